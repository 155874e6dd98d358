"""The public functions: validate, find the live rows, choose a backend, reduce."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import NamedTuple

import torch

from opsd_kernels import backends, validation
from opsd_kernels.engine import autograd, chunk_store
from opsd_kernels.engine.problem import Problem
from opsd_kernels.objectives import Objective, get_objective
from opsd_kernels.sources import Source

SourceLike = torch.Tensor | Source


class TokenStats(NamedTuple):
    """Per-token statistics without gradient: fp32, shape of the token dimensions, in nats; 0 at dead rows."""

    forward_kl: torch.Tensor
    """KL(t || s), without clips."""
    reverse_kl: torch.Tensor
    """KL(s || t), without clips."""
    jsd: torch.Tensor
    """Jensen-Shannon divergence at beta = 1/2."""
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    student_logprob: torch.Tensor
    """log s of `token_ids`; NaN if there are none."""
    teacher_logprob: torch.Tensor
    """log t of `token_ids`; NaN if there are none."""
    top1_agreement: torch.Tensor
    """1 where both have the same most likely token, else 0."""
    clipped_fraction: torch.Tensor
    """Share of the loss that the objective's clips remove: of the sum of the positive terms l_v for
    `entry_clip`, of the token's loss for `token_clip`; in [0, 1]."""


def loss(
    student: SourceLike,
    teacher: SourceLike,
    weight: torch.Tensor | None = None,
    *,
    objective: str | Objective = "opsd",
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: float | torch.Tensor | None = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """On-policy (self-)distillation loss from hidden states, without `[N, V]` logits.

    Replaces, for `objective="forward_kl"`::

        log_s = F.log_softmax(F.linear(student, weight).float() / temperature, -1)
        log_t = F.log_softmax(F.linear(teacher, weight).float() / temperature, -1)
        token = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        loss = (token * token_weight)[mask].sum() / mask.sum()

    Gradients flow to the student's hidden states, its head and its bias; never to the teacher.

    Args:
        student: hidden states `[..., H]` projected by `weight`, or a source (`Hidden`, `Logits`).
        teacher: likewise, with the same token dimensions and without gradient; H may differ in a source.
        weight: `[V, H]`, the head of every argument that is a bare tensor.
        objective: a name of `named_objectives()` or an `Objective`. `"opsd"` is the published one: forward KL
            with each vocabulary entry's term clipped at 0.05 (arXiv 2601.18734).
        mask: bool `[...]`, True where a token counts. Other rows never reach a GEMM; NaN there does no harm.
        token_weight: float `[...]`, a constant factor of each token's loss. Zero-weight rows are skipped too.
        token_ids: int `[...]`, the sampled tokens; checked, and unused by the objectives there are today.
        temperature: T > 0 of both distributions, softmax(z / T). There is no factor T^2.
        reduction: `"mean"` (sum / denominator), `"sum"`, or `"none"` for the weighted loss of every token.
        denominator: of the mean, a number or a one-element tensor; by default the number of unmasked tokens
            (weights do not change it). Pass the global count under gradient accumulation or data parallelism.
        vocab_size: number of leading columns that are real; the rest is padding and is left out.
        workspace_bytes: budget of the two logits buffers. Default: 512 rows on a CPU, 4,096 rows elsewhere
            (2,048 if the head is frozen). At least one row is held whatever the budget.
        backend: `"auto"`, or a name of the README's table. One that is missing is an error.

    Returns:
        A scalar, or `[...]` for `"none"`, in fp32 (fp64 if any input is). With no live token it is exactly 0,
        with zero gradients.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    call = _Call.of(student, teacher, weight, vocab_size, mask, token_ids, temperature, workspace_bytes)
    validation.check_rows("token_weight", token_weight, call.student, validation.FLOATS)
    validation.check_reduction(reduction, denominator)
    problem = call.problem(get_objective(objective), token_weight)
    name, module = _backend(backend, problem)
    if name == backends.REFERENCE:
        tokens = module.token_loss(problem) * problem.weight
        total = tokens.sum()
    elif reduction == "none":
        tokens = autograd.token_loss(problem, module) * problem.weight
    else:
        total = autograd.weighted_sum(problem, module)
    if reduction == "none":
        return call.spread(problem, tokens)
    return total / call.token_count(denominator, problem.dtype) if reduction == "mean" else total


@torch.no_grad()
def token_stats(
    student: SourceLike,
    teacher: SourceLike,
    weight: torch.Tensor | None = None,
    *,
    objective: str | Objective = "opsd",
    mask: torch.Tensor | None = None,
    token_ids: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> TokenStats:
    """What to log about every token: divergences, entropies, log-probs, agreement, clipped share.

    The arguments are those of `loss`; `objective` decides `clipped_fraction` alone. Two GEMMs, no gradient.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    call = _Call.of(student, teacher, weight, vocab_size, mask, token_ids, temperature, workspace_bytes)
    problem = call.problem(get_objective(objective), None)
    name, module = _backend(backend, problem)
    ids = torch.zeros(problem.total_rows, dtype=torch.int64, device=problem.device)
    if token_ids is not None:
        ids = token_ids.reshape(-1).long()
    if problem.rows is not None:
        ids = ids[problem.rows]
    if name == backends.REFERENCE:
        chunks = [module.token_stats(problem, ids)]
    else:
        chunks = chunk_store.token_stats(problem, module, ids)
    columns = {}
    for field in TokenStats._fields:
        parts = [chunk[field] for chunk in chunks]
        live = torch.cat(parts) if parts else torch.zeros(0, device=problem.device)
        if token_ids is None and field.endswith("_logprob"):
            live = torch.full_like(live, torch.nan)
        columns[field] = call.spread(problem, live.float())
    return TokenStats(**columns)


@dataclass(frozen=True)
class _Call:
    """The validated arguments that `loss` and `token_stats` share."""

    student: Source
    teacher: Source
    vocab: int
    mask: torch.Tensor | None
    temperature: float
    workspace_bytes: int | None

    @classmethod
    def of(
        cls,
        student: SourceLike,
        teacher: SourceLike,
        weight: torch.Tensor | None,
        vocab_size: int | None,
        mask: torch.Tensor | None,
        token_ids: torch.Tensor | None,
        temperature: float,
        workspace_bytes: int | None,
    ) -> "_Call":
        validation.check_weight_is_used(student, teacher, weight)
        s = validation.as_source("student", student, weight)
        t = validation.as_source("teacher", teacher, weight)
        validation.check_pair(s, t)
        vocab = validation.common_vocab(s, t, vocab_size)
        validation.check_rows("mask", mask, s, (torch.bool,))
        validation.check_rows("token_ids", token_ids, s, validation.IDS)
        validation.check_ids(token_ids, mask, vocab)
        validation.check_positive("temperature", temperature)
        if workspace_bytes is not None:
            validation.check_positive("workspace_bytes", workspace_bytes)
            workspace_bytes = int(workspace_bytes)  # 2e9 is a natural way to write it
        return cls(s, t, vocab, mask, temperature, workspace_bytes)

    def problem(self, objective: Objective, token_weight: torch.Tensor | None) -> Problem:
        """The engine's view of this call: flat, with the indices and weights of the rows that count."""
        keep = self.mask
        if token_weight is not None:
            nonzero = token_weight != 0
            keep = nonzero if keep is None else keep & nonzero
        rows = None if keep is None else keep.reshape(-1).nonzero()[:, 0]
        n = self.student.lead.numel() if rows is None else rows.numel()
        weight = torch.ones(n, device=self.student.device)
        if token_weight is not None:
            weight = token_weight.reshape(-1)[rows]
        problem = Problem(
            student=self.student.flat(self.vocab),
            teacher=self.teacher.flat(self.vocab),
            objective=objective,
            temperature=float(self.temperature),
            rows=rows,
            weight=weight,
            workspace_bytes=self.workspace_bytes,
        )
        return replace(problem, weight=weight.to(problem.dtype))

    def token_count(
        self, denominator: float | torch.Tensor | None, dtype: torch.dtype
    ) -> float | torch.Tensor:
        """The mean's denominator: the caller's, or the number of unmasked tokens, at least 1."""
        if isinstance(denominator, torch.Tensor):
            return denominator.reshape(()).to(self.student.device, dtype)
        if denominator is not None:
            return denominator
        if self.mask is not None:
            return self.mask.sum().clamp(min=1)
        return max(self.student.lead.numel(), 1)

    def spread(self, problem: Problem, live: torch.Tensor) -> torch.Tensor:
        """Values of the live rows `[n]` as the token dimensions `[...]`, 0 elsewhere."""
        return problem.scatter(live).reshape(self.student.lead)


def _backend(asked: str, problem: Problem) -> tuple[str, ModuleType]:
    """Name and module of the backend."""
    name = backends.choose(asked, problem.device)
    return name, backends.load(name, problem.device, problem.dtype)
