"""Checks what a caller says of the rollouts, and brings it into shape."""

from collections.abc import Mapping

import torch
from torch import Tensor

from opsd_kernels.checks import check_plain
from opsd_kernels.known_checks import check_are_log_probs
from opsd_kernels.tokens import DATA

TRUTHS = ("correct", "privileged", "selected")  # a reward of 0.3 among them would count as True


def check_data(
    data: Mapping[str, Tensor] | None, lead: torch.Size, device: torch.device
) -> dict[str, Tensor]:
    """The columns as `Batch` has them: `[B, C]`, `[B]` or `[B, C, M]` by their kind in `DATA`.

    Raises:
        ValueError: a name that is not in `DATA`, another shape or device, a column with a gradient, numbers
            for truth values.
    """
    batch, count = by_sequence(lead)
    found: dict[str, Tensor] = {}
    for name, column in (data or {}).items():
        if name not in DATA:
            raise ValueError(f"data: expected names among {', '.join(DATA)}; got {name!r}")
        if not isinstance(column, Tensor):
            raise ValueError(f"data[{name!r}]: expected a tensor; got {type(column).__name__}")
        check_plain(f"data[{name!r}]", column)
        if column.requires_grad:
            raise ValueError(f"data[{name!r}]: expected a constant; got requires_grad=True (detach it)")
        if column.device != device:
            raise ValueError(f"data[{name!r}]: expected it on {device}; got {column.device}")
        if name in TRUTHS and column.dtype != torch.bool:
            raise ValueError(f"data[{name!r}]: expected dtype bool; got {column.dtype}")
        shape, kind = column.shape, DATA[name][0]
        per_sequence = shape == lead[:-1]
        if kind == "sequence" and per_sequence:
            found[name] = column.reshape(batch)
        elif kind == "token" and (shape == lead or (per_sequence and len(lead) > 1)):
            spread = column if shape == lead else column[..., None].expand(lead)
            found[name] = spread.reshape(batch, count)
        elif kind == "teachers" and shape[:-1] in (lead, lead[:-1]):
            spread = column if shape[:-1] == lead else column[..., None, :].expand(*lead, shape[-1])
            found[name] = spread.reshape(batch, count, shape[-1])
        else:
            raise ValueError(f"data[{name!r}]: expected shape {_expected(kind, lead)}; got {tuple(shape)}")
    return found


def check_log_probs(data: Mapping[str, Tensor], mask: Tensor | None, rows: Tensor | None) -> None:
    """`known_checks.check_are_log_probs` of the columns of log-probs, as `check_data` returns them."""
    for name, column in data.items():
        if name.endswith(("logprob", "logprobs")):
            highest = column.amax(-1) if DATA[name][0] == "teachers" else column
            check_are_log_probs(f"data[{name!r}]", highest, mask, rows)


def by_sequence(lead: torch.Size) -> tuple[int, int]:
    """B and C of token dimensions: the last one is within a sequence, and without any there is one token."""
    return lead[:-1].numel(), lead[-1] if lead else 1


def by_token(data: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The columns flattened to tokens, `[N]` or `[N, M]`; `count` tokens a sequence."""
    flat = {}
    for name, column in data.items():
        spread = column[:, None].expand(-1, count) if column.dim() == 1 else column
        flat[name] = spread.flatten(0, 1)
    return flat


def _expected(kind: str, lead: torch.Size) -> str:
    tokens, sequences = tuple(lead), tuple(lead[:-1])
    if kind == "sequence":
        return f"{sequences}"
    last = ", M" if kind == "teachers" else ""
    return f"({', '.join(map(str, tokens))}{last}) or ({', '.join(map(str, sequences))}{last})"
