"""Searches for hyperparameters: what a trial trains, Optuna's part, and what is written about them."""
