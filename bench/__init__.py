"""Speed, memory and gradient error of the loss, side by side: `python -m bench`."""
