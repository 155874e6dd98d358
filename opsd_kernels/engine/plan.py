"""How many rows or columns of logits are held at once. Pure functions of sizes."""

# Rows per chunk when the caller sets no budget. Each chunk re-reads and re-writes the fp32 [V, H] accumulator
# of dW; on a GPU that hides under the GEMM only from about 1,000 rows on, on a CPU from about 50.
DEFAULT_ROWS_CPU = 512
DEFAULT_ROWS_TRAINABLE_HEAD = 4096
DEFAULT_ROWS_FROZEN_HEAD = 2048


def workspace_bytes(
    asked: int | None, vocab: int, itemsize: int, device_type: str, trainable_head: bool
) -> int:
    """Bytes for the two logits buffers: what the caller asked for, or the device's default."""
    if asked is not None:
        return asked
    gpu_rows = DEFAULT_ROWS_TRAINABLE_HEAD if trainable_head else DEFAULT_ROWS_FROZEN_HEAD
    rows = DEFAULT_ROWS_CPU if device_type == "cpu" else gpu_rows
    return 2 * rows * vocab * itemsize


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
