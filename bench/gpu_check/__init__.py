"""The checks for a borrowed GPU, in one command: `python -m bench.gpu_check --out DIR`."""
