"""Nothing is skipped, replaced or ignored silently: a start is refused before anything changes, or the log says so."""

import copy
import importlib.util
import json
import re
import shutil
from pathlib import Path

import basicsr.data
import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.data import build_dataset
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import get_root_logger
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from basicsr.utils.registry import DATASET_REGISTRY
from support import pipelines
from support.commands import PACKAGE_PARENT, stock_options, write_images, write_options
from support.forked import options as tiny_options

from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.files.image_folders import list_images
from dpmambair_basicsr.files.image_lists import list_keys, listed_names
from dpmambair_basicsr.option_checks.migration import KEYS, TYPES

NETWORK = {'type': 'VmambaIR', 'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
ARGUMENTS = {key: value for key, value in NETWORK.items() if key != 'type'}
PSNR = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}}


def tree(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


@pytest.fixture
def images(tmp_path):
    """Four pairs of 16 x 16."""
    rng = np.random.default_rng(0)
    for kind in ('gt', 'lq'):
        (tmp_path / 'images' / kind).mkdir(parents=True)
        for index in range(4):
            image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            assert cv2.imwrite(str(tmp_path / 'images' / kind / f'{index}.png'), image)
    return {f'dataroot_{kind}': str(tmp_path / 'images' / kind) for kind in ('gt', 'lq')}


@pytest.fixture
def opt(images):
    """Options of two iterations of a tiny network of ours."""
    opt = tiny_options(images) | {'network_g': copy.deepcopy(NETWORK)}
    opt['train'] |= {'total_iter': 2}
    return opt


@pytest.fixture
def finished(tmp_path):
    """What a finished training and test have left, under the names that the next ones use."""
    for folder in ('experiments/run/models', 'experiments/run/training_states', 'results/run', 'tb_logger/run'):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / 'experiments/run/models/net_g_latest.pth').write_text('weeks of work')
    (tmp_path / 'results/run/results.csv').write_text('the results')
    return tmp_path


def change(opt: dict, changes: dict) -> None:
    for path, value in changes.items():
        *sections, key = path.split('.')
        section = opt
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value


def refused(opt: dict, folder: Path, pipeline=pipelines.train, *arguments: str) -> str:
    """The message of a refused start, which has changed nothing."""
    file = write_options(opt, folder / 'options.yml')
    before = tree(folder)
    with pytest.raises(SystemExit) as refusal:
        pipeline(file, *arguments, cwd=folder)
    assert tree(folder) == before
    return str(refusal.value)


def test_options(opt: dict) -> dict:
    test = {key: opt[key] for key in ('name', 'model_type', 'scale', 'num_gpu', 'network_g')}
    test |= {'datasets': {'test': opt['datasets']['val'] | {'name': 'set'}}, 'path': {}}
    return copy.deepcopy(test) | {'val': {'save_img': False, 'metrics': PSNR}}


test_options.__test__ = False  # not a test, for pytest


# Missing images


@pytest.mark.parametrize('kind', ['gt', 'lq'])
def test_a_link_to_a_file_that_does_not_exist_is_refused(opt, images, finished, kind):
    """Both halves of a pair may be such links: prepare_data links by default, and the download may be deleted."""
    for role in ('gt', 'lq') if kind == 'gt' else ('lq',):
        (Path(images[f'dataroot_{role}']) / 'bad.png').symlink_to('/nowhere/x.png')
    message = rf'datasets\.\w+: \S*/images/{kind}|lq: bad\.png cannot be read: broken link'
    assert re.search(message, refused(opt, finished))
    assert re.search(message, refused(test_options(opt), finished, pipelines.test))


def test_the_log_counts_what_is_not_an_image(images):
    folder = Path(images['dataroot_gt'])
    for name in ('Thumbs.db', 'a.avif', 'b.avif', '.hidden.png', 'README'):
        (folder / name).touch()
    (folder / 'more').mkdir()
    with pipelines.logged() as records:
        assert len(list_images(str(folder))) == 4
    counts = '2 .avif, 1 .db, 1 folders, 1 hidden, 1 without extension'
    assert records == [f'{folder}: 4 images; skipped: {counts}.']


@pytest.mark.parametrize('kind', ['PairedImageDataset', 'SingleImageDataset'])
def test_a_dead_link_in_a_dataset_of_basicsr_is_refused_for_our_models(opt, images, finished, kind):
    opt['datasets']['val'] |= {'type': kind, 'io_backend': {'type': 'disk'}}
    opt['val']['metrics'] = None
    for role in ('gt', 'lq'):
        (Path(images[f'dataroot_{role}']) / 'bad.png').symlink_to('/nowhere/x.png')
    assert 'datasets.val: ' in (message := refused(opt, finished))
    assert 'bad.png cannot be read: broken links or missing files' in message


def test_a_dead_link_is_named_in_the_log_of_a_model_of_basicsr(tmp_path):
    images = write_images(tmp_path / 'smaller')
    for folder in images.values():
        (Path(folder) / 'bad.png').symlink_to('/nowhere/x.png')
    log = pipelines.train(write_options(stock_options(images), tmp_path / 'options.yml'), cwd=tmp_path)
    for folder in images.values():
        assert f'{folder}: {folder}/bad.png cannot be read: broken links or missing files.' in log


def test_the_log_names_images_that_basicsr_would_replace_by_others(images, tmp_path):
    """RealESRGANDataset takes another image at random."""
    (tmp_path / 'list.txt').write_text('0.png\nabsent.png\n')
    train = yaml.safe_load((PACKAGE_PARENT / 'options/train_vmambair_realsr_x4.yml').read_text())['datasets']['train']
    train |= {'dataroot_gt': images['dataroot_gt'], 'meta_info': str(tmp_path / 'list.txt'), 'phase': 'train'}
    with pipelines.logged() as records:
        basicsr.data.build_dataset(train)  # by this name it is patched
    assert any('images/gt/absent.png cannot be read' in record for record in records)


# Names of restored images


@pytest.fixture
def alike(images, tmp_path):
    """Images in two folders with the same names, a list of two of them, and lmdb with dots in the keys."""
    folder = Path(images['dataroot_gt'])
    for name in ('a', 'b'):
        (folder / name).mkdir()
        shutil.copy(folder / '0.png', folder / name)
    (tmp_path / 'list.txt').write_text('a/0.png\nb/0.png\n')
    (tmp_path / 'part').mkdir()
    shutil.copy(folder / '0.png', tmp_path / 'part' / '0_0.png')
    names = [f'{index}.png' for index in range(4)]
    for role in ('gt', 'lq'):
        target = str(tmp_path / f'{role}.lmdb')
        make_lmdb_from_imgs(images[f'dataroot_{role}'], target, names, ['a.0', 'a.1', 'b.0', 'b.1'], map_size=2**20)
    return tmp_path


def pairs_in(root: Path, lq: str, gt: str, **more) -> dict:
    return {'dataroot_lq': str(root / lq), 'dataroot_gt': str(root / gt), **more}


def listed_in(root: Path, kind: str, *roles: str, **more) -> dict:
    folders = {f'dataroot_{role}': str(root / 'images/gt') for role in roles}
    return {'type': kind, 'meta_info_file': str(root / 'list.txt'), 'io_backend': {'type': 'disk'}} | folders | more


LMDB = {'lq': 'lq.lmdb', 'gt': 'gt.lmdb', 'type': 'PairedDegradationDataset', 'io_backend': {'type': 'lmdb'}}
NAMED_ALIKE = {
    'a list': (
        lambda root: listed_in(root, 'SingleImageDataset', 'lq'),
        r'\S*/gt/a/0\.png and \S*/gt/b/0\.png are both 0 in the results,',
    ),
    'a list of clean images': (
        lambda root: listed_in(root, 'SyntheticDegradationDataset', 'gt', degradations=['noise', 'blur']),
        r'\S*/gt/a/0_noise\.png and \S*/gt/b/0_noise\.png are both 0_noise in the results,',
    ),
    'a list of pairs': (
        lambda root: listed_in(root, 'PairedImageDataset', 'gt', 'lq'),
        r'\S*/gt/a/0\.png and \S*/gt/b/0\.png are both 0 in the results,',
    ),
    'lmdb': (lambda root: pairs_in(root, **LMDB), r'a\.0 and a\.1 are both a in the results,'),
    'parts': (
        lambda root: {
            'type': 'MixedDegradationDataset',
            'datasets': {'x': pairs_in(root, 'part', 'part'), 'x_0': pairs_in(root, 'images/lq', 'images/gt')},
        },
        r'\S*/part/x_0_0\.png and \S*/lq/x_0_0\.png are both x_0_0 in the results,',
    ),
}


@pytest.mark.parametrize('case', NAMED_ALIKE)
def test_images_that_would_replace_each_other_are_named(case, opt, alike, finished):
    dataset, message = NAMED_ALIKE[case]
    test = test_options(opt)
    test['datasets']['test'] = {'name': 'set', **dataset(alike)}
    del test['val']['metrics']
    assert re.search(f'datasets.test: {message}', refused(test, finished, pipelines.test))


def test_a_training_that_saves_no_images_needs_no_unique_names(opt, alike, finished):
    opt['datasets']['val'] |= pairs_in(alike, **LMDB)
    opt['val'] |= {'save_img': True}
    assert 'datasets.val: a.0 and a.1 are both a in the results, ' in refused(opt, finished)
    opt['val'] |= {'save_img': False}
    pipelines.train(write_options(opt, finished / 'options.yml'), cwd=finished)


# Lists of images


@pytest.fixture
def listed(opt, tmp_path):
    """Sets the image list of the training set; returns its file."""

    def write(content: str | bytes, **more) -> Path:
        file = tmp_path / 'list.txt'
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        opt['datasets']['train'] |= {'meta_info_file': str(file), **more}
        return file

    return write


LISTS = {
    'a name without a file': (
        '0.png (16,16,3)\n8.png\n9.png\n',
        r'names images that are not in \S*/gt: 8\.png, 9\.png',
    ),
    'no LQ image': ('4.png\n', r'no image, or more than one, in \S*/lq \(.*\) for \S*/gt/4\.png'),
    'two LQ images': ('5.png\n', r'no image, or more than one, in \S*/lq \(.*\) for \S*/gt/5\.png'),
    'two GT images of one name': ('0.png\nmore/0.png\n', r'images of several folders share an LQ image: 0\.png'),
    'no text': (b'\xff\xfe0\x00', 'not text in UTF-8: '),
}


@pytest.mark.parametrize('case', LISTS)
def test_a_list_is_checked_at_the_start(case, opt, listed, images, finished):
    content, message = LISTS[case]
    gt, lq = (Path(images[f'dataroot_{role}']) for role in ('gt', 'lq'))
    (gt / 'more').mkdir()
    for name in ('4.png', '5.png', 'more/0.png'):
        shutil.copy(gt / '0.png', gt / name)
    for extension in ('jpg', 'bmp'):
        cv2.imwrite(str(lq / f'5.{extension}'), cv2.imread(str(lq / '0.png')))
    file = listed(content)
    del opt['datasets']['val'], opt['val']
    assert re.search(f'datasets.train: {file}: {message}', refused(opt, finished))


def test_names_of_a_list_may_have_spaces_a_byte_order_mark_and_other_extensions(opt, listed, images):
    gt, lq = (Path(images[f'dataroot_{role}']) for role in ('gt', 'lq'))
    (gt / '1.png').rename(gt / 'a photo.png')
    (lq / '1.png').unlink()
    cv2.imwrite(str(lq / 'a photo.jpg'), np.zeros((16, 16, 3), np.uint8))
    listed('\ufeff0.png (16,16,3)\r\na photo.png (16,16,3) 1\r\n\r\n2.png 17 x\r\n')
    dataset = build_dataset(opt['datasets']['train'] | {'phase': 'train'})
    assert [(Path(pair['gt_path']).name, Path(pair['lq_path']).name) for pair in dataset.paths] == [
        ('0.png', '0.png'),
        ('a photo.png', 'a photo.jpg'),
        ('2.png', '2.png'),
    ]
    listed('\ufeffa photo.png (16,16,3)\n', type='SyntheticDegradationDataset', degradations=['noise'])
    dataset = build_dataset(opt['datasets']['train'] | {'phase': 'train', 'dataroot_lq': None})
    assert [Path(path).name for path in dataset.paths] == ['a photo.png']


def test_names_of_a_list_may_end_in_a_number_in_parentheses(tmp_path):
    """As copies do; the size that follows has two or three numbers."""
    names = ['photo (1).png', 'photo (2).png', 'photo (1, 2).png', 'grey.png', 'plain.png']
    (tmp_path / 'list.txt').write_text(
        'photo (1).png\nphoto (2).png (16,16,3) 1\nphoto (1, 2).png (16, 16, 3)\ngrey.png (16,16)\nplain.png\n'
    )
    assert listed_names(str(tmp_path / 'list.txt')) == names
    for index, name in enumerate(names):
        cv2.imwrite(str(tmp_path / name), np.full((8, 8, 3), index, np.uint8))
    folder, keys = str(tmp_path / 'x.lmdb'), [Path(name).stem for name in names]
    make_lmdb_from_imgs(str(tmp_path), folder, names, keys, map_size=2**20)
    assert list(list_keys(folder)) == sorted(keys)


def test_a_list_beside_lmdb_is_refused(opt, listed, finished):
    listed('0.png\n', io_backend={'type': 'lmdb'})
    assert 'meta_info_file is ignored with lmdb, which has its own list; write ~' in refused(opt, finished)


def test_keys_of_lmdb_may_contain_dots(images, tmp_path):
    """BasicSR's reader ends a key at the first dot, so that x.1.png and x.2.png would be one image."""
    folder = Path(images['dataroot_gt'])
    for index in range(2):
        (folder / f'{index}.png').rename(folder / f'x.{index}.png')
    names = sorted(path.name for path in folder.iterdir())
    for role in ('gt', 'lq'):
        target = str(tmp_path / f'{role}.lmdb')
        make_lmdb_from_imgs(str(folder), target, names, [name.removesuffix('.png') for name in names], map_size=2**20)
    options = {'name': 'x', 'type': 'PairedDegradationDataset', 'phase': 'val', 'io_backend': {'type': 'lmdb'}}
    dataset = build_dataset(options | {f'dataroot_{role}': str(tmp_path / f'{role}.lmdb') for role in ('gt', 'lq')})
    assert [pair['gt_path'] for pair in dataset.paths] == ['2', '3', 'x.0', 'x.1']
    for index, name in enumerate(names):
        assert np.array_equal(
            (dataset[index]['gt'] * 255).round().byte().permute(1, 2, 0).numpy()[..., ::-1],
            cv2.imread(str(folder / name)),
        )


# The network of a checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    """A network and a different one as its average."""
    states = {}
    for seed, key in enumerate(('params', 'params_ema')):
        torch.manual_seed(seed)
        states[key] = VmambaIR(**ARGUMENTS).state_dict()
    torch.save(states, tmp_path / 'both.pth')
    torch.save({'params': states['params']}, tmp_path / 'one.pth')
    torch.save(states['params'], tmp_path / 'bare.pth')
    return states


def test_a_key_that_the_file_does_not_have_is_refused(opt, checkpoint, finished):
    for name, key, keys in (('both', 'param_ema', 'params, params_ema'), ('one', 'params_ema', 'params')):
        path = {'pretrain_network_g': str(finished / f'{name}.pth'), 'param_key_g': key}
        wanted = f"path.pretrain_network_g: {finished / name}.pth: has no key '{key}'; keys of the file: {keys}"
        assert wanted in refused(test_options(opt) | {'path': path}, finished, pipelines.test)
        assert wanted in refused(opt | {'path': path}, finished)


@pytest.mark.parametrize(
    ('name', 'path', 'used'),
    [
        ('both', {}, 'params_ema'),
        ('both', {'param_key_g': 'params'}, 'params'),
        ('one', {}, 'params'),
        ('bare', {}, ''),
        ('bare', {'param_key_g': None}, ''),
    ],
)
def test_a_test_says_which_network_of_the_file_it_used(opt, checkpoint, tmp_path, name, path, used):
    """Without a key, the one that validation and `restore` use: the EMA, if there is one."""
    file = tmp_path / f'{name}.pth'
    test = test_options(opt) | {'path': {'pretrain_network_g': str(file), **path}}
    log = pipelines.test(write_options(test, tmp_path / 'test.yml'), cwd=tmp_path)
    assert f'Loading VmambaIR from {file}: {f"its {used}" if used else "the whole file"}.' in log
    result = json.loads((tmp_path / 'results/run/results.json').read_text())
    assert result['param_key'] == used
    named = f'{file} ({used})' if used else str(file)
    assert f',{named},' in (tmp_path / 'results/run/results.csv').read_text()
    weights = checkpoint['params_ema' if used == 'params_ema' else 'params']
    expected = VmambaIR(**ARGUMENTS)
    expected.load_state_dict(weights)
    dataset = build_dataset(test['datasets']['test'] | {'phase': 'test'})
    errors = []
    for item in dataset:
        with torch.no_grad():
            restored = expected(item['lq'][None])[0].clamp(0, 1)
        difference = (restored * 255).round() - (item['gt'] * 255).round()
        errors.append(float(10 * torch.log10(255**2 / difference.square().mean())))
    (measured,) = result['sets']
    assert measured['restored']['psnr'] == pytest.approx(np.mean(errors), abs=1e-3)


def test_a_training_that_started_from_another_key_resumes(opt, checkpoint, tmp_path):
    """Its own checkpoints have BasicSR's keys."""
    torch.save({'weights': checkpoint['params']}, tmp_path / 'other.pth')
    for name, key in (('other', 'weights'), ('bare', None)):
        opt |= {'name': name, 'path': {'pretrain_network_g': str(tmp_path / f'{name}.pth'), 'param_key_g': key}}
        file = write_options(opt, tmp_path / 'options.yml')
        pipelines.train(file, cwd=tmp_path)
        log = pipelines.train(file, '--auto_resume', '--force_yml', 'train:total_iter=4', cwd=tmp_path)
        assert 'iter:       4,' in log and 'iter:       2,' not in log
        assert f'{tmp_path}/experiments/{name}/models/net_g_2.pth: its params.' in log


def test_a_test_without_a_checkpoint_says_so(opt, tmp_path):
    file = write_options(test_options(opt), tmp_path / 'test.yml')
    log = pipelines.test(file, cwd=tmp_path)
    assert 'path.pretrain_network_g: none, so what is tested is a network with random weights' in log


# Starts that must fail


STARTS = {
    'a slash in the name': ({'name': 'run/2'}, 'name: must be one name, without / '),
    'wandb without TensorBoard': (
        {'logger.wandb': {'project': 'x'}},
        'logger.use_tb_logger: wandb needs true, it follows the TensorBoard log',
    ),
    'no folder': ({'path.other': 3}, 'path.other: '),
    'one channel in': (
        {'network_g.inp_channels': 1},
        'network_g: inp_channels is 1, but the images of the datasets have 3 channels',
    ),
    'one channel out': (
        {'network_g.out_channels': 1},
        'network_g: out_channels is 1, but the images of the datasets have 3 channels',
    ),
    'a set that is tested twice': (
        {'datasets.val_2': {'name': 'val set', 'type': 'SyntheticDegradationDataset', 'degradations': ['noise']}},
        "datasets: 2 of the sets that are validated or tested have the name 'val set'",
    ),
    'another scale': ({'datasets.val.scale': 4}, 'datasets.val.scale: 4 is replaced by 1; leave it out'),
    'a key of BasicSR': ({'rank': 3}, 'rank: 3 is replaced by 0; leave it out'),
    'a discriminator': (
        {'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3}},
        'network_d: RestorationModel has no such network; leave it out',
    ),
    'an optimizer of none': ({'train.optim_d': {'type': 'Adam', 'lr': 1e-4}}, 'train.optim_d: unknown key'),
    'a loader that nobody reads': ({'logger.wandb': {'projct': 'x'}}, 'logger.wandb.projct: unknown key'),
    'a network that is not resumed': (
        {'path.ignore_resume_networks': ['network_x']},
        'path.ignore_resume_networks: the file has no network_x',
    ),
    'a metric that has nothing to compare with': (
        {'datasets.val.type': 'SingleImageDataset', 'datasets.val.io_backend': {'type': 'disk'}},
        'val.metrics.psnr: compares with clean images, and datasets.val (SingleImageDataset) has none',
    ),
    'a key of another section': ({'train.gt_size': 8}, 'train.gt_size: unknown key, it belongs in datasets'),
}


@pytest.mark.parametrize('case', STARTS)
def test_a_start_that_fails_later_is_refused_and_nothing_is_renamed(case, opt, images, finished):
    changes, message = STARTS[case]
    change(opt, changes)
    for phase in ('val', 'val_2'):
        if phase in opt['datasets']:
            opt['datasets'][phase] |= {'dataroot_gt': images['dataroot_gt']}
    assert message in refused(opt, finished)


@pytest.mark.parametrize('package', ['wandb', 'tensorboard'])
@pytest.mark.parametrize('model', ['RestorationModel', 'SRModel'])
def test_a_logger_that_is_not_installed_is_refused(package, model, opt, finished, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        'dpmambair_basicsr.option_checks.host.find_spec', lambda name: None if name == package else find(name)
    )
    opt |= {'model_type': model}
    opt['logger'] |= {'use_tb_logger': True, 'wandb': {'project': 'x'}}
    assert f'{package} is not installed; pip install {package}, or write ' in refused(opt, finished)


def test_models_of_basicsr_are_refused_what_would_fail_after_the_renaming(images, finished):
    opt = stock_options(images) | {'name': 'run'}
    change(opt, {'path.pretrain_network_g': '/no/such.pth', 'network_g.type': 'MSRResNt', 'path.other': None})
    opt['datasets']['val']['meta_info_file'] = str(finished / 'absent.txt')
    message = refused(opt, finished)
    for part in (
        'path.pretrain_network_g: /no/such.pth does not exist',
        'network_g.type: unknown type MSRResNt, did you mean MSRResNet?',
        'path.other: expected a folder, got None',
        'datasets.val: [Errno 2] No such file or directory:',
    ):
        assert part in message


def test_processes_that_would_each_train_alone_are_refused(opt, finished, monkeypatch):
    """Each would rename the same folder."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert '--launcher: torchrun started several processes' in refused(opt, finished)


def test_auto_resume_logs_that_it_uses_another_state(opt, tmp_path, capsys):
    opt['logger']['save_checkpoint_freq'] = 1
    file = write_options(opt, tmp_path / 'options.yml')
    pipelines.train(file, cwd=tmp_path)
    states = tmp_path / 'experiments/run/training_states'
    forced = ('--force_yml', 'train:total_iter=3', f'path:resume_state={states}/1.state')
    pipelines.train(file, '--auto_resume', *forced, cwd=tmp_path)
    message = f'WARNING: path.resume_state {states}/1.state is ignored: --auto_resume takes {states}/2.state.'
    assert message in capsys.readouterr().out


def test_a_folder_of_the_other_kind_of_run_is_not_created(opt, tmp_path):
    """BasicSR creates every folder that `path` names; an empty one is a TypeError, after the renaming."""
    opt['path'] |= {'results_root': None}
    pipelines.train(write_options(opt, tmp_path / 'train.yml'), cwd=tmp_path)
    test = test_options(opt) | {'path': {'experiments_root': str(tmp_path / 'never')}}
    pipelines.test(write_options(test, tmp_path / 'test.yml'), cwd=tmp_path)
    assert not (tmp_path / 'never').exists()


def test_a_test_of_random_crops_is_refused(opt, finished):
    test = test_options(opt)
    test['datasets']['train'] = opt['datasets']['train']
    assert 'datasets.train: BasicSR would test random crops of it; name it test' in refused(
        test, finished, pipelines.test
    )


def test_weights_that_basicsr_would_download_are_named(opt, finished, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(finished / 'cache'))
    loss = {'type': 'PerceptualLoss', 'layer_weights': {'conv1_2': 1.0}}
    opt['train']['perceptual_opt'] = loss
    message = refused(opt, finished)
    assert 'train.perceptual_opt: ' in message and 'BasicSR would download them without asking' in message
    opt['train']['perceptual_opt'] |= {'type': 'VGGPerceptualLoss'}
    assert 'there is no ' in refused(opt, finished)


# What BasicSR does silently


def test_the_word_debug_in_a_name_changes_nothing_and_the_argument_does(opt, tmp_path):
    opt |= {'name': 'debugged'}
    opt['train']['total_iter'] = 4
    opt['val']['val_freq'] = opt['logger']['save_checkpoint_freq'] = 3
    opt['logger'] |= {'print_freq': 2, 'use_tb_logger': True}
    file = write_options(opt, tmp_path / 'options.yml')
    log = pipelines.train(file, cwd=tmp_path)
    assert (tmp_path / 'experiments/debugged/models/net_g_3.pth').is_file()
    assert 'iter:       2,' in log and 'iter:       1,' not in log
    assert "NOTE name: has 'debug' in it, so BasicSR writes no TensorBoard or wandb log" in log
    log = pipelines.train(file, '--debug', cwd=tmp_path)
    assert 'iter:       1,' in log and 'NOTE --debug: ' in log


def test_the_log_says_which_options_basicsr_does_not_read(opt, tmp_path):
    change(
        opt,
        {
            'datasets.train.use_shuffle': False,
            'datasets.val.batch_size_per_gpu': 4,
            'datasets.val.num_worker_per_gpu': 2,
        },
    )
    log = pipelines.train(write_options(opt, tmp_path / 'options.yml'), cwd=tmp_path)
    for line in (
        'datasets.train.use_shuffle: false is ignored, BasicSR always shuffles',
        'datasets.val.batch_size_per_gpu: 4 is ignored, outside training it is 1',
        'datasets.val.num_worker_per_gpu: 2 is ignored, outside training it is 0',
    ):
        assert f'NOTE {line}' in log


def test_an_ordinary_log_has_no_notes(opt, tmp_path):
    assert 'NOTE' not in pipelines.train(write_options(opt, tmp_path / 'options.yml'), cwd=tmp_path)


# Option files of others


@DATASET_REGISTRY.register()
class FoldersDataset(PairedImageDataset):
    """Accepts several folders, like datasets of some forks."""

    def __init__(self, opt):
        get_root_logger().info(f'folders of GT: {opt["dataroot_gt"]}')
        super().__init__(opt | {'dataroot_gt': opt['dataroot_gt'][-1]})


def test_a_published_option_file_has_all_its_problems_at_once_with_what_to_write(opt, finished):
    """All names and keys of the migration table that can be in one file."""
    opt |= {'model_type': 'ImageCleanModel'}
    opt['network_g'] |= {'type': 'Mamber32', 'heads': [1, 2], 'LayerNorm_type': 'WithBias'}
    opt['datasets']['train'] |= {'type': 'Dataset_PairedImage', 'geometric_augs': True, 'mini_batch_sizes': [2]}
    opt['train'] |= {'use_grad_clip': True, 'mixing_augs': {'mixup': False}}
    opt['val'] |= {'window_size': 8, 'rgb2bgr': True}
    message = refused(opt, finished)
    for part in (
        'model_type: ImageCleanModel is here RestorationModel',
        'network_g.type: Mamber32 is here VmambaIR with channel_scan: lifted, channel_fusion: add',
        'network_g.heads: unknown key, leave it out',
        'network_g.LayerNorm_type: unknown key, leave it out',
        'datasets.train.type: Dataset_PairedImage is here PairedDegradationDataset',
        'datasets.train.geometric_augs: unknown key, write use_hflip: true, use_rot: true',
        'datasets.train.mini_batch_sizes: unknown key, write progressive: {gt_sizes, batch_sizes, iters}',
        'train.use_grad_clip: unknown key, write grad_clip_norm: 0.01',
        'train.mixing_augs: unknown key, leave it out',
        'val.window_size: unknown key, leave it out',
        'val.rgb2bgr: unknown key, leave it out',
    ):
        assert part in message
    assert message.startswith(f'{finished}/options.yml: 11 problems')


def test_a_wrong_model_does_not_hide_the_other_problems(opt, finished):
    opt |= {'model_type': 'RestorationModl'}
    change(opt, {'network_g.dimm': 8, 'train.optim_g.lrr': 1, 'datasets.train.gt_sise': 8})
    message = refused(opt, finished)
    for part in ('model_type: unknown type', 'network_g.dimm: ', 'train.optim_g.lrr: ', 'datasets.train.gt_sise: '):
        assert part in message


def test_the_page_about_migration_has_every_name_and_key_of_the_messages():
    page = (PACKAGE_PARENT / 'docs/migration.md').read_text(encoding='utf-8')
    for name in (*TYPES, *(key for key in KEYS if not key.startswith('accum'))):
        assert re.search(rf'`[^`]*\b{name}\b', page), name


def test_lists_of_folders_are_for_datasets_that_accept_them(opt, images, finished):
    """BasicSR itself ends with a TypeError when it expands `~`."""
    opt['datasets']['val']['dataroot_gt'] = [images['dataroot_gt'], 3]
    assert 'datasets.val.dataroot_gt[1]: expected text, got 3' in refused(opt, finished)
    opt = stock_options(write_images(finished / 'smaller')) | {'name': 'run'}
    folder = opt['datasets']['val']['dataroot_gt']
    change(opt, {'datasets.val.type': 'FoldersDataset', 'datasets.val.dataroot_gt': ['~', folder]})
    log = pipelines.train(write_options(opt, finished / 'options.yml'), cwd=finished)
    assert f"folders of GT: ['{Path.home()}', '{folder}']" in log
