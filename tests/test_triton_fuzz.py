"""2,000 random calls of the Triton row functions in the interpreter, a quarter of them fresh in every run."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from definitions import objective_of
from fuzzing import fuzz
from opsd_kernels import Objective, Support
from opsd_kernels.backends.triton import tiles
from opsd_kernels.divergences import table
from opsd_kernels.engine.rows import GradientForm
from opsd_kernels.objectives import RESTS
from triton_cases import UNTOUCHED, Rows, assert_rows, inside, random_rows, small_blocks


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    with small_blocks():
        yield


@dataclass(frozen=True)
class Draw:
    """What a random call is made of.

    Args:
        n: rows.
        vocab: columns.
        block: columns that a program holds at once.
        splits: programs of a row.
        objective: the token loss.
        gap: between student and teacher, in nats.
        peak: of the logits, in nats.
        temperature: divides the logits.
        coefficients: factors of the rows' gradients.
        dtype: of the gradient.
        cap: soft-cap of the logits.
        excluded: columns at either end, and who excludes them.
        around: columns of memory left and right of the logits.
        apart: distance between rows in memory, in rows.
        cut: column between two slabs of the gradient, modulo `vocab`.
        seed: of the numbers.
    """

    n: int
    vocab: int
    block: int
    splits: int
    objective: Objective
    gap: float
    peak: float
    temperature: float
    coefficients: tuple[float, float]
    dtype: torch.dtype
    cap: float | None
    excluded: tuple[int, int, str]
    around: tuple[int, int]
    apart: int
    cut: int | None
    seed: int

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Student's and teacher's `[n, V]`, contiguous."""
        pair = random_rows(self.n, self.vocab, gap=self.gap, peak=self.peak, seed=self.seed)
        z_s, z_t = (z / self.temperature for z in pair)
        if self.cap is not None:
            return self.cap * torch.tanh(z_s / self.cap), self.cap * torch.tanh(z_t / self.cap)
        left, right, whose = self.excluded
        if left + right < self.vocab:
            gone = torch.zeros(self.vocab, dtype=torch.bool)
            gone[:left], gone[self.vocab - right :] = True, True
            for name, z in (("student", z_s), ("teacher", z_t)):
                if whose in (name, "both"):
                    z[:, gone] = -torch.inf
        return z_s, z_t

    def rows(self) -> tuple[Rows, list[torch.Tensor]]:
        """The call, and the memory of the logits."""
        pair = [inside(z, left=self.around[0], right=self.around[1], apart=self.apart) for z in self.logits()]
        z_s, z_t = (view for view, _ in pair)
        coefficient = torch.tensor(self.coefficients[: self.n])
        ids = None
        if self.objective.support is not None and self.objective.support.of == "given":
            generator = torch.Generator().manual_seed(self.seed)
            ids = torch.randint(-1, self.vocab, (self.n, 4), generator=generator)
        rows = Rows(z_s, z_t, self.objective, coefficient, GradientForm(self.dtype, self.cap), ids)
        return rows, [memory for _, memory in pair]


supports = st.one_of(
    st.builds(
        Support,
        st.integers(1, 6),
        st.sampled_from(["student", "teacher", "union", "intersection"]),
        st.sampled_from(RESTS),
    ),
    st.builds(Support, st.none(), st.just("given"), st.sampled_from(RESTS)),
)
objectives = st.builds(
    objective_of,
    st.sampled_from(list(table())),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]),
    entry_clip=st.sampled_from([None, None, 0.01, 0.05, 0.3]),
    clip_mode=st.sampled_from(["zero", "scale"]),
    token_clip=st.sampled_from([None, None, None, 0.1]),
    support=st.none() | st.none() | supports,
)
coefficients = st.sampled_from([1.0, -0.7, 0.0, 2.5, 1e-3])
draws = st.builds(
    Draw,
    n=st.sampled_from([1, 1, 2]),
    vocab=st.integers(1, 24) | st.integers(25, 64),
    block=st.sampled_from([16, 32]),
    splits=st.sampled_from([1, 2, 2, 3]),
    objective=objectives,
    gap=st.sampled_from([0.3, 1.0, 3.0, 1e-2, 1e-3, 0.0]),
    peak=st.sampled_from([0.5, 4.0, 15.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    coefficients=st.tuples(coefficients, coefficients),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    cap=st.sampled_from([None, None, None, 5.0, 30.0]),
    excluded=st.tuples(
        st.sampled_from([0, 0, 1, 3, 17]),
        st.sampled_from([0, 0, 1, 5, 20]),
        st.sampled_from(["both", "both", "student", "teacher"]),
    ),
    around=st.tuples(st.integers(0, 3), st.integers(0, 17)),
    apart=st.sampled_from([1, 2]),
    cut=st.none() | st.integers(1, 63),
    seed=st.integers(0, 2**31),
)


@pytest.mark.slow
@fuzz(2000, draw=draws)
def test_any_call(draw: Draw) -> None:
    tiles.DEFAULT = tiles.Tiles(block=draw.block, splits=draw.splits)
    rows, memory = draw.rows()
    cut = None if draw.cut is None else draw.cut % draw.vocab
    assert_rows(rows, cut or None)
    left, _ = draw.around
    for whole in memory:
        rest = whole.clone()
        rest[1 :: draw.apart, left : left + draw.vocab][: draw.n] = UNTOUCHED
        assert (rest == UNTOUCHED).all(), "memory around the logits was written"
