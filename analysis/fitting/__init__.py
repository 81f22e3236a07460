"""Fitting: the laws, the minimiser, and how well the parameters are known."""
