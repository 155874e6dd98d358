"""The backends by name, and the rule that picks one.

A backend other than `reference` is a module with four functions over the logits of a chunk of rows:
`row_loss`, `row_gradient_`, `slab_gradient_` and `row_stats` (see `backends/torch` for their contracts).
A new one is a folder here and a line in `BACKENDS`.
"""

import importlib
from types import ModuleType

import torch

REFERENCE = "reference"
BACKENDS = {
    REFERENCE: "opsd_kernels.backends.reference",
    "torch": "opsd_kernels.backends.torch",
}


def choose(backend: str, device: torch.device) -> str:
    """Name of the backend that runs: the one asked for, or for `"auto"` the fastest for the device.

    `"auto"` is a function of its arguments alone: no environment variable, no probing. Today it is `"torch"`
    on every device.

    Raises:
        ValueError: a backend that does not exist. There is no silent fallback.
    """
    if backend == "auto":
        return "torch"
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"backend: expected one of {known}; got {backend!r} (on {device.type})")
    return backend


def load(name: str) -> ModuleType:
    """The backend's module, imported when first used."""
    return importlib.import_module(BACKENDS[name])
