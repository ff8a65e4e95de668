"""Measure time, memory and start-up time of the selective scan and the omni scan. Prints Markdown tables.

    python benchmarks/scan.py --sizes 2x96x16x4096 1x96x16x65536 --repeats 5
    python benchmarks/scan.py --tables omni growth memory start --threads 1
    python benchmarks/scan.py --device cuda --dtype bfloat16

Tables:
    backends    the available backends side by side, and mambapy's pscan if it is installed
    omni        four directions of an image, projections included: fused and by sequences, same scan kernel
    growth      the best backend's time per position
    memory      of the best backend on a CPU, results included, also in units of u
    start       our part of a process's first call, without and with the kernels compiled by an earlier process

The contenders take turns in one process, so that a busy moment of the machine affects all of them; figures are medians.
With one thread they are CPU time, which other programs disturb less than wall-clock time; on a GPU, the device's own
time.
"""

import argparse
import datetime
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import dpmambair_basicsr.training.huge_pages  # noqa: F401  (first: before PyTorch, as our commands do)

# isort: split
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from dpmambair_basicsr.ops import omni_scan, selective_scan
from dpmambair_basicsr.ops.cross_scan import DIRECTIONS
from dpmambair_basicsr.ops.omni_scan import scan_by_sequences
from dpmambair_basicsr.ops.selective_scan import available_backends

# b, d, n, l: three training sizes, then images of 64 x 64 and 128 x 128.
SIZES = ['4x128x16x64', '8x64x16x256', '8x32x16x1024', '2x96x16x4096', '1x96x16x16384']
# Training on 128 x 128 and 64 x 64, images of 256 x 256 in one direction and in four.
SIZES_GPU = ['8x96x16x16384', '8x192x16x4096', '1x96x16x65536', '1x384x16x65536']
# b, d, h, w: VmambaIR's last stage on 64 x 64, its latent stage on 256 x 256, and its first and last stage there.
IMAGES = ['1x96x64x64', '1x384x32x32', '1x48x256x256', '1x96x256x256']
STATES = 16
LENGTHS = [2**i for i in range(10, 19, 2)]
PASSES = {'forward': False, 'forward + backward': True}
# Multiplications and multiply-adds of a state update: 6 for the decay, 2 for the state, 1 for the output.
OPERATIONS = 9


def main():
    tables = {'backends': backends, 'omni': omni, 'growth': growth, 'memory': memory, 'start': start}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--tables', nargs='+', default=['backends', 'omni'], choices=tables, help='default: backends omni'
    )
    parser.add_argument('--sizes', nargs='+', metavar='BxDxNxL', help='of backends: batch, channels, states, length')
    parser.add_argument('--backends', nargs='+', help='only these in the table of backends; mambapy is one')
    parser.add_argument('--images', nargs='+', default=IMAGES, metavar='BxDxHxW', help='of omni')
    parser.add_argument('--repeats', type=int, default=3, help='timed runs per contender (default: 3)')
    parser.add_argument('--forward', action='store_true', help='no backward passes')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu, cuda, ...')
    dtypes = ('float32', 'bfloat16', 'float16')
    parser.add_argument('--dtype', default=dtypes[0], choices=dtypes, help='type of u, delta, B, C')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.device, args.dtype = torch.device(args.device), getattr(torch, args.dtype)
    args.passes = dict(list(PASSES.items())[: 1 if args.forward else 2])
    kind = 'CPU time' if clock(args.device) is time.process_time else 'time'
    print(
        f'{datetime.date.today()}, {machine(args.device)}, {args.threads} thread(s), PyTorch {torch.__version__}, '
        f'{args.dtype}, {kind}, medians of {args.repeats} runs'.replace('torch.', '')
    )
    for name in args.tables:
        print()
        tables[name](args)


def backends(args):
    contenders = {
        name: lambda inputs, name=name: selective_scan(**inputs, delta_softplus=True, backend=name)
        for name in available_backends(args.device)
        if args.device.type == 'cpu'
        or name != 'reference'  # on a GPU, only its launches, one per position, would be measured
    }
    try:
        from mambapy.pscan import pscan
    except ImportError:
        pass
    else:
        contenders['mambapy'] = lambda inputs: scan_by_pscan(pscan, **inputs)
    if args.backends:
        contenders = {name: contenders[name] for name in args.backends}
    base = 'reference' if 'reference' in contenders else list(contenders)[-1]
    table('b x d x n x l', 'pass', *contenders)
    limit, explanation = None, ''
    if args.device.type == 'cuda':
        limit, explanation = gpu_limit(args.device)
    elif args.device.type == 'cpu' and args.threads == 1 and 'numba' in contenders:
        limit, explanation = cpu_limit()
    for size in args.sizes or (SIZES if args.device.type == 'cpu' else SIZES_GPU):
        inputs = scan_inputs(*(int(number) for number in size.split('x')), args.device, args.dtype)
        for label, backward in args.passes.items():
            medians = side_by_side(contenders, inputs, backward, args)
            cells = [f'{ms:.3g} ms ({medians[base] / ms:.3g}x)' for ms in medians.values()]
            row(size, label, *cells)
            if limit is not None and (least := limit(inputs, backward)):
                row('', f'of the limit, {least:.3g} ms', *(f'{least / ms:.1%}' for ms in medians.values()))
    print(f'\nIn brackets: how many times as fast as {base!r}.')
    print(explanation)


def omni(args):
    contenders = {
        'fused': lambda inputs: omni_scan(**inputs),
        'by sequences': lambda inputs: scan_by_sequences(**inputs, directions=DIRECTIONS),
    }
    if 'mamba_ssm' in available_backends(args.device):  # as in the published code
        contenders["by sequences, mamba_ssm's kernel"] = lambda inputs: scan_by_sequences(
            **inputs, directions=DIRECTIONS, backend='mamba_ssm'
        )
    table('b x d x h x w', 'pass', 'fused', *(f'{name} (ratio)' for name in list(contenders)[1:]))
    limit, explanation = gpu_omni_limit(args.device) if args.device.type == 'cuda' else (None, None)
    for size in args.images:
        inputs = omni_inputs(*(int(number) for number in size.split('x')), args.device)
        for label, backward in args.passes.items():
            first, *others = side_by_side(contenders, inputs, backward, args).values()
            row(size, label, f'{first:.3g} ms', *(f'{ms:.3g} ms ({ms / first:.2f}x)' for ms in others))
            if limit is not None:
                least = limit(inputs, backward)
                row('', f'of the limit, {least:.3g} ms', *(f'{least / ms:.1%}' for ms in (first, *others)))
    if explanation is not None:
        print(f'\n{explanation}')


def growth(args):
    contenders = {'best': lambda inputs: selective_scan(**inputs, delta_softplus=True)}
    table('ns per position and channel', *(f'l = {length}' for length in LENGTHS))
    for label, backward in args.passes.items():
        times = []
        for length in LENGTHS:
            inputs = scan_inputs(1, 96, STATES, length, args.device, args.dtype)
            times.append(1e6 * side_by_side(contenders, inputs, backward, args)['best'] / (96 * length))
        row(label, *(f'{ns:.2f}' for ns in times))


def memory(args):
    table('b x d x n x l', *PASSES)
    for size in ('2x96x16x4096', '1x96x16x65536'):
        inputs = scan_inputs(*(int(number) for number in size.split('x')), args.device, args.dtype)
        dy, u = torch.ones_like(inputs['u']), inputs['u'].numel() * inputs['u'].element_size()
        peaks = []
        for backward in PASSES.values():
            once = partial(run_once, lambda inputs: selective_scan(**inputs, delta_softplus=True), inputs, backward, dy)
            once()
            peaks.append(peak(once))
        row(size, *(f'{size / 2**20:.3g} MB ({size / u:.1f} u)' for size in peaks))


def start(args):
    table('CPU seconds', 'first process', 'later')
    calls = {
        'selective scan': 'selective_scan(x[0], x[0], -x[0, 0], x[0], x[0])',
        'omni scan': 'omni_scan(x, x[0, 0, :1].expand(1, 12, 4), x[0, :1], x[0, 0, :1], -x[0, 0], x[0, 0, 0], (0,))',
    }
    for label, call in calls.items():
        code = (
            # torch._dynamo: PyTorch itself imports it at the first call of any operator written in Python
            'import time, torch, torch._dynamo\nfrom dpmambair_basicsr.ops import omni_scan, selective_scan\n'
            f'x, start = torch.ones(1, 4, 4, 4), time.process_time()\n{call}\nprint(time.process_time() - start)'
        )
        with tempfile.TemporaryDirectory() as cache:
            command, environment = [sys.executable, '-c', code], os.environ | {'NUMBA_CACHE_DIR': cache}
            printed = [subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]
        row(label, *(f'{float(seconds):.2f}' for seconds in printed))


def table(*columns):
    row(*columns)
    row(*['---'] * len(columns))


def row(*cells):
    print(f'| {" | ".join(cells)} |', flush=True)


def scan_inputs(b, d, n, length, device, dtype):
    """Inputs with Mamba's statistics: A = -1..-n, steps from 1e-3 to 1e-1. The parameters are fp32."""
    rng = torch.Generator().manual_seed(0)
    inputs = {
        'u': torch.randn(b, d, length, generator=rng).to(dtype),
        'delta': (0.1 * torch.randn(b, d, length, generator=rng)).to(dtype),
        'A': -torch.arange(1.0, n + 1).repeat(d, 1),
        'B': torch.randn(b, 1, n, length, generator=rng).to(dtype),
        'C': torch.randn(b, 1, n, length, generator=rng).to(dtype),
        'D': torch.randn(d, generator=rng),
        'delta_bias': torch.logspace(-3, -1, d).expm1().log(),
    }
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def omni_inputs(b, d, h, w, device):
    """Inputs for four directions; the image is channels_last, as in the networks."""
    rng, rank = torch.Generator().manual_seed(0), -(-d // 16)
    inputs = {
        'x': torch.randn(b, d, h, w, generator=rng).contiguous(memory_format=torch.channels_last),
        'x_proj_weight': d**-0.5 * torch.randn(4, rank + 2 * STATES, d, generator=rng),
        'dt_proj_weight': 0.1 * rank**-0.5 * torch.randn(4, d, rank, generator=rng),
        'dt_proj_bias': torch.logspace(-3, -1, d).expm1().log().repeat(4, 1),
        'A': -torch.arange(1.0, STATES + 1).repeat(4 * d, 1),
        'D': torch.randn(4 * d, generator=rng),
    }
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def scan_by_pscan(pscan, u, delta, A, B, C, D, delta_bias):
    """The scan as in mambapy's Mamba block, from (b, d, l)."""
    delta = F.softplus(delta + delta_bias[:, None]).mT.unsqueeze(-1)  # (b, l, d, 1)
    decay, drive = torch.exp(delta * A), delta * B.transpose(1, 3).mT * u.mT.unsqueeze(-1)  # (b, l, d, n)
    y = pscan(decay, drive) @ C.squeeze(1).mT.unsqueeze(-1).to(drive)  # u may be bf16, the parameters are fp32
    return (y.squeeze(-1).mT + D[:, None] * u).to(u.dtype)


def side_by_side(contenders, inputs, backward, args):
    """The median time of each in milliseconds."""
    times = {name: [] for name in contenders}
    dy = torch.ones_like(next(iter(inputs.values())))
    for repeat in range(args.repeats + 1):
        for name, contender in contenders.items():
            ms = timed(partial(run_once, contender, inputs, backward, dy), args.device)
            if repeat:  # the first round compiles and fills caches
                times[name].append(ms)
    return {name: statistics.median(values) for name, values in times.items()}


def run_once(contender, inputs, backward, dy):
    with torch.set_grad_enabled(backward):
        y = contender(inputs)
    if backward:
        torch.autograd.grad(y, list(inputs.values()), dy)


def timed(function, device):
    """Milliseconds of one call; on a GPU between two events, including launches that the GPU waits for."""
    if device.type == 'cuda':
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end)
    now = clock(device)
    begin = now()
    function()
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return 1e3 * (now() - begin)


def clock(device):
    return time.process_time if device.type == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter


def multiply_adds():
    """Multiply-adds of vectors of 16 that one thread can do per second, without dependencies between them."""
    from dpmambair_basicsr.ops.selective_scan.numba.simd import Address, Integer, fma, kernel, load, store

    @kernel(Integer, Address)
    def rounds(number, place):
        factor = load(place)
        a = b = c = d = e = f = g = h = factor
        for _ in range(number):
            a, b, c, d = fma(a, factor, a), fma(b, factor, b), fma(c, factor, c), fma(d, factor, d)
            e, f, g, h = fma(e, factor, e), fma(f, factor, f), fma(g, factor, g), fma(h, factor, h)
        store(place, a + b + c + d + e + f + g + h)

    number, times = 10**7, []
    for _ in range(5):
        place = torch.zeros(16)
        begin = time.process_time()
        rounds(number, place.data_ptr())
        times.append(time.process_time() - begin)
    return 8 * number / min(times)


def cpu_limit():
    """The limit, a function (inputs, backward) -> milliseconds, or None; and its description."""
    rate = 16 * multiply_adds() / OPERATIONS

    def limit(inputs, backward):
        return None if backward else 1e3 * states(inputs) / rate

    return limit, f'The limit: {OPERATIONS} multiply-adds per state, {rate / 1e9:.3g} G states per second.'


def gpu_limit(device):
    """As `cpu_limit`."""
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(20))
    bandwidth = 2 * source.numel() / ms * 1e3
    exponentials = gpu_exponentials(device)

    def limit(inputs, backward):
        y = inputs['u'].nbytes
        size = sum(inputs[name].nbytes for name in ('u', 'delta', 'B', 'C'))
        passes = [size + y] + ([2 * size + y] if backward else [])  # backward: inputs and dy in, gradients out
        return 1e3 * sum(max(moved / bandwidth, states(inputs) / exponentials) for moved in passes)

    return limit, (
        'The limit: reading each input and writing each result once as fast as a copy does, or one exponential per '
        f'state and pass, whichever is longer; {bandwidth / 1e12:.2f} TB/s, {exponentials / 1e12:.2f} T exponentials/s.'
    )


def gpu_omni_limit(device):
    """As `cpu_limit`, for `omni`: the needs of a scan by chunks, 0.22 and 0.32 ms for 1x96x256x256 on an H200."""
    exponentials = gpu_exponentials(device)

    def limit(inputs, backward):
        steps, n = inputs['x'].numel() * len(inputs['dt_proj_bias']), inputs['A'].shape[1]
        return 1e3 * steps * (2 * n + 4 + (3 * n + 6 if backward else 0)) / exponentials

    return limit, (
        'The limit: exponentials alone. Forward 2 per state, as chunks are scanned twice, and 2 in softplus each time '
        f'it is computed; backward 3 per state and 3 such times; {exponentials / 1e12:.2f} T exponentials/s.'
    )


def gpu_exponentials(device):
    """Exponentials per second, 16 per multiprocessor and cycle; a reciprocal counts as one."""
    query = ['nvidia-smi', '--query-gpu=clocks.max.sm', '--format=csv,noheader,nounits']
    megahertz = float(subprocess.check_output(query, text=True).split()[device.index or 0])
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count * megahertz * 1e6


def states(inputs):
    return inputs['u'].numel() * inputs['A'].shape[1]


def peak(function):
    """Peak of PyTorch's CPU memory in bytes, results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == '[memory]']
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def machine(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == '__main__':
    main()
