"""The public functions. What they do with a validated call is in `call.py`."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd_kernels import methods
from opsd_kernels.call import Call
from opsd_kernels.evaluation import Evaluation
from opsd_kernels.known import Sampled
from opsd_kernels.objectives import Objective, get_objective, named_objectives
from opsd_kernels.options import Denominator, LossOptions, SourceLike, TokenStats, TokenWeight
from opsd_kernels.recipes import Estimator, Recipe, Term
from opsd_kernels.roles import TeacherArgument


class LossAndStats(NamedTuple):
    """What `loss_and_stats` returns."""

    loss: Tensor
    """As `loss` returns it."""
    stats: TokenStats
    """As `token_stats` returns it, and the filter's `dropped_share`."""


def loss(
    student: SourceLike,
    teacher: TeacherArgument,
    weight: Tensor | None = None,
    *,
    objective: str | Objective | Recipe = "forward_kl",
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    token_weight: TokenWeight | None = None,
    token_ids: Tensor | None = None,
    support_ids: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    denominator: Denominator = None,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    grad_filter: float | None = None,
    main_grad: Tensor | None = None,
    backend: str = "auto",
    data: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """On-policy (self-)distillation loss from hidden states, without `[N, V]` logits.

    Replaces, for the default objective::

        log_s = F.log_softmax(F.linear(student, weight).float() / temperature, -1)
        log_t = F.log_softmax(F.linear(teacher, weight).float() / temperature, -1)
        token = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        loss = (token * token_weight)[mask].sum() / mask.sum()

    Gradients flow to the student's hidden states, its head and its bias; never to the teacher. They are those
    of a backward: tensors with a tangent (forward-mode derivatives), or inside a transform of `torch.func`,
    are refused.

    Args:
        student: hidden states `[..., H]` projected by `weight`, or a source (`Hidden`, `Logits`).
        teacher: likewise, or several combined (`LogLinear`, `Mixture`, `Routed`, `Target`); with the same
            token dimensions and without gradient; H may differ in a source. `TopK` for one that is known at a
            few entries, `Sampled` at the sampled token only. A mapping role -> teacher for an objective with
            several; None for one without. Log-probabilities, these and those in `data`, are checked to be
            none above 0 and of a mass within 1: on a CPU always, on a GPU if there is a mask, for which a
            call waits anyway.
        weight: `[V, H]`, the head of every argument that is a bare tensor.
        objective: a name of `named_objectives()` or an `Objective`. `"opsd"` is the published one: forward KL
            with each vocabulary entry's term clipped at 0.05 (arXiv 2601.18734). That clip pushes down what
            it clips: on a small real model the accuracy fell and the KL rose while this loss fell (see
            `Objective`). Or a method of the literature by name (`docs/methods.md`), or a `Recipe` of several
            terms, whose gradients go through one backward.
        mask: bool `[...]`, True where a token counts. Other rows never reach a GEMM; NaN there does no harm.
            On a GPU the number of rows that count is read back once (and once more in the backward of
            `reduction="none"`).
        rows: int `[n]`, instead of a mask: the tokens that count, each once, as indices into the flattened
            token dimensions. Nothing is read back, so that a CUDA graph can be captured.
        token_weight: float `[...]`, a constant factor of each token's loss; zero-weight rows are skipped too,
            as a mask's are (unless `rows` says which count). Or a function of `TokenStats` that returns the
            factors, called between statistics and gradient with `[C]` tensors for one chunk of tokens after
            another: it must treat tokens independently. For weights that need the whole batch call
            `token_stats` first. What it returns is a constant tensor of floats. Either is finite at tokens
            that count, which is looked at on a CPU alone: a GPU would have to be waited for.
        token_ids: int `[...]`, the sampled tokens, for estimators and for the statistics that a
            `token_weight` function sees.
        support_ids: int `[..., K]`, the entries of a `Support` that is `"given"`; -1 for none.
        temperature: T in [1e-6, 1e6] of both distributions, softmax(z / T). There is no factor T^2.
        reduction: `"mean"` (sum / denominator), `"sum"`, or `"none"` for the weighted loss of every token;
            `"sequence_mean"`, the mean over sequences (the last token dimension) of their means, or
            `"sequences"`, those means themselves. Under `"none"` and `"sequences"` a recipe's divisors by
            batch do not apply.
        denominator: of the mean, a number or a one-element tensor; by default the number of unmasked tokens
            (weights do not change it). Pass the global count under gradient accumulation or data parallelism.
            Of `"sequence_mean"` it is the number of sequences; a mapping, as `denominators.denominators`
            makes it of a whole batch, serves a recipe whose terms are divided by different counts.
        vocab_size: number of leading columns that are real; the rest is padding and is left out.
        workspace_bytes: budget of the two logits buffers (teachers made of several sources, and statistics of
            a support, take one or two more of the same size). Default: 512 rows on a CPU, 4,096 rows
            elsewhere (2,048 if the head is frozen). At least one row is held whatever the budget. On a GPU
            one of less than 512 rows with a trainable head is spent on slabs of the vocabulary instead, at
            six GEMMs.
        grad_filter: eps, an approximation that is off by default. Columns of dL/d(z/T) that stay within eps
            times the token's weight at every token of a chunk are left out of the GEMMs of dH and dW (2^-14
            leaves out most columns of a language model). `loss_and_stats` says what share was dropped. On a
            GPU the number of columns is read back once a chunk.
        main_grad: fp32 `[V, H]` to which the backward adds dW, instead of to `weight.grad` (Megatron's
            `main_grad`): no gradient of the head's own, and no rounding to the head's dtype.
        backend: `"auto"`, or a name of the README's table. One that is missing is an error.
        data: what is known of the rollouts, for the objectives that read it: rewards, advantages, log-probs
            and so on by the names of `tokens.DATA`, per token `[...]` or per sequence.

    Returns:
        A scalar, `[...]` for `"none"`, one value per sequence for `"sequences"`, in fp32 (fp64 if any input
        is). With no live token it is exactly 0, with zero gradients.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    options = LossOptions(
        objective, mask, rows, token_weight, token_ids, support_ids, temperature, reduction, denominator,
        vocab_size, workspace_bytes, grad_filter, main_grad, backend, data,
    )  # fmt: skip
    recipe = _recipe(teacher, options)
    if recipe is not None:
        return Evaluation.of(student, teacher, weight, recipe, options).loss()
    return Call.of(student, teacher, weight, options).evaluate(with_stats=False)[0]


def loss_and_stats(
    student: SourceLike, teacher: TeacherArgument, weight: Tensor | None = None, **options: Any
) -> LossAndStats:
    """`loss` and `token_stats` of the same tokens in one walk over the logits, without further GEMMs.

    The arguments are those of `loss`.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    given = LossOptions(**options)
    recipe = _recipe(teacher, given)
    if recipe is not None:
        evaluation = Evaluation.of(student, teacher, weight, recipe, given)
        return LossAndStats(evaluation.loss(), evaluation.stats())
    call = Call.of(student, teacher, weight, given)
    value, columns = call.evaluate(with_stats=True)
    return LossAndStats(value, call.stats(columns))


@torch.no_grad()
def token_stats(
    student: SourceLike,
    teacher: TeacherArgument,
    weight: Tensor | None = None,
    *,
    objective: str | Objective | Recipe = "forward_kl",
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    token_ids: Tensor | None = None,
    support_ids: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    data: Mapping[str, Tensor] | None = None,
) -> TokenStats:
    """What to log about every token: divergences, entropies, log-probs, agreement, clipped share.

    The arguments are those of `loss`; `objective` decides `clipped_fraction` alone. Two GEMMs, no gradient.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    options = LossOptions(
        objective=objective, mask=mask, rows=rows, token_ids=token_ids, support_ids=support_ids,
        temperature=temperature, vocab_size=vocab_size, workspace_bytes=workspace_bytes, backend=backend,
        data=data,
    )  # fmt: skip
    recipe = _recipe(teacher, options)
    if recipe is not None:
        return Evaluation.of(student, teacher, weight, recipe, options).stats()
    call = Call.of(student, teacher, weight, options)
    return call.stats(call.token_stats())


def token_logprobs(
    student: SourceLike, token_ids: Tensor, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """Log-probabilities of the sampled tokens, differentiable: what losses of whole sequences are made of.

    Replaces::

        logits = F.linear(student, weight).float() / temperature
        logprobs = F.log_softmax(logits, -1).gather(-1, token_ids[..., None])[..., 0]

    One product with the head, and three in the backward, which recomputes the logits. `sequences.py` has
    losses made of them.

    Args:
        student: hidden states `[..., H]` projected by `weight`, or a source.
        token_ids: int `[...]`.
        weight: `[V, H]`, the head of a bare tensor.
        options: `mask`, `rows`, `temperature`, `vocab_size`, `workspace_bytes`, `main_grad` and `backend` of
            `loss`.

    Returns:
        `[...]` in fp32 (fp64 if any input is), 0 at tokens that do not count.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    known = {"mask", "rows", "temperature", "vocab_size", "workspace_bytes", "main_grad", "backend"}
    if not set(options) <= known:
        unknown = ", ".join(sorted(set(options) - known))
        raise ValueError(f"token_logprobs: expected options among {', '.join(sorted(known))}; got {unknown}")
    chosen = Recipe((Term(Estimator("nll"), teacher=None),))
    return -loss(student, None, weight, objective=chosen, token_ids=token_ids, reduction="none", **options)


def _recipe(teacher: TeacherArgument, options: LossOptions) -> Recipe | None:
    """The recipe of a call; None for one divergence to one teacher, which the engine does by itself."""
    objective = options.objective
    if isinstance(objective, Recipe):
        return objective
    if isinstance(objective, str) and objective not in named_objectives():
        if objective in methods.names():
            return methods.recipe(objective)
        close = difflib.get_close_matches(objective.lower(), methods.names(), n=1)
        if close:
            known = ", ".join(named_objectives())
            raise ValueError(
                f"objective: expected an Objective, a Recipe, one of {known}, or a method of "
                f"docs/methods.md; got {objective!r} (did you mean {close[0]!r}?)"
            )
    by_sequence = options.reduction in ("sequence_mean", "sequences")
    named = isinstance(teacher, Mapping | Sampled) or isinstance(options.denominator, Mapping)
    return Recipe((Term(get_objective(objective)),)) if by_sequence or named or options.data else None
