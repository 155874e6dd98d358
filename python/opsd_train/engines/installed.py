"""The `vllm` package, if it is one that the driver can use."""

import importlib
from types import ModuleType

from packaging.version import Version

OLDEST = "0.32"  # the oldest that the tests have run
USED = {
    "LLM": ("collective_rpc", "reset_prefix_cache", "sleep", "wake_up"),
    "LLMEngine": ("add_request", "step", "has_unfinished_requests"),
    "SamplingParams": (),
}


def installed() -> ModuleType:
    """The `vllm` package, with everything that is used of it.

    Raises:
        ValueError: it is not there, cannot be imported, is too old, or has changed.
    """
    wanted = f"expected the package vllm {OLDEST} or newer for 'vllm'"
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(f"rollouts: {wanted}; importing it says: {error}") from error
    found = str(getattr(vllm, "__version__", "0"))
    if Version(found) < Version(OLDEST):
        raise ValueError(f"rollouts: {wanted}, got {found}")
    for name, methods in USED.items():
        missing = [method for method in methods if not hasattr(getattr(vllm, name, None), method)]
        if not hasattr(vllm, name) or missing:
            raise ValueError(
                f"rollouts: expected vllm with {name} and its {', '.join(methods)}; vllm {found} has no "
                f"{', '.join(missing) or name}; use an older one"
            )
    return vllm
