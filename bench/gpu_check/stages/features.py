"""What a call may have besides an objective and a shape, each checked for a backend, dtype and objective."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.gpu_check.rule import accurate, case_accurate
from bench.gpu_check.setting import Setting, Skip, need, on
from opsd_kernels import Hidden, Logits, loss
from opsd_kernels.testing import (
    Case,
    Outcome,
    eager_loss,
    evaluate,
    hidden_case,
    hidden_sources,
    logits_case,
    logits_of,
    relative_error,
    upstream_of,
    with_gradient,
)

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Feature:
    """What a feature is checked on.

    Args:
        loss: `opsd_kernels.loss` with the backend bound.
        backend: its name.
        setting: device and sizes.
        dtype: of hidden states, head and logits.
        objective: its name.
        seed: of the random numbers.
    """

    loss: Callable[..., torch.Tensor]
    backend: str
    setting: Setting
    dtype: torch.dtype
    objective: str
    seed: int = 0

    @property
    def rows(self) -> int:
        """N."""
        if not self.setting.small:
            return 37
        return 8 if self.backend == "torch" else 4

    @property
    def vocab(self) -> int:
        """V, ragged."""
        return 97 if self.setting.small else 1_009

    def hidden(self, **options: Any) -> Case:
        """A case of hidden states on the device."""
        return self.prepared(hidden_case(self.rows, self.vocab, 24, seed=self.seed, **options))

    def logits(self, **options: Any) -> Case:
        """A case of logits on the device."""
        return self.prepared(logits_case(self.rows, self.vocab, seed=self.seed, **options))

    def prepared(self, case: Case) -> Case:
        """The case on the device, in the dtype, with the objective."""
        return on(case, self.setting.device).to(self.dtype).having(objective=self.objective)

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Values on the device."""
        return values.to(self.setting.device)

    @property
    def mask(self) -> torch.Tensor:
        """bool `[N]`, two of three rows."""
        return self.tensor(torch.arange(self.rows) % 3 != 1)

    def accurate(self, case: Case, **options: Any) -> Outcome:
        """The rule."""
        return case_accurate(case, self.backend, **options)


def close_pairs(f: Feature) -> None:
    """Pairs that nearly agree, from logits; the cosine has few digits there, as in the engine's tests."""
    case = f.logits(gap=0.01)
    for reduction in REDUCTIONS:
        f.accurate(case.having(reduction=reduction), cosine=1e-3)
    if f.objective == "jsd":
        assert (f.loss(case.student, case.teacher, objective="jsd", reduction="none") >= 0).all(), "negative"


def padded_columns(f: Feature) -> None:
    """Columns that a bias of -inf takes out, within and behind the vocabulary: as if they were not there."""
    case = f.hidden(bias=True)
    student, teacher = hidden_sources(case)
    assert student.bias is not None
    keep = f.tensor(torch.arange(f.vocab) % 7 != 3)
    keep[-f.vocab // 4 :] = False
    bias = student.bias.where(keep, -torch.inf)
    padded = replace(case, student=replace(student, bias=bias), teacher=replace(teacher, bias=bias))
    head: dict[str, Any] = {"weight": student.weight[keep], "bias": student.bias[keep]}
    sliced = replace(case, student=replace(student, **head), teacher=replace(teacher, **head))
    for reduction in ("sum", "none"):
        _as_sliced(f, padded.having(reduction=reduction), sliced.having(reduction=reduction), keep)


def _as_sliced(f: Feature, padded: Case, sliced: Case, keep: torch.Tensor) -> None:
    """Gradients of the columns that are in by the rule, against the sliced case's truth; the others 0."""
    actual = evaluate(f.loss, padded)
    tokens = sliced.having(reduction="none")
    upstream = upstream_of(actual.loss)
    truth = evaluate(_reference, sliced.to(torch.float64), upstream)
    eager = evaluate(eager_loss, sliced, upstream)
    errors = (evaluate(eager_loss, tokens).loss - evaluate(_reference, tokens.to(torch.float64)).loss).abs()
    yardstick = eager.loss if actual.loss.dim() else truth.loss + errors.sum()
    accurate("loss", actual.loss, truth.loss, yardstick, f.backend)
    for name, gradient in actual.gradients.items():
        if name != "hidden":
            assert (gradient[~keep] == 0).all(), f"d{name}: not zero outside the vocabulary"
            gradient = gradient[keep]
        accurate(f"d{name}", gradient, truth.gradients[name], eager.gradients[name], f.backend)


def _reference(*sources: Any, **options: Any) -> torch.Tensor:
    return loss(*sources, backend="reference", **options)


def head_options(f: Feature) -> None:
    """Soft-cap, bias, scale and temperature together."""
    case = f.hidden(bias=True, softcap=20.0, logit_scale=0.7).having(temperature=1.3)
    for reduction in REDUCTIONS:
        f.accurate(case.having(reduction=reduction))


def masks_and_weights(f: Feature) -> None:
    """Rows that do not count, weights of which some are 0, a denominator of the caller's."""
    weight = f.tensor((torch.arange(f.rows) % 4).float() / 2)
    case = f.hidden().having(mask=f.mask, token_weight=weight)
    for reduction in REDUCTIONS:
        f.accurate(case.having(reduction=reduction))
    f.accurate(f.hidden().having(denominator=10.0))


def nan_in_dead_rows(f: Feature) -> None:
    """What stands in masked rows is never read."""
    case = f.hidden().having(mask=f.mask)
    student, teacher = hidden_sources(case)
    dirty = [replace(x, hidden=x.hidden.where(f.mask[:, None], torch.nan)) for x in (student, teacher)]
    _same(evaluate(f.loss, replace(case, student=dirty[0], teacher=dirty[1])), evaluate(f.loss, case))


def frozen_head(f: Feature) -> None:
    """A head without gradient: dH by the rule, and a bias that is trained alone."""
    case = f.hidden(bias=True)
    upstream = f.tensor(torch.tensor(1.0))
    truth = evaluate(_reference, case.to(torch.float64), upstream)
    eager = evaluate(eager_loss, case, upstream)
    for trained in ("hidden", "bias"):
        source, leaves = with_gradient(case.student)
        frozen = {name: x.detach() for name, x in leaves.items() if name != trained}
        f.loss(replace(source, **frozen), case.teacher, **case.options).backward()  # type: ignore[arg-type]
        gradient = leaves[trained].grad
        assert gradient is not None, f"d{trained}: missing"
        accurate(f"d{trained}", gradient, truth.gradients[trained], eager.gradients[trained], f.backend)


def nothing_counts(f: Feature) -> None:
    """No rows at all, and rows of which none counts: a loss of exactly 0 and gradients of exactly 0."""
    for case in (
        f.prepared(hidden_case(0, f.vocab, 24)),
        f.hidden().having(mask=f.tensor(torch.zeros(f.rows, dtype=torch.bool))),
        f.hidden().having(token_weight=f.tensor(torch.zeros(f.rows))),
    ):
        for reduction in REDUCTIONS:
            outcome = evaluate(f.loss, case.having(reduction=reduction))
            assert (outcome.loss == 0).all(), f"loss {outcome.loss}"
            for name, gradient in outcome.gradients.items():
                assert (gradient == 0).all(), f"d{name} is not 0"


def strides(f: Feature) -> None:
    """Transposed, spread and expanded inputs, and rows with a gap: as their contiguous copies."""
    case = f.hidden()
    student, teacher = hidden_sources(case)
    head = student.weight.T.contiguous().T
    gap = torch.empty(f.rows, 3, student.hidden.shape[1], dtype=f.dtype, device=head.device)
    gap[:, 1] = student.hidden
    expanded = teacher.hidden[:1].expand(f.rows, -1)
    odd = replace(case, student=Hidden(gap[:, 1], head), teacher=Hidden(expanded, head))
    for reduction in ("mean", "none"):
        f.accurate(odd.having(reduction=reduction))
    z_s, z_t = logits_of(f.logits())
    wide = torch.empty(f.rows, f.vocab + 5, dtype=f.dtype, device=z_s.device)
    wide[:, 2:-3] = z_s
    for z in (wide[:, 2:-3], z_s.T.contiguous().T):
        f.accurate(Case(Logits(z), Logits(z_t), {"objective": f.objective}))


def logits_and_shapes(f: Feature) -> None:
    """Logits as they are, several token dimensions, a teacher with a head of its own, a cut vocabulary."""
    for reduction in REDUCTIONS:
        f.accurate(f.logits().having(reduction=reduction))
        other = hidden_case((2, f.rows // 2), f.vocab, 24, teacher_width=40, seed=f.seed)
        f.accurate(f.prepared(other).having(reduction=reduction))
        f.accurate(f.hidden().having(reduction=reduction, vocab_size=f.vocab - 9))


def chunks(f: Feature) -> None:
    """A budget of three rows at a time, of twelve per token: dW is summed over many chunks."""
    for reduction, rows in (("mean", 3), ("sum", 3), ("none", 12)):
        f.accurate(f.hidden().having(workspace_bytes=2 * rows * 4 * f.vocab, reduction=reduction))


def mixed_dtypes(f: Feature) -> None:
    """Hidden states in fp32 with a head of the dtype, and the reverse."""
    case = hidden_case(f.rows, f.vocab, 24, seed=f.seed).having(objective=f.objective)
    case = on(case, f.setting.device)
    f.accurate(case.to(torch.float32, head=f.dtype))
    f.accurate(case.to(f.dtype, head=torch.float32))


def rows_as_mask(f: Feature) -> None:
    """`rows=` gives the bits that the mask gives."""
    need("rows")
    rows = f.mask.nonzero()[:, 0]
    for reduction in REDUCTIONS:
        case = f.hidden().having(reduction=reduction)
        _same(evaluate(f.loss, case.having(rows=rows)), evaluate(f.loss, case.having(mask=f.mask)))


def gradient_filter(f: Feature) -> None:
    """A filter far below the rounding of bf16 leaves the value alone and the gradients within 1%."""
    need("grad_filter")
    case = f.hidden(gap=3.0)
    whole, filtered = evaluate(f.loss, case), evaluate(f.loss, case.having(grad_filter=1e-7))
    assert torch.equal(whole.loss, filtered.loss), "the value changed"
    for name, gradient in whole.gradients.items():
        error = relative_error(filtered.gradients[name], gradient)
        assert error <= 1e-2, f"d{name}: relative error {error:.1e}"


def other_stream(f: Feature) -> None:
    """On a stream that is not the default one, while that one is busy."""
    if f.setting.device != "cuda":
        raise Skip("needs a CUDA device: streams")
    case = f.hidden()
    expected = evaluate(f.loss, case)
    busy = torch.randn(4096, 4096, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        busy = busy @ busy * 1e-3
    with torch.cuda.stream(stream):
        actual = evaluate(f.loss, case)
    stream.synchronize()
    _same(actual, expected)


def other_device(f: Feature) -> None:
    """Tensors on a device that is not the current one."""
    if f.setting.device != "cuda" or torch.cuda.device_count() < 2:
        raise Skip("needs two CUDA devices")
    case = f.hidden()
    there = evaluate(f.loss, on(case, "cuda:1"))
    assert torch.cuda.current_device() == 0, "the current device changed"
    here = evaluate(f.loss, case)
    _same(Outcome(there.loss.to("cuda:0"), {k: x.to("cuda:0") for k, x in there.gradients.items()}), here)


def _same(actual: Outcome, expected: Outcome) -> None:
    assert torch.equal(actual.loss, expected.loss), "other bits in the loss"
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), f"other bits in d{name}"


FEATURES: dict[str, Callable[[Feature], None]] = {
    "close pairs": close_pairs,
    "-inf padded columns": padded_columns,
    "soft-cap, bias, scale, temperature": head_options,
    "masks, token weights, denominator": masks_and_weights,
    "NaN in dead rows": nan_in_dead_rows,
    "frozen head": frozen_head,
    "no rows, no live rows": nothing_counts,
    "strides": strides,
    "logits, token dimensions, teacher's head": logits_and_shapes,
    "many chunks": chunks,
    "mixed dtypes": mixed_dtypes,
    "rows=": rows_as_mask,
    "grad_filter=": gradient_filter,
    "another stream": other_stream,
    "another device": other_device,
}
