"""Vectors for numba, and how the CPU kernels are compiled.

Numba has no vector type, and leaving LLVM to vectorise scalar loops costs a factor of five. LLVM maps the type added
here, <16 x float>, to the available instructions (AVX-512, AVX2, SSE, NEON). Addresses and strides are in bytes.
"""

import functools
import hashlib
import math
import operator
from pathlib import Path

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from dpmambair_basicsr.ops.selective_scan.numba.runtime import LANES, LOG2_E

FLOAT_BYTES, INTEGER_BYTES = 4, 8
VECTOR_BYTES = FLOAT_BYTES * LANES

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT32, LANES)


class _VectorType(types.Type):
    def __init__(self):
        super().__init__(name='Float32x16')


Vector = _VectorType()
Address = Integer = types.intp


@register_model(_VectorType)
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
    value.align = FLOAT_BYTES
    return value


def _store(builder, address, value):
    builder.store(value, _pointer(builder, address, _FLOATS)).align = FLOAT_BYTES


def _offset(builder, address, stride, i):
    return builder.add(address, builder.mul(stride, ir.Constant(_INT64, i)))


def _splat(builder, value):
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(vector, vector, _constant(0, _INTS))


def _select(builder, comparison, x, y, where, otherwise):
    return builder.select(builder.fcmp_ordered(comparison, x, y), where, otherwise)


# 2^f on [-0.5, 0.5], relative error 1.8e-7 including rounding. This polynomial and the next are least-squares fits,
# reweighted to minimise the largest relative error; the Taylor polynomial of this degree is twenty times worse.
_EXP2 = (1.0, 0.69314697799, 0.24022242911, 0.055507336729, 0.0096714609269, 0.0013264565863)


def _exp2(builder, x):
    """2^x for x < 128, clamped to 2^-126 from below. x = integer + fraction in [-0.5, 0.5]."""
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
    return _exp2(builder, builder.fmul(minus_abs, _constant(LOG2_E)))


# log(1 + z) / z on [0, 1], relative error 1.7e-7 including rounding.
_LOG1P = (
    *(0.99999997, -0.49999493, 0.33319097, -0.24842983, 0.19106008),
    *(-0.13663247, 0.07822596, -0.02950524, 0.00523269),
)


@_instruction(Vector, Vector, Vector, Vector)
def fma(builder, x, y, z):
    """x * y + z."""
    return _fma(builder, x, y, z)


@_instruction(Vector, Vector)
def exp2(builder, x):
    return _exp2(builder, x)


@_instruction(Vector, Vector)
def softplus(builder, x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))."""
    z = _exp_minus_abs(builder, x)
    positive = _select(builder, '<', x, _constant(0.0), _constant(0.0), x)
    return _fma(builder, z, _polynomial(builder, z, _LOG1P), positive)


def _sigmoid(builder, x):
    z, one = _exp_minus_abs(builder, x), _constant(1.0)
    return builder.fdiv(_select(builder, '<', x, _constant(0.0), z, one), builder.fadd(one, z))


@_instruction(Vector, Vector)
def sigmoid(builder, x):
    """The derivative of softplus; 1 - exp(-softplus(x)) would lose the digits that matter at small step sizes."""
    return _sigmoid(builder, x)


@_instruction(Vector, Vector)
def silu(builder, x):
    """x sigmoid(x)."""
    return builder.fmul(x, _sigmoid(builder, x))


# exp(z^2) erfc(z) / 2 for z in [0, 6.6], a polynomial in t = 1 / (1 + _T z) without constant; relative error 3.6e-7.
_T = 0.5
_ERFC = (
    *(0.0, 0.1412427006, 0.1377929834, 0.1458421607),
    *(0.00583676297, 0.2126620322, -0.1910266945, 0.04765023539),
)


@_instruction(Vector, Vector)
def gelu(builder, x):
    """x times the normal distribution's cumulative function, erfc(-x / sqrt(2)) / 2."""
    sign = _constant(-(2**31), _INTS)
    minus_abs = builder.bitcast(builder.or_(builder.bitcast(x, _INTS), sign), _FLOATS)
    t = builder.fdiv(_constant(1.0), _fma(builder, minus_abs, _constant(-_T / math.sqrt(2)), _constant(1.0)))
    square = builder.fmul(minus_abs, minus_abs)
    tail = builder.fmul(_polynomial(builder, t, _ERFC), _exp2(builder, builder.fmul(square, _constant(-LOG2_E / 2))))
    below = _select(builder, '<', x, _constant(0.0), tail, builder.fsub(_constant(1.0), tail))
    return builder.fmul(x, below)


@_instruction(Vector)
def zeros(builder):
    return _constant(0.0)


@_instruction(Vector, types.float32)
def splat(builder, value):
    return _splat(builder, value)


@_instruction(Vector, Address)
def load(builder, address):
    return _load(builder, address)


@_instruction(types.void, Address, Vector)
def store(builder, address, value):
    _store(builder, address, value)


@_instruction(types.float32, Address)
def load_float(builder, address):
    return builder.load(_pointer(builder, address, _FLOAT))


@_instruction(types.void, Address, types.float32)
def store_float(builder, address, value):
    builder.store(value, _pointer(builder, address, _FLOAT))


@_instruction(Integer, Address)
def load_integer(builder, address):
    return builder.load(_pointer(builder, address, _INT64))


@_instruction(types.void, Address, Integer)
def store_integer(builder, address, value):
    builder.store(value, _pointer(builder, address, _INT64))


def _prefetch(builder, address, write):
    byte_pointer = ir.IntType(8).as_pointer()
    # 2: into the second-level cache, as rows that are 2^k bytes apart evict each other from the first; 1: data
    hints = [ir.Constant(_INT32, hint) for hint in (write, 2, 1)]
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, *[_INT32] * 3])
    function = cgutils.get_or_insert_function(builder.module, function_type, 'llvm.prefetch.p0')
    builder.call(function, [builder.inttoptr(address, byte_pointer), *hints])


@_instruction(types.void, Address)
def prefetch_read(builder, address):
    """Prefetch data to be read soon; the address need not be valid."""
    _prefetch(builder, address, 0)


@_instruction(types.void, Address)
def prefetch_write(builder, address):
    _prefetch(builder, address, 1)


@_instruction(Vector, Address)
def broadcast(builder, address):
    return _splat(builder, builder.load(_pointer(builder, address, _FLOAT)))


def _interleave(builder, x, y, width):
    """Two vectors: the even runs of `width` lanes of x and y, alternating, and the odd runs."""

    def runs(first):
        starts = range(first, LANES, 2 * width)
        lanes = [start + i for run in starts for start in (run, LANES + run) for i in range(width)]
        return builder.shuffle_vector(x, y, ir.Constant(_INTS, lanes))

    return runs(0), runs(width)


@_instruction(types.void, Address, Address, Address, Address)
def transpose(builder, target, target_stride, source, source_stride):
    """Transpose 16 rows of 16 floats."""
    rows = [_load(builder, _offset(builder, source, source_stride, i)) for i in range(LANES)]
    for width in (1, 2, 4, 8):
        for i in range(LANES):
            if not i & width:
                rows[i], rows[i + width] = _interleave(builder, rows[i], rows[i + width], width)
    for i, row in enumerate(rows):
        _store(builder, _offset(builder, target, target_stride, i), row)


@_instruction(Vector, Address)
def row_sums(builder, source):
    """The sum of each of 16 consecutive vectors."""
    stride = ir.Constant(_INT64, VECTOR_BYTES)
    rows = [_load(builder, _offset(builder, source, stride, i)) for i in range(LANES)]
    for width in (1, 2, 4, 8):
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [builder.fadd(*_interleave(builder, x, y, width)) for x, y in pairs]
    return rows[0]


@_instruction(types.float32, Vector)
def total(builder, x):
    """The sum of the 16 floats."""
    for width in (8, 4, 2, 1):
        lanes = ir.Constant(_INTS, [i ^ width for i in range(LANES)])
        x = builder.fadd(x, builder.shuffle_vector(x, x, lanes))
    return builder.extract_element(x, ir.Constant(_INT32, 0))


def _overload(symbol, name):
    @_instruction(Vector, Vector, Vector)
    def emit(builder, x, y):
        return getattr(builder, name)(x, y)

    @overload(symbol)
    def implementation(x, y):
        if isinstance(x, _VectorType) and isinstance(y, _VectorType):
            return lambda x, y: emit(x, y)


_overload(operator.add, 'fadd')
_overload(operator.mul, 'fmul')
_overload(operator.sub, 'fsub')


# Numba recompiles a cached kernel when its file changes, but does not track the other files that it uses.
_VERSION = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.py'))))


def kernel(*arguments):
    """Compile for these argument types only, and cache the result unless numba finds no writable directory.

    A kernel takes addresses and strides in bytes, allocates nothing, holds no state and releases the GIL.
    """

    def decorate(function):
        function.__qualname__ += f'_{_VERSION.hexdigest()[:16]}'  # the name of the file in the cache
        options = {'nogil': True, 'error_model': 'numpy'}
        try:
            return njit(types.void(*arguments), cache=True, **options)(function)
        except RuntimeError as error:
            if 'no locator' not in str(error):
                raise
            return njit(types.void(*arguments), **options)(function)

    return decorate


subroutine = njit(nogil=True, error_model='numpy')  # of kernels
