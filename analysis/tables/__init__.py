"""Tables of runs: read from files, given roles and units, filtered and checked."""
