"""A validated call of the public functions, and how its loss is made from the operators."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import backends, known_checks, ops, source_checks, validation
from opsd_kernels.checks import FLOATS, check_rows
from opsd_kernels.engine import packing, plan
from opsd_kernels.engine.chunk_store import weighted
from opsd_kernels.engine.problem import Problem, Rowwise, Weigher, accumulator_dtype
from opsd_kernels.engine.teachers import needs_whole_rows
from opsd_kernels.objectives import get_objective
from opsd_kernels.options import LossOptions, SourceLike, TokenStats
from opsd_kernels.sources import Source, Teacher


@dataclass(frozen=True)
class Call:
    """A validated call: flat sources, what is said per token, and the operators' options."""

    student: Source
    teacher: Teacher
    lead: torch.Size
    rowwise: Rowwise
    options: LossOptions
    packed: packing.Options

    @classmethod
    def of(cls, student: SourceLike, teacher: Any, weight: Tensor | None, options: LossOptions) -> "Call":
        """Checks everything, that the teacher is a `TeacherLike` too, then flattens the token dimensions."""
        source_checks.check_weight_is_used([student, teacher], weight)
        s = source_checks.as_source("student", student, weight)
        t = source_checks.as_teacher("teacher", teacher, weight)
        source_checks.check_pair(s, t)
        vocab = source_checks.common_vocab(s, t, options.vocab_size)
        known_checks.check_temperature("teacher", t, options.temperature)
        objective = get_objective(options.objective)
        known_checks.check_topk_support(t, objective.support)
        given = known_checks.given_entries(t, objective.support, options.support_ids)
        options = replace(options, support_ids=given)
        validation.check_options(options, objective, s, t, vocab)
        known_checks.check_topks(t, options.mask, options.rows)
        device = s.tensors[0].device
        backend = backends.choose(options.backend, device)
        if backend == backends.REFERENCE:
            validation.check_reference(options)
        validation.check_ratio(objective, backend)
        packed = packing.Options(
            objective=objective,
            temperature=options.temperature,
            workspace_bytes=None if options.workspace_bytes is None else int(options.workspace_bytes),
            backend=backend,
            grad_filter=options.grad_filter,
            operand=_autocast_dtype(device),
        )
        weights = options.token_weight
        rowwise = Rowwise(
            mask=_flat(options.mask),
            rows=None if options.rows is None else options.rows.long(),
            token_weight=_flat(weights) if isinstance(weights, Tensor) else None,
            token_ids=None if options.token_ids is None else options.token_ids.reshape(-1).long(),
            support_ids=None if options.support_ids is None else _entries(options.support_ids),
        )
        return cls(s.flat(vocab), t.flat(vocab), s.lead, rowwise, options, packed)

    def evaluate(self, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        """The reduced loss, and `[N, fields]` statistics if they are asked for."""
        if self.packed.backend == backends.REFERENCE:
            return self._reference(with_stats)
        weights = self.options.token_weight
        if self.options.reduction == "none" or self._budget_is_tight():
            tokens, columns = self._token_loss(with_stats or callable(weights))
            return self._reduced(self._weighted(tokens, columns)), columns if with_stats else None
        if callable(weights) and (torch.compiler.is_compiling() or self._is_half()):
            return self._statistics_first().evaluate(with_stats)
        total, columns = self._weighted_sum(with_stats)
        return self._over_count(total), columns

    def _is_half(self) -> bool:
        """Whether gradients may be rounded to fp16 on the way, where small weights need `safe_unit`."""
        halves = [x.dtype == torch.float16 for x in self.student.tensors]
        return any(halves) or self.packed.operand == "float16"

    def _statistics_first(self) -> "Call":
        """The call with its weights as a tensor.

        A compiled graph cannot call a function of Python's, and fp16 operands need all weights beforehand.
        """
        with torch.no_grad():
            ones = torch.ones(self.lead.numel(), device=self.student.tensors[0].device)
            weights = self._weighted(ones, self.token_stats())
        options = replace(self.options, token_weight=weights.reshape(self.lead))
        return replace(self, options=options, rowwise=replace(self.rowwise, token_weight=weights))

    def token_stats(self) -> Tensor:
        """`[N, fields]` statistics."""
        if self.packed.backend == backends.REFERENCE:
            return self._reference_stats(self._problem())
        found: Tensor = torch.ops.opsd_kernels.token_stats(*self.inputs(self.packed))
        return found

    def stats(self, columns: Tensor | None) -> TokenStats:
        """The statistics by field, in the shape of the token dimensions."""
        assert columns is not None
        fields = [column.reshape(self.lead) for column in columns.unbind(1)]
        return TokenStats(*fields)

    def inputs(self, packed: packing.Options) -> tuple[Any, ...]:
        """The arguments that all operators share. The teacher is constant, also where it is a parameter."""
        rowwise = self.rowwise
        return (
            self.student.tensors,
            [x.detach() for x in self.teacher.tensors],
            rowwise.mask, rowwise.rows, rowwise.token_weight, rowwise.token_ids, rowwise.support_ids,
            packing.pack(self.student, self.teacher, packed),
        )  # fmt: skip

    def _weighted_sum(self, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        weights = self.options.token_weight
        weigher = None if weights is None or isinstance(weights, Tensor) else _weigher(weights)
        wanted = [x.requires_grad and torch.is_grad_enabled() for x in self.student.tensors]
        with ops.registered(weigher) as handle:
            packed = self.packed if handle is None else replace(self.packed, weigher=handle)
            total, columns, _ = torch.ops.opsd_kernels.weighted_sum(
                *self.inputs(packed), self.main_grad(), wanted, with_stats
            )
        return total, columns if with_stats else None

    def _token_loss(self, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        """`[N]` token losses, not yet weighted."""
        tokens, _, columns = torch.ops.opsd_kernels.token_loss(
            *self.inputs(self.packed), self.main_grad(), with_stats
        )
        return tokens, columns if with_stats else None

    def main_grad(self) -> Tensor | None:
        """The part of it that belongs to the columns in use."""
        main_grad = self.options.main_grad
        return None if main_grad is None else main_grad[: self.student.vocab]

    def _weighted(self, tokens: Tensor, columns: Tensor | None) -> Tensor:
        """`[N]` token losses times their weights."""
        weights = self.options.token_weight
        if weights is None:
            return tokens
        if not isinstance(weights, Tensor):
            assert columns is not None
            weights = checked_weights(weights, TokenStats(*columns.unbind(1)), self._live(tokens))
        # Whatever a dead row's weight is, NaN too, it does not count.
        weights = torch.where(self._live(tokens), weights.reshape(-1).to(tokens.dtype), 0.0)
        return weighted(tokens, weights)

    def _live(self, tokens: Tensor) -> Tensor:
        """`[N]` bool: the rows that count."""
        if self.rowwise.mask is not None:
            return self.rowwise.mask
        live = torch.ones_like(tokens, dtype=torch.bool)
        rows = self.rowwise.rows
        return live if rows is None else torch.zeros_like(live).index_fill(0, rows, True)

    def _reduced(self, tokens: Tensor) -> Tensor:
        if self.options.reduction == "none":
            return tokens.reshape(self.lead)
        return self._over_count(tokens.sum())

    def _over_count(self, total: Tensor) -> Tensor:
        """The sum itself, or the mean.

        A mean divides afterwards, so that its 1 / N reaches the fp32 gradients in the backward: in the fp16
        operands of the GEMMs it would underflow.
        """
        if self.options.reduction == "sum":
            return total
        denominator = self.options.denominator
        assert not isinstance(denominator, Mapping)
        if isinstance(denominator, Tensor):
            # A CPU scalar divides on any device, without a copy that would wait.
            device = denominator.device if denominator.device.type == "cpu" else total.device
            return total / denominator.reshape(()).to(device, total.dtype)
        if denominator is not None:
            return total / denominator
        if self.rowwise.mask is not None:
            return total / self.rowwise.mask.sum().clamp(min=1)
        rows = self.rowwise.rows
        return total / max(self.lead.numel() if rows is None else rows.numel(), 1)

    def _budget_is_tight(self) -> bool:
        """Whether the budget is too small for design A, and slabs of columns can be taken instead."""
        head = self.student.tensors[1:2]
        objective = self.packed.objective
        whole = objective.support is not None or objective.ratio_bound is not None
        if whole or self.packed.backend in backends.WITHOUT_SLABS:
            return False
        if needs_whole_rows(self.teacher) or self.options.grad_filter is not None:
            return False
        if not (head and head[0].requires_grad):
            return False
        row_bytes = self.student.vocab * accumulator_dtype(self.student, self.teacher).itemsize
        rows = self.lead.numel() if self.rowwise.rows is None else self.rowwise.rows.numel()
        device = self.student.tensors[0].device.type
        return plan.budget_is_tight(self.packed.workspace_bytes, rows, row_bytes, device)

    def _problem(self) -> Problem:
        return Problem.of(self.student, self.teacher, self.packed, self.rowwise)

    def _reference(self, with_stats: bool) -> tuple[Tensor, Tensor | None]:
        """The definition, with autograd's own gradient."""
        problem, weights = self._problem(), self.options.token_weight
        columns = self._reference_stats(problem) if with_stats or callable(weights) else None
        tokens = problem.scatter(self._module.token_loss(problem))
        return self._reduced(self._weighted(tokens, columns)), columns if with_stats else None

    def _reference_stats(self, problem: Problem) -> Tensor:
        with torch.no_grad():
            return ops.spread(problem, self._module.token_stats(problem))

    @property
    def _module(self) -> Any:
        return backends.load(backends.REFERENCE, self.student.tensors[0].device, torch.float64)


def _weigher(function: Callable[[TokenStats], Tensor]) -> Weigher:
    def weigh(stats: dict[str, Tensor], _rows: Tensor) -> Tensor:
        return checked_weights(function, TokenStats(**{k: v.float() for k, v in stats.items()}))

    return weigh


def checked_weights(
    function: Callable[[TokenStats], Tensor], stats: TokenStats, live: Tensor | None = None
) -> Tensor:
    """What the caller's function makes of the statistics of some tokens; those of dead ones are any numbers.

    Raises:
        ValueError: it is no constant tensor of floats, one for each token and finite (looked at on a CPU).
    """
    with torch.no_grad():
        weights = function(stats)
    expected = stats.forward_kl.shape
    if not isinstance(weights, Tensor) or weights.shape != expected:
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"token_weight: expected the function to return a tensor of shape {tuple(expected)}; got {shape}"
        )
    check_rows("token_weight", weights, expected, stats.forward_kl.device, FLOATS)
    validation.check_weights("token_weight", weights, stats, live)
    return weights


def _autocast_dtype(device: torch.device) -> str | None:
    """Name of the dtype to which operands are rounded under autocast."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def _entries(ids: Tensor) -> Tensor:
    return ids.reshape(-1, ids.shape[-1]).long()
