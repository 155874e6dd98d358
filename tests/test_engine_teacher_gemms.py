"""What combined teachers cost: the matrix products PyTorch runs, and how many rows each has."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from opsd_kernels import Hidden, LogLinear, Mixture, Objective, Routed, Support, loss, loss_and_stats
from opsd_kernels.testing import hidden_case, logits_case, upstream_of, with_gradient
from recorder import Recorder

N, V, H, CHUNK = 31, 53, 7, 8  # distinct primes: a dimension tells what it is; 31 rows are 4 chunks of 8
ONE_CHUNK, FOUR_CHUNKS = 10**9, 2 * CHUNK * V * 4
STUDENT = hidden_case(N, V, H, bias=True).to(torch.float32).student
ME = STUDENT.with_tensors([x.detach() for x in STUDENT.tensors])


def _shared(k: int) -> Hidden:
    noise = torch.randn(N, H, generator=torch.Generator().manual_seed(k))
    return replace(ME, hidden=ME.hidden + 0.3 * noise)


def _own(k: int) -> Hidden:
    return hidden_case(N, V, H + k, seed=k, bias=True).to(torch.float32).student


def _gemms(teacher: Any, frozen: bool = False, **options: Any) -> list[tuple[tuple[int, ...], ...]]:
    """Operand shapes of all products of a forward and a backward."""
    student, leaves = with_gradient(STUDENT)
    if frozen:
        student = replace(student, weight=STUDENT.weight, bias=STUDENT.bias)
    options = {"objective": "forward_kl", "workspace_bytes": ONE_CHUNK, **options}
    with Recorder() as recorder:
        value = loss(student, teacher, **options)
        value.backward(upstream_of(value))
    assert leaves["hidden"].grad is not None
    return recorder.gemms


@pytest.mark.parametrize("count", [1, 2, 5])
def test_streams_through_one_head_are_one_product(count: int) -> None:
    """4 products a chunk with a trainable head, 3 with a frozen one, as with a single teacher."""
    per_token = torch.linspace(-1, 1, N)
    for first in (_shared(0), ME):
        teacher = LogLinear([(per_token, first)] + [(0.4, _shared(k)) for k in range(1, count)])
        assert len(_gemms(teacher)) == 4
        assert len(_gemms(teacher, workspace_bytes=FOUR_CHUNKS)) == 4 * 4
        assert len(_gemms(teacher, frozen=True)) == 3
        assert len(_gemms(teacher, reduction="none")) == 2 + 4
        assert len(_gemms(teacher, objective=Objective("jsd", support=Support(3, "union")))) == 4
        assert all(set(gemm[0]) | set(gemm[1]) == {N, V, H} for gemm in _gemms(teacher))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_streams_with_their_own_heads_are_a_product_each(count: int) -> None:
    streams: list[Any] = [(0.3, _own(k)) for k in range(1, count + 1)]
    assert len(_gemms(LogLinear(streams))) == 3 + count
    assert len(_gemms(LogLinear(streams), workspace_bytes=FOUR_CHUNKS)) == 4 * (3 + count)
    assert len(_gemms(LogLinear(streams), reduction="none")) == 1 + count + 3 + count
    by_logits = LogLinear([(0.3, _shared(k)) for k in range(count)], mix="logits")
    assert len(_gemms(by_logits)) == 3 + count
    capped = LogLinear([(0.3, replace(_shared(k), softcap=9.0)) for k in range(count)])
    assert len(_gemms(capped)) == 3 + count


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_student_as_a_stream_is_no_product(count: int) -> None:
    """Recognised by its memory: through the same tensors, detached or viewed, not through copies."""
    beside: list[Any] = [(0.3, _own(k)) for k in range(1, count + 1)]
    views = replace(ME, hidden=ME.hidden[:], weight=ME.weight.detach())
    for mine in (ME, views):
        for streams in ([(0.5, mine), *beside], [*beside, (0.5, mine)], [(0.5, mine), (0.1, mine), *beside]):
            assert len(_gemms(LogLinear(streams, mix="logits"))) == 3 + count
            assert len(_gemms(LogLinear(streams, mix="logits"), reduction="none")) == 1 + count + 3 + count
    copied = replace(ME, hidden=ME.hidden.clone())
    assert len(_gemms(LogLinear([(0.5, copied), *beside], mix="logits"))) == 3 + count + 1


def test_streams_of_logits_are_no_product() -> None:
    z = logits_case(N, V).to(torch.float32).teacher
    assert len(_gemms(LogLinear([(0.5, z), (0.4, z), (0.2, ME)]))) == 3
    assert len(_gemms(Mixture([(0.5, z), (0.5, z)]))) == 3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_mixture_is_a_product_per_stream(count: int) -> None:
    shared = Mixture([(1 / count, _shared(k)) for k in range(count)])
    assert len(_gemms(shared)) == 3 + count
    assert len(_gemms(shared, workspace_bytes=FOUR_CHUNKS)) == 4 * (3 + count)
    # Each of them a log-linear mixture of three through one head.
    mixed = LogLinear([(0.2, _shared(k)) for k in range(3)])
    assert len(_gemms(Mixture([(1 / count, mixed)] * count))) == 3 + count


@pytest.mark.parametrize("how", ["all", "mask", "rows"])
@pytest.mark.parametrize("workspace", [ONE_CHUNK, FOUR_CHUNKS])
def test_each_row_reaches_one_of_the_routed_teachers(workspace: int, how: str) -> None:
    index = torch.arange(N) * 5 % 7 % 4  # nobody is sent to the last one
    live = torch.ones(N, dtype=torch.bool) if how == "all" else torch.arange(N) % 3 != 0
    options: dict[str, Any] = {"mask": live} if how == "mask" else {}
    if how == "rows":
        options = {"rows": live.nonzero()[:, 0]}
    widths = [H + k for k in range(20, 25)]
    teacher = Routed([_own(k) for k in range(20, 25)], index)
    gemms = _gemms(teacher, workspace_bytes=workspace, **options)
    rows = [sum(left[0] for left, right in gemms if right == (width, V)) for width in widths]
    sizes = torch.bincount(index[live], minlength=5).tolist()
    assert rows == sizes
    assert sum(sizes) == int(live.sum())
    # Through one head: the rows of the student's and of the teacher's products.
    shared = Routed([_shared(1), LogLinear([(0.5, _shared(2)), (0.6, ME)])], index % 2)
    gemms = _gemms(shared, workspace_bytes=workspace, **options)
    assert sum(left[0] for left, right in gemms if right == (H, V)) == 2 * int(live.sum())


def test_statistics_and_loss_share_their_products() -> None:
    student, _ = with_gradient(STUDENT)
    teacher = LogLinear([(0.4, _shared(k)) for k in range(3)])
    with Recorder() as recorder:
        loss_and_stats(student, teacher).loss.backward()
    assert len(recorder.gemms) == 4


def test_a_head_of_two_bytes_is_cast_once_for_all_streams() -> None:
    """Where products need fp32 operands; the copy is the largest buffer there is."""
    student = STUDENT.with_tensors([x.bfloat16() for x in STUDENT.tensors])
    me = student.with_tensors([x.detach() for x in student.tensors])
    streams = [(0.4, replace(me, hidden=me.hidden + k)) for k in range(3)]
    mixture = Mixture([(1 / 3, stream) for _, stream in streams])
    for teacher in (LogLinear(streams), LogLinear(streams, mix="logits"), mixture):
        for combined in (teacher, Routed([me, teacher], torch.arange(N) % 2)):
            with Recorder() as recorder:
                loss(student, combined, workspace_bytes=FOUR_CHUNKS)
            assert recorder.casts.count((V, H)) == 1
