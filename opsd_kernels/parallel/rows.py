"""Row functions over the columns of one rank, with what belongs to whole rows reduced over the group.

The engine calls them as it calls a backend's (`backends/torch` has the contracts). A chunk of rows costs two
collectives, of 6 and 2 fp64 numbers a row: the maxima, their places and the sums of the exponentials, then
the sums of the divergence's terms and weights. Each is a gather, and every rank adds up the same numbers in
the same order: losses, statistics and everything that follows have the same bits on all of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from opsd_kernels.backends.torch.rows import blocks, slab_gradient_, write_
from opsd_kernels.engine.entries import LOG_ZERO, Entries, Softmax
from opsd_kernels.engine.logits_store import DenseStore
from opsd_kernels.engine.rows import (
    GradientForm,
    RowStatistics,
    clip_tokens,
    clipped_fraction,
    divergence,
)
from opsd_kernels.objectives import Objective

if TYPE_CHECKING:
    from opsd_kernels.parallel.shards import Shard

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class Normaliser(NamedTuple):
    """Of whole rows, `[C]` each."""

    top: Tensor
    """Largest logit, in the logits' dtype."""
    total: Tensor
    """Sum of exp(z - top), in fp64."""
    best: Tensor
    """Id of the largest logit, the first of several."""


@dataclass(frozen=True)
class ShardedRows:
    """The row functions of a shard."""

    shard: "Shard"
    LogitsStore: ClassVar[type[DenseStore]] = DenseStore

    def row_loss(self, z_s: Tensor, z_t: Tensor, objective: Objective) -> RowStatistics:
        """Statistics of whole rows, from this rank's columns `[C, V_r]` of their logits."""
        return self._statistics(z_s, z_t, objective, None)

    def row_gradient_(
        self, z_s: Tensor, z_t: Tensor, objective: Objective, coefficient: Tensor, form: GradientForm
    ) -> tuple[Tensor, Tensor]:
        """`[C]` losses of whole rows, and `[C, V_r]` gradients of this rank's columns in place of z_t."""
        row = self._statistics(z_s, z_t, objective, z_t)
        weight, dz, scale = z_t, form.over(z_t), row.scale * coefficient
        for rows in blocks(z_s):
            p = (z_s[rows] - row.top_s[rows, None]).exp_()
            p *= (1 / row.sum_s[rows]).to(p.dtype)[:, None]
            gradient = torch.addcmul(weight[rows], p, row.total[rows, None], value=-1)
            write_(dz[rows], gradient, scale[rows], z_s[rows], form)
        return row.loss, dz

    @staticmethod
    def slab_gradient_(
        z_s: Tensor, z_t: Tensor, objective: Objective, statistics: RowStatistics,
        coefficient: Tensor, form: GradientForm,
    ) -> Tensor:  # fmt: skip
        """As the backend's: given the statistics of whole rows, columns need nobody else's."""
        return slab_gradient_(z_s, z_t, objective, statistics, coefficient, form)

    def row_stats(
        self, z_s: Tensor, z_t: Tensor, objective: Objective, token_ids: Tensor
    ) -> dict[str, Tensor]:
        """`[C]` values of the fields of `TokenStats`; `token_ids` `[C]` are of the whole vocabulary."""
        top_s, top_t = self.of_whole_rows(z_s, z_t)
        columns, here = self.shard.local(token_ids)
        parts = []
        for rows in blocks(z_s):
            student, teacher = _softmax(z_s, top_s, rows), _softmax(z_t, top_t, rows)
            sums = [Entries(student, teacher, Objective(x)).value.sum(-1) for x in DIVERGENCES]
            sums += [-(x.p * x.log_p).sum(-1) for x in (student, teacher)]
            sums += [_log_prob_of(x.log_p, columns[rows], here[rows]) for x in (student, teacher)]
            sums += _clip_sums(Entries(student, teacher, objective))
            parts.append(torch.stack(sums, 1))
        total = self.shard.sum(torch.cat(parts).double()).to(z_s.dtype)
        *sums, positive, kept, value = total.unbind(1)
        found = {name: divergence(x, Objective(name)) for name, x in zip(DIVERGENCES, sums[:3], strict=True)}
        names = ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
        found |= dict(zip(names, sums[3:], strict=True))
        found["top1_agreement"] = (top_s.best == top_t.best).to(z_s.dtype)
        loss = divergence(value, objective)
        return found | {"clipped_fraction": clipped_fraction(positive, kept, loss, objective)}

    def normalisers(self, z_s: Tensor, z_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the backend's, of whole rows."""
        student, teacher = self.of_whole_rows(z_s, z_t)
        return student.top, student.total, teacher.top, teacher.total

    def of_whole_rows(self, *logits: Tensor) -> list[Normaliser]:
        """Of whole rows, from this rank's columns of each tensor of logits `[C, V_r]`; one collective."""
        local = [column for z in logits for column in _local_normaliser(z, self.shard.start)]
        everyone = self.shard.gather(torch.stack(local))
        top, total, best = everyone.unflatten(1, (len(logits), 3)).unbind(2)
        # An excluded part has the maximum -inf; so has a row without any column, which stays undefined.
        highest = top.amax(0)
        share = torch.where(top == -torch.inf, 0.0, (top - highest).exp())
        owner = top.argmax(0, keepdim=True)
        columns = zip(highest, (total * share).sum(0), best.gather(0, owner)[0], strict=True)
        dtype = logits[0].dtype
        return [Normaliser(highest.to(dtype), total, best) for highest, total, best in columns]

    def _statistics(
        self, z_s: Tensor, z_t: Tensor, objective: Objective, weights: Tensor | None
    ) -> RowStatistics:
        """Of whole rows; the weights a_v of this rank's columns go to `weights`, which may be z_t."""
        student, teacher = self.of_whole_rows(z_s, z_t)
        parts = []
        for rows in blocks(z_s):
            entries = Entries(_softmax(z_s, student, rows), _softmax(z_t, teacher, rows), objective)
            parts.append(torch.stack((entries.value.sum(-1), entries.weight.sum(-1)), 1))
            if weights is not None:
                weights[rows] = entries.weight
        value, total = self.shard.sum(torch.cat(parts).double()).to(z_s.dtype).unbind(1)
        loss, scale = clip_tokens(divergence(value, objective), objective)
        return RowStatistics(loss, student.top, student.total, teacher.top, teacher.total, total, scale)


def _local_normaliser(z: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[C]` maximum, sum of exp(z - maximum) and id of the first maximum of a rank's columns, in fp64."""
    tops, sums, best = [], [], []
    for rows in blocks(z):
        if z.shape[1] == 0:
            nothing = z.new_zeros(z[rows].shape[0], dtype=torch.float64)
            top, total, first = nothing - torch.inf, nothing, nothing
        else:
            values, indices = z[rows].max(-1)
            anchor = torch.where(values == -torch.inf, 0.0, values)
            total = (z[rows] - anchor[:, None]).exp_().sum(-1, dtype=torch.float64)
            top, first = values.double(), (indices + start).double()
        tops.append(top)
        sums.append(total)
        best.append(first)
    return torch.cat(tops), torch.cat(sums), torch.cat(best)


def _softmax(z: Tensor, row: Normaliser, rows: slice) -> Softmax:
    return Softmax(z[rows], row.top[rows], row.total[rows])


def _log_prob_of(log_p: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """`[C]` log-probabilities of columns that this rank has, 0 for the others."""
    if log_p.shape[1] == 0:
        return log_p.new_zeros(log_p.shape[0])
    chosen = log_p.gather(-1, columns[:, None])[:, 0]
    return torch.where(here, torch.where(chosen <= LOG_ZERO, -torch.inf, chosen), 0.0)


def _clip_sums(entries: Entries) -> list[Tensor]:
    """`[C]` sums of the positive terms, of what the entry clip keeps of them, and of the values."""
    objective = entries.objective
    positive = entries.signed_term.clamp(min=0)
    kept = positive if objective.entry_clip is None else positive.clamp(max=objective.entry_clip)
    return [positive.sum(-1), kept.sum(-1), entries.value.sum(-1)]
