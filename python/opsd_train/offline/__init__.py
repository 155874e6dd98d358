"""Rollouts and what the teacher said of them, on disk."""
