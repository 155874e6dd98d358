"""Nested state as two files: tensors as safetensors, everything else as JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def save_tree(tree: Any, stem: Path) -> None:
    """Write `stem`.json, and `stem`.safetensors if there are tensors; `load_tree` gives the same back.

    Args:
        tree: dictionaries, lists and tuples of tensors, numpy arrays, numbers, strings, booleans and None.
        stem: path without the suffix.

    Raises:
        ValueError: anything else, naming where in the tree it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = _encode(tree, stem.name, tensors)
    _named(stem, "json").write_text(json.dumps(plain, allow_nan=False), encoding="utf-8")
    if tensors:
        save_file(tensors, _named(stem, "safetensors"))


def load_tree(stem: Path) -> Any:
    """Read what `save_tree` wrote, tensors on the CPU; ValueError if it is not there."""
    plain, held = _named(stem, "json"), _named(stem, "safetensors")
    if not plain.is_file():
        raise ValueError(f"resume_from_checkpoint: expected {plain}; got none")
    tensors = load_file(held) if held.is_file() else {}
    return _decode(json.loads(plain.read_text(encoding="utf-8")), tensors)


def _named(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}.{suffix}")


def _encode(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        tensors[where] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": where}
    if isinstance(value, np.ndarray):
        return {"$array": _encode(torch.from_numpy(value), where, tensors)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, tensors)
    if type(value) in (list, tuple, torch.Size):
        items = [_encode(one, f"{where}.{number}", tensors) for number, one in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    raise ValueError(
        f"{where}: expected state that safetensors and JSON can hold; got a {type(value).__name__}"
    )


def _encode_mapping(value: Mapping[Any, Any], where: str, tensors: dict[str, torch.Tensor]) -> Any:
    found = [(key, _encode(one, f"{where}.{key}", tensors)) for key, one in value.items()]
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in found):
        return dict(found)
    return {"$dict": [[_encode(key, f"{where} (key)", tensors), one] for key, one in found]}


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return NOT_FINITE[value["$float"]]
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$array" in value:
        return _decode(value["$array"], tensors).numpy()
    if "$tuple" in value:
        return tuple(_decode(one, tensors) for one in value["$tuple"])
    if "$dict" in value:
        return {_decode(key, tensors): _decode(one, tensors) for key, one in value["$dict"]}
    return {key: _decode(one, tensors) for key, one in value.items()}
