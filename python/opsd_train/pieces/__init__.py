"""Pieces of a run beside its loss, each of which may be had or not."""
