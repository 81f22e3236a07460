"""Grids of sizes and budgets: the frontier, IsoFLOP minima, and the best size for a budget."""
