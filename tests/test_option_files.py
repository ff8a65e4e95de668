"""Any text as an option file is options or one message with file and line, quickly, before anything is created."""

import os
from pathlib import Path

import pytest
import yaml
from support import commands, forked
from support.forked import Training, changed, train

from dpmambair_basicsr.files.names import name_problem
from dpmambair_basicsr.files.option_files import OptionError, parse_value, read_options


@pytest.fixture
def opt(tmp_path):
    return changed(forked.options(forked.write_images(tmp_path / 'images')), {'train.total_iter': 2})


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob('*') if not path.name.startswith('output ')}


def write_text(monkeypatch, text: str) -> None:
    """Writes it in place of a training's options."""

    def write_options(opt, file):
        file.write_text(text)
        return file

    monkeypatch.setattr(forked, 'write_options', write_options)


def refusal(opt: dict | str, folder: Path, *arguments: str) -> str:
    """The message of a training that is refused before it has created anything."""
    (folder / 'work').mkdir(exist_ok=True)
    (folder / 'datasets').mkdir(exist_ok=True)
    file = folder / 'work/options.yml'
    file.write_text('')
    before = tree(folder)
    run = Training(opt, folder / 'work', *arguments)
    assert run.status(timeout=100) == 1, run.log()
    assert tree(folder) == before
    log = run.log()
    assert 'Traceback' not in log
    assert log.count(f'{file}: ') == 1, log
    return log.partition(f'{file}: ')[2].rstrip()


BILLIONS = 'a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'a{n}: &a{n} [{", ".join([f"*a{n - 1}"] * 10)}]\n' for n in range(1, 10)
)
TEXTS = {
    'aliases that stand for 10^9 values': (BILLIONS, 'line 4: more than 10000 values, aliases expanded'),
    'an alias inside itself': ('x: &a [1, *a]', 'line 1: *a contains itself'),
    '900 levels': ('x:\n  ' + '[' * 900 + ']' * 900, 'line 2: more than 32 nested sections or lists'),
    '10^5 levels': ('[' * 10**5, 'line 1: while increasing flow level exceeded maximum nesting depth'),
    '10^5 levels of lines': ('\n'.join(' ' * n + 'a:' for n in range(1000)), 'line 32: more than 32 nested sections'),
    '10^5 values': ('x: [' + '1, ' * 10**5 + ']', 'line 1: more than 10000 values'),
    'a megabyte': ('#' * 2**20 + '\n', 'is larger than 1048576 bytes'),
    'NUL': ('name: x\nscale: \0', 'line 2: the character U+0000 is not allowed in YAML'),
    'two documents': ('a: 1\n---\nb: 2', 'line 2: expected a single document'),
    'no such day': ('a: 1\nb: 2001-99-99', "line 2: '2001-99-99' is not a valid timestamp"),
    'not an int': ('a: !!int x', "line 1: 'x' is not a valid int"),
    '5000 digits': ('a: ' + '1' * 5000, "line 1: '11111111111111111111111111111111111111111111"),
    'a list as a key': ('a: 1\n[b]: 2', 'line 2: a key must be text, got a list'),
    'UTF-16': ('name: x'.encode('utf-16'), 'line 1: byte 0xff is not UTF-8'),
}


@pytest.mark.parametrize('text', TEXTS)
def test_a_hostile_text_is_refused_with_its_line(text, tmp_path):
    content, message = TEXTS[text]
    file = tmp_path / 'options.yml'
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError) as refused:
        read_options(file)
    assert str(refused.value).startswith(f'{file}: {message}')
    assert len(str(refused.value)) < 500 and '\n' not in str(refused.value)


@pytest.mark.parametrize('text', ['aliases that stand for 10^9 values', '900 levels', 'NUL'])
def test_training_is_refused_for_a_hostile_text(text, opt, tmp_path, monkeypatch):
    content, message = TEXTS[text]
    write_text(monkeypatch, content)
    assert refusal(opt, tmp_path).startswith(message)


def test_duplicate_keys_are_refused(opt, tmp_path, monkeypatch):
    text = yaml.safe_dump(opt, sort_keys=False)
    for more, message in {
        'train:\n  total_iter: 3\n': "duplicate key 'train', first in line",
        'name: other\n': "duplicate key 'name', first in line",
    }.items():
        content = f'{text}{more}'
        monkeypatch.setattr(
            forked, 'write_options', lambda _, file, content=content: (file.write_text(content), file)[1]
        )
        assert refusal(opt, tmp_path).startswith(f'line {len(text.splitlines()) + 1}: {message}')


# Changes to the options of a training, and the complete message.
VALUES = {
    'a time that no calendar has': ({'train.total_iter': 1e18}, 'train.total_iter: must be at most 10'),
    'infinity': ({'train.total_iter': float('inf')}, 'train.total_iter: must be at most 1000000000000, got inf'),
    '300 letters': ({'name': 'x' * 300}, 'name: must have at most 200 bytes, not 300 (line '),
    'the folder above': (
        {'name': '../datasets'},
        "name: must be one name, without / \\ and control characters, not '../",
    ),
    'far above': ({'name': '../../x'}, "name: must be one name, without / \\ and control characters, not '../../x'"),
    'absolute': ({'name': '/x'}, "name: must be one name, without / \\ and control characters, not '/x'"),
    'a backslash': ({'name': '..\\x'}, "name: must be one name, without / \\ and control characters, not '..\\\\x'"),
    'itself': ({'name': '.'}, "name: must be a name, not '.'"),
    'nothing': ({'name': ''}, "name: must be a name, not ''"),
    'a dot at the end': ({'name': 'x.'}, "name: must not end in a dot or a space, as 'x.' does"),
    'a set': ({'datasets.val.name': '../../x'}, 'datasets.val.name: must be one name'),
    'a suffix': ({'val.suffix': '/../../x'}, 'val.suffix: must be one name'),
}


def named_line(problem: str, folder: Path) -> str:
    number = int(problem.rpartition('(line ')[2].rstrip(')'))
    return (folder / 'work/options.yml').read_text().splitlines()[number - 1]


@pytest.mark.parametrize('value', VALUES)
def test_training_is_refused_before_anything_is_created_or_renamed(value, opt, tmp_path):
    changes, message = VALUES[value]
    report = refusal(changed(opt, changes), tmp_path)
    assert report.startswith(f'1 problem in the options:\n  {message}')
    assert (
        report.endswith(')')
        and named_line(report, tmp_path).split(':')[0].strip() == message.split(':')[0].split('.')[-1]
    )


@pytest.mark.parametrize(
    ('entry', 'message'),
    {
        'name=../datasets': "name: must be one name, without / \\ and control characters, not '../datasets'",
        'name=': "name: must be a name, not ''",
        f'train:total_iter={10**25}': 'does not fit into 64 bits',
        f'train:x={"[" * 900 + "]" * 900}': 'more than 32 nested sections or lists',
        'datasets:val:name=a/b': 'datasets.val.name: must be one name',
    }.items(),
)
def test_forced_values_have_the_same_limits(entry, message, opt, tmp_path):
    report = refusal(opt, tmp_path, '--force_yml', entry)
    assert message in report and '(line' not in report


def test_every_problem_has_the_line_of_its_key(opt, tmp_path):
    report = refusal(changed(opt, {'train.totl_iter': 3, 'network_g.dmi': 4}), tmp_path)
    for key in ('totl_iter', 'dmi'):
        (told,) = [line for line in report.splitlines() if f'.{key}: ' in line]
        assert named_line(told, tmp_path).strip().startswith(f'{key}: ')


def test_a_number_of_26_digits_is_refused(opt, tmp_path):
    report = refusal(changed(opt, {'train.total_iter': 10**25}), tmp_path)
    assert report.endswith(": '10000000000000000000000000' does not fit into 64 bits")
    assert named_line(report.partition(':')[0].replace('line', '(line'), tmp_path).strip().startswith('total_iter: 1')


def test_many_problems_are_a_short_report(opt, tmp_path):
    opt |= {f'unknown_{index}': 0 for index in range(4000)}
    report = refusal(opt, tmp_path)
    assert report.startswith('4000 problems in the options:\n') and report.endswith('\n  and 3950 more')


def test_options_are_utf_8_wherever_they_are_read(tmp_path):
    """With a byte order mark, as editors on Windows write it, and on a system with another default encoding."""
    opt = commands.stock_options(commands.write_images(tmp_path / 'images'))
    text = '\ufeff# für Größe\n' + yaml.safe_dump(opt, sort_keys=False)
    (tmp_path / 'options.yml').write_text(text, encoding='utf-8')
    ascii_system = {'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'LC_ALL': 'POSIX'}
    done = commands.python('-m', 'dpmambair_basicsr.train', '-opt', 'options.yml', cwd=tmp_path, **ascii_system)
    assert done.returncode == 0, done.stdout
    copy = tmp_path / 'experiments/tiny/options.yml'
    assert copy.read_bytes().startswith(b'# GENERATE TIME: ')
    assert copy.read_bytes().endswith(text.removeprefix('\ufeff').encode())
    assert read_options(copy) == opt


def test_files_that_are_not_regular_are_refused_without_blocking(opt, tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    for file, message in {
        'fifo': 'not a regular file',
        '/dev/zero': 'not a regular file',
        '.': 'Is a directory',
    }.items():
        with pytest.raises(OptionError, match=f'^{tmp_path / file}: {message}$'):
            read_options(tmp_path / file)


def test_aliases_stand_for_what_they_name():
    assert parse_value('{a: &x {b: [1, 2]}, c: *x}') == {'a': {'b': [1, 2]}, 'c': {'b': [1, 2]}}


def test_names_must_be_valid_on_every_system():
    for name in ('run', 'train_DPMambaIR_all-in-one', 'Größe 2', '.hidden', 'a.b', '-x', 'x' * 200):
        assert name_problem(name) == ''
    for name in ('', '.', '..', 'a/b', '/', '..\\x', 'x ', 'x.', 'a\nb', 'a\0', '\ud800', 'ä' * 101):
        assert name_problem(name)


def test_a_name_with_dots_and_spaces_inside_trains_as_before(opt, tmp_path):
    train(changed(opt, {'name': 'my run.v2', 'datasets.val.name': 'val 1.5'}), tmp_path)
    assert (tmp_path / 'experiments/my run.v2/models/net_g_latest.pth').is_file()
