"""What the operators' text and the options hold, and what calling the engine imports."""

import dataclasses
import inspect
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

from definitions import objective_of
from fuzzing import fuzz
from opsd_kernels import Hidden, Logits, LogLinear, Mixture, Routed, Support, loss
from opsd_kernels.divergences import table
from opsd_kernels.engine import packing
from opsd_kernels.objectives import RESTS
from opsd_kernels.options import LossOptions

floats = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
maybe = partial(st.one_of, st.none())
tensors = st.builds(lambda: torch.zeros(1))
hidden = st.builds(Hidden, tensors, tensors, maybe(tensors), logit_scale=positive, softcap=maybe(positive))
plain_source = st.one_of(hidden, st.builds(Logits, tensors))


def streams(of: Any, factor: Any) -> Any:
    return st.lists(st.tuples(st.one_of(tensors, factor), of), min_size=1, max_size=3)


loglinear = st.builds(LogLinear, streams(plain_source, floats), mix=st.sampled_from(["auto", "logits"]))
mixture = st.builds(Mixture, streams(st.one_of(plain_source, loglinear), positive))
single = st.one_of(plain_source, loglinear, mixture)
teachers = st.one_of(single, st.builds(Routed, st.lists(single, min_size=1, max_size=3), tensors))
supports = st.one_of(
    st.builds(
        Support,
        st.integers(1, 99),
        st.sampled_from(["student", "teacher", "union", "intersection"]),
        st.sampled_from(RESTS),
    ),
    st.just(Support(None, "given")),
)
objectives = st.builds(
    objective_of,
    st.sampled_from(list(table())),
    st.floats(0, 1),
    entry_clip=maybe(positive),
    clip_mode=st.sampled_from(["zero", "scale"]),
    token_clip=maybe(positive),
    support=maybe(supports),
)
options = st.builds(
    packing.Options, objectives, positive, maybe(st.integers(1, 2**50)), st.sampled_from(["torch", "triton"]),
    maybe(positive), maybe(st.just("bfloat16")), maybe(st.integers(0, 2**40)),
)  # fmt: skip


def skeleton(x: Any) -> Any:
    """Everything in it, with a tensor's identity in its place."""
    if isinstance(x, torch.Tensor):
        return ("tensor", id(x))
    if dataclasses.is_dataclass(x):
        return (type(x), *[skeleton(getattr(x, f.name)) for f in dataclasses.fields(x)])
    return [skeleton(y) for y in x] if isinstance(x, list | tuple) else x


@fuzz(150, plain_source, teachers, options)
def test_packing_loses_nothing(student: Any, teacher: Any, packed: packing.Options) -> None:
    text = packing.pack(student, teacher, packed)
    found = packing.unpack(text, student.tensors, teacher.tensors)
    assert skeleton(found) == skeleton((student, teacher, packed))
    assert packing.pack(*found) == text


def test_options_are_the_signature_of_loss() -> None:
    signature = inspect.signature(loss).parameters.values()
    keywords = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    assert {f.name: f.default for f in dataclasses.fields(LossOptions)} == keywords
    assert [f.name for f in dataclasses.fields(LossOptions)] == list(keywords)  # they are passed by position


def test_the_torch_backend_needs_no_triton() -> None:
    """Nor does a call of it import what importing the package does not."""
    program = """
import sys, torch
from opsd_kernels import loss, loss_and_stats
h, w = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
loss(h, h.detach() + 1, w, reduction="none").sum().backward()
loss_and_stats(h, h.detach() + 1, w, grad_filter=1e-3).loss.backward()
unwanted = {"opsd_kernels.backends.triton", "triton", "transformers", "opsd_train"}
print(*sorted(unwanted & set(sys.modules)), "end")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["end"]
