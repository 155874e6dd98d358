"""The backends by name, and the rule that picks one.

A backend other than `reference` is a module with functions over the logits of a chunk of rows: `row_loss`,
`row_gradient_`, `slab_gradient_` and `row_stats`; for supports `normalisers` and `softmax_gradient_`; for the
column filter `live_columns` (see `backends/torch` for their contracts). Beside them `LogitsStore`, which
holds a chunk's logits, and `unsupported(device, dtype)`, which says where it cannot run. A new one is a
folder here and a line in `BACKENDS`.
"""

import importlib
from types import ModuleType

import torch

REFERENCE = "reference"
BACKENDS = {
    REFERENCE: "opsd_kernels.backends.reference",
    "torch": "opsd_kernels.backends.torch",
    "triton": "opsd_kernels.backends.triton",
    "triton_paired": "opsd_kernels.backends.triton.paired_store",
}
# Those that cannot take some columns of rows on their own, as a loss per token needs it.
WITHOUT_SLABS = ("triton_paired",)


def choose(backend: str, device: torch.device) -> str:
    """Name of the backend that runs: the one asked for, or for `"auto"` the fastest for the device.

    `"auto"` is a function of its arguments alone: no environment variable, no probing. Today it is `"torch"`
    on every device; the Triton backends have to be asked for until they have been measured on a GPU.

    Raises:
        ValueError: a backend that does not exist. There is no silent fallback.
    """
    if backend == "auto":
        return "torch"
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"backend: expected one of {known}; got {backend!r} (on {device.type})")
    return backend


def load(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend's module, imported when first used.

    Raises:
        ValueError: the backend's package is not installed, or it cannot run on the device or in the dtype.
    """
    try:
        module = importlib.import_module(BACKENDS[name])
    except ModuleNotFoundError as error:
        raise ValueError(
            f"backend: {name!r} needs the package {error.name!r}, which is not installed"
        ) from error
    reason = None if name == REFERENCE else module.unsupported(device, dtype)
    if reason is not None:
        raise ValueError(f"backend: expected 'torch' or 'reference' {reason}; got {name!r}")
    return module
