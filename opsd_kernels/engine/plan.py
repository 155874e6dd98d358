"""How many rows or columns of logits are held at once. Pure functions of sizes."""

from opsd_kernels.engine.problem import Problem

# Rows per chunk when the caller sets no budget. Each chunk re-reads and re-writes the fp32 [V, H] accumulator
# of dW; on a GPU that hides under the GEMM only from about 1,000 rows on, on a CPU from about 50.
DEFAULT_ROWS_CPU = 512
DEFAULT_ROWS_TRAINABLE_HEAD = 4096
DEFAULT_ROWS_FROZEN_HEAD = 2048
# With fewer rows a chunk, recomputing by slabs (6 GEMMs) beats accumulating dW by chunks (4) on a GPU.
FEWEST_ROWS_TRAINABLE_HEAD = {"cpu": 0}
DEFAULT_FEWEST_ROWS = 512


def chunk_rows(problem: Problem, entry_bytes: int, trainable_head: bool) -> int:
    """Rows of logits held at once, of `entry_bytes` a logit."""
    row_bytes = (problem.vocab if problem.widest is None else problem.widest) * entry_bytes
    return length(problem.live_rows, row_bytes, _budget(problem, row_bytes, trainable_head))


def slab_columns(problem: Problem) -> int:
    """Columns of the logits of all live rows held at once."""
    itemsize = problem.dtype.itemsize
    budget = _budget(problem, problem.vocab * itemsize, trainable_head=False)
    return length(problem.vocab, max(problem.live_rows, 1) * itemsize, budget)


def budget_is_tight(asked: int | None, total_rows: int, row_bytes: int, device_type: str) -> bool:
    """Whether the budget a caller set is too small for chunks of rows with a trainable head."""
    fewest = min(FEWEST_ROWS_TRAINABLE_HEAD.get(device_type, DEFAULT_FEWEST_ROWS), total_rows)
    return asked is not None and asked < 2 * fewest * row_bytes


def _budget(problem: Problem, row_bytes: int, trainable_head: bool) -> int:
    """Bytes for the two logits buffers: what the caller asked for, or the device's default."""
    asked = problem.options.workspace_bytes
    if asked is not None:
        return asked
    gpu_rows = DEFAULT_ROWS_TRAINABLE_HEAD if trainable_head else DEFAULT_ROWS_FROZEN_HEAD
    rows = DEFAULT_ROWS_CPU if problem.device.type == "cpu" else gpu_rows
    return 2 * rows * row_bytes


def length(total: int, row_bytes: int, budget: int) -> int:
    """Rows (or columns) per step: as many as the budget holds in two buffers, at least 1, evenly spread.

    An even spread wastes no step on a remainder: 300 rows in steps of at most 256 are 2 x 150.
    """
    most = max(1, budget // (2 * row_bytes))
    steps = -(-total // most)
    return -(-total // steps) if steps else 1


def spans(total: int, step: int) -> list[slice]:
    """Slices of at most `step` that cover `total`."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
