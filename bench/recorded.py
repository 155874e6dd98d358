"""Reads the file that `python -m bench.record` writes; needs torch and safetensors, nothing else.

| tensor | dtype, shape | |
|---|---|---|
| `student`, `teacher` | bf16 `[N, H]` | final hidden states, each one position before its token |
| `token_ids` | int32 `[N]` | the sampled tokens |
| `head_values` | int8 `[V, H]` | the head as the model's file stores it: |
| `head_scales` | fp16 `[V, H / block]` | weight = value * scale of its block of columns |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FORMAT = "opsd-recording-1"
HINT = "run `python -m bench.record --out FILE`, which needs the dev extra and no network"
DTYPES = {
    "student": torch.bfloat16,
    "teacher": torch.bfloat16,
    "token_ids": torch.int32,
    "head_values": torch.int8,
    "head_scales": torch.float16,
}


@dataclass(frozen=True)
class Recording:
    """Hidden states of one model as student and as teacher, at N tokens of its own rollouts.

    Args:
        student: `[N, H]` bf16.
        teacher: `[N, H]` bf16.
        head: `[V, H]` bf16, shared by both.
        token_ids: `[N]` int64, the tokens that the student sampled.
        about: which model, versions, seed and command made it.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    head: torch.Tensor
    token_ids: torch.Tensor
    about: Mapping[str, str]


def load(path: str | Path) -> Recording:
    """Read a recording; ValueError says what is wrong with the file and how to make it."""
    if not Path(path).is_file():
        raise ValueError(f"path: expected a recording at {path}, got no file; {HINT}")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: expected a safetensors file, got {path}: {error}; {HINT}") from error
    _check(tensors, about, path)
    return Recording(
        student=tensors["student"],
        teacher=tensors["teacher"],
        head=dequantise(tensors["head_values"], tensors["head_scales"]).bfloat16(),
        token_ids=tensors["token_ids"].long(),
        about={key: value for key, value in about.items() if key != "format"},
    )


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights `[V, H]` in fp32, exact: a product of 8 and 11 significant bits has at most 19."""
    blocks = values.float().unflatten(1, (scales.shape[1], -1))
    return (blocks * scales.float().unsqueeze(-1)).flatten(1)


def _check(tensors: Mapping[str, torch.Tensor], about: Mapping[str, str], path: str | Path) -> None:
    if about.get("format") != FORMAT:
        got = about.get("format", "no such entry")
        raise ValueError(f"path: expected `format` {FORMAT} in the metadata of {path}, got {got}; {HINT}")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if dtypes != DTYPES:
        raise ValueError(f"path: expected tensors {DTYPES} in {path}, got {dtypes}; {HINT}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ranks = {name: len(shape) for name, shape in shapes.items()}
    fits = ranks == {name: 1 if name == "token_ids" else 2 for name in DTYPES} and (
        shapes["student"] == shapes["teacher"] == (*shapes["token_ids"], shapes["head_values"][1])
        and shapes["head_scales"][0] == shapes["head_values"][0]
        and shapes["head_scales"][1] > 0
        and shapes["head_values"][1] % shapes["head_scales"][1] == 0
    )
    if not fits:
        raise ValueError(f"path: expected shapes of one N, V and H in {path}, got {shapes}; {HINT}")
