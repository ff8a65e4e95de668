"""CPU kernels of the selective scan in numba. Importing this module compiles them, or loads them from a disk cache.

Vectors hold 16 neighbouring channels, a block. The sequence is cut into chunks of `CHUNK` positions. Of one block and
chunk the inputs are gathered, whatever their strides, into small dense tiles that stay in the first-level cache:

- u, delta, y and their gradients as (CHUNK, 16), a vector per position;
- B, C and their gradients as (n, CHUNK), a float per state and position, broadcast to a vector when used.

Then one state after the other runs along the chunk in registers. Channels of a block beyond the end of their group are
zeros in u, A, D, delta_bias and dy, and so add nothing. The forward pass keeps the states that chunks start from; the
backward pass recomputes the others from these, chunk by chunk.

Numba has no vectors, and leaving it to LLVM to find them in scalar loops costs a factor of five. The first part of this
file therefore adds a vector type; LLVM maps <16 x float> to whatever there is (AVX-512, AVX2, SSE, NEON). It stays here
because numba recompiles a cached function when the file that holds it changes, and only then.

Kernels take addresses and strides in bytes, allocate nothing, hold no state and release the GIL.
"""

import functools
import math
import operator

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
CHUNK = 64
_FLOAT_BYTES = 4
_VECTOR = _FLOAT_BYTES * LANES  # bytes of a vector, and of a row of a (CHUNK, 16) tile
_ROW = _FLOAT_BYTES * CHUNK  # bytes of a row of an (n, CHUNK) tile
# Bytes of a (CHUNK, 16) tile and a gap: loads and stores 4096 bytes apart are taken for one another and wait.
_TILE = (CHUNK + 21) * _VECTOR

_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)


class _Vector(types.Type):
    def __init__(self):
        super().__init__(name='Float32x16')


_vector = _Vector()
_address = types.intp


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _FLOATS)


def _instruction(result, *arguments):
    """Make `emit(builder, *llvm_values) -> llvm_value` callable in kernels, with these numba types."""

    def decorate(emit):
        def code(context, builder, signature, values):
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        @functools.wraps(emit)  # numba takes the number of arguments from the signature
        def typing(context, *argument_types):
            return result(*arguments), code

        return intrinsic(typing)

    return decorate


def _constant(value, vector_type=_FLOATS):
    return ir.Constant(vector_type, [value] * LANES)


def _call(builder, name, *values):
    function_type = ir.FunctionType(values[0].type, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)


def _fma(builder, x, y, z):
    return _call(builder, 'llvm.fmuladd.v16f32', x, y, z)


def _polynomial(builder, x, coefficients):
    value = _constant(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = _fma(builder, value, x, _constant(coefficient))
    return value


def _pointer(builder, address, pointee):
    return builder.inttoptr(address, pointee.as_pointer())


def _load(builder, address):
    value = builder.load(_pointer(builder, address, _FLOATS))
    value.align = _FLOAT_BYTES
    return value


def _store(builder, address, value):
    builder.store(value, _pointer(builder, address, _FLOATS)).align = _FLOAT_BYTES


def _offset(builder, address, stride, i):
    return builder.add(address, builder.mul(stride, ir.Constant(_INT64, i)))


def _splat(builder, value):
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(vector, vector, _constant(0, _INTS))


def _select(builder, comparison, x, y, where, otherwise):
    return builder.select(builder.fcmp_ordered(comparison, x, y), where, otherwise)


# 2^f on [-0.5, 0.5], relative error 1.8e-7 with the rounding. This polynomial and the next are least squares fits,
# reweighted until their largest relative error was smallest; Taylor's of the same degree is twenty times worse.
_EXP2 = (1.0, 0.69314697799, 0.24022242911, 0.055507336729, 0.0096714609269, 0.0013264565863)


def _exp2(builder, x):
    """2^x for x < 128; what is below 2^-126 becomes that. x = integer + fraction in [-0.5, 0.5]."""
    # `x < -126` is false for nan, which thus stays nan
    x = _select(builder, '<', x, _constant(-126.0), _constant(-126.0), x)
    shift = _constant(1.5 * 2**23)  # floats of this size are integers, so adding it rounds x
    rounded = builder.fadd(x, shift)
    fraction = builder.fsub(x, builder.fsub(rounded, shift))
    power = builder.bitcast(_polynomial(builder, fraction, _EXP2), _INTS)
    exponent = builder.shl(builder.bitcast(rounded, _INTS), _constant(23, _INTS))
    return builder.bitcast(builder.add(power, exponent), _FLOATS)


def _exp_minus_abs(builder, x):
    sign = _constant(-(2**31), _INTS)
    minus_abs = builder.bitcast(builder.or_(builder.bitcast(x, _INTS), sign), _FLOATS)
    return _exp2(builder, builder.fmul(minus_abs, _constant(_LOG2_E)))


# log(1 + z) / z on [0, 1], relative error 1.7e-7 with the rounding.
_LOG1P = (
    *(0.99999997, -0.49999493, 0.33319097, -0.24842983, 0.19106008),
    *(-0.13663247, 0.07822596, -0.02950524, 0.00523269),
)


@_instruction(_vector, _vector, _vector, _vector)
def fma(builder, x, y, z):
    """x * y + z."""
    return _fma(builder, x, y, z)


@_instruction(_vector, _vector)
def exp2(builder, x):
    return _exp2(builder, x)


@_instruction(_vector, _vector)
def softplus(builder, x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))."""
    z = _exp_minus_abs(builder, x)
    positive = _select(builder, '<', x, _constant(0.0), _constant(0.0), x)
    return _fma(builder, z, _polynomial(builder, z, _LOG1P), positive)


@_instruction(_vector, _vector)
def sigmoid(builder, x):
    """The derivative of softplus; 1 - exp(-softplus(x)) would lose the digits that matter at small step sizes."""
    z, one = _exp_minus_abs(builder, x), _constant(1.0)
    return builder.fdiv(_select(builder, '<', x, _constant(0.0), z, one), builder.fadd(one, z))


@_instruction(_vector)
def zeros(builder):
    return _constant(0.0)


@_instruction(_vector, types.float32)
def splat(builder, value):
    return _splat(builder, value)


@_instruction(_vector, _address)
def load(builder, address):
    return _load(builder, address)


@_instruction(types.void, _address, _vector)
def store(builder, address, value):
    _store(builder, address, value)


@_instruction(types.float32, _address)
def load_float(builder, address):
    return builder.load(_pointer(builder, address, _FLOAT))


@_instruction(types.void, _address, types.float32)
def store_float(builder, address, value):
    builder.store(value, _pointer(builder, address, _FLOAT))


def _prefetch(builder, address, write):
    byte_pointer = ir.IntType(8).as_pointer()
    # 2: into the second-level cache, as rows that are 2^k bytes apart evict each other from the first; 1: data
    hints = [ir.Constant(_INT32, hint) for hint in (write, 2, 1)]
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, *[_INT32] * 3])
    function = cgutils.get_or_insert_function(builder.module, function_type, 'llvm.prefetch.p0')
    builder.call(function, [builder.inttoptr(address, byte_pointer), *hints])


@_instruction(types.void, _address)
def prefetch_read(builder, address):
    """Fetch what will be read soon; the address need not exist."""
    _prefetch(builder, address, 0)


@_instruction(types.void, _address)
def prefetch_write(builder, address):
    _prefetch(builder, address, 1)


@_instruction(_vector, _address)
def broadcast(builder, address):
    return _splat(builder, builder.load(_pointer(builder, address, _FLOAT)))


def _interleave(builder, x, y, width):
    """Two vectors: the even runs of `width` lanes of x and y by turns, and the odd ones."""

    def runs(first):
        starts = range(first, LANES, 2 * width)
        lanes = [start + i for run in starts for start in (run, LANES + run) for i in range(width)]
        return builder.shuffle_vector(x, y, ir.Constant(_INTS, lanes))

    return runs(0), runs(width)


@_instruction(types.void, _address, _address, _address, _address)
def transpose(builder, target, target_stride, source, source_stride):
    """Transpose 16 rows of 16 floats."""
    rows = [_load(builder, _offset(builder, source, source_stride, i)) for i in range(LANES)]
    for width in (1, 2, 4, 8):
        for i in range(LANES):
            if not i & width:
                rows[i], rows[i + width] = _interleave(builder, rows[i], rows[i + width], width)
    for i, row in enumerate(rows):
        _store(builder, _offset(builder, target, target_stride, i), row)


@_instruction(_vector, _address)
def row_sums(builder, source):
    """The sums over each of 16 vectors that follow one another."""
    stride = ir.Constant(_INT64, _VECTOR)
    rows = [_load(builder, _offset(builder, source, stride, i)) for i in range(LANES)]
    for width in (1, 2, 4, 8):
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [builder.fadd(*_interleave(builder, x, y, width)) for x, y in pairs]
    return rows[0]


def _overload(symbol, name):
    @_instruction(_vector, _vector, _vector)
    def emit(builder, x, y):
        return getattr(builder, name)(x, y)

    @overload(symbol)
    def implementation(x, y):
        if isinstance(x, _Vector) and isinstance(y, _Vector):
            return lambda x, y: emit(x, y)


_overload(operator.add, 'fadd')
_overload(operator.mul, 'fmul')


def _kernel(*arguments):
    """Compile for these argument types alone, and keep the result unless numba finds no place where it could."""

    def decorate(function):
        options = {'nogil': True, 'error_model': 'numpy'}
        try:
            return njit(types.void(*arguments), cache=True, **options)(function)
        except RuntimeError as error:
            if 'no locator' not in str(error):
                raise
            return njit(types.void(*arguments), **options)(function)

    return decorate


_part = njit(nogil=True, error_model='numpy')


@_part
def _gather(tile, pitch, source, row_stride, column_stride, rows, columns, ahead):
    """Copy `columns` floats of each row to the tile, its rows `pitch` bytes apart; zeros up to a multiple of 16.

    The next tile of this source will be read `ahead` bytes from here: short pieces of many rows, which the CPU does not
    foresee. Fetching them saves a tenth to a sixth of the time where the sequences do not fit into the cache.
    """
    for column in range(0, columns, LANES):
        source_block, tile_block = source + column * column_stride, tile + column * _FLOAT_BYTES
        count = min(LANES, columns - column)
        row = 0
        if count == LANES and column_stride == _FLOAT_BYTES:
            while row < rows:
                prefetch_read(source_block + row * row_stride + ahead)
                store(tile_block + row * pitch, load(source_block + row * row_stride))
                row += 1
        elif count == LANES and row_stride == _FLOAT_BYTES:
            while row + LANES <= rows:
                source_rows = source_block + row * _FLOAT_BYTES
                for i in range(LANES):
                    prefetch_read(source_rows + i * column_stride + ahead)
                transpose(tile_block + row * pitch, pitch, source_rows, column_stride)
                row += LANES
        while row < rows:
            if count < LANES:
                store(tile_block + row * pitch, zeros())
            for i in range(count):
                value = load_float(source_block + row * row_stride + i * column_stride)
                store_float(tile_block + row * pitch + i * _FLOAT_BYTES, value)
            row += 1


@_part
def _scatter(target, row_stride, column_stride, tile, pitch, rows, columns, ahead):
    """Copy `columns` floats of each row of the tile to the target; the next tile goes `ahead` bytes from here."""
    for column in range(0, columns, LANES):
        target_block, tile_block = target + column * column_stride, tile + column * _FLOAT_BYTES
        count = min(LANES, columns - column)
        row = 0
        if count == LANES and column_stride == _FLOAT_BYTES:
            while row < rows:
                prefetch_write(target_block + row * row_stride + ahead)
                store(target_block + row * row_stride, load(tile_block + row * pitch))
                row += 1
        elif count == LANES and row_stride == _FLOAT_BYTES:
            while row + LANES <= rows:
                target_rows = target_block + row * _FLOAT_BYTES
                for i in range(LANES):
                    prefetch_write(target_rows + i * column_stride + ahead)
                transpose(target_rows, column_stride, tile_block + row * pitch, pitch)
                row += LANES
        while row < rows:
            for i in range(count):
                value = load_float(tile_block + row * pitch + i * _FLOAT_BYTES)
                store_float(target_block + row * row_stride + i * column_stride, value)
            row += 1


_integer = types.intp
_sizes = types.UniTuple(_integer, 4)  # groups, channels per group, n, l
_view_u = types.UniTuple(_integer, 4)  # address of (b, d, l) and its strides
_view_B = types.UniTuple(_integer, 5)  # address of (b, g, n, l) and its strides


@_part
def _place(view, i, j, k):
    return view[0] + i * view[1] + j * view[2] + k * view[3]


def forward_scratch(n):
    """Floats that `forward` needs as scratch."""
    return (3 * _TILE + 2 * n * _ROW + n * _VECTOR) // _FLOAT_BYTES


@_kernel(
    _sizes, types.boolean, _view_u, _view_u, _address, _view_B, _view_B, _view_u, _address, _integer, _integer, _address
)
def forward(sizes, delta_softplus, u, delta, parameters, B, C, y, states, first, last, scratch):
    """Outputs of the blocks [first, last), counted over (b, g, blocks of a group).

    Args:
        parameters: (g * blocks, n + 2, 16); per block A * log2(e), D, delta_bias.
        states: (b * g * blocks, chunks, n, 16), receives the state that each chunk starts from; or address 0.
    """
    groups, width, n, length = sizes
    blocks, chunks = (width + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    tile_step = scratch
    tile_drive = tile_step + _TILE
    tile_y = tile_drive + _TILE
    tile_B = tile_y + _TILE
    tile_C = tile_B + n * _ROW
    h = tile_C + n * _ROW
    for number in range(first, last):
        sample, group, block = number // (groups * blocks), number // blocks % groups, number % blocks
        channel, lanes = group * width + block * LANES, min(LANES, width - block * LANES)
        A = parameters + (group * blocks + block) * (n + 2) * _VECTOR
        D, delta_bias = load(A + n * _VECTOR), load(A + (n + 1) * _VECTOR)
        u_block, delta_block = _place(u, sample, channel, 0), _place(delta, sample, channel, 0)
        y_block = _place(y, sample, channel, 0)
        B_group = B[0] + sample * B[1] + group * B[2]
        C_group = C[0] + sample * C[1] + group * C[2]
        for state in range(n):
            store(h + state * _VECTOR, zeros())
        for chunk in range(chunks):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            if states:
                kept = states + (number * chunks + chunk) * n * _VECTOR
                for state in range(n):
                    store(kept + state * _VECTOR, load(h + state * _VECTOR))
            u_chunk, delta_chunk = u_block + start * u[3], delta_block + start * delta[3]
            _gather(tile_drive, _VECTOR, u_chunk, u[3], u[2], steps, lanes, CHUNK * u[3])
            _gather(tile_step, _VECTOR, delta_chunk, delta[3], delta[2], steps, lanes, CHUNK * delta[3])
            _gather(tile_B, _ROW, B_group + start * B[4], B[3], B[4], n, steps, CHUNK * B[4])
            _gather(tile_C, _ROW, C_group + start * C[4], C[3], C[4], n, steps, CHUNK * C[4])
            for t in range(0, steps * _VECTOR, _VECTOR):
                step, u_t = load(tile_step + t) + delta_bias, load(tile_drive + t)
                if delta_softplus:
                    step = softplus(step)
                store(tile_step + t, step)
                store(tile_drive + t, step * u_t)
                store(tile_y + t, D * u_t)
            for state in range(n):
                A_n, h_n = load(A + state * _VECTOR), load(h + state * _VECTOR)
                B_n, C_n = tile_B + state * _ROW, tile_C + state * _ROW
                for t in range(steps):
                    i, j = t * _VECTOR, t * _FLOAT_BYTES
                    decay = exp2(load(tile_step + i) * A_n)
                    h_n = fma(decay, h_n, load(tile_drive + i) * broadcast(B_n + j))
                    store(tile_y + i, fma(h_n, broadcast(C_n + j), load(tile_y + i)))
                store(h + state * _VECTOR, h_n)
            _scatter(y_block + start * y[3], y[3], y[2], tile_y, _VECTOR, steps, lanes, CHUNK * y[3])


def backward_scratch(n):
    """Floats that `backward` needs as scratch."""
    return (10 * _TILE + 4 * n * _ROW) // _FLOAT_BYTES


@_kernel(
    *(_sizes, types.boolean, _view_u, _view_u, _address, _view_B, _view_B, _view_u, _address),
    *(_view_u, _view_u, _address, _address, _view_u, _view_u),
    *(_integer, _integer, _integer, _integer, _integer, _address),
)
def backward(
    sizes,
    delta_softplus,
    u,
    delta,
    parameters,
    B,
    C,
    dy,
    states,
    du,
    ddelta,
    dparameters,
    adjoints,
    dB,
    dC,
    parts,
    first_chunk,
    last_chunk,
    first,
    last,
    scratch,
):
    """Gradients in the chunks [first_chunk, last_chunk); calls must come from the end of the sequence to its start.

    The blocks of each group are dealt to `parts`; [first, last) are parts, counted over (b, g, parts).

    Args:
        parameters, states: as in `forward`, states filled.
        dparameters: (b * g * blocks, n + 2, 16), zeros at first; the gradients of A, D, delta_bias are added.
        adjoints: (b * g * blocks, n, 16), zeros at first; the gradients of the states that the last call started from.
        dB, dC: (parts, b * g * n, positions in these chunks); each part writes the sums over its blocks.
    """
    groups, width, n, length = sizes
    blocks, chunks = (width + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    tile_u = scratch
    tile_dy = tile_u + _TILE
    tile_step = tile_dy + _TILE
    tile_slope = tile_step + _TILE  # of the step size in the given delta
    tile_drive = tile_slope + _TILE
    tile_ddrive = tile_drive + _TILE
    tile_dlog = tile_ddrive + _TILE  # sum over n of A * (gradient of the decay's exponent)
    tile_decay = tile_dlog + _TILE
    tile_kept = tile_decay + _TILE  # decay * h before the step: what is kept of the state
    tile_product = tile_kept + _TILE
    tile_B = tile_product + _TILE
    tile_C = tile_B + n * _ROW
    tile_dB = tile_C + n * _ROW
    tile_dC = tile_dB + n * _ROW
    ln_2 = splat(_LN_2)
    for number in range(first, last):
        sample, group, part = number // (groups * parts), number // parts % groups, number % parts
        first_block, last_block = blocks * part // parts, blocks * (part + 1) // parts
        B_group = B[0] + sample * B[1] + group * B[2]
        C_group = C[0] + sample * C[1] + group * C[2]
        for chunk in range(last_chunk - 1, first_chunk - 1, -1):
            start = chunk * CHUNK
            steps = min(CHUNK, length - start)
            _gather(tile_B, _ROW, B_group + start * B[4], B[3], B[4], n, steps, -CHUNK * B[4])
            _gather(tile_C, _ROW, C_group + start * C[4], C[3], C[4], n, steps, -CHUNK * C[4])
            for i in range(0, n * _ROW, _VECTOR):
                store(tile_dB + i, zeros())
                store(tile_dC + i, zeros())
            for block in range(first_block, last_block):
                channel, lanes = group * width + block * LANES, min(LANES, width - block * LANES)
                A = parameters + (group * blocks + block) * (n + 2) * _VECTOR
                D, delta_bias = load(A + n * _VECTOR), load(A + (n + 1) * _VECTOR)
                block_number = (sample * groups + group) * blocks + block
                h = states + (block_number * chunks + chunk) * n * _VECTOR
                dA = dparameters + block_number * (n + 2) * _VECTOR
                adjoint = adjoints + block_number * n * _VECTOR
                # to what comes next, in channels and positions: the next block or, after the last, the chunk before
                onward, back = (LANES, 0) if block + 1 < last_block else ((first_block - block) * LANES, CHUNK)
                place, ahead = _place(u, sample, channel, start), onward * u[2] - back * u[3]
                _gather(tile_u, _VECTOR, place, u[3], u[2], steps, lanes, ahead)
                place, ahead = _place(delta, sample, channel, start), onward * delta[2] - back * delta[3]
                _gather(tile_step, _VECTOR, place, delta[3], delta[2], steps, lanes, ahead)
                place, ahead = _place(dy, sample, channel, start), onward * dy[2] - back * dy[3]
                _gather(tile_dy, _VECTOR, place, dy[3], dy[2], steps, lanes, ahead)
                for t in range(0, steps * _VECTOR, _VECTOR):
                    step = load(tile_step + t) + delta_bias
                    if delta_softplus:
                        store(tile_slope + t, sigmoid(step))
                        step = softplus(step)
                    store(tile_step + t, step)
                    store(tile_drive + t, step * load(tile_u + t))
                    store(tile_ddrive + t, zeros())
                    store(tile_dlog + t, zeros())
                for state in range(n):
                    A_n, h_n = load(A + state * _VECTOR), load(h + state * _VECTOR)
                    B_n, C_n = tile_B + state * _ROW, tile_C + state * _ROW
                    for t in range(steps):
                        i = t * _VECTOR
                        decay = exp2(load(tile_step + i) * A_n)
                        store(tile_decay + i, decay)
                        store(tile_kept + i, decay * h_n)
                        h_n = fma(decay, h_n, load(tile_drive + i) * broadcast(B_n + t * _FLOAT_BYTES))
                        store(tile_product + i, h_n * load(tile_dy + i))
                    dC_n = tile_dC + state * _ROW
                    for t in range(0, steps, LANES):
                        row = dC_n + t * _FLOAT_BYTES
                        store(row, load(row) + row_sums(tile_product + t * _VECTOR))
                    dh, dA_n, decay = load(adjoint + state * _VECTOR), zeros(), splat(1.0)
                    for t in range(steps - 1, -1, -1):
                        i, j = t * _VECTOR, t * _FLOAT_BYTES
                        dh = fma(decay, dh, load(tile_dy + i) * broadcast(C_n + j))
                        decay = load(tile_decay + i)
                        store(tile_product + i, dh * load(tile_drive + i))
                        store(tile_ddrive + i, fma(dh, broadcast(B_n + j), load(tile_ddrive + i)))
                        dexponent = dh * load(tile_kept + i)
                        store(tile_dlog + i, fma(dexponent, A_n, load(tile_dlog + i)))
                        dA_n = fma(dexponent, load(tile_step + i), dA_n)
                    store(adjoint + state * _VECTOR, decay * dh)
                    store(dA + state * _VECTOR, load(dA + state * _VECTOR) + dA_n)
                    dB_n = tile_dB + state * _ROW
                    for t in range(0, steps, LANES):
                        row = dB_n + t * _FLOAT_BYTES
                        store(row, load(row) + row_sums(tile_product + t * _VECTOR))
                dD, dbias = zeros(), zeros()
                for t in range(0, steps * _VECTOR, _VECTOR):
                    u_t, dy_t, ddrive = load(tile_u + t), load(tile_dy + t), load(tile_ddrive + t)
                    ddelta_t = fma(ln_2, load(tile_dlog + t), ddrive * u_t)
                    if delta_softplus:
                        ddelta_t = ddelta_t * load(tile_slope + t)
                    store(tile_dlog + t, ddelta_t)
                    store(tile_ddrive + t, fma(ddrive, load(tile_step + t), dy_t * D))
                    dD, dbias = fma(dy_t, u_t, dD), dbias + ddelta_t
                row = dA + n * _VECTOR
                store(row, load(row) + dD)
                store(row + _VECTOR, load(row + _VECTOR) + dbias)
                place, ahead = _place(du, sample, channel, start), onward * du[2] - back * du[3]
                _scatter(place, du[3], du[2], tile_ddrive, _VECTOR, steps, lanes, ahead)
                place, ahead = _place(ddelta, sample, channel, start), onward * ddelta[2] - back * ddelta[3]
                _scatter(place, ddelta[3], ddelta[2], tile_dlog, _VECTOR, steps, lanes, ahead)
            row, column = (sample * groups + group) * n, start - first_chunk * CHUNK
            place, ahead = _place(dB, part, row, column), -CHUNK * dB[3]
            _scatter(place, dB[2], dB[3], tile_dB, _ROW, n, steps, ahead)
            place, ahead = _place(dC, part, row, column), -CHUNK * dC[3]
            _scatter(place, dC[2], dC[3], tile_dC, _ROW, n, steps, ahead)


@_kernel(_integer, _address, _integer, _integer, _address, _integer, _integer, _integer, _integer)
def add_parts(parts, source, part_stride, source_stride, target, target_stride, columns, first, last):
    """Sum `parts` arrays in order: of rows [first, last), that are so many bytes apart, the first `columns` floats."""
    for row in range(first, last):
        source_row, target_row = source + row * source_stride, target + row * target_stride
        vectors = columns // LANES * _VECTOR
        for i in range(0, vectors, _VECTOR):
            total = load(source_row + i)
            for part in range(1, parts):
                total = total + load(source_row + part * part_stride + i)
            store(target_row + i, total)
        for i in range(vectors, columns * _FLOAT_BYTES, _FLOAT_BYTES):
            rest = load_float(source_row + i)
            for part in range(1, parts):
                rest += load_float(source_row + part * part_stride + i)
            store_float(target_row + i, rest)
