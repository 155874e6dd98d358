"""`divergences.def` in both of its languages, and what importing the engine brings along."""

import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from definitions import objective_of, token_losses
from opsd_kernels import Logits, Objective, divergences, loss, named_objectives
from opsd_kernels.divergences import LETTERS, TABLE, table

# What CUDA will do with the table, on the host: X-macro, two helpers, one function per expression.
PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstring>

static inline double times(double p, double x) { return p == 0 ? 0 : p * x; }
static inline double kl_term(double p, double q, double x) {
    return (x < 1 ? p * std::expm1(x) : q - p) - times(p, x);
}

static inline double mean_gap(double p, double q, double x, double c) {
    double top = p > q ? p : q, share = x < 0 ? c : 1 - c;
    return top * (share * std::expm1(-std::fabs(x)) - std::expm1(-share * std::fabs(x)));
}
static inline double mean_drift(double p, double q, double x, double c) {
    return c * x < 1 ? -p * std::expm1(c * x) : p - q * std::exp((c - 1) * x);
}
static inline double sign(double x) { return (x > 0) - (x < 0); }
using std::abs;
using std::exp;
using std::expm1;

#define DIVERGENCE(name, value, slack, weight)                                        \
    struct name {                                                                     \
        static void eval(double s, double t, double d, double rs, double rt,          \
                         double beta, double* out) {                                  \
            (void)s; (void)t; (void)d; (void)rs; (void)rt; (void)beta;                \
            out[0] = (value); out[1] = (slack); out[2] = (weight);                    \
        }                                                                             \
    };
#include "divergences.def"
#undef DIVERGENCE

int main() {
    char wanted[64];
    double s, t, d, rs, rt, beta, out[3];
    while (std::scanf("%63s %lf %lf %lf %lf %lf %lf", wanted, &s, &t, &d, &rs, &rt, &beta) == 7) {
#define DIVERGENCE(name, value, slack, weight) \
        if (!std::strcmp(wanted, #name)) { name::eval(s, t, d, rs, rt, beta, out); }
#include "divergences.def"
#undef DIVERGENCE
        std::printf("%.17g %.17g %.17g\n", out[0], out[1], out[2]);
    }
}
"""


def _times(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(p == 0, 0.0, p * x)


def _kl_term(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 1, p * torch.expm1(x), q - p) - _times(p, x)


def _mean_gap(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """By the logarithm of the geometric mean; near 0 the series."""
    far = (1 - c) * p + c * q - p ** (1 - c) * q**c
    series = sum((c - c**n) * x**n / math.factorial(n) for n in range(2, 9))
    return torch.where(x.abs() < 0.03, p * series, far)


def _mean_drift(p: torch.Tensor, q: torch.Tensor, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 0.03, -p * torch.expm1(c * x), p - p ** (1 - c) * q**c)


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "abs": torch.abs,
    "sign": torch.sign,
    "times": _times,
    "kl_term": _kl_term,
    "mean_gap": _mean_gap,
    "mean_drift": _mean_drift,
}


def _inputs(count: int) -> list[tuple[float, ...]]:
    """s, t, d, rs, rt, beta of entries from nearly equal to 15 orders of magnitude apart."""
    rng = random.Random(0)
    rows: list[tuple[float, ...]] = []
    for _ in range(count):
        ls = rng.uniform(-30, 0)
        lt = ls + rng.choice((1e-6, 1e-2, 1.0, 5.0)) * rng.uniform(-1, 1)
        beta = rng.choice((0.1, 0.5, 0.9))
        x = torch.tensor([ls, lt], dtype=torch.float64)
        s, t = x.exp()
        lm = (beta * t + (1 - beta) * s).log()
        rows.append((float(s), float(t), ls - lt, float(lm - x[0]), float(lm - x[1]), beta))
    return rows


def _in_python(name: str, rows: list[tuple[float, ...]]) -> torch.Tensor:
    columns = torch.tensor(rows, dtype=torch.float64).T
    line = table()[name]
    sources = (line.value, line.slack, line.weight)
    return torch.stack([divergences.compile_expression(x, FUNCTIONS)(*columns) for x in sources], -1)


def test_the_table_parses() -> None:
    plain = ["forward_kl", "reverse_kl", "reverse_kl_sg"]
    mixtures = ["jsd", "skew_forward", "skew_reverse", "skew_reverse_sg"]
    assert list(table()) == [*plain, *mixtures, "total_variation", "alpha", "mixed"]
    assert LETTERS == ("s", "t", "d", "rs", "rt", "beta")
    assert [name for name, line in table().items() if line.uses_mixture] == mixtures
    for name, line in table().items():
        assert line.name == name
        assert all((line.value, line.slack, line.weight))
    lines = [x for x in TABLE.read_text().splitlines() if x and not x.startswith("//")]
    assert len(lines) == len(table()), "a line of the table that the parser does not see"


@pytest.mark.parametrize("name", table())
def test_every_divergence_has_a_definition_in_the_reference(name: str) -> None:
    """And the table's three expressions fit it: value - slack is the term, weight its derivative."""
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = torch.randn(2, 40, 23, generator=generator, dtype=torch.float64) * 2
    objective = objective_of(name, beta=0.3)
    leaf = z_s.requires_grad_()
    token = loss(Logits(leaf), Logits(z_t), objective=objective, reduction="none", backend="reference")
    token.sum().backward()
    ls, lt = z_s.detach().log_softmax(-1), z_t.log_softmax(-1)
    s, t = ls.exp(), lt.exp()
    lm = (0.3 * t + 0.7 * s).log()
    rows = torch.stack([x.flatten() for x in (s, t, ls - lt, lm - ls, lm - lt, torch.full_like(s, 0.3))], -1)
    value, slack, weight = (x.reshape(40, 23) for x in _in_python(name, rows.tolist()).unbind(-1))
    torch.testing.assert_close(value.sum(-1), token.detach())
    torch.testing.assert_close(slack.sum(-1), torch.zeros(40, dtype=torch.float64))
    torch.testing.assert_close(weight - s * weight.sum(-1, keepdim=True), leaf.grad)


@pytest.mark.parametrize("name", table())
def test_the_terms_are_the_published_ones(name: str) -> None:
    """Entry by entry, since that is what the entry clip compares with tau."""
    rows = _inputs(300)
    value, slack, _ = _in_python(name, rows).unbind(-1)
    s, t, _, _, _, beta = torch.tensor(rows, dtype=torch.float64).T
    m = beta * t + (1 - beta) * s
    terms = {
        "forward_kl": t * (t / s).log(),
        "reverse_kl": s * (s / t).log(),
        "reverse_kl_sg": s * (s / t).log(),
        "jsd": beta * t * (t / m).log() + (1 - beta) * s * (s / m).log(),
        "skew_forward": t * (t / m).log(),
        "skew_reverse": s * (s / m).log(),
        "skew_reverse_sg": s * (s / m).log(),
        "total_variation": (s - t).abs() / 2,
        "alpha": (beta * t + (1 - beta) * s - t**beta * s ** (1 - beta)) / (beta * (1 - beta)),
        "mixed": beta * s * (s / t).log() + (1 - beta) * t * (t / s).log(),
    }
    # Amari's difference is written here as it stands, and loses digits that the table keeps.
    atol = 2e-15 if name == "alpha" else 1e-16
    torch.testing.assert_close(value - slack, terms[name], rtol=1e-7, atol=atol)


def test_the_table_is_cplusplus_too(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here to compile the table with")
    (tmp_path / "host.cpp").write_text(PROGRAM)
    binary = tmp_path / "host"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", str(TABLE.parent), "host.cpp"]
    subprocess.run([*command, "-o", str(binary)], cwd=tmp_path, check=True)
    rows = _inputs(200)
    for name in table():
        lines = "".join(f"{name} {' '.join(f'{x:.17g}' for x in row)}\n" for row in rows)
        run = subprocess.run([str(binary)], input=lines, capture_output=True, text=True, check=True)
        found = torch.tensor([[float(x) for x in line.split()] for line in run.stdout.splitlines()])
        torch.testing.assert_close(
            found.double(), _in_python(name, rows).float().double(), rtol=1e-6, atol=1e-30
        )


def test_names() -> None:
    assert list(named_objectives()) == [*divergences.table(), "opsd"]
    assert all(named_objectives()[name] == Objective(name, 0.5) for name in divergences.table())
    assert named_objectives()["opsd"] == Objective("forward_kl", entry_clip=0.05, clip_mode="zero")
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)
    s, t = x.sin().log_softmax(-1), (3 * x).cos().log_softmax(-1)
    for name in divergences.table():
        by_name = loss(Logits(s), Logits(t), objective=name)
        torch.testing.assert_close(by_name, token_losses(s, t, Objective(name, 0.5)).mean())
    named_objectives().clear()
    assert named_objectives(), "a copy: nobody can edit the registry through it"


def test_importing_the_engine_imports_torch_alone() -> None:
    """In a fresh process: nothing beyond torch, the standard library and the engine itself."""
    program = """
import sys
import torch
before = set(sys.modules)
import opsd_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(*sorted({"transformers", "triton", "numpy", "peft", "opsd_train"} & new))
print("opsd_kernels.testing" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["opsd_kernels", "", "False"]
