"""The `varscale` command: a function a verb; each imports what it needs when it runs, so --help is quick."""

from varscale.cli.app import main

__all__ = ["main"]
