"""Networks as safetensors files: written by the command, accepted wherever a checkpoint is."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import forked
from support.commands import command
from support.forked import Training, changed, train

import dpmambair_basicsr
from dpmambair_basicsr import convert, load
from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.files.checkpoints import encode_safetensors, read_checkpoint, write_safetensors

dpmambair_basicsr.register()
NETWORK = {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}


def network(seed):
    torch.manual_seed(seed)
    return VmambaIR(**{key: value for key, value in NETWORK.items() if key != 'type'}).state_dict()


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """The folder with net.pth, its average as net.safetensors, and params.safetensors."""
    folder = tmp_path_factory.mktemp('converted')
    content = {'params': network(0), 'params_ema': network(1), 'network_g': NETWORK}
    torch.save(content, folder / 'net.pth')
    result = command('convert', 'net.pth', 'net.safetensors', cwd=folder)
    assert result.returncode == 0 and re.fullmatch(r'net\.safetensors: \d+ tensors\n', result.stdout), result.stdout
    write(folder / 'net.pth', folder / 'params.safetensors', '--key', 'params')
    return folder


def write(*arguments):
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['convert', *map(str, arguments)])
        convert.main()


def test_any_program_reads_it(converted):
    for name, expected in (('net', network(1)), ('params', network(0))):
        weights = load_file(converted / f'{name}.safetensors')
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], value) for key, value in expected.items())


def test_it_restores_like_its_source_checkpoint(converted):
    image = np.random.default_rng(0).integers(0, 256, (17, 20, 3), dtype=np.uint8)
    restored = [load(converted / f'net.{kind}').restore(image) for kind in ('pth', 'safetensors')]
    assert np.array_equal(*restored)


def test_spandrel_recognises_it(converted):
    spandrel = pytest.importorskip('spandrel')
    registry = spandrel.ArchRegistry()
    pytest.importorskip('dpmambair_basicsr.integrations.spandrel').install(registry)
    model = spandrel.ModelLoader(registry=registry).load_from_file(converted / 'net.safetensors')
    assert model.architecture.id == 'VmambaIR'
    assert all(torch.equal(model.model.state_dict()[name], value) for name, value in network(1).items())


def test_files_of_a_training_are_read_like_its_checkpoint(converted, tmp_path):
    """logger.save_format: network and EMA in one file, with the options and the metric of the best network."""
    content = torch.load(converted / 'net.pth') | {
        'best': {'metric': 'psnr', 'value': 0.1 + 0.2, 'iter': 8, 'sets': ['a']}
    }
    file = tmp_path / 'net_g_8.safetensors'
    file.write_bytes(encode_safetensors(str(file), content))
    read = read_checkpoint(file)
    assert read.keys() == content.keys()
    for key in ('params', 'params_ema'):
        assert read[key].keys() == content[key].keys()
        assert all(torch.equal(read[key][name], value) for name, value in content[key].items())
    assert (read['network_g'], read['best']) == (NETWORK, content['best'])

    image = np.random.default_rng(0).integers(0, 256, (17, 20, 3), dtype=np.uint8)
    assert np.array_equal(load(file).restore(image), load(converted / 'net.pth').restore(image))
    write(file, tmp_path / 'average.safetensors')
    assert load_file(tmp_path / 'average.safetensors').keys() == content['params_ema'].keys()


def test_spandrel_loads_the_average_from_files_of_a_training(converted, tmp_path):
    spandrel = pytest.importorskip('spandrel')
    registry = spandrel.ArchRegistry()
    pytest.importorskip('dpmambair_basicsr.integrations.spandrel').install(registry)
    content = encode_safetensors('net_g_8.safetensors', torch.load(converted / 'net.pth'))
    (tmp_path / 'net_g_8.safetensors').write_bytes(content)
    model = spandrel.ModelLoader(registry=registry).load_from_file(tmp_path / 'net_g_8.safetensors')
    assert all(torch.equal(model.model.state_dict()[name], value) for name, value in network(1).items())


def test_values_that_are_not_tensors_are_refused():
    content = {'params': {'weight': torch.zeros(1), '_extra_state': {'a': 1}}}
    with pytest.raises(ValueError, match=r'net\.safetensors: params, _extra_state is not a tensor'):
        encode_safetensors('net.safetensors', content)


def test_training_starts_from_it(converted, tmp_path):
    opt = changed(
        forked.options(forked.write_images(tmp_path / 'images')),
        {
            'network_g': NETWORK,
            'path.pretrain_network_g': str(converted / 'net.safetensors'),
            'train.optim_g.lr': 0.0,
            'train.total_iter': 1,
        },
    )
    train(opt, tmp_path)
    content = forked.load(tmp_path, 'models/net_g_latest.pth')
    for key in ('params', 'params_ema'):
        for name, value in network(1).items():
            torch.testing.assert_close(content[key][name], value, rtol=1e-6, atol=0)
    run = Training(changed(opt, {'network_g.dim': 8}), tmp_path)
    assert run.status() == 1
    assert re.search(r'path\.pretrain_network_g: \S*net\.safetensors: .*does not fit VmambaIR', run.log())


def test_the_output_folder_is_created(converted, tmp_path):
    write(converted / 'net.pth', tmp_path / 'new' / 'folder' / 'net.safetensors')
    assert read_checkpoint(str(tmp_path / 'new/folder/net.safetensors'))['network_g'] == NETWORK


def test_files_that_cannot_be_converted_are_named(converted, tmp_path, capsys):
    with pytest.raises(SystemExit, match="net.pth: has no key 'mean'; keys of the file: params, params_ema"):
        write(converted / 'net.pth', tmp_path / 'net.safetensors', '--key', 'mean')
    with pytest.raises(SystemExit, match='absent.pth'):
        write(tmp_path / 'absent.pth', tmp_path / 'net.safetensors')
    with pytest.raises(SystemExit):
        write(converted / 'net.pth', tmp_path / 'net.pth')
    assert 'must end in .safetensors' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_invalid_safetensors_files_are_named(tmp_path):
    file = tmp_path / 'wrong.safetensors'
    save_file({'x': torch.zeros(1)}, file, {'network_g': '{"type":'})
    texts = {'truncated': file.read_bytes()[:30], 'json': file.read_bytes(), 'pickle': b'\x80\x02', 'empty': b''}
    for content in texts.values():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f'^{file}: cannot be read by safetensors'):
            read_checkpoint(str(file))
    with pytest.raises(FileNotFoundError, match='absent'):
        read_checkpoint(str(tmp_path / 'absent.safetensors'))
    save_file({'x': torch.zeros(1)}, file)  # of another program, without options
    with pytest.raises(ValueError, match=f"^{file}: has no key 'network_g', .* not recognised"):
        load(file)


def test_shared_and_transposed_weights_are_written(tmp_path):
    """A state dict may hold what safetensors refuses."""
    weight = torch.arange(6.0).reshape(2, 3)
    write_safetensors(str(tmp_path / 'net.safetensors'), {'a': weight, 'b': weight, 'c': weight.T}, NETWORK)
    content = read_checkpoint(str(tmp_path / 'net.safetensors'))
    assert content['network_g'] == json.loads(json.dumps(NETWORK))
    assert torch.equal(content['params']['b'], weight) and torch.equal(content['params']['c'], weight.T)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(ValueError, match=r'net\.safetensors: requires .*: pip install safetensors$'):
        read_checkpoint(str(tmp_path / 'net.safetensors'))
