"""Run networks of other projects, unchanged, with our stand-ins: deviation from the definition of the scan, and speed.

    python benchmarks/peers.py --mamba PATH --mambair PATH --vmambair PATH --vmunet PATH --mambaunet PATH --vmamba PATH

PATHs are checkouts of state-spaces/mamba, csguoh/MambaIR, AlphacatPlus/VmambaIR, JCruan519/VM-UNet,
ziyangwang007/Mamba-UNet and MzeroMiko/VMamba (form v0: the cross scan of the others needs a GPU); those not given are
left out. They need timm, einops and fvcore. The definition is mamba's own `selective_scan_ref`, extracted from its
checkout, or, without --mamba, ours. Prints a Markdown table: largest difference of the outputs divided by the largest
output, largest relative difference of the losses over ten training steps from the same start, and the median seconds of
a forward pass.
"""

import argparse
import ast
import copy
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import einops
import torch
import torch.nn.functional as F

import dpmambair_basicsr  # noqa: F401  (first: BasicSR can be imported then)
from dpmambair_basicsr import standins
from dpmambair_basicsr.ops import use_backend

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
# {name: (option, file, class, arguments)}
NETWORKS = {
    'MambaIR': (
        'mambair',
        'basicsr/archs/mambair_arch.py',
        'MambaIR',
        {'depths': (2, 2), 'embed_dim': 48, 'drop_path_rate': 0.0},
    ),
    'MambaIRv2': ('mambair', 'basicsr/archs/mambairv2_arch.py', 'MambaIRv2', {'depths': (2, 2), 'num_heads': (4, 4)}),
    'MambaIRv2Light': (
        'mambair',
        'basicsr/archs/mambairv2light_arch.py',
        'MambaIRv2Light',
        {'depths': (2, 2), 'num_heads': (4, 4)},
    ),
    'MambaIR, U-Net': ('mambair', 'realDenoising/basicsr/models/archs/mambairunet_arch.py', 'MambaIRUNet', SMALL),
    'VmambaIR, deraining': ('vmambair', 'Deraining/basicsr/models/archs/mamber33_arch.py', 'Mamber33', SMALL),
    'VM-UNet': (
        'vmunet',
        'models/vmunet/vmamba.py',
        'VSSM',
        {'depths': [1, 1, 1, 1], 'depths_decoder': [1, 1, 1, 1], 'num_classes': 1, 'drop_path_rate': 0.0},
    ),
    'Mamba-UNet': (
        'mambaunet',
        'code/networks/mamba_sys.py',
        'VSSM',
        {
            'in_chans': 3,
            'depths': [1, 1, 1, 1],
            'depths_decoder': [1, 1, 1, 1],
            'num_classes': 1,
            'drop_path_rate': 0.0,
        },
    ),
    'VMamba': (
        'vmamba',
        'classification/models/vmamba.py',
        'VSSM',
        {'depths': [1, 1, 2, 1], 'dims': 48, 'num_classes': 10, 'forward_type': 'v0', 'drop_path_rate': 0.0},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option in ('mamba', 'mambair', 'vmambair', 'vmunet', 'mambaunet', 'vmamba'):
        parser.add_argument(f'--{option}', type=Path, metavar='PATH')
    parser.add_argument('--size', type=int, default=64, help='height and width in pixels (default: %(default)s)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--only', help='run only this network')
    arguments = parser.parse_args()
    standins.install()
    reference = read_reference(arguments.mamba) if arguments.mamba else None
    source = "mamba_ssm's selective_scan_ref" if reference else 'our reference'
    print(f'{arguments.size} x {arguments.size}, {arguments.device}, {torch.get_num_threads()} threads, {source}')
    print('| network | output | losses of ten steps | stand-in | reference |')
    print('|---|---|---|---|---|')
    for name, (option, *network) in NETWORKS.items():
        checkout = getattr(arguments, option)
        if checkout is not None and arguments.only in (None, name):
            print(f'| {name} | {measure(checkout, *network, arguments, reference)} |', flush=True)


def read_reference(checkout: Path):
    """mamba's function; its module cannot be imported without Triton and its extension."""
    text = (checkout / 'mamba_ssm/ops/selective_scan_interface.py').read_text()
    (node,) = (node for node in ast.parse(text).body if getattr(node, 'name', '') == 'selective_scan_ref')
    names = {'torch': torch, 'F': F, 'rearrange': einops.rearrange, 'repeat': einops.repeat}
    exec(ast.get_source_segment(text, node), names)
    return names['selective_scan_ref']


def measure(checkout: Path, file: str, cls: str, options: dict, arguments, reference) -> str:
    module = load(checkout / file)
    torch.manual_seed(0)
    net = getattr(module, cls)(**options).to(arguments.device)
    image = torch.rand(1, 3, arguments.size, arguments.size, device=arguments.device)
    y, losses, seconds = run(copy.deepcopy(net), image)
    if reference is not None:
        swap(net, reference)
    with use_backend('reference'):  # for networks that call an extension module
        y_ref, losses_ref, seconds_ref = run(net, image)
    difference = ((y - y_ref).abs().max() / y_ref.abs().max()).item()
    of_losses = max(abs(a - b) / abs(b) for a, b in zip(losses, losses_ref, strict=True))
    return f'{difference:.1e} | {of_losses:.1e} | {seconds:.3f} s | {seconds_ref:.2f} s'


def load(file: Path):
    sys.path += [str(file.parent), str(file.parents[2])]  # for its imports
    specification = importlib.util.spec_from_file_location(f'peer_{file.stem}', file)
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module
    specification.loader.exec_module(module)
    return module


def swap(net: torch.nn.Module, reference) -> None:
    """Replace the scan by the reference in modules that keep it as an attribute."""

    def scan(*tensors, nrows=1, **options):
        return reference(*tensors, **options)

    for part in net.modules():
        for name in ('selective_scan', 'selective_scanC'):
            if hasattr(part, name):
                setattr(part, name, scan)


def run(net: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, list[float], float]:
    """The output, the losses of ten training steps, and the median seconds of three forward passes."""
    torch.manual_seed(0)  # some draw random numbers in every pass
    net.eval()
    with torch.no_grad():
        y, seconds = net(image), []
        for _ in range(3):
            start = time.perf_counter()
            net(image)
            seconds.append(time.perf_counter() - start)
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=1e-4), []
    target = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    for _ in range(10):
        optimizer.zero_grad()
        loss = (net(image) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return y, losses, statistics.median(seconds)


if __name__ == '__main__':
    main()
