"""Times the available backends of the selective scan side by side and prints a Markdown table.

The backends take turns in one process, so that a busy moment of the machine hits all of them; figures are medians.
On a GPU, which is taken if there is one, the definition is left out and the times are the device's own. There a floor
is given too: what it takes to read each input and write each result once at the speed of a copy, or one exponential per
state and pass at 16 per cycle and multiprocessor, whichever is longer.

    python scripts/benchmark_scan.py --sizes 2x96x16x4096 1x48x16x65536 --repeats 5
    python scripts/benchmark_scan.py --device cuda --dtype bfloat16
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.ops.selective_scan import available_backends

# b, d, n, l: three training sizes, then images of 64 x 64 and 128 x 128.
SIZES_CPU = ['4x128x16x64', '8x64x16x256', '8x32x16x1024', '2x96x16x4096', '1x96x16x16384']
# Training on 128 x 128 and 64 x 64, images of 256 x 256 in one direction and in four.
SIZES_GPU = ['8x96x16x16384', '8x192x16x4096', '1x96x16x65536', '1x384x16x65536']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', metavar='BxDxNxL', help='batch, channels, states, length')
    parser.add_argument('--repeats', type=int, help='timed runs of each backend (default: 3; on a GPU 30)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='cpu, cuda, ...')
    parser.add_argument(
        '--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'], help='of u, delta, B, C'
    )
    args = parser.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    on_gpu = device.type == 'cuda'
    repeats = args.repeats or (30 if on_gpu else 3)
    backends = [name for name in available_backends(device) if not (on_gpu and name == 'reference')]
    baseline = 'torch' if on_gpu else 'reference'
    peaks = gpu_peaks(device) if on_gpu else None
    setting = f'{datetime.date.today()}, {machine(device)}, PyTorch {torch.__version__}'
    print(f'{setting}, {args.dtype}, medians of {repeats} runs')
    if on_gpu:
        print(f'copy: {peaks[0] / 1e12:.2f} TB/s; exponentials: {peaks[1] / 1e12:.2f} T/s')
    print()
    print('| b x d x n x l | pass | ' + ' | '.join(backends) + (' | floor |' if on_gpu else ' |'))
    print('|---|---|' + '---|' * (len(backends) + on_gpu))
    for size in args.sizes or (SIZES_GPU if on_gpu else SIZES_CPU):
        inputs = scan_inputs(*(int(number) for number in size.split('x')), device, dtype)
        for backward in (False, True):
            medians = side_by_side(backends, inputs, backward, repeats)
            cells = [f'{ms:.2f} ms ({medians[baseline] / ms:.1f}x)' for ms in medians.values()]
            if on_gpu:
                floor = floor_ms(inputs, backward, peaks)
                cells = [f'{cell}, {floor / ms:.0%}' for cell, ms in zip(cells, medians.values(), strict=True)]
                cells.append(f'{floor:.3f} ms')
            print(f'| {size} | {"forward + backward" if backward else "forward"} | {" | ".join(cells)} |', flush=True)
    print()
    print(f'In brackets: how many times as fast as {baseline}.' + (' Percent: floor / time.' if on_gpu else ''))


def scan_inputs(b, d, n, length, device, dtype):
    """With Mamba's statistics: A = -1..-n, steps from 1e-3 to 1e-1. The parameters are fp32."""
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


def side_by_side(backends, inputs, backward, repeats):
    """The median time of each backend in milliseconds."""
    times = {backend: [] for backend in backends}
    for repeat in range(repeats + 1):
        for backend in backends:
            ms = timed(lambda backend=backend: run(backend, inputs, backward), inputs['u'].device)
            if repeat:  # the first round compiles and fills caches
                times[backend].append(ms)
    return {backend: statistics.median(values) for backend, values in times.items()}


def run(backend, inputs, backward):
    with torch.set_grad_enabled(backward):
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    if backward:
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))


def timed(function, device):
    """Milliseconds of one call; on a GPU between two events, in which launches that the GPU waits for count too."""
    if device.type != 'cuda':
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def synchronize(device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def gpu_peaks(device):
    """Bytes that a copy reads and writes per second, measured, and exponentials per second at the highest clock."""
    source = torch.empty(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = statistics.median(timed(lambda: target.copy_(source), device) for _ in range(20))
    query = ['nvidia-smi', '--query-gpu=clocks.max.sm', '--format=csv,noheader,nounits']
    megahertz = float(
        subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[device.index or 0]
    )
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return 2 * source.numel() / ms * 1e3, 16 * multiprocessors * megahertz * 1e6


def floor_ms(inputs, backward, peaks):
    """The least time that any implementation needs: see the top."""
    size = sum(inputs[name].nbytes for name in ('u', 'delta', 'B', 'C'))
    y = inputs['u'].nbytes
    passes = [size + y] + ([2 * size + y] if backward else [])  # backward: inputs and dy in, gradients out
    states = inputs['u'].numel() * inputs['A'].shape[1]
    bandwidth, exponentials = peaks
    return 1e3 * sum(max(moved / bandwidth, states / exponentials) for moved in passes)


def machine(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)'


if __name__ == '__main__':
    main()
