"""Who writes the student's rollouts: transformers' `generate`, vLLM in this process, or a vLLM server."""
