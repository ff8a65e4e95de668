"""Other people's Mamba networks run by our stand-ins for mamba_ssm, causal_conv1d and VMamba's extensions.

DPMAMBAIR_MAMBA and DPMAMBAIR_VMAMBA name checkouts of state-spaces/mamba and MzeroMiko/VMamba, whose own tests then run
on DPMAMBAIR_PEER_DEVICE (default: cpu).
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.commands import python, warm_python

from dpmambair_basicsr import standins
from dpmambair_basicsr.ops import selective_scan
from dpmambair_basicsr.standins import extensions
from dpmambair_basicsr.standins.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from dpmambair_basicsr.standins.mamba_simple import Mamba
from dpmambair_basicsr.standins.selective_scan_interface import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
)

SCRIPT = """
import sys
from causal_conv1d import causal_conv1d_fn
from mamba_ssm import Mamba
from mamba_ssm.modules.mamba_simple import Mamba as same
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
import selective_scan_cuda, selective_scan_cuda_core, selective_scan_cuda_oflex
import torch
assert Mamba is same and __name__ == '__main__'
print(sys.argv[1:], Mamba(8)(torch.ones(1, 5, 8)).shape)
"""


@pytest.fixture(autouse=True)
def nothing_installed():
    yield
    standins.uninstall()
    for name in [name for name in sys.modules if name.partition('.')[0] in standins.PACKAGES]:
        del sys.modules[name]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def inputs(rng, b=2, d=6, n=4, length=37, groups=2, dtype=torch.float32):
    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=rng).to(dtype)

    return {
        'u': normal(b, d, length),
        'delta': normal(b, d, length) - 1,
        'A': -torch.rand(d, n, generator=rng) - 0.1,
        'B': normal(b, groups, n, length),
        'C': normal(b, groups, n, length),
        'D': normal(d, dtype=torch.float32),
        'z': normal(b, d, length),
        'delta_bias': normal(d, dtype=torch.float32),
    }


def with_gradients(function, tensors, **options):
    tensors = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    results = function(**tensors, **options)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((result.double() * torch.arange(result.numel()).view(result.shape).cos()).sum() for result in results)
    return [*results, *torch.autograd.grad(total, list(tensors.values()))]


def assert_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        limit = tolerance * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=limit)


@pytest.mark.parametrize('softplus', [True, False])
@pytest.mark.parametrize(
    ('dtype', 'tolerance'),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_the_whole_contract_equals_the_definition_with_every_gradient(rng, dtype, tolerance, softplus):
    tensors = inputs(rng, dtype=dtype)
    if dtype == torch.float64:
        tensors = {name: x.double() for name, x in tensors.items()}
    if not softplus:
        tensors['delta'] = tensors['delta'].abs() / 8
        tensors['delta_bias'] = tensors['delta_bias'].abs() / 8
    options = {'delta_softplus': softplus, 'return_last_state': True}
    found = with_gradients(selective_scan_fn, tensors, **options)
    wide = {name: x.double() for name, x in tensors.items()}
    expected = with_gradients(selective_scan_ref, wide, **options)
    assert found[0].dtype == dtype
    assert_close(found, expected, tolerance)


def test_the_last_state_is_the_final_state_of_the_recurrence(rng):
    tensors = inputs(rng, groups=1)
    y, state = selective_scan_fn(**tensors, delta_softplus=True, return_last_state=True)
    step = F.softplus(tensors['delta'] + tensors['delta_bias'][:, None]).unsqueeze(2)
    h = torch.zeros_like(state)
    for t in range(tensors['u'].shape[2]):
        driven = step[..., t] * tensors['B'][:, :, :, t] * tensors['u'][:, :, t, None]
        h = torch.exp(step[..., t] * tensors['A']) * h + driven
    torch.testing.assert_close(state, h)
    assert torch.equal(y, selective_scan_fn(**tensors, delta_softplus=True)), 'asking for it does not change y'


@pytest.mark.parametrize('constant', ['B', 'C', 'BC'])
def test_B_and_C_may_be_constant_for_each_channel(rng, constant):
    tensors = inputs(rng, groups=1)
    d, n, length = 6, 4, 37
    spread = dict(tensors)
    for name in {'B', 'C'} - {*constant}:
        spread[name] = tensors[name].repeat_interleave(d, dim=1)
    for name in constant:
        tensors[name] = torch.randn(d, n, generator=rng)
        spread[name] = tensors[name][None, :, :, None].expand(2, d, n, length)
    found = with_gradients(selective_scan_fn, tensors, delta_softplus=True)
    expected = with_gradients(selective_scan_ref, spread, delta_softplus=True)
    for i, name in enumerate(tensors, start=1):
        if name in constant:
            expected[i] = expected[i].sum((0, 3))
        elif name in ('B', 'C'):
            expected[i] = expected[i].sum(1, keepdim=True)
    assert_close(found, expected, 1e-5)


def test_steps_may_be_shared_by_consecutive_channels(rng):
    tensors = inputs(rng)
    tensors['delta'], tensors['delta_bias'] = tensors['delta'][:, :3], tensors['delta_bias'][:3]
    spread = tensors | {
        'delta': tensors['delta'].repeat_interleave(2, dim=1),
        'delta_bias': tensors['delta_bias'].repeat_interleave(2),
    }
    found, expected = (selective_scan_fn(**each, delta_softplus=True) for each in (tensors, spread))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_complex_A_is_refused(rng):
    tensors = inputs(rng)
    with pytest.raises(ValueError, match='A must be real'):
        selective_scan_fn(**tensors | {'A': tensors['A'].to(torch.complex64)})


def test_the_contract_compiles_without_a_graph_break(rng):
    tensors = inputs(rng)

    def function(**tensors):
        return selective_scan(**tensors, delta_softplus=True, return_last_state=True)

    found = torch.compile(function, backend='aot_eager', fullgraph=True)(**tensors)
    for one, other in zip(found, function(**tensors), strict=True):
        torch.testing.assert_close(one, other)


def inner_inputs(rng, d=6, n=4, rank=2, length=19):
    shapes = {
        'xz': (2, 2 * d, length),
        'conv1d_weight': (d, 1, 3),
        'conv1d_bias': (d,),
        'x_proj_weight': (rank + 2 * n, d),
        'delta_proj_weight': (d, rank),
        'out_proj_weight': (5, d),
        'out_proj_bias': (5,),
        'A': (d, n),
        'D': (d,),
        'delta_bias': (d,),
        'B_proj_bias': (n,),
        'C_proj_bias': (n,),
    }
    tensors = {name: torch.randn(shape, generator=rng) / 2 for name, shape in shapes.items()}
    return tensors | {'A': -tensors['A'].abs()}


def test_mamba_inner_fn_equals_its_parts_with_every_gradient(rng):
    tensors = inner_inputs(rng)
    wide = {name: x.double() for name, x in tensors.items()}
    assert_close(with_gradients(mamba_inner_fn, tensors), with_gradients(mamba_inner_ref, wide), 1e-5)
    x, z = wide['xz'].chunk(2, dim=1)
    x = F.conv1d(x, wide['conv1d_weight'], wide['conv1d_bias'], padding=2, groups=6)[..., :19]
    x = F.silu(x).transpose(1, 2)
    dt, B, C = F.linear(x, wide['x_proj_weight']).split([2, 4, 4], dim=2)
    y = selective_scan_ref(
        x.transpose(1, 2),
        F.linear(dt, wide['delta_proj_weight']).transpose(1, 2),
        wide['A'],
        (B + wide['B_proj_bias']).transpose(1, 2),
        (C + wide['C_proj_bias']).transpose(1, 2),
        wide['D'],
        z,
        wide['delta_bias'],
        True,
    )
    expected = F.linear(y.transpose(1, 2), wide['out_proj_weight'], wide['out_proj_bias'])
    torch.testing.assert_close(mamba_inner_ref(**wide), expected)


def test_a_mamba_block_takes_a_checkpoint_of_the_published_names_and_trains():
    torch.manual_seed(0)
    block = Mamba(32, d_state=8, d_conv=3, expand=1.5)
    assert {name: tuple(x.shape) for name, x in block.state_dict().items()} == {
        'A_log': (48, 8),
        'D': (48,),
        'in_proj.weight': (96, 32),
        'conv1d.weight': (48, 1, 3),
        'conv1d.bias': (48,),
        'x_proj.weight': (18, 48),
        'dt_proj.weight': (48, 2),
        'dt_proj.bias': (48,),
        'out_proj.weight': (32, 48),
    }
    step = F.softplus(block.dt_proj.bias)
    assert step.min() >= 0.99e-3 and step.max() <= 0.101
    x = torch.randn(2, 25, 32, requires_grad=True)
    changed = x.detach().clone()
    changed[:, 20:] += 1
    assert torch.equal(block(changed)[:, :20], block(x)[:, :20]), 'it is causal'
    block(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in [x, *block.parameters()])


def test_unsupported_options_of_the_mamba_block_are_named():
    with pytest.raises(NotImplementedError, match='bimamba_type'):
        Mamba(8, bimamba_type='v2')
    with pytest.raises(NotImplementedError, match='inference_params'):
        Mamba(8)(torch.zeros(1, 2, 8), inference_params={})


@pytest.mark.parametrize('width', [1, 2, 4])
def test_the_causal_convolution_continues_from_its_state(rng, width):
    x, weight = torch.randn(2, 3, 11, generator=rng), torch.randn(3, width, generator=rng)
    bias = torch.randn(3, generator=rng)
    whole = causal_conv1d_fn(x, weight, bias, activation='silu')
    first = F.silu(sum(weight[:, -1 - back] * F.pad(x, (back, 0))[:, :, 5] for back in range(width)) + bias)
    torch.testing.assert_close(whole[:, :, 5], first)
    start, state = causal_conv1d_fn(x[..., :6], weight, bias, return_final_states=True, activation='silu')
    rest = causal_conv1d_fn(x[..., 6:], weight, bias, initial_states=state, activation='silu')
    torch.testing.assert_close(torch.cat([start, rest], dim=2), whole)
    buffer = F.pad(x[..., :6], (4, 0))[..., -max(1, width) :].clone()
    steps = [causal_conv1d_update(x[..., t], buffer, weight, bias, 'silu') for t in range(6, 11)]
    torch.testing.assert_close(torch.stack(steps, dim=2), whole[..., 6:])
    with pytest.raises(NotImplementedError, match='seq_idx'):
        causal_conv1d_fn(x, weight, seq_idx=torch.zeros(2, 11))


def test_extensions_return_what_the_kernels_return(rng):
    tensors = inputs(rng)
    given = tensors | {'delta_softplus': True}
    y, x, gated = extensions.forward(**given)
    expected, state = selective_scan_ref(**given, return_last_state=True)
    torch.testing.assert_close(gated, expected)
    assert x.shape == (2, 6, 1, 8)
    torch.testing.assert_close(x[:, :, -1, 1::2], state)
    again = selective_scan_ref(**given | {'u': torch.zeros_like(tensors['u']), 'z': None}, return_last_state=True)[1]
    assert torch.equal(again, torch.zeros_like(again))
    dout = torch.randn(y.shape, generator=rng)
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
    wanted = torch.autograd.grad(selective_scan_ref(**leaves, delta_softplus=True), list(leaves.values()), dout)
    wanted = dict(zip(leaves, wanted, strict=True))
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'delta_bias', 'z')
    for name, gradient in zip(names, extensions.backward(**given, dout=dout), strict=True):
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-4)


def test_a_script_imports_them_by_the_usual_names(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    result = warm_python('-m', 'dpmambair_basicsr.run', 'script.py', '--its', '-m', 'own', cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "['--its', '-m', 'own'] torch.Size([1, 5, 8])" in result.stdout
    assert result.stdout.count('selective_scan: backend ') == 1, 'it is said once what runs'
    (tmp_path / 'package').mkdir()
    (tmp_path / 'package' / 'train.py').write_text(SCRIPT)
    result = warm_python('-m', 'dpmambair_basicsr.run', '-m', 'package.train', 'x', cwd=tmp_path)
    assert result.returncode == 0 and "['x'] torch.Size([1, 5, 8])" in result.stdout, result.stdout


def test_unsupported_names_are_named_import_errors(nothing_installed):
    standins.install()
    with pytest.raises(ImportError, match=r'not for mamba_ssm\.ops\.triton; covered: .*selective_scan_interface'):
        importlib.import_module('mamba_ssm.ops.triton.layer_norm')
    with pytest.raises(ImportError, match='not for its Mamba2; covered: Mamba'):
        exec('from mamba_ssm import Mamba2', {})


def real_package(folder):
    """Packages of the real ones' names, as they would be installed."""
    (folder / 'mamba_ssm' / 'ops').mkdir(parents=True)
    (folder / 'mamba_ssm' / '__init__.py').write_text('real = True\n')
    (folder / 'mamba_ssm' / 'ops' / '__init__.py').write_text('')
    (folder / 'mamba_ssm' / 'ops' / 'selective_scan_interface.py').write_text('real = True\n')
    (folder / 'selective_scan_cuda.py').write_text('real = True\n')


@pytest.mark.parametrize('imported_before', [False, True])
def test_a_real_installation_is_never_replaced_without_being_asked(tmp_path, imported_before):
    real_package(tmp_path)
    code = f"""
import sys
sys.path.insert(0, '.')
{'import mamba_ssm, selective_scan_cuda' if imported_before else ''}
from dpmambair_basicsr import standins
assert standins.install() == ['causal_conv1d', 'selective_scan_cuda_core', 'selective_scan_cuda_oflex']
import mamba_ssm, selective_scan_cuda
from mamba_ssm.ops import selective_scan_interface
assert mamba_ssm.real and selective_scan_interface.real and selective_scan_cuda.real
try:
    import mamba_ssm.modules
except ModuleNotFoundError as error:
    assert 'stands in' not in str(error)
else:
    raise AssertionError('mixed with the real one')
"""
    result = warm_python('-c', code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout


def test_a_real_installation_is_replaced_when_asked(tmp_path):
    real_package(tmp_path)
    script = 'import mamba_ssm\nassert not hasattr(mamba_ssm, "__real__") and mamba_ssm.Mamba\nprint("replaced")\n'
    (tmp_path / 'script.py').write_text(script)
    result = warm_python('-m', 'dpmambair_basicsr.run', '--replace', 'script.py', cwd=tmp_path)
    assert result.returncode == 0 and 'replaced' in result.stdout, result.stdout
    code = """
import sys
sys.path.insert(0, '.')
import mamba_ssm
from dpmambair_basicsr import standins
standins.install(replace=True)
"""
    result = warm_python('-c', code, cwd=tmp_path)
    assert 'ImportError: mamba_ssm: imported already' in result.stdout


def test_installing_them_imports_no_torch(tmp_path):
    code = "import sys; from dpmambair_basicsr import standins; standins.install(); assert 'torch' not in sys.modules"
    result = python('-c', code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout


PEERS = {
    'DPMAMBAIR_MAMBA': ('tests/ops/test_selective_scan.py', 'test_selective_scan'),
    'DPMAMBAIR_VMAMBA': ('kernels/selective_scan/test_selective_scan.py', 'test_selective_scan and 64'),
}


@pytest.mark.parametrize('variable', PEERS)
def test_published_tests_pass(variable, tmp_path):
    if variable not in os.environ:
        pytest.skip(f'{variable} names no checkout')
    name, chosen = PEERS[variable]
    text = (Path(os.environ[variable]) / name).read_text()
    device = os.environ.get('DPMAMBAIR_PEER_DEVICE', 'cpu')
    text, count = re.subn(r"device = 'cuda'", f'device = {device!r}', text)
    assert count
    (tmp_path / 'test_peer.py').write_text(text)
    command = [sys.executable, '-m', 'dpmambair_basicsr.run', '-m', 'pytest', '-q', 'test_peer.py', '-k', chosen]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
