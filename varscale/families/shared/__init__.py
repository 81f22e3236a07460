"""What several families are built of; it is no family itself. VAR, raster and masked are one transformer."""
