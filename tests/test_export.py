"""`python -m dpmambair_basicsr.export`: networks as ONNX and .pt2 files that do not need this package."""

import itertools
import sys

import pytest
import torch
from support.commands import PACKAGE_PARENT, warm_python

import dpmambair_basicsr
from dpmambair_basicsr import archs, export
from dpmambair_basicsr.ops import selective_scan, use_backend

pytest.importorskip('onnxscript', reason='it writes ONNX')
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime', reason='it runs ONNX')

dpmambair_basicsr.register()

SCRIPT = PACKAGE_PARENT / 'dpmambair_basicsr' / 'export.py'

# One block each, at full resolution and at the lowest: tracing and writing ONNX take ten seconds and more per block.
FULL = {'num_blocks': [0, 0, 0, 0], 'num_refinement_blocks': 1, 'd_state': 2}
LOWEST = {'num_blocks': [0, 0, 0, 1], 'num_refinement_blocks': 0, 'd_state': 2}
NETWORKS = {
    'vmambair': {'type': 'VmambaIR', 'dim': 4, 'scale': 2, **FULL},
    'dpmambair': {
        'type': 'DPMambaIR',
        'dim': 8,
        'd_inner': [8, 8, 8, 8],
        'embed_dim': 8,
        'extractor_channels': [4, 4, 4],
        **LOWEST,
    },
}
SIZES = [(1, 16, 16), (2, 40, 24), (1, 48, 56)]
FORMATS = ('onnx', 'pt2')


def network(name):
    torch.manual_seed(0)
    options = dict(NETWORKS[name])
    net = getattr(archs, options.pop('type'))(**options).eval().requires_grad_(False)
    if name == 'dpmambair':
        net.output.weight.normal_(0, 0.1)
        for part, parameter in net.named_parameters():
            if '.modulation.' in part:  # otherwise all prompts are 1
                parameter.normal_(0, 3)
            elif part.endswith('dt_projs_bias'):  # otherwise the states are nearly 0
                parameter.fill_(1)
    return net


def run_main(monkeypatch, weights, output):
    monkeypatch.setattr(sys, 'argv', ['export', '-w', str(weights), '-o', str(output)])
    export.main()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Each network as a checkpoint and, by the command, in both formats; traced only once, since this is slow."""
    folder = tmp_path_factory.mktemp('export')
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, options in NETWORKS.items():
            torch.save({'params': network(name).state_dict(), 'network_g': options}, folder / f'{name}.pth')
            program = export.trace(network(name))
            monkeypatch.setattr(export, 'trace', lambda net, program=program: program)
            for form in FORMATS:
                run_main(monkeypatch, folder / f'{name}.pth', folder / f'{name}.{form}')
            monkeypatch.undo()
    return folder


def runner(file):
    return (export.run_onnx if file.suffix == '.onnx' else export.run_torch)(file)


def scan_inputs(length, groups=2):
    b, d, n = 2, 6, 3
    rng = torch.Generator().manual_seed(length)
    sizes = (b, d, length), (b, d, length), (d, n), (b, groups, n, length), (b, groups, n, length), (d,), (d,)
    u, delta, A, *rest = (torch.randn(size, generator=rng) for size in sizes)
    return u, delta, -A.exp(), *rest


@pytest.mark.parametrize('length', [1, 31, 32, 33, 64, 200])
def test_the_scan_agrees_with_the_definition(length):
    inputs = scan_inputs(length)
    expected = selective_scan(*inputs, delta_softplus=True, backend='reference')
    torch.testing.assert_close(export.scan(*inputs, True), expected, rtol=1e-4, atol=1e-5)


def test_the_scan_agrees_with_the_definition_without_options():
    u, delta, A, B, C, *_ = scan_inputs(70, groups=1)
    delta = delta.exp()
    expected = selective_scan(u, delta, A, B, C, backend='reference')
    torch.testing.assert_close(export.scan(u, delta, A, B, C, None, None, False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('name', 'form'), itertools.product(NETWORKS, FORMATS))
def test_files_match_the_network_at_any_size(name, form, folder):
    net, run = network(name), runner(folder / f'{name}.{form}')
    for batch, height, width in SIZES:
        image = torch.rand(batch, 3, height, width)
        expected = net(image)
        torch.testing.assert_close(run(image), expected, rtol=0, atol=1e-4)
        if name == 'dpmambair':  # the extractor's output must matter, or the test would not notice errors in it
            assert (expected - net(image, embedding=-net.embed(image))).abs().max() > 1e-2


@pytest.mark.parametrize('name', NETWORKS)
def test_onnx_contains_standard_operators_only(name, folder):
    model = onnx.load(folder / f'{name}.onnx')
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {''} and not model.functions
    assert sum(node.op_type == 'Scan' for node in model.graph.node) == 3 * (2 if name == 'vmambair' else 1)
    (image,), (restored,) = model.graph.input, model.graph.output
    assert (image.name, restored.name) == ('image', 'restored')
    assert all(image.type.tensor_type.shape.dim[axis].dim_param for axis in (0, 2, 3))


def test_pt2_needs_torch_alone(folder):
    code = (
        'import sys, torch; net = torch.export.load("dpmambair.pt2").module()\n'
        'print(net(torch.rand(1, 3, 24, 32)).shape)\n'
        'assert not {"dpmambair_basicsr", "basicsr"} & sys.modules.keys()'
    )
    done = warm_python('-c', code, cwd=folder)
    assert done.stdout.strip().endswith('torch.Size([1, 3, 24, 32])'), done.stdout


@pytest.mark.parametrize('form', FORMATS)
def test_unsupported_sizes_are_refused(form, folder):
    run = runner(folder / f'dpmambair.{form}')
    with pytest.raises(Exception, match=r'(?i)shape|dimension|guard|divisible|blocksize'):
        run(torch.rand(1, 3, 20, 24))


def test_tracing_leaves_network_and_scan_unchanged(folder):
    net = network('dpmambair')
    image = torch.rand(1, 3, 16, 16)
    before = net(image)
    with use_backend(export.LoopBackend), export.without_blocks(net):
        assert not torch.equal(net(image), before) and 'forward' in vars(net.extractor)
    assert torch.equal(net(image), before) and 'forward' not in vars(net.extractor)


def test_a_file_that_differs_is_not_left_behind(folder, monkeypatch, tmp_path):
    program = torch.export.load(str(folder / 'vmambair.pt2'))
    monkeypatch.setattr(export, 'trace', lambda net: program)
    changed = torch.load(folder / 'vmambair.pth')
    for value in changed['params'].values():
        value.mul_(1.1)
    torch.save(changed, tmp_path / 'w.pth')
    with pytest.raises(SystemExit, match='differ by more than 0.001; nothing was written'):
        run_main(monkeypatch, tmp_path / 'w.pth', tmp_path / 'x.pt2')
    assert [path.name for path in tmp_path.iterdir()] == ['w.pth']


def test_mistakes_end_with_one_line(folder, monkeypatch, tmp_path):
    (tmp_path / 'text.pth').write_text('')

    with pytest.raises(SystemExit, match='x.bin: must end in .onnx or .pt2; or choose --format'):
        run_main(monkeypatch, folder / 'vmambair.pth', tmp_path / 'x.bin')
    with pytest.raises(SystemExit, match='text.pth: not a checkpoint'):
        run_main(monkeypatch, tmp_path / 'text.pth', tmp_path / 'x.onnx')
    with pytest.raises(SystemExit, match='text.pth: it is a file; expected a folder'):
        run_main(monkeypatch, folder / 'vmambair.pth', tmp_path / 'text.pth/x.pt2')
    (tmp_path / 'x.pt2').mkdir()
    with pytest.raises(SystemExit, match='x.pt2: is a folder; expected a file'):
        run_main(monkeypatch, folder / 'vmambair.pth', tmp_path / 'x.pt2')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)  # as if it were not installed
    with pytest.raises(SystemExit, match='ONNX needs onnxscript .*pip install onnx onnxscript onnxruntime'):
        run_main(monkeypatch, folder / 'vmambair.pth', tmp_path / 'x.onnx')
