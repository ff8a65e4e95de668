"""How the CUDA kernels divide the work: their constants, grids and order, determined by shapes alone.

The choices were measured on one H100: chunks of 128 steps, shorter ones if there would be too few warps; 4 channels by
4 states per thread in `scan_gradients`, 3 of its warps side by side. See scan_forward.cu and scan_backward.cu for the
constants.

Shapes: b batch, l positions, d channels of an order, k orders, n states, r rank.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_ORDERS = 8
MAX_STATES = 32  # beyond this, registers spill: callers scan parts of the states and add up
CHAIN_THREADS = 32 * 16
STATIC_SHARED = 48 << 10
_SCHEDULERS, _WARPS_EACH = 132 * 4, 6  # of an H100; chunk lengths are chosen to give each scheduler this many warps

# fmt: off
_POINTERS = (
    'x', 'delta', 'projected', 'dt_weight', 'dt_bias', 'A', 'D', 'states', 'sums', 'checkpoints', 'acc', 'out', 'dy',
    'ddelta', 'adjoints', 'dparts', 'dprojected', 'dparameters',
)
_NUMBERS = (
    'batch', 'length', 'height', 'width', 'd', 'row', 'orders', 'chunks', 'A_sample', 'first', 'second', 'accumulate',
    'last',
)
# fmt: on


class Arguments(ctypes.Structure):
    """The struct Scan of scan_common.cuh, a kernel's only argument."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int) for name in _NUMBERS),
        ('direction', ctypes.c_int * MAX_ORDERS),
    ]


class Step(NamedTuple):
    """One launch."""

    kernel: str
    orders: tuple[int, ...]  # those that it handles, () for all; otherwise as many as the constant P
    threads: int
    grid: int
    shared: int = 0  # bytes, dynamic


class Plan(NamedTuple):
    """The plan of both passes for one shape.

    Attributes:
        constants: macros of the kernels except P and those that depend on it.
        chunks: number of chunks of all positions.
        pairs: the orders that are handled together, one or two.
        blocks: number of `scan_gradients` blocks side by side, each with its own sums of gradients of projections.
    """

    constants: dict[str, int]
    chunks: int
    pairs: tuple[tuple[int, ...], ...]
    blocks: int


def chunk_length(b, d, length, k) -> int:
    """T: 128, or less, down to 16, if a GPU would not have enough warps. Supports symbolic sizes."""
    warps = b * k * -(-d // 32)
    for T in (128, 64, 32):
        if warps * length >= _SCHEDULERS * _WARPS_EACH * T:
            return T
    return 16


def check_length(T) -> int:
    """Steps between the states that the backward pass starts from."""
    return min(16, T // 2)


def states_shape(b, d, length, k, n) -> tuple[int, ...]:
    """The shape of the states that the forward pass keeps. Supports symbolic sizes."""
    T = chunk_length(b, d, length, k)
    return b, k, -(-length // T) * (T // check_length(T)), n, d


@functools.lru_cache(4096)
def make_plan(b: int, d: int, length: int, n: int, rank: int, directions: tuple[int, ...], limit: int) -> Plan:
    """Plan both passes.

    Args:
        rank: 0 for the plain scan.
        directions: of the orders; in the plain scan one per group.
        limit: maximum shared memory of a block, in bytes.

    Raises:
        ValueError: too little shared memory.
    """
    k, pairs = len(directions), _pairs(directions) if rank else ((),)
    together = max(1, *map(len, pairs))
    T = chunk_length(b, d, length, k)
    chunks = -(-length // T)
    channels, slots = _forward_block(d, chunks)
    constants = {'T': T, 'CHECK': check_length(T), 'CB': channels, 'S': slots, 'U': 2, 'N': n, 'R': rank}
    constants['TS'] = constants['CHECK']
    while _static_shared(constants, together) > STATIC_SHARED:
        smaller = 'TS' if constants['TS'] > 4 else 'S'
        if constants[smaller] == 1:
            raise _too_large(n, rank)
        constants[smaller] //= 2
    for cc, warps in _backward_blocks(d, n, together):
        constants |= {'CC': cc, 'W': warps}
        if shared_bytes(constants, together) <= limit:
            return Plan(constants, chunks, pairs, -(-d // (8 * cc * warps)))
    raise _too_large(n, rank)


def _too_large(n, rank):
    return ValueError(f'selective_scan: backend cuda has too little shared memory for n = {n} states and rank {rank}')


def _pairs(directions: Sequence[int]):
    """Pairs of orders of one family, rows or columns, that start at opposite ends of a chunk; the rest alone."""
    pairs = []
    for family in (0, 1):
        forward = [k for k, direction in enumerate(directions) if direction == family]
        backward = [k for k, direction in enumerate(directions) if direction == family + 2]
        both = min(len(forward), len(backward))
        pairs += list(zip(forward, backward, strict=False))
        pairs += [(k,) for k in forward[both:] + backward[both:]]
    return tuple(pairs)


def _forward_block(d, chunks):
    """Channels and chunks of a block, chosen so that its warps are full."""
    blocks = -(-d // 128)
    channels = -(-d // blocks)
    if blocks > 1:
        channels = -(-channels // 32) * 32
    if channels % 32 == 0:
        return channels, 1
    slots = [s for s in (1, 2, 4, 8, 16, 32) if s * channels <= 128 and (s == 1 or s <= chunks)]
    return channels, max(slots, key=lambda s: (s * channels / (-(-s * channels // 32) * 32), -s))


def _backward_blocks(d, n, together):
    """(CC, W), best first, then those that need less shared memory."""
    most = min(4, -(-d // 8), max(1, 16 // -(-n // 4)))
    best = min(range(1, most + 1), key=lambda cc: (-(-d // (8 * cc)) * cc, -cc))
    for cc in range(best, 0, -1):
        total = -(-d // (8 * cc))
        for side_by_side in range(3 if together == 2 else 4, 0, -1):
            yield cc, -(-total // -(-total // side_by_side))


def _row(rank):
    return max(4, -(-rank // 4) * 4)


def _static_shared(c, together):
    """Bytes of scan_outputs, which needs the most."""
    row = _row(c['R']) + 2 * -(-c['N'] // 4) * 4 + 4
    return 4 * c['S'] * together * (c['TS'] * row + c['T'])


def shared_bytes(c: Mapping[str, Any], together: int) -> int:
    """Bytes of scan_gradients, see its struct Shared, for `together` orders at a time."""
    row, nn, rank = c['CHECK'] + 4, -(-c['N'] // 4), c['R']
    warp = 3 * 8 * c['CC'] * row + (c['CHECK'] // 4 - 1) * c['CC'] * nn * 32
    warp += c['CHECK'] * (rank + 2 * c['N']) + (rank + 2) * 32
    block = 8 * nn * row + c['CHECK'] * _row(rank) + c['T']
    return 4 * together * (block + c['W'] * (-(-warp // 4) * 4)) + 16


def specialize(constants: Mapping[str, Any], together: int) -> tuple[tuple[str, int | str], ...]:
    """All macros, for launches that handle `together` orders at a time.

    ..._BLOCKS: blocks per multiprocessor, which limits registers to those available to this many warps: 24 in the
    forward pass (16 with many low-rank weights, which are kept in registers), 12 in the backward pass.
    """
    c, warps = constants, 24 if constants['R'] <= 8 else 16
    ends = c['CB'] * c['S']

    def blocks(threads, warps):
        return max(1, min(32, warps // -(-threads // 32)))

    return tuple(
        sorted(
            {
                **c,
                'P': together,
                'SCAN_BYTES': ctypes.sizeof(Arguments),
                'SHARED': shared_bytes(c, together),
                'ENDS_BLOCKS': blocks(ends, warps),
                'OUTPUTS_BLOCKS': blocks(ends * together, warps),
                'GRADIENTS_BLOCKS': blocks(32 * c['W'] * together, 12),
            }.items()
        )
    )


def forward_steps(plan: Plan, b: int, d: int, k: int) -> list[Step]:
    """The launches of the forward pass."""
    c = plan.constants
    threads = c['CB'] * c['S']
    tiles = -(-d // c['CB']) * -(-plan.chunks // c['S']) * b
    starts = _starts(plan, 'scan_ends', 'scan_chain', tiles, b, d, k)
    if not c['R']:
        return [*starts, Step('scan_outputs', (), threads, tiles * k)]
    return [*starts, *(Step('scan_outputs', pair, threads * len(pair), tiles) for pair in plan.pairs)]


def backward_steps(plan: Plan, b: int, d: int, k: int) -> list[Step]:
    """The launches of the backward pass."""
    c = plan.constants
    tiles = -(-d // c['CB']) * -(-plan.chunks // c['S']) * b
    starts = _starts(plan, 'scan_adjoint_ends', 'scan_adjoint_chain', tiles, b, d, k)
    grid = plan.blocks * plan.chunks * b * (1 if c['R'] else k)
    return [
        *starts,
        *(
            Step('scan_gradients', pair, 32 * c['W'] * max(1, len(pair)), grid, shared_bytes(c, max(1, len(pair))))
            for pair in plan.pairs
        ),
    ]


def _starts(plan, ends, chain, tiles, b, d, k):
    """The launches that compute the initial state of each chunk; the first one starts from 0."""
    if plan.chunks == 1:
        return []
    c = plan.constants
    columns = -(-c['N'] * d // 32)
    return [Step(ends, (), c['CB'] * c['S'], tiles * k), Step(chain, (), CHAIN_THREADS, columns * b * k)]
