"""`python -m varscale.cli`."""

from varscale.cli import main

main()
