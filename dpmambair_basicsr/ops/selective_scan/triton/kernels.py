"""The selective scan's kernels in Triton, driven by selective.py and, for images, by omni.py.

Importing this needs Triton, but no GPU.

A program handles one tile, `ROWS` channels of one group by `T` positions, one state after the other. Nothing is carried
from tile to tile inside a kernel, so a long sequence has as many independent programs as it has tiles:

1. `chunk_ends`: what each chunk of T positions adds to the state. A plain sum, sum_t exp(A s_t) drive_t, with s_t the
   sum of the steps after t;
2. `chain`: state at the start of the next chunk = exp(A * sum of the steps) * start + end;
3. `outputs`: the states inside each chunk from its start on, and y. `gradients`: these once more, and the adjoint
   states from right to left, for which 1. and 2. come first, from right to left too.

No program writes where another writes, so that results are bitwise reproducible. Every exponential is of a sum of
delta * A, never positive. All arithmetic is in fp32, whatever the type of a tensor.

Shapes: b batch, d channels, n states, l positions, c chunks; a group has `width` channels, in `blocks` blocks of ROWS.
Tensors that may have any strides come as tuples (pointer, stride, ...), one stride per axis; others are contiguous.
A tile's tuple ends with `fold` and a stride: where fold is not None, position t is at t % fold on the last axis and at
t // fold on one more, with this stride. So an image is read along its columns. Along what is reversed strides are
negative, and the pointer is at the last element.

A comes as a tuple too, (pointer, stride per sample): (d, n) contiguous with stride 0, or each sample's own.

Step sizes come as they are, (b, d, l), or, with `dt` (d, r) contiguous, as (b, 1, r, l), whose product with dt
they are.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(length, width, blocks, groups, chunks, ROWS: tl.constexpr, T: tl.constexpr):
    """This program's tile: b, group, its first channel of d, chunk, and which of its channels and positions exist.

    Blocks of channels vary fastest: they read the same B and C at about the same time.
    """
    program = tl.program_id(0)
    block = program % blocks
    group = program // blocks % groups
    chunk = program // (blocks * groups) % chunks
    b = program // (blocks * groups) // chunks
    first = group * width + block * ROWS
    has_row = block * ROWS + tl.arange(0, ROWS) < width
    has_position = chunk * T + tl.arange(0, T) < length
    # 64 bits: what these are multiplied with may be large.
    return b.to(tl.int64), group.to(tl.int64), first.to(tl.int64), chunk.to(tl.int64), has_row, has_position


@triton.jit
def _tile_pointers(x, b, first, start, ROWS: tl.constexpr, T: tl.constexpr):
    """To x[b, first : first + ROWS, start : start + T]."""
    rows, positions = tl.arange(0, ROWS)[:, None], tl.arange(0, T)[None, :]
    pointer = x[0] + b * x[1] + first * x[2]
    if x[4] is None:
        pointer += start * x[3]
        offset = positions * x[3]
    else:
        positions += start.to(tl.int32)
        offset = (positions % x[4]).to(tl.int64) * x[3] + (positions // x[4]).to(tl.int64) * x[5]
    return pointer + rows * x[2] + offset


@triton.jit
def _load_tile(x, b, first, start, mask, ROWS: tl.constexpr, T: tl.constexpr):
    """x[b, first : first + ROWS, start : start + T] in fp32, 0 where masked."""
    return tl.load(_tile_pointers(x, b, first, start, ROWS, T), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(x, b, first, start, value, mask, ROWS: tl.constexpr, T: tl.constexpr):
    tl.store(_tile_pointers(x, b, first, start, ROWS, T), value, mask=mask)


@triton.jit
def _in_lines(x, TURN: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr):
    """x itself. TURN: with a channel's positions in the threads of one warp, as scans are fastest.

    Triton leaves a tile as it was read. With channels next to each other in memory, scans would then cross warps, and
    the loop of `outputs` take 617 instructions instead of 166. What it gathers from it lays along the gathered axis.
    """
    if TURN:
        x = tl.gather(x, tl.arange(0, T)[None, :] + tl.zeros((ROWS, T), tl.int32), 1)
    return x


@triton.jit
def _load_positions(x, b, group, state, start, mask, T: tl.constexpr):
    """x[b, group, state, start : start + T] as a row (1, T) in fp32, 0 where masked."""
    pointer = x[0] + b * x[1] + group * x[2] + state * x[3] + start * x[4]
    return tl.load(pointer + tl.arange(0, T) * x[4], mask=mask, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_rows(x, first, stride, mask, ROWS: tl.constexpr):
    """x[first + i * stride] for ROWS channels i as a column (ROWS, 1) in fp32, 0 where masked."""
    return tl.load(x + first + tl.arange(0, ROWS) * stride, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _softplus(x):
    """max(x, 0) + log(1 + z), z = exp(-|x|), the logarithm as 2 artanh(z / (2 + z)).

    A GPU's fast logarithm has an absolute error of 2^-22 near 1, all digits of the small steps that matter here.
    """
    z = tl.exp(-tl.abs(x))
    r = z / (2 + z)
    s = r * r  # at most 1/9: the first term left out is below 2^-27
    p = 1 / 13 + s * (1 / 15)
    p = 1 / 11 + s * p
    p = 1 / 9 + s * p
    p = 1 / 7 + s * p
    p = 1 / 5 + s * p
    p = 1 / 3 + s * p
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2 * r * (1 + s * p)


@triton.jit
def _sigmoid(x):
    z = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, z) / (1 + z)


@triton.jit
def _load_delta(
    delta, dt, rank, bias, b, first, start, mask, has_row, has_position, ROWS: tl.constexpr, T: tl.constexpr
):
    """delta with its bias, before softplus."""
    if dt is None:
        raw = _load_tile(delta, b, first, start, mask, ROWS, T)
    else:
        raw = tl.zeros((ROWS, T), tl.float32)
        for i in range(rank):
            low = _load_positions(delta, b, 0, i, start, has_position, T)
            raw += _load_rows(dt, first * rank + i, rank, has_row, ROWS) * low
    if bias is not None:
        raw += _load_rows(bias, first, 1, has_row, ROWS)
    return raw


@triton.jit
def _steps(raw, mask, SOFTPLUS: tl.constexpr):
    """The step sizes; 0 beyond the end, where nothing then decays and nothing is added."""
    return tl.where(mask, _softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _then(decay_1, add_1, decay_2, add_2):
    """x -> decay_1 * x + add_1, then x -> decay_2 * x + add_2, as one such map."""
    return decay_1 * decay_2, decay_2 * add_1 + add_2


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _sum_before(before_1, total_1, before_2, total_2):
    """Scans (0, x) into the sums of what came before each x: inclusive sum - x would cancel."""
    return total_1 + before_2, total_1 + total_2


@triton.jit
def chunk_ends(
    x,
    delta,
    weight,
    A,
    dt,
    bias,
    ends,
    sums,
    length,
    width,
    blocks,
    groups,
    chunks,
    n,
    rank,
    SOFTPLUS: tl.constexpr,
    TURN: tl.constexpr,
    ADJOINT: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
):
    """What a chunk adds to the state behind it: x = u, weight = B. ADJOINT: to the adjoint state before it: dy, C.

    Args:
        ends: (b, c, n, d).
        sums: (b, c, d), the sums of the step sizes.
    """
    b, group, first, chunk, has_row, has_position = _tile(length, width, blocks, groups, chunks, ROWS, T)
    mask = has_row[:, None] & has_position[None, :]
    start = chunk * T
    step = _steps(
        _load_delta(delta, dt, rank, bias, b, first, start, mask, has_row, has_position, ROWS, T), mask, SOFTPLUS
    )
    drive = _load_tile(x, b, first, start, mask, ROWS, T)
    step, drive = _in_lines(step, TURN, ROWS, T), _in_lines(drive, TURN, ROWS, T)
    if ADJOINT:
        span = tl.associative_scan(step, 1, _add)
    else:
        drive *= step
        span, _ = tl.associative_scan((tl.zeros_like(step), step), 1, _sum_before, reverse=True)
    rows = tl.arange(0, ROWS)
    d = groups * width
    tl.store(sums + (b * chunks + chunk) * d + first + rows, tl.sum(step, 1), mask=has_row)
    end = ends + (b * chunks + chunk) * n * d + first
    for state in range(n):
        rate = _load_rows(A[0], b * A[1] + first * n + state, n, has_row, ROWS) * LOG2_E
        end_state = tl.exp2(span * rate) * drive * _load_positions(weight, b, group, state, start, has_position, T)
        tl.store(end + state * d + rows, tl.sum(end_state, 1), mask=has_row)


@triton.jit
def chain(ends, sums, A, starts, d, n, chunks, ADJOINT: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """The state each chunk starts from; ADJOINT: the adjoint state behind each chunk.

    Args:
        ends, starts: (b, c, n, d), a row of a tile being a pair of n and d.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    has_row = row < n * d
    channel, b = row % d, tl.program_id(0).to(tl.int64)
    rate = tl.load(A[0] + b * A[1] + channel * n + row // d, mask=has_row, other=0.0).to(tl.float32) * LOG2_E
    before = b * chunks  # chunks of other samples
    first = before + (chunks - 1 if ADJOINT else 0)
    tl.store(starts + first * n * d + row, tl.zeros_like(rate), mask=has_row)
    state = tl.zeros_like(rate)
    for done in range(0, chunks, CHUNKS):
        order = done + tl.arange(0, CHUNKS)
        chunk = chunks - 1 - order if ADJOINT else order
        mask = has_row[:, None] & (order < chunks)[None, :]
        total = tl.load(sums + (before + chunk)[None, :] * d + channel[:, None], mask=mask, other=0.0)
        end = tl.load(ends + (before + chunk)[None, :] * n * d + row[:, None], mask=mask, other=0.0)
        decay, add = tl.associative_scan((tl.exp2(total * rate[:, None]), end), 1, _then)
        after = decay * state[:, None] + add
        target = chunk - 1 if ADJOINT else chunk + 1
        inside = mask & (order + 1 < chunks)[None, :]
        tl.store(starts + (before + target)[None, :] * n * d + row[:, None], after, mask=inside)
        state = tl.sum(tl.where((tl.arange(0, CHUNKS) == CHUNKS - 1)[None, :], after, 0.0), 1)


@triton.jit
def outputs(
    u,
    delta,
    A,
    B,
    C,
    D,
    dt,
    bias,
    starts,
    y,
    length,
    width,
    blocks,
    groups,
    chunks,
    n,
    rank,
    SOFTPLUS: tl.constexpr,
    TURN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
):
    """y, from the states (b, c, n, d) that the chunks start from. ACCUMULATE: added to what is in y."""
    b, group, first, chunk, has_row, has_position = _tile(length, width, blocks, groups, chunks, ROWS, T)
    mask = has_row[:, None] & has_position[None, :]
    start = chunk * T
    step = _steps(
        _load_delta(delta, dt, rank, bias, b, first, start, mask, has_row, has_position, ROWS, T), mask, SOFTPLUS
    )
    x = _load_tile(u, b, first, start, mask, ROWS, T)
    total = tl.zeros_like(x)
    if D is not None:
        total = x * _load_rows(D, first, 1, has_row, ROWS)
    drive = _in_lines(step * x, TURN, ROWS, T)
    step = _in_lines(step, TURN, ROWS, T)
    d = groups * width
    of_chunk = (b * chunks + chunk) * n * d + first
    for state in range(n):
        rate = _load_rows(A[0], b * A[1] + first * n + state, n, has_row, ROWS) * LOG2_E
        B_row = _load_positions(B, b, group, state, start, has_position, T)
        C_row = _load_positions(C, b, group, state, start, has_position, T)
        h_start = _load_rows(starts, of_chunk + state * d, 1, has_row, ROWS)
        decay, h = tl.associative_scan((tl.exp2(step * rate), drive * B_row), 1, _then)
        total += (decay * h_start + h) * C_row
    if ACCUMULATE:
        total += _load_tile(y, b, first, start, mask, ROWS, T)
    _store_tile(y, b, first, start, total, mask, ROWS, T)


@triton.jit
def gradients(
    u,
    delta,
    A,
    B,
    C,
    D,
    dt,
    bias,
    starts,
    dy,
    adjoints,
    du,
    ddelta,
    dB,
    dC,
    dparameters,
    length,
    width,
    blocks,
    groups,
    chunks,
    n,
    rank,
    SOFTPLUS: tl.constexpr,
    TURN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
):
    """All gradients, from the states (b, c, n, d) at the start of the chunks and the adjoint states behind them.

    Args:
        dB, dC: (blocks, b, g, n, l), one sum for each block of a group. With dt they and ddelta, likewise (.., r, l),
            are parts of one tensor (blocks, b, r + 2 n, l).
        dparameters: (n + 2, b, c, d), one sum for each chunk: A's for each state, D's, delta_bias's; then dt's, if any.
        ACCUMULATE: whether du is added to what is there.
    """
    b, group, first, chunk, has_row, has_position = _tile(length, width, blocks, groups, chunks, ROWS, T)
    mask = has_row[:, None] & has_position[None, :]
    start = chunk * T
    t = tl.arange(0, T)[None, :]
    d = groups * width
    step = _steps(
        _load_delta(delta, dt, rank, bias, b, first, start, mask, has_row, has_position, ROWS, T), mask, SOFTPLUS
    )
    step = _in_lines(step, TURN, ROWS, T)
    drive = step * _in_lines(_load_tile(u, b, first, start, mask, ROWS, T), TURN, ROWS, T)
    g_y = _in_lines(_load_tile(dy, b, first, start, mask, ROWS, T), TURN, ROWS, T)
    index = t + tl.zeros((ROWS, T), tl.int32)
    drive_before = tl.gather(drive, tl.maximum(index - 1, 0), 1)
    step_after = tl.gather(step, tl.minimum(index + 1, T - 1), 1)
    from_B = tl.zeros_like(drive)  # what goes to drive
    from_A = tl.zeros_like(drive)  # what goes to the step sizes by the decays
    of_chunk = (b * chunks + chunk) * n * d + first
    batch = (tl.num_programs(0) // (blocks * groups * chunks)).to(tl.int64)
    block = (first - group * width) // ROWS
    lines = n if dt is None else rank + 2 * n
    from_position = ((block * batch + b) * groups + group) * lines * length + start
    positions, rows = tl.arange(0, T), tl.arange(0, ROWS)
    of_state = dparameters + (b * chunks + chunk) * d + first
    for state in range(n):
        A_column = _load_rows(A[0], b * A[1] + first * n + state, n, has_row, ROWS)
        rate = A_column * LOG2_E
        B_row = _load_positions(B, b, group, state, start, has_position, T)
        B_before = _load_positions(B, b, group, state, start - 1, has_position & (tl.arange(0, T) > 0), T)
        C_row = _load_positions(C, b, group, state, start, has_position, T)
        h_start = _load_rows(starts, of_chunk + state * d, 1, has_row, ROWS)
        g_end = _load_rows(adjoints, of_chunk + state * d, 1, has_row, ROWS)
        # kept: decay * the state before. The state is kept + added; state - added, for kept, would cancel.
        added = drive * B_row
        decay = tl.exp2(step * rate)
        _, kept = tl.associative_scan((decay, decay * tl.where(t > 0, drive_before * B_before, h_start)), 1, _then)
        # g_h: the gradient of the state, C dy here and what the decay behind lets through.
        g_h = g_y * C_row + tl.where(t < T - 1, 0.0, g_end)
        _, g_h = tl.associative_scan((tl.exp2(step_after * rate), g_h), 1, _then, reverse=True)
        flow = g_h * kept  # the gradient of log(decay)
        from_B += g_h * B_row
        from_A += flow * A_column
        here = from_position + state * length
        tl.store(dB + here + positions, tl.sum(g_h * drive, 0), mask=has_position)
        tl.store(dC + here + positions, tl.sum(g_y * (kept + added), 0), mask=has_position)
        tl.store(of_state + rows, tl.sum(flow * step, 1), mask=has_row)
        of_state += batch * chunks * d
    # Read u and delta again: keeping them during the loop would take too many registers.
    x = _load_tile(u, b, first, start, mask, ROWS, T)
    g_delta = from_A + from_B * x
    if SOFTPLUS:
        raw = _load_delta(delta, dt, rank, bias, b, first, start, mask, has_row, has_position, ROWS, T)
        g_delta *= _sigmoid(raw)
    g_u = from_B * step
    if D is not None:
        g_u += g_y * _load_rows(D, first, 1, has_row, ROWS)
    if ACCUMULATE:
        g_u += _load_tile(du, b, first, start, mask, ROWS, T)
    _store_tile(du, b, first, start, g_u, mask, ROWS, T)
    # Masked positions need no mask in these sums: x, dy and so all gradients are 0 there.
    tl.store(of_state + rows, tl.sum(g_y * x, 1), mask=has_row)
    of_state += batch * chunks * d
    tl.store(of_state + rows, tl.sum(g_delta, 1), mask=has_row)
    if dt is None:
        _store_tile(ddelta, b, first, start, g_delta, mask, ROWS, T)
    else:
        for i in range(rank):
            of_state += batch * chunks * d
            weight = _load_rows(dt, first * rank + i, rank, has_row, ROWS)
            low = _load_positions(delta, b, 0, i, start, has_position, T)
            tl.store(ddelta[0] + from_position + i * length + positions, tl.sum(g_delta * weight, 0), mask=has_position)
            tl.store(of_state + rows, tl.sum(g_delta * low, 1), mask=has_row)


@triton.jit
def add_parts(source, target, parts, lines, length, ROWS: tl.constexpr, T: tl.constexpr):
    """Sum source (parts * b, lines, l) over parts into target (b, lines, l), both tiles' tuples. parts=1 copies."""
    start = tl.program_id(0).to(tl.int64) * T
    first = tl.program_id(1).to(tl.int64) * ROWS
    b, batch = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    mask = (first + tl.arange(0, ROWS) < lines)[:, None] & (start + tl.arange(0, T) < length)[None, :]
    total = tl.zeros((ROWS, T), tl.float32)
    for part in range(parts):
        total += _load_tile(source, part * batch + b, first, start, mask, ROWS, T)
    _store_tile(target, b, first, start, total, mask, ROWS, T)
