"""What the degradation extractor sees: `python -m dpmambair_basicsr.degradation`, with tiny random extractors.

Random features separate noise from darkness as reliably as trained ones: they average brightness, or edges.
"""

import sys

import cv2
import numpy as np
import pytest
import torch
from support.commands import command
from torch.nn import functional as F

import dpmambair_basicsr
from dpmambair_basicsr import archs, degradation
from dpmambair_basicsr.data.degradations import DEGRADATIONS
from dpmambair_basicsr.inference.degradation_classes import Classes
from dpmambair_basicsr.inference.embedder import load_extractor

dpmambair_basicsr.register()

SMALL = {'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2, 'd_inner': [8, 8, 8, 8]}
EXTRACTOR = {'embed_dim': 8, 'channels': [8, 8, 8]}


def scene(seed, size=40):
    """(size, size, 3) BGR uint8, smooth."""
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(60, 200, (4, 4, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def noisy(image):
    return (image + np.random.default_rng(0).normal(0, 60, image.shape)).clip(0, 255).astype(np.uint8)


def dark(image):
    return image // 8


KINDS = {'dark': dark, 'noisy': noisy}


def write(file, image):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), image)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """reference/{dark,noisy}, pictures/{dark,noisy}, clean/ and w.pth, the checkpoint of an extractor."""
    folder = tmp_path_factory.mktemp('viewer')
    for kind, change in KINDS.items():
        for seed in range(4):
            write(folder / 'reference' / kind / f'{seed}.png', change(scene(seed)))
        for seed in range(10, 13):
            write(folder / 'pictures' / kind / f'{seed}.png', change(scene(seed)))
    for seed in range(2):
        write(folder / 'clean' / f'{seed}.png', scene(seed, 64))
    torch.manual_seed(0)
    torch.save({'params': archs.DegradationExtractor(**EXTRACTOR).state_dict()}, folder / 'w.pth')
    return folder


def run(monkeypatch, capsys, folder, *arguments):
    """(exit status, stdout, stderr) of the command in the folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['degradation', *map(str, arguments)])
    status = degradation.main()
    return status, *capsys.readouterr()


def rows(output):
    """{picture: its other cells} of the table."""
    lines = [line.split() for line in output.splitlines() if '.png' in line and not line.startswith('map')]
    return {line[0]: line[1:] for line in lines}


def colours(file):
    return {tuple(colour) for colour in cv2.imread(str(file)).reshape(-1, 3)}


def named_colours(count):
    """Matplotlib's first default colours, BGR."""
    colors = pytest.importorskip('matplotlib.colors')
    return [tuple(round(255 * x) for x in colors.to_rgb(f'C{i}'))[::-1] for i in range(count)]


def test_pictures_are_ranked_by_the_folders_of_the_reference(folder, monkeypatch, capsys):
    status, output, _ = run(monkeypatch, capsys, folder, '-w', 'w.pth', 'pictures', '--reference', 'reference')
    assert status == 0
    assert output.startswith('2 classes, 8 reference pictures, 100% of them recognised')
    table = rows(output)
    assert len(table) == 6
    for name, (kind, first, score, second, other, _) in table.items():
        assert name.split('/')[1] == kind == first != second
        assert 0.5 < float(score) <= 1 and float(score) + float(other) == pytest.approx(1, abs=0.011)
    assert output.splitlines()[-1] == '6 of 6 are assigned to the class that their folder is named after'


def test_synthetic_degradations_of_clean_pictures_are_the_classes(folder, monkeypatch, capsys):
    dark_picture = 'pictures/dark/10.png'
    status, output, _ = run(monkeypatch, capsys, folder, '-w', 'w.pth', dark_picture, '--clean', 'clean')
    assert status == 0 and output.startswith('9 classes, 18 reference pictures')
    assert rows(output)[dark_picture][0] == 'lowlight'
    shown = rows(output)[dark_picture][:6:2]
    assert len({*shown}) == 3 and {*shown} <= {*DEGRADATIONS}


@pytest.mark.parametrize('method', ['pca', 'tsne'])
def test_the_map_has_a_colour_for_each_kind(method, folder, monkeypatch, capsys, tmp_path):
    pytest.importorskip('matplotlib')
    pytest.importorskip('sklearn')
    file = tmp_path / 'new' / 'map.png'
    first, second, third, fourth = named_colours(4)
    common = ('-w', 'w.pth', '--reference', 'reference', '-o', file, '--map', method)
    assert run(monkeypatch, capsys, folder, 'pictures', *common)[0] == 0
    assert {first, second} <= colours(file) and not {third, fourth} & colours(file)
    write(folder / 'more' / 'unknown' / 'a.png', scene(20))
    assert run(monkeypatch, capsys, folder, 'pictures', 'more', *common)[0] == 0
    assert {first, second, third} <= colours(file) and fourth not in colours(file)
    assert [path.name for path in file.parent.iterdir()] == ['map.png']


def test_scores_are_those_of_the_docstring():
    """Two classes in one coordinate, means 0 and 4, spreads 1 and 2: at 1 the second is at distance 1.5."""
    members = {'a': (-1.0, 1.0), 'b': (2.0, 6.0)}
    classes = Classes.of({name: [torch.tensor([[x]]) for x in values] for name, values in members.items()})
    distances = classes.distances(torch.tensor([[1.0]]))
    torch.testing.assert_close(distances, torch.tensor([[1.0, 1.5]]))
    densities = torch.tensor([1, 1 / 4]) * torch.tensor([-1.0, -(1.5**2)]).exp()
    torch.testing.assert_close(classes.scores(distances)[0], densities / densities.sum())
    # Leave-one-out means are 1, -1, 6 and 2: all but -1 and 6 are then nearer to the other class.
    assert classes.accuracy() == 0.5


def test_every_checkpoint_with_an_extractor_gives_the_embedding_of_its_network(tmp_path):
    torch.manual_seed(0)
    autoencoder = archs.DegradationAutoencoder(embed_dim=8, extractor_channels=[4, 4, 4], channels=4)
    extractor = autoencoder.extractor
    network = archs.DPMambaIR(dim=8, embed_dim=8, extractor_channels=[4, 4, 4], **SMALL)
    network.load_extractor(autoencoder.state_dict())
    image = torch.rand(1, 3, 30, 20)
    expected = network.embed(image)
    for index, net in enumerate((autoencoder, extractor, network)):
        file = str(tmp_path / f'{index}.pth')
        torch.save({'params': net.state_dict()}, file)
        embedding = F.normalize(load_extractor(file)(image), dim=1)
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-6)


def test_a_broken_picture_is_reported_and_the_others_are_processed(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / 'broken.png').write_bytes((folder / 'pictures' / 'dark' / '10.png').read_bytes()[:100])
    write(tmp_path / 'fine.png', dark(scene(3)))
    common = ('-w', 'w.pth', '--reference', 'reference')
    status, output, errors = run(monkeypatch, capsys, folder, tmp_path, *common)
    assert status == 1
    assert f'{tmp_path / "broken.png"}: not a picture' in errors and 'failed pictures: 1' in errors
    assert rows(output).keys() == {str(tmp_path / 'fine.png')}


def test_only_the_crop_is_analysed(folder, monkeypatch, capsys, tmp_path):
    """Noise around a dark center."""
    image = noisy(scene(5))
    image[10:30, 10:30] = dark(scene(5))[10:30, 10:30]
    write(tmp_path / 'x.png', image)
    found = [
        rows(run(monkeypatch, capsys, folder, tmp_path, '-w', 'w.pth', '--reference', 'reference', *crop)[1])
        for crop in ((), ('--crop', '20'))
    ]
    assert [table[str(tmp_path / 'x.png')][0] for table in found] == ['noisy', 'dark']


def test_mistakes_end_with_one_line(folder, monkeypatch, capsys, tmp_path):
    torch.save({'params': archs.VmambaIR(dim=4, num_blocks=[1, 1, 1, 1], d_state=2).state_dict()}, tmp_path / 'v.pth')
    write(tmp_path / 'one' / 'a' / 'x.png', scene(0))
    (tmp_path / 'text.png').write_text('')
    right = {'-w': 'w.pth', '--reference': 'reference', '-o': tmp_path / 'map.png'}
    wrong = {
        'v.pth: contains no degradation extractor': {'-w': tmp_path / 'v.pth'},
        'nowhere.pth': {'-w': 'nowhere.pth'},
        'class a: a class needs two or more readable pictures, got 1': {'--reference': tmp_path / 'one'},
        'clean: no sub-folder contains pictures': {'--reference': 'clean'},
        'nowhere': {'--reference': 'nowhere'},
        'map.jpg: must end in .png': {'-o': tmp_path / 'map.jpg'},
        'text.png: it is a file; expected a folder': {'-o': tmp_path / 'text.png' / 'map.png'},
        "device: must be one of auto, cpu, cuda, mps, got 'tpu9'": {'--device': 'tpu9'},
    }
    pytest.importorskip('matplotlib')
    for message, change in wrong.items():
        arguments = [part for option in (right | change).items() for part in option]
        with pytest.raises(SystemExit, match=message) as caught:
            run(monkeypatch, capsys, folder, 'pictures', *arguments)
        assert '\n' not in str(caught.value)
    with pytest.raises(SystemExit, match='nowhere: no such file or folder'):
        run(monkeypatch, capsys, folder, 'nowhere', '-w', 'w.pth', '--reference', 'reference')


@pytest.mark.parametrize(
    ('module', 'arguments', 'message'),
    [
        ('matplotlib', (), '--output needs matplotlib .*pip install matplotlib scikit-learn'),
        ('sklearn', ('--map', 'tsne'), '--map tsne needs scikit-learn .*pip install matplotlib scikit-learn'),
    ],
)
def test_a_missing_library_is_named_with_its_extra(module, arguments, message, folder, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, capsys, folder, 'pictures', '-w', 'w', '--clean', 'clean', '-o', 'map.png', *arguments)


def test_classes_must_be_chosen(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, folder, 'pictures', '-w', 'w.pth')
    assert 'one of the arguments --reference --clean is required' in capsys.readouterr().err


def test_the_command_prints_the_table(folder):
    arguments = ('-w', 'w.pth', '--reference', 'reference', 'pictures/dark/10.png')
    done = command('degradation', *arguments, cwd=folder)
    assert done.returncode == 0 and rows(done.stdout)['pictures/dark/10.png'][0] == 'dark', done.stdout
