"""The check for GPU machines, as far as it can be tested without a GPU."""

import runpy
import subprocess

import pytest
import torch
from support.commands import PACKAGE_PARENT

GPU = runpy.run_path(str(PACKAGE_PARENT / 'benchmarks/gpu.py'))


def test_the_page_has_the_markers_of_the_tables():
    before, behind = GPU['parts'](PACKAGE_PARENT / 'docs/benchmarks.md')
    assert '## GPUs' in before and '## Progressive training' in behind


def test_tables_replace_earlier_ones_and_nothing_else_changes(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(f'before\n{GPU["BEGIN"]}old\n{GPU["END"]}behind\n')
    GPU['write'](page, '| new |')
    assert page.read_text() == f'before\n{GPU["BEGIN"]}| new |\n{GPU["END"]}behind\n'


@pytest.mark.parametrize('text', ['', 'BEGIN', 'END BEGIN', 'BEGIN BEGIN END'])
def test_a_page_without_the_markers_is_refused(text, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(text.replace('BEGIN', GPU['BEGIN']).replace('END', GPU['END']))
    with pytest.raises(SystemExit, match='page.md: expected one line'):
        GPU['write'](page, 'x')
    assert '| x' not in page.read_text()


def test_the_benchmarks_accept_the_arguments_they_are_given():
    for command in GPU['BENCHMARKS'].values():
        assert (PACKAGE_PARENT / 'benchmarks' / command[0]).is_file()
    assert subprocess.run(['bash', '-n', PACKAGE_PARENT / 'scripts/gpu_check.sh']).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_the_check_says_so():
    done = subprocess.run(['bash', PACKAGE_PARENT / 'scripts/gpu_check.sh'], capture_output=True, text=True)
    assert done.returncode == 1 and 'gpu_check: PyTorch finds no CUDA device' in done.stderr
