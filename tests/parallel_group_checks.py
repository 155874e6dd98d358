"""How a group of ranks works together: collectives, memory, mistakes, DTensors."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels import Estimator, Hidden, Mixture, Objective, Recipe, Support, Term, loss, parallel
from opsd_kernels.testing import hidden_case, hidden_sources
from parallel_ranks import Ranks, check, leaves

ROWS, VOCAB = 64, 400


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return found


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    counts = {"all_gather": 0, "all_reduce": 0}

    def counting(name: str) -> Any:
        real = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    with counting("all_gather"), counting("all_reduce"):
        yield counts


def _slices(ranks: Ranks, dtype: torch.dtype = torch.float32) -> tuple[Hidden, Hidden]:
    student, teacher = hidden_sources(hidden_case(ROWS, VOCAB, 5).to(dtype))
    its = ranks.sliced(teacher)
    return leaves(ranks.sliced(student)), its.with_tensors([x.clone() for x in its.tensors])


@check
def collectives(ranks: Ranks) -> None:
    """One gather a call, two a chunk (four with statistics), one all-reduce a backward; nothing else."""
    student, teacher = _slices(ranks)
    cuts = ranks.cuts(VOCAB)
    widest = max(b - a for a, b in itertools.pairwise(cuts))
    for rows in (ROWS, 16):
        chunks = ROWS // rows
        options: dict[str, Any] = {"group": ranks.group, "workspace_bytes": 2 * rows * widest * 4}
        for reduction in ("mean", "none"):
            with _counted() as counts:
                value = parallel.loss(student, teacher, reduction=reduction, **options)
            assert counts == {"all_gather": 1 + 2 * chunks, "all_reduce": 0}
            with _counted() as counts:
                value.sum().backward()
            assert counts == {"all_gather": 0, "all_reduce": 1}
            with _counted() as counts:
                parallel.loss_and_stats(student, teacher, reduction=reduction, **options)
            assert counts == {"all_gather": 1 + 4 * chunks, "all_reduce": 0}
        with _counted() as counts:
            parallel.token_stats(student, teacher, **options)
        assert counts == {"all_gather": 1 + 2 * chunks, "all_reduce": 0}
        with _counted() as counts:
            parallel.token_logprobs(student, torch.arange(ROWS), **options).sum().backward()
        assert counts == {"all_gather": 1 + 2 * chunks, "all_reduce": 1}


@check
def memory(ranks: Ranks) -> None:
    """No tensor of all tokens and the columns of a rank, nor of a head in another dtype, is ever held."""
    student, teacher = _slices(ranks)
    widest = max(b - a for a, b in itertools.pairwise(ranks.cuts(VOCAB)))
    options: dict[str, Any] = {"group": ranks.group, "workspace_bytes": 2 * 4 * widest * 4}
    with _Largest() as largest:
        for reduction in ("mean", "none"):
            parallel.loss_and_stats(student, teacher, reduction=reduction, **options)
            parallel.loss(student, teacher, reduction=reduction, **options).sum().backward()
        parallel.token_stats(student, teacher, **options)
        parallel.token_logprobs(student, torch.arange(ROWS), **options).sum().backward()
    # Two buffers of 4 rows each, with rows that start at multiples of 16 numbers.
    assert largest.elements <= 2 * 4 * (widest + 16) < ROWS * VOCAB // ranks.world // 2


@check
def a_frozen_head_and_main_grad(ranks: Ranks) -> None:
    case = hidden_case(12, 77, 6).to(torch.bfloat16)
    student, teacher = hidden_sources(case)
    hidden = student.hidden.clone().requires_grad_()
    frozen = ranks.sliced(replace(student, hidden=hidden))
    parallel.loss(frozen, ranks.sliced(teacher), group=ranks.group).backward()
    trained = leaves(student)
    parallel.loss(ranks.sliced(trained), ranks.sliced(teacher), group=ranks.group).backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None
    torch.testing.assert_close(hidden.grad, trained.hidden.grad, rtol=0, atol=0)
    for reduction in ("mean", "none"):
        mine = leaves(ranks.sliced(student))
        main = torch.ones(mine.weight.shape)
        value = parallel.loss(
            mine, ranks.sliced(teacher), group=ranks.group, main_grad=main, reduction=reduction
        )
        value.mean().backward()
        assert mine.weight.grad is None
        cuts = ranks.cuts(77)
        expected = trained.weight.grad[cuts[ranks.rank] : cuts[ranks.rank + 1]].float()  # type: ignore[index]
        torch.testing.assert_close(main - 1, expected, rtol=1e-2, atol=1e-5)


@check
def hidden_gradient_left_to_the_layer_below(ranks: Ranks) -> None:
    student, teacher = hidden_sources(hidden_case(12, 77, 6).to(torch.float64))
    found = []
    for reduce_hidden in (True, False):
        mine = leaves(ranks.sliced(student))
        options = {"group": ranks.group, "reduce_hidden": reduce_hidden}
        value = parallel.loss(mine, ranks.sliced(teacher), **options)
        (value + parallel.token_logprobs(mine, torch.arange(12), **options).sum()).backward()
        found.append(mine.hidden.grad)
    whole, part = found
    assert whole is not None
    assert part is not None
    assert not torch.allclose(whole, part)
    torch.testing.assert_close(ranks.gathered(part).sum(0), whole, rtol=1e-12, atol=1e-14)


@check
def differences_between_ranks(ranks: Ranks) -> None:
    student, teacher = _slices(ranks)
    last = ranks.rank == ranks.world - 1
    every = torch.ones(ROWS, dtype=torch.bool)

    def refuses(match: str, changed: dict[str, Any], given: dict[str, Any] | None = None) -> None:
        options = {**(given or {}), **(changed if last else {})}
        ranks.refuses(match, lambda: parallel.loss(student, teacher, group=ranks.group, **options))

    refuses("temperature: expected the same", {"temperature": 2.0})
    refuses("objective: expected the same", {"objective": "jsd"})
    refuses("reduction: expected the same", {"reduction": "sum"})
    refuses("denominator: expected the same", {"denominator": 5})
    refuses("vocab_size: expected the same", {"vocab_size": 300})
    refuses("mask: expected the same", {"mask": every & (torch.arange(ROWS) != 9)}, {"mask": every})
    refuses("mask: expected the same", {"mask": every})
    refuses("workspace_bytes: expected the same", {"workspace_bytes": 1000})
    refuses("token_weight: expected the same", {"token_weight": torch.ones(ROWS)})
    refuses("temperature: expected a finite number", {"temperature": -1.0})
    refuses("expected options among", {"objektive": "jsd"})
    refuses("mask: expected shape", {"mask": torch.ones(3, dtype=torch.bool)})
    group = ranks.group
    other = replace(student, hidden=student.hidden + ranks.rank)
    ranks.refuses("student.hidden: expected the same", lambda: parallel.loss(other, teacher, group=group))
    fewer = Hidden(student.hidden[: ROWS - ranks.rank], student.weight)
    its = Hidden(teacher.hidden[: ROWS - ranks.rank], teacher.weight)
    ranks.refuses("token dimensions: expected the same", lambda: parallel.loss(fewer, its, group=group))
    wide = replace(teacher, weight=teacher.weight[: -1 if last else None])
    ranks.refuses("teacher: expected the student's", lambda: parallel.loss(student, wide, group=group))
    frozen = replace(student, hidden=student.hidden.detach()) if last else student
    ranks.refuses("requires_grad: expected the same", lambda: parallel.loss(frozen, teacher, group=group))
    ids = torch.arange(ROWS) + int(last)
    ranks.refuses("token_ids: expected the same", lambda: parallel.token_logprobs(student, ids, group=group))
    # All are in step afterwards.
    parallel.loss(student, teacher, group=ranks.group).backward()


@check
def a_failure_of_one_rank_is_heard_of(ranks: Ranks) -> None:
    """Also one that is no ValueError: the others would wait for ever."""
    student, teacher = _slices(ranks)
    wrong = "nothing" if ranks.rank == 0 else student
    ranks.refuses("student: expected a tensor", lambda: parallel.loss(wrong, teacher, group=ranks.group))


@check
def what_is_not_supported(ranks: Ranks) -> None:
    student, teacher = _slices(ranks)

    def refuses(match: str, its: Any = teacher, **options: Any) -> None:
        ranks.refuses(match, lambda: parallel.loss(student, its, group=ranks.group, **options))

    refuses("objective.support", objective=Objective("jsd", support=Support(4)))
    refuses("methods of several terms", objective=Recipe((Term(Estimator("nll"), teacher=None),)))
    refuses("methods of several terms", objective="gkd")
    refuses("reduction: expected", reduction="sequence_mean")
    refuses("backend: expected", backend="triton")
    refuses("grad_filter: expected None", grad_filter=1e-3)
    refuses("data: expected None", data={"reward": torch.ones(2)})
    refuses("needs whole rows", Mixture([(1.0, teacher)]))
    refuses(f"vocab_size: expected an int in [1, {VOCAB}]", vocab_size=VOCAB + 1)
    ids = torch.full((ROWS,), VOCAB)
    ranks.refuses(
        "token_ids: expected ids in", lambda: parallel.token_logprobs(student, ids, group=ranks.group)
    )


@check
def a_group_of_some_ranks(ranks: Ranks) -> None:
    """The vocabulary is held by two ranks; a third one is refused at once."""
    group = dist.new_group([0, ranks.world - 1])
    student, teacher = hidden_sources(hidden_case(6, 30, 5).to(torch.float32))
    if ranks.rank not in (0, ranks.world - 1):
        ranks.refuses("group: expected", lambda: parallel.loss(student, teacher, group=group))
        return
    mine = slice(0, 11) if ranks.rank == 0 else slice(11, 30)
    s, t = (replace(x, weight=x.weight[mine]) for x in (student, teacher))
    value = parallel.loss(s, t, group=group, objective="jsd")
    torch.testing.assert_close(value, loss(student, teacher, objective="jsd"), rtol=1e-6, atol=0)


@check
def dtensors(ranks: Ranks) -> None:
    """Heads that are `Shard(0)`, of sizes that leave the last rank fewer rows or none."""
    mesh = init_device_mesh("cpu", (ranks.world,))
    for vocab in (31, ranks.world + 1):
        student, teacher = hidden_sources(hidden_case(7, vocab, 5, bias=True).to(torch.float32))
        whole = leaves(student)
        loss(whole, teacher).backward()

        def shared(source: Hidden) -> Hidden:
            weight, bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in source.tensors[1:])
            return Hidden(distribute_tensor(source.hidden, mesh, [Replicate()]), weight, bias)

        sharded = leaves(shared(student))
        mine, group = parallel.from_dtensor(sharded)
        theirs, _ = parallel.from_dtensor(shared(teacher))
        parallel.loss(mine, theirs, group=group).backward()
        for x, y in zip(sharded.tensors, whole.tensors, strict=True):
            assert isinstance(x.grad, DTensor)
            torch.testing.assert_close(x.grad.full_tensor(), y.grad, rtol=1e-5, atol=1e-7)
    replicated = Hidden(student.hidden, distribute_tensor(student.weight, mesh, [Replicate()]))
    ranks.refuses("weight: expected S(0)", lambda: parallel.from_dtensor(replicated))
    ranks.refuses("weight: expected a DTensor", lambda: parallel.from_dtensor(student))
