"""The command `opsd`."""
