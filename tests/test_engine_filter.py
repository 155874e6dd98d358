"""`grad_filter` against the same filter written anew over whole fp64 logits."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels import Hidden, Logits, loss, loss_and_stats, ops
from opsd_kernels.backends.triton import tiles
from opsd_kernels.engine.plan import spans
from opsd_kernels.testing import Case, Outcome, evaluate, hidden_case, hidden_sources, relative_error

torch_backend, triton_backend = (
    importlib.import_module(f"opsd_kernels.backends.{name}") for name in ("torch", "triton")
)
N, V, H, CHUNK = 30, 211, 12, 6
ONE = torch.ones(())
ROUNDING = 3e-6  # of an fp32 gradient, relative in the L2 norm: the products' and the logits' rounding


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the interpreter: the column filter has several blocks of rows and columns, ragged last ones."""
    small = tiles.Tiles(block=256, stats_block=256, splits=1, filter_rows=4, filter_block=64)
    monkeypatch.setattr(tiles, "DEFAULT", small)
    return


def filter_case(**options: Any) -> Case:
    """24 live rows of 30, which are 4 chunks of 6; all heads have a bias, a scale and a soft-cap."""
    case = hidden_case(N, V, H, bias=True, softcap=12.0, logit_scale=1.5).to(torch.float32)
    mask = torch.arange(N) % 5 != 1
    budget = 2 * CHUNK * V * 4
    return case.having(
        objective="forward_kl", mask=mask, temperature=1.4, workspace_bytes=budget, reduction="sum", **options
    )


def signed_weights() -> torch.Tensor:
    """Negative, small and large ones, and one zero at a row that the mask keeps."""
    weight = torch.linspace(-2, 3, N)
    weight[7] = 0
    return weight


def whole_gradient(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses `[N]` and their gradients `[N, V]` by `hidden @ weight.T + bias`, unweighted, in fp64."""
    student, teacher = hidden_sources(case.to(torch.float64))
    linear = [torch.nn.functional.linear(x.hidden, x.weight, x.bias) for x in (student, teacher)]
    linear[0].requires_grad_()
    z = [x * student.logit_scale for x in linear]
    if student.softcap is not None:
        z = [student.softcap * torch.tanh(x / student.softcap) for x in z]
    log_s, log_t = (torch.log_softmax(x / case.options.get("temperature", 1.0), -1) for x in z)
    tokens = (log_t.exp() * (log_t - log_s)).detach().sum(-1)
    value = -(log_t.exp().detach() * log_s).sum()
    (gradient,) = torch.autograd.grad(value, linear[0])
    return tokens, gradient


def filtered(case: Case, eps: float) -> tuple[Outcome, torch.Tensor, list[int]]:
    """Loss and gradients, `[N]` share of |dlogits| left out, and the live columns of each chunk."""
    student, _ = hidden_sources(case.to(torch.float64))
    tokens, gradient = whole_gradient(case)
    weight = case.options.get("token_weight", torch.ones(N)).double() * case.options["mask"]
    rows = weight.nonzero()[:, 0]
    # A factor of every logit is no reason to keep a column: the bound is that of the softmax's own argument.
    bound = eps * student.logit_scale / case.options["temperature"]
    kept, share, live_counts = torch.zeros(N, V).double(), torch.zeros(N).double(), []
    for span in spans(rows.numel(), CHUNK):
        chunk = gradient[rows[span]]
        most = chunk.abs().amax(0)
        assert ((most / bound - 1).abs() > 1e-4).all(), "a column too close to call in fp32"
        live = most > bound
        kept[rows[span]] = chunk * live
        share[rows[span]] = 1 - (chunk * live).abs().sum(1) / chunk.abs().sum(1)
        live_counts.append(int(live.sum()))
    dz = kept * weight[:, None]
    gradients = {"hidden": dz @ student.weight, "weight": dz.T @ student.hidden}
    gradients["bias"] = (gradient * weight[:, None]).sum(0)
    return Outcome((tokens * weight).sum(), gradients), share, live_counts


def assert_same(actual: Outcome, expected: Outcome, rounding: float = ROUNDING) -> None:
    torch.testing.assert_close(actual.loss.double(), expected.loss.double(), rtol=1e-6, atol=0)
    for name, gradient in expected.gradients.items():
        found = actual.gradients[name]
        assert relative_error(found, gradient) < rounding, name
        torch.testing.assert_close(
            found.double(), gradient.double(), rtol=0, atol=rounding * gradient.abs().max()
        )


@pytest.mark.parametrize(
    ("eps", "weighted", "backend"),
    [(3e-3, False, "torch"), (3e-3, True, "torch"), (1e-2, True, "torch"), (1e-2, True, "triton")],
)
def test_dead_columns_are_left_out_chunk_by_chunk(eps: float, weighted: bool, backend: str) -> None:
    case = filter_case(backend=backend)
    if weighted:
        case = case.having(token_weight=signed_weights())
    expected, share, live = filtered(case, eps)
    assert len(live) == 4
    assert all(0 < count < V for count in live)
    assert len(set(live)) > 1
    outcome = evaluate(loss, case.having(grad_filter=eps), ONE)
    assert_same(outcome, expected)
    # The filter is seen: without it dH and dW are further away than any rounding.
    exact = evaluate(loss, case.having(backend="torch"), ONE)
    for name in ("hidden", "weight"):
        assert relative_error(exact.gradients[name], expected.gradients[name]) > 100 * ROUNDING
    found = loss_and_stats(*trained(case), grad_filter=eps, **case.options)
    torch.testing.assert_close(found.stats.dropped_share.double(), share, rtol=0, atol=1e-6)
    assert share.max() > 1e-3
    assert torch.equal(found.loss.detach(), outcome.loss)


def trained(case: Case) -> tuple[Any, Any]:
    """Student with gradient, and teacher."""
    student, teacher = hidden_sources(case)
    return replace(student, hidden=student.hidden.clone().requires_grad_()), teacher


def test_the_bias_is_not_filtered() -> None:
    """It costs no matrix product, so that nothing of it is left out: every column, dead or live."""
    case = filter_case(token_weight=signed_weights())
    exact = evaluate(loss, case, ONE).gradients["bias"]
    assert torch.equal(evaluate(loss, case.having(grad_filter=0.5), ONE).gradients["bias"], exact)


@pytest.mark.parametrize(
    ("objective", "backend"),
    [("opsd", "torch"), ("reverse_kl", "torch"), ("jsd", "torch"), ("opsd", "triton")],
)
def test_a_tiny_eps_is_no_filter(objective: str, backend: str) -> None:
    case = filter_case(backend=backend, token_weight=signed_weights()).having(objective=objective)
    exact = evaluate(loss, case, ONE)
    assert_same(evaluate(loss, case.having(grad_filter=1e-30), ONE), exact, 1e-6)


def test_an_eps_that_drops_everything() -> None:
    case = filter_case(grad_filter=0.999)
    outcome = evaluate(loss, case, ONE)
    assert outcome.loss > 0.1
    assert outcome.gradients["hidden"].abs().max() == 0
    assert outcome.gradients["weight"].abs().max() == 0
    assert outcome.gradients["bias"].abs().max() > 0
    share = loss_and_stats(*trained(case), **case.options).stats.dropped_share
    assert torch.equal(share, case.options["mask"].float())


def test_the_bound_is_in_units_of_the_weight() -> None:
    """Weights a million times smaller drop the same columns, and the upstream factor plays no part."""
    case = filter_case(token_weight=signed_weights(), grad_filter=1e-2)
    small = case.having(token_weight=signed_weights() * 2.0**-20)
    expected = evaluate(loss, case, ONE)
    for outcome, factor in (
        (evaluate(loss, small, ONE), 2.0**20),
        (evaluate(loss, case, ONE * 2.0**-30), 2.0**30),
    ):
        for name, gradient in expected.gradients.items():
            assert torch.equal(outcome.gradients[name] * factor, gradient)


def test_weights_from_statistics() -> None:
    """The bound follows the weights that a function returns."""
    case = filter_case(grad_filter=1e-2)
    function = lambda stats: stats.student_entropy - 1  # noqa: E731
    stats = loss_and_stats(case.student, case.teacher, **case.options).stats
    expected, _, _ = filtered(case.having(token_weight=stats.student_entropy - 1), 1e-2)
    assert_same(evaluate(loss, case.having(token_weight=function), ONE), expected, 1e-5)


@pytest.mark.parametrize("trained_field", ["hidden", "weight", "bias"])
def test_only_what_is_trained(trained_field: str) -> None:
    case = filter_case(grad_filter=1e-2)
    expected = evaluate(loss, case, ONE).gradients[trained_field]
    student, teacher = hidden_sources(case)
    leaf = getattr(student, trained_field).clone().requires_grad_()
    loss(replace(student, **{trained_field: leaf}), teacher, **case.options).backward()
    assert torch.equal(leaf.grad, expected)


def test_a_row_of_nan_stays_visible() -> None:
    """Its chunk is not filtered at all; the rows of the other chunks have the filter's gradient."""
    case = filter_case(grad_filter=1e-2)
    clean, plain = evaluate(loss, case, ONE), evaluate(loss, case.having(grad_filter=None), ONE)
    _, teacher = hidden_sources(case)
    broken = teacher.hidden.clone()
    broken[0] = torch.nan
    outcome = evaluate(loss, replace(case, teacher=replace(teacher, hidden=broken)), ONE)
    assert outcome.loss.isnan()
    assert outcome.gradients["hidden"][0].isnan().all()
    assert outcome.gradients["weight"].isnan().all()
    dh, second_chunk = outcome.gradients["hidden"], int(case.options["mask"].nonzero()[CHUNK])
    assert relative_error(dh[1:second_chunk], plain.gradients["hidden"][1:second_chunk]) < 1e-6
    assert relative_error(dh[1:second_chunk], clean.gradients["hidden"][1:second_chunk]) > 1e-4
    assert torch.equal(dh[second_chunk:], clean.gradients["hidden"][second_chunk:])


@pytest.mark.parametrize("module", [torch_backend, triton_backend], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (4, 64), (5, 65), (9, 130), (0, 70)])
def test_live_columns(rows: int, vocab: int, dtype: torch.dtype, module: Any) -> None:
    """A value at its bound is dead, one beyond it live; NaN is, also where nothing may be left out."""
    dz = torch.randn(rows, vocab + 6, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :vocab]
    bound = torch.linspace(0.5, 2.5, max(rows, 1))[:rows]
    if rows > 1:
        dz[:, ::7] = 0
        dz[-1, -1], dz[1, 0], dz[0, vocab // 2] = torch.nan, torch.inf, bound[0]
        dz[:, 1] = bound[:, None].expand(rows, 2)[:, 0].to(dtype)
        bound[-1] = torch.inf
    expected = torch.tensor(
        [
            any(not abs(x) <= b for x, b in zip(column, bound.tolist(), strict=True))
            for column in dz.T.tolist()
        ],
        dtype=torch.bool,
    )
    assert torch.equal(module.live_columns(dz, bound), expected)
    if rows > 1:
        assert expected.any()
        assert expected[-1]
        assert not expected.all()


class Gemms(TorchDispatchMode):
    """Operand shapes of the matrix products, those inside the operators included."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        if func.namespace == "opsd_kernels":
            with self:
                return ops.IMPLEMENTATIONS[operation][0](*args, **(kwargs or {}))
        if operation in ("mm", "addmm"):
            self.shapes.append(tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))[-2:])
        return func(*args, **(kwargs or {}))


def test_gemms_have_the_live_columns_alone() -> None:
    case = filter_case()
    _, _, live = filtered(case, 1e-2)
    with Gemms() as gemms:
        evaluate(loss, case.having(grad_filter=1e-2), ONE)
    expected = []
    for count in live:
        expected += [((CHUNK, H), (H, V))] * 2 + [((CHUNK, count), (count, H)), ((count, CHUNK), (CHUNK, H))]
    assert gemms.shapes == expected


@pytest.mark.parametrize("head", [torch.bfloat16, torch.float16], ids=str)
def test_two_byte_heads(head: torch.dtype) -> None:
    case = filter_case(token_weight=signed_weights()).to(head)
    expected, _, _ = filtered(case, 1e-2)
    outcome = evaluate(loss, case.having(grad_filter=1e-2), ONE)
    assert_same(outcome, expected, torch.finfo(head).eps)


def test_where_there_is_no_filter() -> None:
    case = filter_case(grad_filter=1e-2)
    assert isinstance(case.student, Hidden)
    with pytest.raises(ValueError, match="grad_filter: expected None with reduction='none'"):
        loss(case.student, case.teacher, grad_filter=1e-2, reduction="none")
    with pytest.raises(ValueError, match="grad_filter: expected None for logits"):
        loss(Logits(torch.zeros(2, 3)), Logits(torch.zeros(2, 3)), grad_filter=1e-2)
    for eps in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="grad_filter: expected a finite number above 0"):
            loss(case.student, case.teacher, grad_filter=eps)
    # Without a gradient there is nothing to leave out.
    assert loss_and_stats(case.student, case.teacher, grad_filter=0.999).stats.dropped_share.abs().max() == 0
