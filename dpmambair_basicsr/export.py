"""Export a trained network to a single file that runs without this package: ONNX, or torch.export's .pt2.

    python -m dpmambair_basicsr.export --weights net_g_latest.pth --output net.onnx
    python -m dpmambair_basicsr.export --weights net_g_latest.pth --output net.pt2

One input, `image`, (B, 3, H, W) float32 RGB in [0, 1]; one output, `restored`, (B, 3, scale * H, scale * W), not
clamped. B, H and W are dynamic; H and W must be multiples of 8, unlike in the network itself (pad, restore, crop), and
at least 16 for .pt2. The selective scan consists of standard operators, ONNX's Scan or PyTorch's own.
The file is written only if its results agree with the network's at several sizes. A full-size network takes minutes.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from dpmambair_basicsr.files.atomic import check_file, replacing
from dpmambair_basicsr.files.errors import InputError, MissingLibraryError, UserError, exit_on_error
from dpmambair_basicsr.files.option_files import read_network
from dpmambair_basicsr.inference.restorer import load
from dpmambair_basicsr.ops import use_backend

FORMATS = {'.onnx': 'onnx', '.pt2': 'torch'}
CHUNK = 32  # positions; see scan
EXAMPLE = (2, 5, 7)  # batch, and height and width in strides: all different, or they would be considered equal
CHECKED = [(1, 2, 3), (2, 8, 5), (1, 16, 16)]  # the same, for the images with which the file is tested
TOLERANCE = 1e-3


class ExportError(UserError, ValueError):
    """The exported network computes something else than the original."""


def main() -> None:
    arguments = parse_arguments()
    with exit_on_error('', ValueError, OSError):
        form = choose_format(arguments)
        check_file(arguments.output)
        network = None if arguments.opt is None else read_network(arguments.opt)
        net = load(arguments.weights, network=network, device='cpu').net
    print('tracing the network', flush=True)
    program = trace(net)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with exit_on_error('', OSError), replacing(arguments.output) as part:
        print(f'writing {form}', flush=True)
        (write_onnx if form == 'onnx' else write_torch)(program, part)
        check(net, (run_onnx if form == 'onnx' else run_torch)(part))
    print(f'{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('-w', '--weights', required=True, metavar='FILE', help='checkpoint, net_g_*.pth')
    add('-o', '--output', required=True, type=Path, metavar='FILE', help='FILE.onnx or FILE.pt2')
    add('--format', choices=FORMATS.values(), help='default: from the extension of the output')
    add('--opt', metavar='FILE', help='option file with network_g, for a checkpoint without network options')
    return parser.parse_args()


def choose_format(arguments: argparse.Namespace) -> str:
    """The format, by the arguments.

    Raises:
        InputError: neither the extension of the output nor --format names one.
        MissingLibraryError: a library that writes it is missing.
    """
    form = arguments.format or FORMATS.get(arguments.output.suffix)
    if form is None:
        raise InputError(f'{arguments.output}: must end in .onnx or .pt2; or choose --format onnx or torch')
    for library in ('onnx', 'onnxscript', 'onnxruntime') if form == 'onnx' else ():
        try:
            importlib.import_module(library)
        except ImportError as error:
            needed = f'ONNX needs {library} ({error}); pip install onnx onnxscript onnxruntime'
            raise MissingLibraryError(needed) from None
    return form


def trace(net: nn.Module) -> ExportedProgram:
    """The network as a graph of PyTorch's own operators, for any batch and any multiples of its stride."""
    batch, height, width = EXAMPLE
    stride = cast(int, net.stride)  # to a type checker, attributes of a module are tensors or modules
    image = torch.rand(batch, 3, height * stride, width * stride)
    sizes = {0: Dim('batch'), 2: stride * Dim('height'), 3: stride * Dim('width')}
    with torch.no_grad(), use_backend(LoopBackend), without_blocks(net):
        return torch.export.export(net, (image,), dynamic_shapes=(sizes,))


@contextmanager
def without_blocks(net: nn.Module) -> Iterator[None]:
    """A context in which a degradation extractor does not split images: a graph cannot depend on their size."""
    extractor = getattr(net, 'extractor', None)
    if extractor is not None:
        extractor.forward = lambda image: extractor.head(extractor.features(image).mean(dim=(2, 3)))
    try:
        yield
    finally:
        if extractor is not None:
            del extractor.forward


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus) -> Tensor:
    """`selective_scan`'s contract for validated arguments, for any length l, in three loops of PyTorch's `scan`.

    A loop over l would be slow, and a graph without loops has a fixed length. So c chunks of CHUNK positions advance
    side by side, as explained in `torch_chunked`: sweep them from a zero state, chain their contributions to the state,
    sweep again from the resulting states. Together, 2 * CHUNK + c steps.

    Shapes: b batch, g groups, w channels per group, n states; a state is (b, g, w, n, c).
    """
    (b, d, length), (g, n) = u.shape, B.shape[1:3]
    w = d // g
    c = length // CHUNK + 2  # one more than needed, since PyTorch specialises sizes of 1
    loop = torch.ops.higher_order.scan  # (body, states, inputs by step, constants) -> last states, outputs by step

    def by_step(x):
        """(..., l) -> (CHUNK, ..., c); zeros beyond the end, where delta = 0 keeps the state."""
        x = F.pad(x, (0, c * CHUNK - length)).unflatten(-1, (c, CHUNK))
        return x.movedim(-1, 0).contiguous()

    def advance(h, delta, drive, B, A):
        return torch.exp(delta * A) * h + drive * B

    def sweep(h, delta, drive, B, A):
        return (advance(h, delta, drive, B, A),)

    def chain(h, delta, end, A):
        return torch.exp(delta * A) * h + end, h.clone()

    def read(h, delta, drive, B, C, A):
        h = advance(h, delta, drive, B, A)
        return h, (h * C).sum(dim=3)

    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    A = A.view(g, w, n, 1)
    step, drive = (by_step(x.unflatten(1, (g, w)).unsqueeze(3)) for x in (delta, delta * u))
    B, C = (by_step(x.unsqueeze(2)) for x in (B, C))

    (end,) = loop(sweep, (u.new_zeros(b, g, w, n, c),), (step, drive, B), (A,))
    total, end = (x.movedim(-1, 0).contiguous() for x in (step.sum(dim=0), end))
    _, start = loop(chain, (u.new_zeros(b, g, w, n),), (total, end), (A.squeeze(3),))
    _, y = loop(read, (start.movedim(0, -1).contiguous(),), (step, drive, B, C), (A,))

    y = y.movedim(0, -1).flatten(-2)[..., :length].flatten(1, 2)  # (b, d, l)
    return y if D is None else y + D[:, None] * u


class LoopBackend:
    """`scan` as a backend."""

    name, reads_half, omni_scan = 'loops', False, None
    scan = staticmethod(scan)

    @staticmethod
    def why_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
        """It runs everywhere."""


def write_onnx(program: ExportedProgram, file: Path) -> None:
    logging.getLogger('onnx_ir').setLevel(logging.ERROR)  # it warns about the sweep, which has no output per step
    sizes = {0: 'batch', 2: 'height', 3: 'width'}
    names = {'input_names': ['image'], 'output_names': ['restored'], 'dynamic_shapes': (sizes,)}
    exported = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, **names)
    assert exported is not None, 'None only without dynamo'
    exported.save(file)


def run_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda image: torch.from_numpy(session.run(['restored'], {'image': image.numpy()})[0])


def write_torch(program: ExportedProgram, file: Path) -> None:
    with open(file, 'wb') as stream:  # a path would have to end in .pt2
        torch.export.save(program, stream)


def run_torch(file: Path) -> Callable[[Tensor], Tensor]:
    with open(file, 'rb') as stream:
        return torch.export.load(stream).module()


@torch.no_grad()
def check(net: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    """Print the largest difference from the network at each size; raise ExportError if it exceeds TOLERANCE."""
    stride = cast(int, net.stride)
    for batch, height, width in CHECKED:
        image = torch.rand(batch, 3, height * stride, width * stride)
        error = (run(image) - net(image)).abs().max().item()
        print(f'{" x ".join(map(str, image.shape))}: largest difference {error:.1e}', flush=True)
        if not error <= TOLERANCE:
            raise ExportError(f'the results differ by more than {TOLERANCE}; nothing was written')


if __name__ == '__main__':
    sys.exit(main())
