"""What a run keeps when something fails: checkpoints, skipped steps, signals."""
