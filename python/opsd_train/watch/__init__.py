"""What is seen and kept of a run while it goes on: metrics, completions, the run folder."""
