"""Checks: runs held out, forecasts of the largest budget, groups compared, and warnings."""
