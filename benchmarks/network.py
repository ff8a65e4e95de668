"""Time whole networks side by side: medians, peak memory, and shares of the time. Prints Markdown tables.

    python benchmarks/network.py                                # both networks, 1 x 3 x 256 x 256, inference
    python benchmarks/network.py --small --size 64              # seconds instead of minutes
    python benchmarks/network.py --train --batch 2 --size 64    # forward and backward
    python benchmarks/network.py --versus backend torch numba   # two values of a setting

The contenders take turns in one process, so that a busy moment of the machine affects all of them. CPU time is summed
over all threads; other programs disturb it less than wall-clock time. Networks are those of the option files.
"""

import argparse
import datetime
import os
import platform
import statistics
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import dpmambair_basicsr.training.huge_pages  # noqa: F401  (first: before PyTorch, as our commands do; makes BasicSR importable)

# isort: split
import torch
import yaml
from scan import peak
from torch.profiler import ProfilerActivity, profile

from dpmambair_basicsr import archs
from dpmambair_basicsr.models.precision import DTYPES, in_training, mixed
from dpmambair_basicsr.ops import use_backend
from dpmambair_basicsr.ops.cuda_graphs import CudaGraphs, Replayed
from dpmambair_basicsr.ops.selective_scan.backend import get_backend

OPTIONS = Path(__file__).parents[1] / 'options'
FILES = {'DPMambaIR': 'train_dpmambair.yml', 'VmambaIR': 'train_vmambair_derain.yml'}
SMALL = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
SMALL_ONLY = {'DPMambaIR': {'d_inner': [16, 32, 64, 128], 'embed_dim': 64, 'extractor_channels': [16, 24, 32, 48]}}
PARTS = ('scan', 'layer norm', 'depthwise conv', '1x1 conv', 'other conv', 'projections', 'gates')
KERNELS = {'layer_norm': 'layer norm', 'depthwise': 'depthwise conv'}
ELEMENTWISE = ('aten::gelu', 'aten::silu', 'aten::mul', 'aten::gelu_backward', 'aten::silu_backward')


def backend(value):
    name, _, by_sequences = value.partition(', ')
    if name == 'best':
        return use_backend(None)
    return use_backend(not_fused(name) if by_sequences else name)


def not_fused(name):
    """A copy of a backend that reads images as sequences."""
    parts = {key: getattr(get_backend(name), key) for key in ('reads_half', 'scan', 'why_unavailable')}
    return SimpleNamespace(name=f'{name}, by sequences', omni_scan=None, **parts)


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(int(number))
    try:
        yield
    finally:
        torch.set_num_threads(before)


# {name: its values}
SETTINGS = {
    'backend': 'best, a backend of selective_scan, or, with its scans not fused, e.g. "numba, by sequences"',
    'threads': 'a number',
    'channels_last': 'on, off',
    'checkpoint_levels': 'digits of the levels, e.g. 0 or 0123, or none',
    'amp': 'off, bf16, fp16, with --train',
    'cuda_graph': 'off, on, whether all launches are replayed as one',
}


def setting(name: str | None, value: str, net: torch.nn.Module):
    """Apply a setting to the network, or return a context that applies it."""
    if name == 'channels_last':
        net.memory_format = torch.channels_last if value == 'on' else torch.contiguous_format
    elif name == 'checkpoint_levels':
        net.checkpoint_levels = () if value == 'none' else tuple(int(digit) for digit in value)
    elif name == 'amp':
        vars(net).pop('forward', None)
        if value != 'off':
            in_training(net, mixed(DTYPES[value], type(net).forward))
    elif name == 'cuda_graph':
        if 'graph' not in vars(net):
            net.graph = Replayed(partial(work, net), CudaGraphs(next(net.parameters()).device), warm_up=3)
        net.replays = value == 'on'
    elif name is not None:
        return {'backend': backend, 'threads': threads}[name](value)
    return nullcontext()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', nargs='+', default=list(FILES), choices=list(FILES))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--size', type=int, default=256, help='height and width, a multiple of 8 (default: 256)')
    parser.add_argument('--small', action='store_true', help='narrow, with one block per level, for a quick run')
    parser.add_argument('--train', action='store_true', help='forward and backward pass')
    parser.add_argument('--repeats', type=int, default=3, help='timed passes per contender (default: 3)')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads(), help='CPU threads')
    parser.add_argument('--devices', nargs='+', default=['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu'])
    parser.add_argument('--restormer', type=Path, metavar='FILE', help="Restormer's restormer_arch.py, to time it too")
    choices = '; '.join(f'{name}: {values}' for name, values in SETTINGS.items())
    parser.add_argument('--versus', nargs=3, metavar=('SETTING', 'VALUE', 'VALUE'), help=f'compare them. {choices}')
    args = parser.parse_args()
    name, *values = args.versus or (None, '')
    if name is not None and name not in SETTINGS:
        parser.error(f'--versus: must be one of {", ".join(SETTINGS)}, got {name!r}')
    if name == 'amp' and not args.train:
        parser.error('--versus amp: needs --train, since inference is fp32')
    if name == 'cuda_graph' and args.devices != ['cuda']:
        parser.error('--versus cuda_graph: needs --devices cuda')
    torch.set_num_threads(args.threads)

    memory = 'huge pages' if os.environ['THP_MEM_ALLOC_ENABLE'] == '1' else 'no huge pages'
    print(f'{datetime.date.today()}, {machine()}, {args.threads} thread(s), PyTorch {torch.__version__}, {memory}.')
    shape, what = (args.batch, 3, args.size, args.size), 'forward and backward' if args.train else 'inference'
    print(f'{" x ".join(map(str, shape))}, {what}, medians of {args.repeats}.\n')
    print('| network | setting | time | CPU time | peak memory | ' + ' | '.join(PARTS) + ' | rest |')
    print('|---|---|---|---|---|' + '---|' * (len(PARTS) + 1))
    for device in map(torch.device, args.devices):
        nets = {network: make(network, args.small, args.train) for network in args.networks}
        if args.restormer:
            from peers import load  # needs einops, like Restormer

            nets['Restormer'] = load(args.restormer).Restormer().train(args.train)
        nets = {network: net.to(device) for network, net in nets.items()}
        cases = [(network, value) for network in nets for value in values]
        image = torch.rand(shape, device=device)

        def run(network, value, measure, nets=nets, image=image):
            with setting(name, value, nets[network]):
                return measure(nets[network], image)

        taken = {case: [] for case in cases}
        for repeat in range(args.repeats + 1):
            for case in cases:
                seconds = run(*case, timed)
                if repeat:  # the first round compiles and fills caches
                    taken[case].append(seconds)
        for network, value in cases:
            clock, cpu = (statistics.median(part) for part in zip(*taken[network, value], strict=True))
            label = f'{device.type}, {name} {value}' if name else device.type
            cells = [network, label, f'{clock:.3g} s', f'{cpu:.3g} s' if device.type == 'cpu' else '']
            cells.append(run(network, value, peak_memory))
            cells += [f'{share:.0%}' for share in run(network, value, time_shares)]
            print(f'| {" | ".join(cells)} |', flush=True)


def make(network: str, small: bool, train: bool) -> torch.nn.Module:
    options = yaml.safe_load((OPTIONS / FILES[network]).read_text())['network_g']
    options = {key: value for key, value in options.items() if key != 'type'}
    if small:
        options |= SMALL | SMALL_ONLY.get(network, {})
    return getattr(archs, network)(**options).train(train)


def work(net, image):
    if net.training:
        net(image).square().mean().backward()
        net.zero_grad()
    else:
        with torch.no_grad():
            net(image)


def once(net, image):
    if getattr(net, 'replays', False):
        while net.graph.replay is None:
            net.graph(image)
        net.graph(image)
    else:
        work(net, image)
    if image.device.type != 'cpu':
        torch.accelerator.synchronize(image.device)


def timed(net, image) -> tuple[float, float]:
    """Wall-clock and CPU time in seconds."""
    clock, cpu = time.perf_counter(), time.process_time()
    once(net, image)
    return time.perf_counter() - clock, time.process_time() - cpu


def peak_memory(net, image) -> str:
    """PyTorch's memory for a pass, besides parameters and image."""
    if image.device.type != 'cuda':
        return f'{peak(partial(once, net, image)) / 2**20:.0f} MB'
    torch.cuda.reset_peak_memory_stats(image.device)
    before = torch.cuda.memory_allocated(image.device)
    once(net, image)
    return f'{(torch.cuda.max_memory_allocated(image.device) - before) / 2**20:.0f} MB'


def time_shares(net, image) -> list[float]:
    """The shares of PARTS, and of the rest, in the time of all operators."""
    cuda = image.device.type == 'cuda'
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities, record_shapes=True) as record:
        once(net, image)
    totals, everything = dict.fromkeys(PARTS, 0.0), 0.0
    for event in record.events():
        duration = event.device_time_total if cuda else event.cpu_time_total
        if event.cpu_parent is None:
            everything += duration
        part = part_of(event)
        if part is not None and not any(part_of(parent) for parent in parents(event)):
            totals[part] += duration
    shares = [total / everything for total in totals.values()]
    return [*shares, 1 - sum(shares)]


def parents(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def part_of(event) -> str | None:
    name, shapes = event.name, event.input_shapes
    if name.startswith('dpmambair_basicsr::'):
        return next((part for key, part in KERNELS.items() if key in name), 'scan')
    if name in ('aten::native_layer_norm', 'aten::layer_norm', 'aten::native_layer_norm_backward'):
        return 'layer norm'
    if name in ('aten::convolution', 'aten::convolution_backward'):
        _, per_group, height, _ = shapes[1 if name == 'aten::convolution' else 2]
        return '1x1 conv' if height == 1 else 'depthwise conv' if per_group == 1 else 'other conv'
    if name in ('aten::matmul', 'aten::bmm'):
        return 'projections'
    if name in ELEMENTWISE:
        return 'gates'
    return None


def machine() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    return f'{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores{gpu}'


if __name__ == '__main__':
    main()
