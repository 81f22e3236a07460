"""The laws: `base` says what a law gives, `registry` lists them, each other file is a form of law."""
