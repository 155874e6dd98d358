"""How a recipe's terms are made of what the engine evaluates: divergences and gathered log-probabilities."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import validation
from opsd_kernels.engine.composite_chunk import Gathered, Values
from opsd_kernels.estimators import estimator
from opsd_kernels.options import TokenStats
from opsd_kernels.recipes import Estimator, Weight
from opsd_kernels.tokens import Batch, Tokens
from opsd_kernels.weights import weight


@dataclass(frozen=True)
class Factor:
    """What a term's loss is multiplied by.

    Args:
        fixed: `[N]` everything that is known beforehand; 0 at tokens that do not count.
        local: further weights, made of the statistics of a chunk of tokens.
    """

    fixed: Tensor
    local: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A term that is an estimator.

    Args:
        spec: the function.
        factor: of the token's loss.
        gather: which of the gathers it sees.
        baseline: which of the divergences it sees, or None.
        log_t: `[N]` log-probs of a teacher that is known at the sampled tokens only, or None.
    """

    spec: Estimator
    factor: Factor
    gather: int
    baseline: int | None = None
    log_t: Tensor | None = None


@dataclass(frozen=True)
class Combination:
    """Implements `engine.composite.Combination`, and the same for all tokens at once.

    Args:
        dense: the factor of each divergence; one of a constant does not matter.
        estimates: the terms that are estimators.
        data: the columns of `DATA` by token, `[N]` or `[N, M]`.
    """

    dense: list[Factor]
    estimates: list[Estimate]
    data: Mapping[str, Tensor]

    @property
    def needs_stats(self) -> bool:
        """Whether any weight is made of a chunk's statistics."""
        return any(factor.local for factor in self._factors)

    @property
    def largest(self) -> Tensor:
        """`[N]` largest of the fixed weights; the local ones of the literature are of order 1."""
        return torch.stack([factor.fixed.abs() for factor in self._factors]).amax(0)

    @property
    def live(self) -> Tensor:
        """`[N]` bool: tokens that any term counts."""
        return torch.stack([factor.fixed != 0 for factor in self._factors]).any(0)

    def weights(self, stats: dict[str, Tensor] | None, rows: Tensor) -> Tensor:
        """`[C, D]` factors of the divergences."""
        batch = self._batch(stats, rows)
        columns = [_factor(factor, batch, rows) for factor in self.dense]
        return torch.stack(columns, 1) if columns else torch.zeros(len(rows), 0, device=rows.device)

    def estimate(
        self, values: Values, stats: dict[str, Tensor] | None, rows: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """`[C]` what the estimators add to each token's loss, and its derivatives `[C, K]` by log s."""
        batch = self._batch(stats, rows)
        with torch.enable_grad():
            leaves = [g.log_s.detach().requires_grad_() for g in values.gathered]
            gathered = [g._replace(log_s=leaf) for g, leaf in zip(values.gathered, leaves, strict=True)]
            losses = self.losses(Values(values.dense, gathered), batch, rows)
            slopes: tuple[Tensor | None, ...] = ()
            if losses.requires_grad:
                slopes = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        found = slopes or [None] * len(leaves)
        known = [torch.zeros_like(x) if e is None else e for x, e in zip(leaves, found, strict=True)]
        return losses.detach(), known

    def losses(self, values: Values, batch: Batch, rows: Tensor) -> Tensor:
        """`[C]` weighted sum of the estimators, differentiable by the gathered log s."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for estimate in self.estimates:
            w = _factor(estimate.factor, batch, rows).double()
            tokens = self._tokens(estimate, values, w != 0, rows)
            total = total + torch.where(
                w == 0, 0.0, w * estimator[estimate.spec.name](tokens, **estimate.spec.options)
            )
        return total

    def _tokens(self, estimate: Estimate, values: Values, live: Tensor, rows: Tensor) -> Tokens:
        """What an estimator sees; of tokens that do not count no derivative is taken."""
        entries: Gathered = values.gathered[estimate.gather]
        log_s = torch.where(live[:, None], entries.log_s, entries.log_s.detach())
        log_t, valid = entries.log_t, entries.valid
        if estimate.spec.support is None:
            log_s, log_t = log_s[:, 0], None if log_t is None else log_t[:, 0]
        if estimate.log_t is not None:
            log_t = estimate.log_t[rows].double()
        baseline = None if estimate.baseline is None else values.dense[:, estimate.baseline].detach().double()
        return Tokens(
            log_s=log_s,
            log_t=log_t,
            valid=None if estimate.spec.support is None else valid,
            baseline=baseline,
            data={name: column[rows] for name, column in self.data.items()},
        )

    def _batch(self, stats: dict[str, Tensor] | None, rows: Tensor) -> Batch:
        """The chunk as a batch of one sequence."""
        found = None if stats is None else TokenStats(**{name: x.float()[None] for name, x in stats.items()})
        return Batch(
            mask=torch.ones(1, len(rows), dtype=torch.bool, device=rows.device),
            data={name: column[rows][None] for name, column in self.data.items()},
            measure=None if found is None else lambda: found,
        )

    @property
    def _factors(self) -> list[Factor]:
        return [*self.dense, *[estimate.factor for estimate in self.estimates]]


def _factor(factor: Factor, batch: Batch, rows: Tensor) -> Tensor:
    """`[C]` product of all weights of a term."""
    found = factor.fixed[rows]
    for spec in factor.local:
        found = found * made_weight(spec, batch).reshape(-1).to(found.dtype)
    return found


def made_weight(spec: Weight, batch: Batch) -> Tensor:
    """`[B, C]` or `[B, 1]` factors of the tokens; those of dead ones are any numbers."""
    found = weight[spec.name](batch, **spec.options)
    if found.dim() != 2:
        raise ValueError(
            f"weight {spec.name!r}: expected one with a factor for each token; got one for each teacher too, "
            f"{tuple(found.shape)}"
        )
    if "stats" in vars(batch):
        live = torch.where(batch.mask, found, 0.0)
        validation.check_ids_known(f"weight {spec.name!r}", live, batch.stats)
    return found
