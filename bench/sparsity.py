"""`python -m bench.sparsity FILE`: what rounding and the column filter cost on a recorded model's gradient.

Forward KL of a recording (`python -m bench.record`), row scale 1: the gradient of the logits is d = s - t, of
the hidden states dH = d W, of the head dW = d^T H. The truth is that closed form in fp64 from the recorded
bf16 states. Errors are relative L2. An error d' - d is formed in fp64; its products with W and H run in fp32,
which leaves six digits of the error. Beside every number stands the design's estimate, where it has one.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from bench.machine import commit, line
from bench.machine import describe as machine
from bench.recorded import Recording, load

BLOCK = 128  # columns of a tile
SLAB = 256  # rows whose logits are rounded at once
CHUNKS = (256, 1024)
EXPONENTS = (-12, -14, -16)
# Estimates that the engine was designed with, from other problems and the same model: errors of dlogits,
# dH, dW
DESIGN_FORMATS = {
    "bf16": (0.091, 0.081, 0.035),
    "fp16": (0.011, 0.010, 0.004),
    "bf16 log s, bf16 log t - log s": (0.006, 0.006, 0.002),
    "fp32": (0.00001, 0.00001, 0.00001),
    "bf16, dlogits alone": (0.0017, 0.0019, 0.0006),
}
# and live columns, live blocks, errors of dH and dW, by rows of a chunk and log2 of eps.
DESIGN_FILTER = {
    (256, -12): (0.046, 0.80, 0.024, 0.003),
    (256, -14): (0.095, 0.94, 0.012, 0.001),
    (1024, -14): (0.15, 1.00, 0.010, 0.0008),
    (1024, -16): (0.27, 1.00, 0.004, 0.0003),
}


@dataclass(frozen=True)
class Exact:
    """The gradient in fp64: logits `z_s`, `z_t` and `d` `[N, V]`, `dh` `[N, H]`, `dw` `[V, H]`."""

    hidden: torch.Tensor
    head: torch.Tensor
    z_s: torch.Tensor
    z_t: torch.Tensor
    d: torch.Tensor
    dh: torch.Tensor
    dw: torch.Tensor

    @classmethod
    def of(cls, recording: Recording) -> "Exact":
        """From the recorded bf16 states; 2 GB at 1,280 tokens of 49,152 columns."""
        hidden, teacher, head = (x.double() for x in (recording.student, recording.teacher, recording.head))
        z_s, z_t = hidden @ head.T, teacher @ head.T
        d = difference(z_s, z_t)
        return cls(hidden, head, z_s, z_t, d, d @ head, d.T @ hidden)

    def first(self, rows: int) -> "Exact":
        """The same over the first rows."""
        hidden, d = self.hidden[:rows], self.d[:rows]
        dw = self.dw if rows == len(self.d) else d.T @ hidden
        return Exact(hidden, self.head, self.z_s[:rows], self.z_t[:rows], d, self.dh[:rows], dw)

    def errors(self, error: torch.Tensor) -> tuple[float, float, float]:
        """Relative L2 errors of dlogits, dH and dW for `error` `[N, V]`, fp32, of dlogits."""
        pairs = (
            (error, self.d),
            (error @ self.head.float(), self.dh),
            (error.T @ self.hidden.float(), self.dw),
        )
        dlogits, dh, dw = (float(_norm(e) / _norm(truth)) for e, truth in pairs)
        return dlogits, dh, dw


@dataclass(frozen=True)
class FormatLine:
    """What keeping the logits in a format costs."""

    kept_as: str
    dlogits_error: float
    dh_error: float
    dw_error: float
    design: tuple[float, ...] | None


@dataclass(frozen=True)
class FilterLine:
    """What leaving out columns costs: shares of 1, `rows` tokens in chunks of `chunk`, eps = 2^`exponent`."""

    chunk: int
    exponent: int
    rows: int
    live_columns: float
    live_blocks: float
    dh_error: float
    dw_error: float
    dropped_mean: float
    dropped_total: float
    design: tuple[float, ...] | None


def difference(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """The gradient of the forward KL with respect to the student's logits: s - t."""
    return z_s.softmax(-1) - z_t.softmax(-1)


def rounded(dtype: torch.dtype) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """dlogits from logits that were rounded to `dtype`; everything else stays fp64."""
    return lambda z_s, z_t: difference(z_s.to(dtype).double(), z_t.to(dtype).double())


def from_log_probs(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """dlogits from log s and log t - log s, both rounded to bf16."""
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    ratio = (log_t - log_s).bfloat16().double()
    return -log_s.bfloat16().double().exp() * ratio.expm1()


def from_tiles(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """dlogits from logits kept in fp16 below the maximum, itself in fp32, of their tile of 128 columns."""

    def keep(z: torch.Tensor) -> torch.Tensor:
        tiles = z.unflatten(1, (-1, BLOCK))
        top = tiles.amax(-1, keepdim=True).float().double()
        return ((tiles - top).half().double() + top).flatten(1)

    return difference(keep(z_s), keep(z_t))


FORMATS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bf16": rounded(torch.bfloat16),
    "fp16": rounded(torch.float16),
    "bf16 log s, bf16 log t - log s": from_log_probs,
    "fp16 below the tile's maximum": from_tiles,
    "fp32": rounded(torch.float32),
    "bf16, dlogits alone": lambda z_s, z_t: difference(z_s, z_t).bfloat16().double(),
}


def format_line(exact: Exact, kept_as: str) -> FormatLine:
    """One line of the first table."""
    slabs = zip(exact.z_s.split(SLAB), exact.z_t.split(SLAB), exact.d.split(SLAB), strict=True)
    error = torch.cat([(FORMATS[kept_as](z_s, z_t) - d).float() for z_s, z_t, d in slabs])
    return FormatLine(kept_as, *exact.errors(error), DESIGN_FORMATS.get(kept_as))


def live_columns(d: torch.Tensor, chunk: int, eps: float) -> torch.Tensor:
    """Bool `[N / chunk, V]`: whether any entry of the column in the chunk exceeds eps in magnitude."""
    return torch.stack([rows.abs().amax(0) > eps for rows in d.split(chunk)])


def filter_line(exact: Exact, chunk: int, exponent: int) -> FilterLine:
    """One line of the second table; the rows are a whole number of chunks."""
    live = live_columns(exact.d, chunk, 2.0**exponent)
    error = exact.d.masked_fill(live.repeat_interleave(chunk, 0), 0).float()
    _, dh_error, dw_error = exact.errors(error)
    dropped, mass = (x.abs().sum(-1, dtype=torch.float64) for x in (error, exact.d))
    padded = F.pad(live, (0, -live.shape[1] % BLOCK))
    return FilterLine(
        chunk=chunk,
        exponent=exponent,
        rows=len(exact.d),
        live_columns=float(live.double().mean()),
        live_blocks=float(padded.unflatten(1, (-1, BLOCK)).any(-1).double().mean()),
        dh_error=dh_error,
        dw_error=dw_error,
        dropped_mean=float((dropped / mass).mean()),
        dropped_total=float(dropped.sum() / mass.sum()),
        design=DESIGN_FILTER.get((chunk, exponent)),
    )


def describe(exact: Exact) -> dict[str, float]:
    """How far apart student and teacher are, means over the tokens: nats, and the sum of |d|."""
    log_s, log_t = exact.z_s.log_softmax(-1), exact.z_t.log_softmax(-1)
    return {
        "forward_kl": float((log_t.exp() * (log_t - log_s)).sum(-1).mean()),
        "student_entropy": float(-(log_s.exp() * log_s).sum(-1).mean()),
        "sum_abs_dlogits": float(exact.d.abs().sum(-1).mean()),
    }


def measure(recording: Recording) -> dict[str, Any]:
    """Both tables and what they were measured on, for JSON."""
    exact = Exact.of(recording)
    filters = []
    for chunk in CHUNKS:
        part = exact.first(len(exact.d) // chunk * chunk)
        filters += [asdict(filter_line(part, chunk, exponent)) for exponent in EXPONENTS]
    return {
        "machine": line(machine("cpu")),
        "commit": commit(),
        "recording": {**recording.about, "rows": len(exact.d), **describe(exact)},
        "formats": [asdict(format_line(exact, kept_as)) for kept_as in FORMATS],
        "filter": filters,
    }


def tables(measured: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of both tables; a cell reads "ours (the design's estimate)"."""
    formats = [
        [line["kept_as"], *_beside(line, ("dlogits_error", "dh_error", "dw_error"))]
        for line in measured["formats"]
    ]
    filters = [
        [
            f"{line['chunk']:,}",
            f"2^{line['exponent']}",
            *_beside(line, ("live_columns", "live_blocks", "dh_error", "dw_error")),
            _percent(line["dropped_mean"]),
            _percent(line["dropped_total"]),
        ]
        for line in measured["filter"]
    ]
    cost = ["error of dlogits", "dH error", "dW error"]
    live = ["chunk rows", "eps", "live columns", "live 128-column blocks", *cost[1:]]
    return [
        ("What the logits are kept as", ["logits kept as", *cost], formats),
        ("The column filter", [*live, "dropped mass, mean of rows", "of the total"], filters),
    ]


def markdown(measured: dict[str, Any]) -> str:
    """The page: what was measured, the two tables, what could not be measured."""
    about = measured["recording"]
    parts = [
        "# Rounding and the column filter on recorded states",
        "",
        f"{about['model']} ({about['file']}), {about['rows']:,} tokens by `{about['command']}`; torch "
        f"{about['torch']}, transformers {about['transformers']}. {measured['machine']}. Commit "
        f"{measured['commit']}.",
        "",
        f"Forward KL, closed form in fp64, relative L2 errors. Means over the tokens: KL "
        f"{about['forward_kl']:.3f} nats, the student's entropy {about['student_entropy']:.2f} nats, sum of "
        f"|dlogits| {about['sum_abs_dlogits']:.3f}. In brackets the design's estimate, from other problems.",
    ]
    for title, header, cells in tables(measured):
        parts += ["", f"## {title}", "", "| " + " | ".join(header) + " |"]
        parts += ["|---|" + "---:|" * (len(header) - 1)]
        parts += ["| " + " | ".join(row) + " |" for row in cells]
    rows = ", ".join(f"{line['chunk']:,}: {line['rows']:,}" for line in measured["filter"][:: len(EXPONENTS)])
    parts += [
        "",
        "A column is live in a chunk if one of its entries exceeds eps (row scale 1); the others' share of "
        "the sum of |dlogits| is the dropped mass, per row or of all rows together. Only whole chunks "
        f"count; tokens used by chunk rows, {rows}. Chunks of 4,096 rows would need a longer recording.",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Parses the command line, measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m bench.sparsity", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a recording, from python -m bench.record")
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    arguments = parser.parse_args()
    measured = measure(load(arguments.file))
    for title, header, cells in tables(measured):
        table = Table(*header, title=title, caption="ours (the design's estimate)")
        for row in cells:
            table.add_row(*row)
        Console(width=140).print(table)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "results.json").write_text(json.dumps(measured, indent=1) + "\n")
        (arguments.out / "results.md").write_text(markdown(measured))


def _beside(line: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    design = line["design"] or (None,) * len(names)
    return [
        _percent(line[name]) + ("" if estimate is None else f" ({_percent(estimate)})")
        for name, estimate in zip(names, design, strict=True)
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64)


if __name__ == "__main__":
    main()
