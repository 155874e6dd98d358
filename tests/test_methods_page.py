"""The table of methods: complete, true, and every name usable."""

import re
from pathlib import Path

import pytest
import torch

import opsd_kernels
from opsd_kernels import Logits, get_method, methods
from opsd_kernels.methods.needs import columns
from opsd_kernels.methods.page import page
from opsd_kernels.methods.registry import MODULES
from opsd_kernels.recipes import Recipe
from opsd_kernels.schedules import linear
from opsd_kernels.tokens import DATA
from opsd_train.reading.contexts import context
from opsd_train.teachers.rule import KINDS

ROOT = Path(__file__).parent.parent
MECHANICS = {
    "reward", "advantage", "old_logprob", "rollout_logprob", "reference", "horizon", "turns", "exposure",
    "routing", "pool", "offline", "extrapolate", "private", "subnetwork", "spans",
}  # fmt: skip


def test_the_page_is_made_from_the_entries() -> None:
    """`python -m opsd_kernels.methods > docs/methods.md` brings it up to date."""
    assert (ROOT / "docs" / "methods.md").read_text() == page()


def test_every_method_is_on_the_page_once_and_has_its_test() -> None:
    text = page()
    assert {get_method(key).module for key in methods.names()} == set(MODULES)
    for key in methods.names():
        assert text.count(f"\n| `{key}` |") == 1
        file = ROOT / "tests" / f"test_methods_{get_method(key).module}.py"
        assert re.search(rf"^def test_{key}\(", file.read_text(), flags=re.MULTILINE), (key, file)


def test_every_module_of_entries_is_imported() -> None:
    folder = ROOT / "opsd_kernels" / "methods"
    with_entries = {
        f.stem for f in folder.glob("*.py") if re.search(r"^@method\(", f.read_text(), flags=re.M)
    }
    assert with_entries == set(MODULES)


@pytest.mark.parametrize("key", methods.names())
def test_entry_says_what_the_driver_understands(key: str) -> None:
    method = get_method(key)
    assert method.note.endswith((".", ")"))
    assert method.title
    assert method.teacher
    for word in method.driver:
        kind, _, name = word.partition(" ")
        if kind == "context":
            assert name in context.functions
        elif kind == "teacher":
            assert name.replace(" ", "_") in KINDS
        else:
            assert word in MECHANICS
    for name, spec in method.schedule.items():
        at_start = method.recipe(**{name: linear(0, **spec)})
        assert at_start == method.recipe()
        assert at_start != method.recipe(**{name: spec["end"]})


@pytest.mark.parametrize("key", methods.names())
def test_name_is_an_objective(key: str) -> None:
    """`loss(objective=name)` is the loss of the entry's recipe, and it asks for the columns that it names."""
    g = torch.Generator().manual_seed(0)
    recipe: Recipe = methods.recipe(key)
    student = Logits(torch.randn(2, 4, 24, generator=g).requires_grad_())
    teachers = {role: Logits(torch.randn(2, 4, 24, generator=g)) for role in recipe.roles}
    data = {name: _column(name) for name in columns(recipe)}
    ids = torch.randint(24, (2, 4), generator=g)
    given = {"token_ids": ids, "data": data, "temperature": 1.2}
    torch.manual_seed(0)  # what is left to chance is the same in both calls
    by_name = opsd_kernels.loss(student, teachers, objective=key, **given)
    assert torch.isfinite(by_name)
    if key not in opsd_kernels.named_objectives():
        torch.manual_seed(0)
        assert torch.equal(by_name, opsd_kernels.loss(student, teachers, objective=recipe, **given))


def _column(name: str) -> torch.Tensor:
    shape = {"sequence": (2,), "token": (2, 4), "teachers": (2, 4, 2)}[DATA[name][0]]
    if name in ("correct", "privileged", "selected"):
        return torch.tensor([True, False]).reshape(2, *[1] * (len(shape) - 1)).expand(shape)
    if name in ("group", "span", "turn", "chunk"):
        return torch.zeros(shape, dtype=torch.int64)
    return torch.linspace(-1, -0.1, torch.Size(shape).numel()).reshape(shape)


def test_unknown_names_and_options_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"method: expected one of .*got 'pw_opds' \(did you mean 'pw_opsd'"):
        get_method("pw_opds")
    with pytest.raises(ValueError, match=r"pw_opsd: expected options among least, .*; got 'tau'"):
        methods.recipe("pw_opsd", tau=1)
    with pytest.raises(ValueError, match=r"objective: .* got 'pw_opds' \(did you mean 'pw_opsd'"):
        opsd_kernels.loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(3, 2), objective="pw_opds")
