"""A right call of the engine to be made wrong, and what every error has to say: for tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


class FakeDTensor(torch.Tensor):
    """What the engine can see of a `torch.distributed.tensor.DTensor` without a process group."""

    device_mesh = "mesh"


H_S, H_T = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
W, Z, BIAS = torch.randn(11, 8), torch.randn(2, 3, 11), torch.randn(11)
META = {"device": "meta"}
SHARDED = H_S.as_subclass(FakeDTensor)
MASK = torch.ones(2, 3, dtype=torch.bool)
IDS = torch.zeros(2, 3, dtype=torch.int64)


def call_of(student: Any = H_S, teacher: Any = H_T, weight: Any = W, **options: Any) -> dict[str, Any]:
    """The arguments of a call."""
    return {"student": student, "teacher": teacher, "weight": weight, **options}


def raises(call: Callable[[], Any], parts: tuple[str, ...]) -> None:
    """A ValueError that names the argument `parts[0]`, says what was expected, and holds the other parts."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the parts are the match)
        call()
    message = str(error.value)
    argument, _, rest = message.partition(": ")
    assert parts[0] in argument, message
    for part in parts[1:]:
        assert part in rest, message
    assert "expected" in rest, message
