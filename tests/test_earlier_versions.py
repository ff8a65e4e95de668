"""Checkpoints, training states and option files of version 692b954 are read, and continued as by that version.

data/run_of_692b954.tar.xz holds for RestorationModel and RestorationGANModel an option file, the checkpoint of
iteration 4, and the one of iteration 8 that version 692b954 continued to. Other processors round differently, so
numbers of that file are compared with a tolerance; where git has the version, it trains here and
all bits are compared.

data/networks_of_692b954.tar.xz holds small DPMambaIRs of that version, with non-initial weights: their checkpoints, an
image, and that version's outputs for it. Their options lack the keys that did not exist then.
"""

import copy
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from support import forked
from support.commands import PACKAGE_PARENT, warm_python
from support.forked import changed, train
from test_exact_resume import GAN, assert_equal, resumed_at
from torch.utils._pytree import tree_flatten

import dpmambair_basicsr
from dpmambair_basicsr import archs
from dpmambair_basicsr.registry import arguments_of
from dpmambair_basicsr.training.earlier_options import complete_networks

VERSION = '692b954'
DATA = Path(__file__).parent / 'data'
ARCHIVE, NETWORKS = DATA / f'run_of_{VERSION}.tar.xz', DATA / f'networks_of_{VERSION}.tar.xz'
TRIAL = Path(__file__).parents[2] / 'shared' / 'weights' / 'dpmambair_small_trial.pth'
# The former defaults.
EARLIER = {'delta_prompt': 'low_rank', 'extractor_channels': [64, 64, 64, 64, 64, 128], 'extractor_hidden': 512}
FILES = {'restoration': ['net_g'], 'gan': ['net_g', 'net_d']}


@pytest.fixture(scope='module')
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('recorded')
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter='data')
    return folder


def assert_close(value, expected, name):
    (leaves, structure), (expected_leaves, expected_structure) = map(tree_flatten, (value, expected))
    assert structure == expected_structure, name
    for pair in zip(leaves, expected_leaves, strict=True):
        if isinstance(pair[0], torch.Tensor | float):
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-4)
        else:
            assert pair[0] == pair[1], name


def with_buffers(content):
    """The file, whose average of that version has the buffers of iteration 0, with those of its network."""
    if 'calls' in content.get('params_ema', {}):
        content['params_ema']['calls'] = content['params']['calls']
    return content


@pytest.mark.parametrize('kind', FILES)
def test_a_recorded_run_continues(kind, recorded, tmp_path):
    forked.write_images(tmp_path / 'images')
    shutil.copytree(recorded / kind / 'at_4', tmp_path / 'experiments/run')
    opt = yaml.safe_load((recorded / kind / 'options.yml').read_text())
    log = train(opt, tmp_path, '--auto_resume')
    assert 'Best psnr so far: 6.' in log and 'iter: 4\n' in log.partition('Start training from')[2]
    for name in ['training_states/8.state', *(f'models/{net}_8.pth' for net in FILES[kind])]:
        expected = with_buffers(torch.load(recorded / kind / 'at_8' / name, weights_only=True))
        saved = forked.load(tmp_path, name)
        saved.pop('trained', None)  # new in states
        assert_close(saved, expected, name)


@pytest.fixture(scope='module')
def earlier_version(tmp_path_factory):
    """A folder with the files of that version."""
    folder = tmp_path_factory.mktemp('earlier') / 'version.tar'
    git = ('git', '-C', PACKAGE_PARENT, 'archive', '--output', folder, VERSION)
    if not shutil.which('git') or subprocess.run(git, capture_output=True).returncode:
        pytest.skip(f'git does not have version {VERSION}')
    with tarfile.open(folder) as archive:
        archive.extractall(folder.parent, filter='data')
    return folder.parent


DPMAMBAIR = {'type': 'DPMambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_inner': [4] * 4}
KINDS = {
    'RestorationModel': {
        'network_g': {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1},
        'train.grad_clip_norm': 0.1,
        'train.mse_opt': {'type': 'MSELoss'},
        'train.warmup_iter': -1,
    },
    'RestorationGANModel': GAN | {'train.warmup_iter': -1},
    'DPMambaIR': {'network_g': {**DPMAMBAIR, 'embed_dim': 8}, 'path.pretrain_network_e': 'stage_1.pth'},
    'DegradationAutoencoder': {
        'model_type': 'DegradationExtractorModel',
        'network_g': {'type': 'DegradationAutoencoder', 'embed_dim': 8, 'channels': 4},
    },
}
# Networks whose options lack the changed arguments; these are added to the checkpoints.
ADDED = {'DPMambaIR': EARLIER, 'DegradationAutoencoder': {k: v for k, v in EARLIER.items() if k != 'delta_prompt'}}
ADDED['DegradationAutoencoder']['unit_embedding'] = False


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_continues_bit_exactly(kind, earlier_version, tmp_path):
    opt = changed(forked.options(forked.write_images(tmp_path / 'images')), KINDS[kind])
    opt = changed(opt, {'train.total_iter': 6, 'logger.save_checkpoint_freq': 3})
    if kind == 'DPMambaIR':
        stage_1 = archs.DegradationAutoencoder(**ADDED['DegradationAutoencoder'], embed_dim=8, channels=4)
        torch.save({'params': stage_1.state_dict()}, tmp_path / 'stage_1.pth')
        opt['path']['pretrain_network_e'] = str(tmp_path / 'stage_1.pth')
    (tmp_path / 'options.yml').write_text(yaml.safe_dump(opt))
    script = (
        'import dpmambair_basicsr, forked_runs, sys; print(dpmambair_basicsr.__file__); '
        "sys.argv = ['train.py', '-opt', '../options.yml']; dpmambair_basicsr.train.main()"
    )
    straight = tmp_path / 'straight'
    straight.mkdir()
    result = warm_python('-c', script, cwd=straight, PYTHONPATH=f'{earlier_version}:{earlier_version / "tests"}')
    assert result.returncode == 0, result.stdout
    assert str(earlier_version) in result.stdout, 'that version has run'
    target = resumed_at(3, straight, tmp_path / 'resumed')
    train(opt, target, '--auto_resume')
    for name in ('training_states/6.state', 'models/net_g_latest.pth', 'models/net_g_best.pth'):
        saved, expected = forked.load(target, name), with_buffers(forked.load(straight, name))
        if name == 'models/net_g_best.pth':  # it may be one that the earlier version saved
            saved = with_buffers(saved)
        saved.pop('trained', None)  # new in states
        if kind in ADDED and 'network_g' in saved:
            options, before = saved.pop('network_g'), expected.pop('network_g')
            assert options == before | ADDED[kind] or (name == 'models/net_g_best.pth' and options == before)
        assert_equal(saved, expected)


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('networks')
    with tarfile.open(NETWORKS) as archive:
        archive.extractall(folder, filter='data')
    return folder


@pytest.mark.parametrize('kind', ['modulate', 'directions'])
@pytest.mark.parametrize('network', ['its own options', 'of an option file'])
def test_a_network_gives_the_same_picture(kind, network, networks):
    file = networks / f'{kind}.pth'
    saved = torch.load(file, weights_only=True)
    if network == 'its own options':
        restorer = dpmambair_basicsr.load(file)
    else:
        torch.save({'params': saved['params']}, networks / f'{kind}_bare.pth')
        restorer = dpmambair_basicsr.load(networks / f'{kind}_bare.pth', network=saved['network_g'])
    output = restorer.net(saved['image'].float())
    assert (output - saved['output']).abs().max() <= 1e-6
    assert restorer.net.encoder_level1[0].attn.modulation.layers['delta'].out_features == 1  # R


def test_a_network_of_classes_gives_the_same_picture(networks):
    saved = torch.load(networks / 'class.pth', weights_only=True)
    opt = {
        'network_g': saved['network_g'],
        'path': {'pretrain_network_g': str(networks / 'class.pth')},
        'is_train': False,
    }
    complete_networks(opt)
    net = archs.DPMambaIR(**arguments_of(opt['network_g'])).eval()
    net.load_state_dict(saved['params'])
    with torch.no_grad():
        output = net(saved['image'].float(), torch.tensor([3]))
    assert (output - saved['output']).abs().max() <= 1e-6


@pytest.mark.parametrize('kind', ['attention', 'concat'])
def test_removed_insertions_are_an_error_that_says_so(kind, networks):
    file = networks / f'{kind}.pth'
    with pytest.raises(ValueError, match=f'{file}: weights with an insertion of version 0.1.0'):
        dpmambair_basicsr.load(file)
    network = torch.load(file, weights_only=True)['network_g']
    with pytest.raises(ValueError, match=f'{file}: weights with an insertion of version 0.1.0'):
        complete_networks({'network_g': network, 'path': {'pretrain_network_g': str(file)}, 'is_train': True})


def test_spandrel_loads_an_earlier_network(networks):
    spandrel = pytest.importorskip('spandrel', reason='spandrel is not installed: pip install spandrel')
    from dpmambair_basicsr.integrations.spandrel import install

    install()
    saved = torch.load(networks / 'modulate.pth', weights_only=True)
    with torch.no_grad():
        output = spandrel.ModelLoader().load_from_file(networks / 'modulate.pth')(saved['image'].float())
    assert (output - saved['output'].clamp(0, 1)).abs().max() <= 1e-6


@pytest.mark.parametrize('kind', ['network_g', 'network_e'])
def test_an_earlier_option_file_is_completed_by_its_checkpoint(kind, networks, tmp_path, caplog):
    """Including stage 1, which has no prompts; values given in the file are kept."""
    network = torch.load(networks / 'modulate.pth', weights_only=True)['network_g']
    del network['extractor_channels']
    if kind == 'network_g':
        file, expected = networks / 'modulate.pth', {'extractor_channels': [4, 6, 5], 'extractor_hidden': 20}
        expected |= {'delta_prompt': 'low_rank'}
    else:
        file, expected = tmp_path / 'stage_1.pth', {'extractor_channels': [4, 2], 'extractor_hidden': 6}
        stage_1 = archs.DegradationAutoencoder(**expected, embed_dim=16, channels=4)
        torch.save({'params': stage_1.state_dict()}, file)
    opt = {'network_g': copy.deepcopy(network), 'path': {f'pretrain_{kind}': str(file)}, 'is_train': True}
    with caplog.at_level('INFO', 'basicsr'):
        complete_networks(opt)
    assert opt['network_g'] == network | expected
    assert all(f'{key}: {value}' in caplog.text for key, value in expected.items()) and str(file) in caplog.text
    opt['network_g'] = network | {'delta_prompt': 'scale', 'extractor_hidden': 7}
    complete_networks(opt)
    assert opt['network_g']['delta_prompt'] == 'scale' and opt['network_g']['extractor_hidden'] == 7


def test_a_prompt_insertion_other_than_the_checkpoints_is_an_error(networks):
    file = networks / 'modulate.pth'
    network = torch.load(file, weights_only=True)['network_g'] | {'delta_prompt': 'scale'}
    with pytest.raises(ValueError, match=f'{file}: does not fit DPMambaIR'):
        dpmambair_basicsr.load(file, network=network)


@pytest.mark.skipif(not TRIAL.exists(), reason='no ../shared/weights: a network that version 692b954 trained')
def test_the_trained_network_keeps_its_prompt_insertion():
    net = dpmambair_basicsr.load(TRIAL).net
    assert net.encoder_level1[0].attn.modulation.layers.keys() == {'delta', 'B', 'C'}
    assert net.extractor.head[0].out_features == 384
