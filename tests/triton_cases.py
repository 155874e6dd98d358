"""What the tests of the Triton row kernels share: small blocks, the fp64 definition of a row's loss and
gradient, and how far fp32 arithmetic may be from it.

Triton's interpreter runs the kernels. At every call of a `@triton.jit` helper it looks through all of
`triton.language` to replace what a CPU cannot run, which takes longer than the kernels do; `small_blocks`
lets it do so once for every module of kernels instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from definitions import chosen, on_support_of_both
from opsd_kernels import Logits, Objective, loss, named_objectives
from opsd_kernels.backends import triton as backend
from opsd_kernels.backends.triton import tiles
from opsd_kernels.engine import supports
from opsd_kernels.engine.rows import GradientForm

OBJECTIVES = {
    **{name: named_objectives()[name] for name in ("forward_kl", "reverse_kl", "jsd", "opsd")},
    "reverse_kl_sg": Objective("reverse_kl_sg"),
    "jsd 0 (forward KL)": Objective("jsd", beta=0.0),
    "jsd 1 (reverse KL)": Objective("jsd", beta=1.0),
    "jsd 0.1": Objective("jsd", beta=0.1),
    "jsd 0.9": Objective("jsd", beta=0.9),
    "forward_kl scaled clip": Objective("forward_kl", entry_clip=0.05, clip_mode="scale"),
    "reverse_kl clip": Objective("reverse_kl", entry_clip=0.03),
    "reverse_kl_sg scaled clip": Objective("reverse_kl_sg", entry_clip=0.03, clip_mode="scale"),
    "jsd clip": Objective("jsd", entry_clip=0.01),
    "jsd 0.2 scaled clip": Objective("jsd", beta=0.2, entry_clip=0.01, clip_mode="scale"),
    "skew_forward 0.1": Objective("skew_forward", beta=0.1),
    "skew_forward 0.1 clip": Objective("skew_forward", beta=0.1, entry_clip=0.02),
    "skew_reverse 0.9": Objective("skew_reverse", beta=0.9),
    "skew_reverse scaled clip": Objective("skew_reverse", entry_clip=0.01, clip_mode="scale"),
    "skew_reverse_sg 0.9": Objective("skew_reverse_sg", beta=0.9),
    "total_variation": Objective("total_variation"),
    "total_variation scaled clip": Objective("total_variation", entry_clip=0.02, clip_mode="scale"),
    "alpha": Objective("alpha"),
    "alpha 0.2 clip": Objective("alpha", beta=0.2, entry_clip=0.01),
    "mixed 0.3": Objective("mixed", beta=0.3),
    "mixed scaled clip": Objective("mixed", entry_clip=0.03, clip_mode="scale"),
    "token clip": Objective("reverse_kl", token_clip=0.1),
    "token and entry clip, scaled": Objective("jsd", entry_clip=0.02, token_clip=0.1, clip_mode="scale"),
}
UNTOUCHED = 77.0  # what memory around the logits holds before and after
NEAR_A_CLIP = 1e-4
LEAST_MASS = 1e-28
EPS = torch.finfo(torch.float32).eps
# Where numbers are subnormal each of a few roundings is one of the smallest numbers there are.
SUBNORMALS = 4


@contextmanager
def small_blocks(**sizes: int) -> Iterator[None]:
    """Blocks of these sizes, so that short rows have several; the interpreter is set up once."""
    saved, replace_language = tiles.DEFAULT, interpreter._patch_lang
    tiles.DEFAULT = tiles.Tiles(**sizes)
    scopes: dict[int, Any] = {}

    def replace_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = replace_language(function)
        return interpreter._LangPatchScope()  # nothing for the launch to undo

    interpreter._patch_lang = replace_once
    try:
        yield
    finally:
        tiles.DEFAULT, interpreter._patch_lang = saved, replace_language
        for scope in reversed(scopes.values()):
            scope.restore()


@dataclass(frozen=True)
class Rows:
    """A call of the row functions.

    Args:
        z_s: `[n, V]` fp32 student logits; `z_t` teacher logits, which the gradient overwrites.
        objective: the token loss, on a support or not.
        coefficient: `[n]` factor of each row's gradient.
        form: how the gradient is wanted.
        ids: `[n, K]` entries of a support that is given.
    """

    z_s: Tensor
    z_t: Tensor
    objective: Objective
    coefficient: Tensor
    form: GradientForm = GradientForm(torch.float32)  # noqa: RUF009
    ids: Tensor | None = None

    def run(self, cut: int | None = None) -> tuple[Tensor, Tensor]:
        """Losses and gradient by the kernels; by two slabs of columns if there is a `cut` between them."""
        pair = self.z_s, self.z_t
        if self.objective.support is not None:
            return supports.row_gradient_(
                *pair, self.objective, self.ids, self.coefficient, self.form, backend
            )
        if cut is None:
            return backend.row_gradient_(*pair, self.objective, self.coefficient, self.form)
        statistics = backend.row_loss(*pair, self.objective)
        slabs = []
        for columns in (slice(0, cut), slice(cut, None)):
            slab = (z[:, columns] for z in pair)
            slabs.append(
                backend.slab_gradient_(*slab, self.objective, statistics, self.coefficient, self.form)
            )
        return statistics.loss, torch.cat(slabs, 1)

    def definition(self, objective: Objective | None = None) -> tuple[Tensor, Tensor]:
        """Losses and gradient by the reference in fp64."""
        z = self.z_s.double().requires_grad_()
        tokens = loss(
            Logits(z), Logits(self.z_t.double()), objective=objective or self.objective, reduction="none",
            support_ids=self.ids, backend="reference",
        )  # fmt: skip
        tokens.backward(self.coefficient.double())
        assert z.grad is not None
        slope = 1 if self.form.cap is None else 1 - (self.z_s.double() / self.form.cap) ** 2
        return tokens.detach(), z.grad * slope


def random_rows(
    n: int, vocab: int, *, gap: float = 0.5, peak: float = 4.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits `[n, V]` of a student and a teacher in fp32; `gap` and `peak` as in `opsd_kernels.testing`."""
    normal = torch.randn(2, n, vocab, generator=torch.Generator().manual_seed(seed))
    z_s = normal[0] * peak
    return z_s, z_s + normal[1] * gap


def inside(z: Tensor, *, left: int = 0, right: int = 0, apart: int = 1) -> tuple[Tensor, Tensor]:
    """The logits as a view of larger memory, and a view of the memory: columns and rows around them."""
    n, vocab = z.shape
    memory = torch.full((1 + n * apart, left + vocab + right), UNTOUCHED)
    view = memory[1::apart, left : left + vocab]
    view = view[:n]
    view.copy_(z)
    return view, memory


def assert_rows(rows: Rows, cut: int | None = None) -> None:
    """Runs the kernels and compares with the definition: values, gradients, and what has to stay as it is."""
    before = rows.z_s.clone()
    expected, truth = rows.definition()
    bound, entry_bound = tolerances(rows, expected, truth)
    # Renormalising no mass on the support at all is 0 / 0.
    defined, decided = loss_is_defined(rows) & ~expected.isnan(), gradient_is_decided(rows, truth)
    excluded = rows.z_s == -torch.inf
    found, gradient = rows.run(cut)
    assert torch.equal(rows.z_s, before) or rows.objective.support is not None
    infinite = expected.isinf()
    assert (found == expected)[infinite & defined].all(), f"value: {found.tolist()}, expected infinite ones"
    error = torch.where(infinite | ~defined, 0.0, (found - expected).abs())
    assert (error <= bound).all(), (
        f"value: {found.tolist()}, expected {expected.tolist()} within {bound.tolist()}"
    )
    support = rows.objective.support
    if rows.objective.entry_clip is None and (support is None or support.is_whole):
        assert (found >= 0)[defined].all(), f"negative: {found.tolist()}"
    assert gradient.dtype == rows.form.dtype
    # Where the loss is infinite the definition's gradient is 0 * inf, and so is everyone's.
    decided &= defined & ~infinite & truth.isfinite().all(1)
    # A scaled clip of an infinite term leaves tau / LOG_ZERO.
    leak = gradient.double().abs().where(excluded & decided[:, None], 0.0).amax()
    assert leak < 1e-37, f"gradient {leak:.1e} of an excluded column"
    error = (gradient.double() - truth).abs() - entry_bound
    worst = error[decided].flatten().argmax() if decided.any() else None
    assert worst is None or error[decided].max() <= 0, (
        f"gradient {gradient[decided].flatten()[worst]:.9e}, expected {truth[decided].flatten()[worst]:.9e} "
        f"within {entry_bound[decided].flatten()[worst]:.1e}"
    )


def tolerances(rows: Rows, expected: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds `[n]` of the value's error and `[n, V]` of the gradient's, by what fp32 rounds.

    A log-probability is off by about `EPS` times its size, the probability by that share of itself, the
    weight a = s (d + 1) of a reverse KL by that share times |d| again, the row's total by the sum of it.
    A clip that scales divides by the term, whose error is absolute.
    """
    ls, lt = (z.double().log_softmax(1) for z in (rows.z_s, rows.z_t))
    objective = rows.objective
    depth = 1 + ls.abs().nan_to_num(posinf=0) + lt.abs().nan_to_num(posinf=0)
    if objective.support is None:
        mass = ls.exp() + lt.exp()
        terms = (mass * depth).sum(1) + expected.abs().nan_to_num(posinf=0)
        bound, size = EPS * terms, EPS * mass * depth.square()
    else:
        # Renormalised, entries of little mass weigh as much as any; a tail gathers the errors of all of it.
        bound = EPS * depth.amax(1) * (1 + expected.nan_to_num(posinf=0).abs())
        size = bound[:, None].expand_as(depth)
    if objective.clip_mode == "scale" and objective.entry_clip is not None:
        size = size * (1 + size / EPS / objective.entry_clip)
    whole = size.sum(1, keepdim=True) if objective.support is None else size
    slope = 1 if rows.form.cap is None else 1 + 2 * (rows.z_s.double() / rows.form.cap) ** 2
    entry = (size + ls.exp() * whole) * rows.coefficient.double().abs()[:, None] * slope
    if objective.clip_mode == "scale" and objective.token_clip is not None:
        entry = entry + truth.abs() * (bound / objective.token_clip)[:, None]
    info = torch.finfo(rows.form.dtype)
    rounding = info.eps if rows.form.dtype == torch.bfloat16 else info.eps / 2  # truncated
    return bound, entry + truth.abs() * rounding + SUBNORMALS * info.smallest_normal * info.eps


def loss_is_defined(rows: Rows) -> Tensor:
    """`[n]` bool: False where the loss is infinite and fp32 need not see it.

    A column that one side excludes and that has next to none of the other's mass looks like one that both
    exclude (see `LOG_ZERO`).
    """
    masses = [z.double().softmax(1) for z in (rows.z_s, rows.z_t)]
    lost = [(p == 0) & (q > 0) & (q < LEAST_MASS) for p, q in (masses, masses[::-1])]
    return ~(lost[0] | lost[1]).any(1)


def gradient_is_decided(rows: Rows, truth: Tensor) -> Tensor:
    """`[n]` bool: False within rounding, on either side, of the bound of a clip that drops gradients, or of
    the place where the gradient of an |s - t| jumps."""
    objective = rows.objective
    decided = torch.ones(len(truth), dtype=torch.bool)
    if objective.divergence == "total_variation":
        decided = ~_has_near_equals(rows)
    if objective.clip_mode == "zero" and (objective.entry_clip or objective.token_clip):
        for factor in (1 - NEAR_A_CLIP, 1 + NEAR_A_CLIP):
            moved = {
                name: getattr(objective, name) * factor
                for name in ("entry_clip", "token_clip")
                if getattr(objective, name) is not None
            }
            decided &= torch.isclose(rows.definition(replace(objective, **moved))[1], truth, atol=1e-12).all(
                1
            )
    return decided


def _has_near_equals(rows: Rows) -> Tensor:
    """`[n]` bool: whether rows that differ have an entry where log s and log t do so by rounding alone."""
    ls, lt = (z.double().log_softmax(1) for z in (rows.z_s, rows.z_t))
    support = rows.objective.support
    if support is not None:
        inside = chosen(ls, lt, support, rows.ids)
        ls, lt = on_support_of_both(ls, lt, inside, support.rest)
    near = (ls - lt).abs() <= 1e-5 * (1 + ls.abs() + lt.abs())  # false where both are -inf
    return near.any(1) & ~(rows.z_s == rows.z_t).all(1)
