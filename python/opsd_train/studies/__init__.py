"""Comparisons of runs, and measurements without training."""
