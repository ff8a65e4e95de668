"""Times the available backends of the selective scan side by side and prints a Markdown table.

The backends take turns in one process, so that a busy moment of the machine hits all of them; figures are medians.

    python scripts/benchmark_scan.py --sizes 2x96x16x4096 1x48x16x65536 --repeats 5
"""

import argparse
import datetime
import platform
import statistics
import time
from pathlib import Path

import torch

from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.ops.selective_scan import available_backends

# b, d, n, l: three training sizes, then images of 64 x 64 and 128 x 128.
SIZES = ['4x128x16x64', '8x64x16x256', '8x32x16x1024', '2x96x16x4096', '1x96x16x16384']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', default=SIZES, metavar='BxDxNxL', help='batch, channels, states, length')
    parser.add_argument('--repeats', type=int, default=3, help='timed runs of each backend (default: 3)')
    parser.add_argument('--device', default='cpu', help='cpu (default), cuda, ...')
    args = parser.parse_args()

    device = torch.device(args.device)
    backends = available_backends(device)
    setting = f'{datetime.date.today()}, {machine(device)}, PyTorch {torch.__version__}'
    print(f'{setting}, fp32, medians of {args.repeats} runs')
    print()
    print('| b x d x n x l | pass | ' + ' | '.join(backends) + ' |')
    print('|---|---|' + '---|' * len(backends))
    for size in args.sizes:
        inputs = scan_inputs(*(int(number) for number in size.split('x')), device)
        for backward in (False, True):
            medians = side_by_side(backends, inputs, backward, args.repeats)
            cells = [f'{ms:.2f} ms ({medians["reference"] / ms:.1f}x)' for ms in medians.values()]
            print(f'| {size} | {"forward + backward" if backward else "forward"} | {" | ".join(cells)} |', flush=True)
    print()
    print('In brackets: how many times as fast as the reference.')


def scan_inputs(b, d, n, length, device):
    """With Mamba's statistics: A = -1..-n, steps from 1e-3 to 1e-1."""
    rng = torch.Generator().manual_seed(0)
    inputs = {
        'u': torch.randn(b, d, length, generator=rng),
        'delta': 0.1 * torch.randn(b, d, length, generator=rng),
        'A': -torch.arange(1.0, n + 1).repeat(d, 1),
        'B': torch.randn(b, 1, n, length, generator=rng),
        'C': torch.randn(b, 1, n, length, generator=rng),
        'D': torch.randn(d, generator=rng),
        'delta_bias': torch.logspace(-3, -1, d).expm1().log(),
    }
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def side_by_side(backends, inputs, backward, repeats):
    """The median time of each backend in milliseconds."""
    times = {backend: [] for backend in backends}
    for repeat in range(repeats + 1):
        for backend in backends:
            ms = timed(backend, inputs, backward)
            if repeat:  # the first round compiles and fills caches
                times[backend].append(ms)
    return {backend: statistics.median(values) for backend, values in times.items()}


def timed(backend, inputs, backward):
    device = inputs['u'].device
    weight = torch.ones_like(inputs['u'])
    synchronize(device)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
    if backward:
        torch.autograd.grad(y, list(inputs.values()), weight)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def synchronize(device):
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def machine(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)'


if __name__ == '__main__':
    main()
