"""Tensors that no operator can read, and transforms that none knows, are refused by the argument's name."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from opsd_kernels import (
    Hidden,
    Logits,
    LogLinear,
    Mixture,
    Objective,
    Routed,
    Sampled,
    Support,
    Target,
    TopK,
    loss,
    loss_and_stats,
    parallel,
    token_logprobs,
    token_stats,
)
from opsd_kernels.recipes import Estimator, Recipe, Term
from wrong_calls import BIAS, H_S, H_T, IDS, MASK, META, W, Z, raises

ONE = Hidden(H_T, W)
GIVEN = Objective("forward_kl", support=Support(None, "given"))
K1 = Recipe((Term(Estimator("k1")),))
LOG_PROBS = Z.log_softmax(-1)[..., :2]
ENTRIES = torch.arange(2).expand(2, 3, 2).clone()
MANY = 10**400

# Every function, and every tensor that an argument can be: the name that the error has, and the call.
Call = Callable[[Tensor], Any]
DENSE: dict[str, tuple[Tensor, Call]] = {
    "student.hidden": (H_S, lambda x: {"student": Hidden(x, W)}),
    "student.weight": (W, lambda x: {"student": Hidden(H_S, x)}),
    "student.bias": (BIAS, lambda x: {"student": Hidden(H_S, W, x)}),
    "student.z": (Z, lambda x: {"student": Logits(x), "teacher": Logits(Z)}),
    "mask": (MASK, lambda x: {"mask": x}),
    "rows": (torch.arange(3), lambda x: {"rows": x}),
}
TEACHERS: dict[str, tuple[Tensor, Call]] = {
    "teacher.hidden": (H_T, lambda x: {"teacher": Hidden(x, W)}),
    "teacher.z": (Z, lambda x: {"teacher": Logits(x)}),
    "teacher.streams[1].hidden": (H_T, lambda x: {"teacher": LogLinear([(1.0, ONE), (2.0, Hidden(x, W))])}),
    "teacher.streams[0] factor": (torch.ones(2, 3), lambda x: {"teacher": LogLinear([(x, ONE)])}),
    "teacher.index": (IDS, lambda x: {"teacher": Routed([ONE, ONE], x)}),
    "teacher.sources[1].weight": (W, lambda x: {"teacher": Routed([ONE, Hidden(H_T, x)], IDS)}),
}
WHOLE: dict[str, tuple[Tensor, Call]] = {
    "teacher.streams[0].z": (Z, lambda x: {"teacher": Mixture([(0.5, Logits(x)), (0.5, ONE)])}),
    "teacher.sources[0].z": (
        Z,
        lambda x: {"teacher": Target("veto", [Logits(x)], {"beta": 0.5})},
    ),
    "teacher.logprobs": (LOG_PROBS, lambda x: {"teacher": TopK(ENTRIES, x), "objective": GIVEN}),
    "teacher.ids": (ENTRIES, lambda x: {"teacher": TopK(x, LOG_PROBS), "objective": GIVEN}),
    "support_ids": (ENTRIES, lambda x: {"support_ids": x, "objective": GIVEN}),
    "teacher.logprob": (
        -torch.ones(2, 3),
        lambda x: {"teacher": Sampled(x), "objective": K1, "token_ids": IDS},
    ),
    "data['reward']": (
        torch.ones(2),
        lambda x: {"data": {"reward": x}},
    ),
}
OF_LOSS: dict[str, tuple[Tensor, Call]] = {
    "token_weight": (torch.ones(2, 3), lambda x: {"token_weight": x}),
    "denominator": (torch.ones(1), lambda x: {"denominator": x}),
}
OF_PARALLEL = {"parallel.loss": parallel.loss, "parallel.token_stats": parallel.token_stats}
CASES = [
    *[(loss, name) for name in (DENSE | TEACHERS | WHOLE | OF_LOSS)],
    *[(loss_and_stats, name) for name in ("student.hidden", "teacher.hidden", "token_weight")],
    *[(token_stats, name) for name in (DENSE | TEACHERS | WHOLE)],
    *[(function, name) for function in OF_PARALLEL.values() for name in (DENSE | TEACHERS)],
    *[(token_logprobs, name) for name in DENSE],
    *[(parallel.token_logprobs, name) for name in DENSE],
]


def _nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x, x])


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def _csr(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x.reshape(-1, x.shape[-1]).to_sparse_csr()


UNLIKE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "meta": (lambda x: x.to(**META), "meta"),
    "sparse": (lambda x: x.to_sparse(), "torch.sparse_coo"),
    "csr": (_csr, "torch.sparse_csr"),
    "mkldnn": (lambda x: x.float().to_mkldnn(), "torch._mkldnn"),
    "nested": (_nested, "nested"),
    "jagged": (lambda x: torch.nested.as_nested_tensor([x, x], layout=torch.jagged), "nested"),
    "quantized": (_quantized, "torch.qint8"),
}


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _call(function: Callable[..., Any], given: dict[str, Any]) -> Callable[[], Any]:
    """The call with what it needs beside what is given."""
    both = {"student": Hidden(H_S, W), "teacher": ONE} | given
    if function in (token_logprobs, parallel.token_logprobs):
        del both["teacher"]
        both |= {"token_ids": IDS}
    return partial(function, **both)


@pytest.mark.parametrize("kind", UNLIKE)
@pytest.mark.parametrize(
    ("function", "name"), CASES, ids=[f"{f.__module__.split('.')[1]}.{f.__name__}-{n}" for f, n in CASES]
)
def test_layouts(function: Callable[..., Any], name: str, kind: str) -> None:
    tensor, call = (DENSE | TEACHERS | WHOLE | OF_LOSS)[name]
    make, got = UNLIKE[kind]
    given = call(make(tensor))
    raises(_call(function, given), (name, "plain dense tensor", got))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("function", [loss, loss_and_stats, token_stats, token_logprobs, parallel.loss])
def test_a_mask_is_of_bools(function: Callable[..., Any], dtype: torch.dtype) -> None:
    raises(_call(function, {"mask": MASK.to(dtype)}), ("mask", "torch.bool", str(dtype)))


@pytest.mark.parametrize(
    "value", [1e-40, 1e-20, 1e20, MANY, 10**5000], ids=["-40", "-20", "20", "400", "5000"]
)
@pytest.mark.parametrize("function", [loss, token_stats, token_logprobs, parallel.loss])
def test_a_temperature_that_leaves_nothing(function: Callable[..., Any], value: float) -> None:
    raises(_call(function, {"temperature": value}), ("temperature", "finite number above 0"))


NUMBERS: dict[str, dict[str, Any]] = {
    "student.softcap": {"student": Hidden(H_S, W, softcap=MANY)},
    "student.logit_scale": {"student": Hidden(H_S, W, logit_scale=1e-30)},
    "teacher.streams[0] factor": {"teacher": LogLinear([(MANY, ONE)])},
    "teacher.options['beta']": {"teacher": Target("veto", [ONE], {"beta": MANY})},
    "teacher.temperature": {"teacher": TopK(ENTRIES, LOG_PROBS, 1e-20), "objective": GIVEN},
    "denominator": {"denominator": MANY},
    "workspace_bytes": {"workspace_bytes": MANY},
    "grad_filter": {"grad_filter": MANY},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_beyond_floats(name: str) -> None:
    raises(_call(loss, NUMBERS[name]), (name,))


def _jvp(call: Callable[[Tensor], Any], x: Tensor) -> None:
    torch.func.jvp(call, (x,), (torch.ones_like(x),))


def _dual(call: Callable[[Tensor], Any], x: Tensor) -> None:
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, torch.ones_like(x)))


TRANSFORMS: dict[str, tuple[Callable[[Call, Tensor], Any], str]] = {
    "jvp": (_jvp, "torch.func"),
    "forward_ad": (_dual, "tangent"),
    "grad": (lambda call, x: torch.func.grad(call)(x), "torch.func"),
    "vmap": (lambda call, x: torch.vmap(call)(x[None]), "torch.vmap"),
    "compiled jvp": (lambda call, x: torch.compile(partial(_jvp, call), backend="eager")(x), "torch.func"),
}
MOVED = ["student.hidden", "student.weight", "student.bias", "teacher.hidden", "teacher.streams[0] factor"]
MOVED += ["student.z", "token_weight", "teacher.logprob", "teacher.logprobs", "data['reward']", "denominator"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", MOVED)
def test_transforms(name: str, transform: str) -> None:
    """Forward mode gave a tangent of 0 here: the operators have no rule for it, and none was missed."""
    if transform == "compiled jvp" and name != "student.hidden":
        return
    tensor, call = (DENSE | TEACHERS | WHOLE | OF_LOSS)[name]
    apply, got = TRANSFORMS[transform]
    raises(lambda: apply(lambda x: _call(loss, call(x))(), tensor.clone()), (name, "plain dense tensor", got))


@pytest.mark.parametrize("trained", [False, True])
def test_a_tangent_of_a_trained_student(trained: bool) -> None:
    x = H_S.clone().requires_grad_(trained)
    for function in (loss, loss_and_stats, token_stats):
        raises(lambda f=function: _dual(lambda h: f(h, H_T, W), x), ("student.hidden", "forward-mode"))


def test_tensors_of_a_dual_level_without_a_tangent_are_plain() -> None:
    with forward_ad.dual_level():
        found = loss(H_S, H_T, W)
    torch.testing.assert_close(found, loss(H_S, H_T, W), rtol=0, atol=0)
