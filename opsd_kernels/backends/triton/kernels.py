"""The row kernels: passes over student and teacher logits, generic in divergence and clips.

Every row is shared by `SPLITS` programs that walk their columns in blocks; what they find goes to `[SPLITS]`
partial results per row that a later pass, or PyTorch, combines in a fixed order. No atomics, no autotuning.

Logits come in one of two formats. `TILE == 0`: fp32 `[C, V]`. `TILE > 0`: fp16 values of z minus the maximum
of the row's tile of `TILE` columns, and the maxima in `tops_s`, `tops_t` `[C, tiles]`, which keeps the
gradient's quality in half the memory (`paired.py`). Row strides are int64, offsets are too.

`numbers` `[C, 6]` holds what is known of whole rows: the student's maximum and log sum exp(z - maximum), the
teacher's likewise, and the gradient's total and scale.
"""

import triton
import triton.language as tl

from opsd_kernels.backends.triton.terms import LOG_ZERO, mixture, slack, times, value, weight


@triton.jit
def _columns(V, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """First and last column of this program's part of the row."""
    blocks = tl.cdiv(tl.cdiv(V, BLOCK), SPLITS)
    first = tl.program_id(1) * blocks * BLOCK
    return first, tl.minimum(first + blocks * BLOCK, V)


@triton.jit
def _logits(z, tops, row, columns, live, stride, tiles, TILE: tl.constexpr):
    """fp32 logits of a block; -inf past the end. `tops`: this side's `[C, tiles]` maxima."""
    found = tl.load(z + row * stride + columns, mask=live, other=-float("inf")).to(tl.float32)
    if TILE > 0:
        # Of an excluded tile the maximum is -inf; its values are, too.
        found += tl.load(tops + row * tiles + columns // TILE, mask=live, other=-float("inf"))
    return found


@triton.jit
def normaliser_kernel(z_s, z_t, partial, V, stride_s, stride_t, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum and sum of exp(z - maximum) of each part of a row of fp32 logits.

    partial: [C, SPLITS, 4] student's maximum and sum, teacher's maximum and sum.
    """
    row = tl.program_id(0).to(tl.int64)
    first, last = _columns(V, SPLITS, BLOCK)
    top_s, top_t = -float("inf"), -float("inf")
    sum_s, sum_t = 0.0, 0.0
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < last
        top_s, sum_s = _online(top_s, sum_s, _logits(z_s, z_s, row, columns, live, stride_s, 0, 0))
        top_t, sum_t = _online(top_t, sum_t, _logits(z_t, z_t, row, columns, live, stride_t, 0, 0))
    out = partial + (row * SPLITS + tl.program_id(1)) * 4
    tl.store(out, top_s)
    tl.store(out + 1, sum_s)
    tl.store(out + 2, top_t)
    tl.store(out + 3, sum_t)


@triton.jit
def _online(top, total, z):
    """Maximum and sum of exp(z - maximum) with a block more; a block of -inf adds nothing."""
    new_top = tl.maximum(top, tl.max(z, 0))
    anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - anchor) + tl.sum(tl.exp(z - anchor), 0)


@triton.jit
def _log_probs(z, top, log_sum):
    """log softmax of a block, `LOG_ZERO` where the logit is -inf or the column is past the end.

    The maximum is taken off first: log sum exp rounded to the size of the logits would cost digits.
    """
    return tl.maximum((z - top) - log_sum, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _letters(ls, lt, beta, MIXTURE: tl.constexpr):
    """s, t, d, rs, rt of a block."""
    d = ls - lt
    if MIXTURE:
        rs, rt = mixture(d, beta)
    else:
        rs, rt = d, d
    return tl.exp(ls), tl.exp(lt), d, rs, rt


@triton.jit
def _entry_terms(ls, lt, beta, tau, NAME: tl.constexpr, MIXTURE: tl.constexpr, CLIP: tl.constexpr):
    """s, the value and the weight a of a block's entries, clipped."""
    s, t, d, rs, rt = _letters(ls, lt, beta, MIXTURE)
    v = value(NAME, s, t, d, rs, rt, beta)
    a = weight(NAME, s, t, d, rs, rt, beta)
    if CLIP != "none":
        u = slack(NAME, s, t, d, rs, rt, beta)
        term = v - u
        clipped = term > tau
        v = tl.where(clipped, u + tau, v)
        kept = a * (tau / tl.maximum(term, tau)) if CLIP == "scale" else 0.0
        a = tl.where(clipped, kept, a)
    return s, v, a


@triton.jit
def loss_kernel(
    z_s, z_t, tops_s, tops_t, numbers, partial, V, stride_s, stride_t, beta, tau,
    NAME: tl.constexpr, MIXTURE: tl.constexpr, CLIP: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the value, of the weight a and of s over each part of a row.

    partial: [C, SPLITS, 3].
    """
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(V, TILE) if TILE > 0 else 0
    first, last = _columns(V, SPLITS, BLOCK)
    top_s, log_sum_s = tl.load(numbers + row * 6), tl.load(numbers + row * 6 + 1)
    top_t, log_sum_t = tl.load(numbers + row * 6 + 2), tl.load(numbers + row * 6 + 3)
    loss, total, mass = 0.0, 0.0, 0.0
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < last
        ls = _log_probs(_logits(z_s, tops_s, row, columns, live, stride_s, tiles, TILE), top_s, log_sum_s)
        lt = _log_probs(_logits(z_t, tops_t, row, columns, live, stride_t, tiles, TILE), top_t, log_sum_t)
        s, v, a = _entry_terms(ls, lt, beta, tau, NAME, MIXTURE, CLIP)
        loss += tl.sum(v, 0)
        total += tl.sum(a, 0)
        mass += tl.sum(s, 0)
    out = partial + (row * SPLITS + tl.program_id(1)) * 3
    tl.store(out, loss)
    tl.store(out + 1, total)
    tl.store(out + 2, mass)


@triton.jit
def gradient_kernel(
    z_s, z_t, dz, tops_s, tops_t, numbers, V, stride_s, stride_t, stride_dz, beta, tau, cap,
    NAME: tl.constexpr, MIXTURE: tl.constexpr, CLIP: tl.constexpr, CAPPED: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale (a - s total), through the soft-cap's slope; V columns of whole rows, or a slab of them.

    dz: [C, V] in the memory of z_t, each row at the row's start. Of 2 bytes over fp32 logits it lies over
    columns further left, so a row then has one program (SPLITS == 1), and its threads wait for each other
    between reading a block and writing it.
    """
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(V, TILE) if TILE > 0 else 0
    first, last = _columns(V, SPLITS, BLOCK)
    top_s, log_sum_s = tl.load(numbers + row * 6), tl.load(numbers + row * 6 + 1)
    top_t, log_sum_t = tl.load(numbers + row * 6 + 2), tl.load(numbers + row * 6 + 3)
    total, scale = tl.load(numbers + row * 6 + 4), tl.load(numbers + row * 6 + 5)
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < last
        z = _logits(z_s, tops_s, row, columns, live, stride_s, tiles, TILE)
        ls = _log_probs(z, top_s, log_sum_s)
        lt = _log_probs(_logits(z_t, tops_t, row, columns, live, stride_t, tiles, TILE), top_t, log_sum_t)
        s, _, a = _entry_terms(ls, lt, beta, tau, NAME, MIXTURE, CLIP)
        gradient = scale * (a - s * total)
        if CAPPED:
            gradient *= 1 - (z / cap) * (z / cap)
        if SPLITS == 1:
            tl.debug_barrier()
        tl.store(dz + row * stride_dz + columns, gradient.to(dz.dtype.element_ty), mask=live)


@triton.jit
def softmax_gradient_kernel(
    z_s, dz, numbers, V, stride_s, stride_dz, cap,
    CAPPED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """coefficient exp(z_s - top - log_sum), through the soft-cap's slope: the gradient of a support's rest.

    dz: [C, V] as in `gradient_kernel`; the teacher's logits are no longer needed.
    numbers: [C, 3] top, log_sum, coefficient.
    """
    row = tl.program_id(0).to(tl.int64)
    first, last = _columns(V, SPLITS, BLOCK)
    top, log_sum = tl.load(numbers + row * 3), tl.load(numbers + row * 3 + 1)
    coefficient = tl.load(numbers + row * 3 + 2)
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < last
        z = _logits(z_s, z_s, row, columns, live, stride_s, 0, 0)
        gradient = coefficient * tl.exp((z - top) - log_sum)
        if CAPPED:
            gradient *= 1 - (z / cap) * (z / cap)
        tl.store(dz + row * stride_dz + columns, gradient.to(dz.dtype.element_ty), mask=live)


@triton.jit
def live_columns_kernel(dz, bound, live, C, V, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """live[v] = 1 where some row's |dz| is not at most its bound (NaN is live too), else 0.

    dz: [C, V]. bound: [C]. live: [V] int8.
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, C, ROWS):
        rows = start + tl.arange(0, ROWS)
        here = rows < C
        place = dz + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        x = tl.abs(tl.load(place, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32))
        most = tl.load(bound + rows, mask=here, other=0.0)
        dead = x <= most[:, None]
        found = tl.maximum(found, tl.max(tl.where(dead, 0, 1), 0))
    tl.store(live + columns, found.to(tl.int8), mask=inside)


@triton.jit
def stats_kernel(
    z_s, z_t, tops_s, tops_t, numbers, partial, V, stride_s, stride_t, beta, tau,
    NAME: tl.constexpr, MIXTURE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `token_stats` reports, summed over each part of a row.

    partial: [C, SPLITS, 11] forward KL, reverse KL, JSD at 1/2, entropy of s, of t, sum of positive terms,
    the same with each at most tau, then the largest log s and its column, the largest log t and its column.
    """
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(V, TILE) if TILE > 0 else 0
    first, last = _columns(V, SPLITS, BLOCK)
    top_s, log_sum_s = tl.load(numbers + row * 6), tl.load(numbers + row * 6 + 1)
    top_t, log_sum_t = tl.load(numbers + row * 6 + 2), tl.load(numbers + row * 6 + 3)
    forward, reverse, jsd, entropy_s, entropy_t, positive, kept = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    best_s, best_t = -float("inf"), -float("inf")
    column_s, column_t = 0, 0
    for start in range(first, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        live = columns < last
        ls = _log_probs(_logits(z_s, tops_s, row, columns, live, stride_s, tiles, TILE), top_s, log_sum_s)
        lt = _log_probs(_logits(z_t, tops_t, row, columns, live, stride_t, tiles, TILE), top_t, log_sum_t)
        s, t, d, rs, rt = _letters(ls, lt, 0.5, True)
        forward += tl.sum(value("forward_kl", s, t, d, rs, rt, 0.5), 0)
        reverse += tl.sum(value("reverse_kl", s, t, d, rs, rt, 0.5), 0)
        jsd += tl.sum(value("jsd", s, t, d, rs, rt, 0.5), 0)
        entropy_s -= tl.sum(times(s, ls), 0)
        entropy_t -= tl.sum(times(t, lt), 0)
        if MIXTURE:
            rs, rt = mixture(d, beta)
        term = value(NAME, s, t, d, rs, rt, beta) - slack(NAME, s, t, d, rs, rt, beta)
        term = tl.maximum(term, 0.0)
        positive += tl.sum(term, 0)
        kept += tl.sum(tl.minimum(term, tau), 0)
        best_s, column_s = _best(best_s, column_s, ls, start)
        best_t, column_t = _best(best_t, column_t, lt, start)
    out = partial + (row * SPLITS + tl.program_id(1)) * 11
    tl.store(out, forward)
    tl.store(out + 1, reverse)
    tl.store(out + 2, jsd)
    tl.store(out + 3, entropy_s)
    tl.store(out + 4, entropy_t)
    tl.store(out + 5, positive)
    tl.store(out + 6, kept)
    tl.store(out + 7, best_s)
    tl.store(out + 8, column_s)
    tl.store(out + 9, best_t)
    tl.store(out + 10, column_t)


@triton.jit
def _best(best, column, log_p, start):
    """Largest log p so far and its column, the first one of equals."""
    top = tl.max(log_p, 0)
    found = start + tl.argmax(log_p, 0)
    return tl.maximum(best, top), tl.where(top > best, found, column)
