"""Library code raises named errors; only a command's `main` turns one into an exit."""

import ast
from pathlib import Path

import pytest

import dpmambair_basicsr
from dpmambair_basicsr.files import errors

PACKAGE = Path(dpmambair_basicsr.__file__).parent
ENDS = {'SystemExit', 'exit', 'quit', '_exit', 'abort', 'exit_on_error'}
# (module, function or class) -> why it may end the program although it is not a command's main
EXCEPTIONS = {
    ('files/errors.py', 'exit_on_error'): 'what main calls',
    ('patches/options.py', 'checked_options'): "BasicSR's own train.py and test.py call it, with no main of ours",
    ('patches/resume.py', 'load_resume_state'): "BasicSR's own train.py calls it, with no main of ours",
    ('training/signals.py', 'StoppedBySignal'): "BasicSR's loop has no other end, and the shell expects 128 + signal",
    ('training/signals.py', 'exit_with_parent'): "a thread of a loader's worker, which ends the process no other way",
}


def ends_of(file: Path) -> list[tuple[str, str]]:
    """(module, outermost function or class) of all code that raises or catches an exit, or calls code that exits."""
    module, tree = file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text(encoding='utf-8'))
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = []
    for part in tree.body:
        if isinstance(part, ast.Import | ast.ImportFrom) or '__main__' in ast.unparse(part).partition('\n')[0]:
            continue
        used = {node.id for node in ast.walk(part) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(part) if isinstance(node, ast.Attribute)}
        if used & ENDS:
            found.append((module, part.name if isinstance(part, named) else ''))
    return found


def test_only_a_commands_main_ends_the_program():
    places = {place for file in PACKAGE.rglob('*.py') for place in ends_of(file)}
    assert {place for place in places if place[1] != 'main'} == EXCEPTIONS.keys()
    assert ('restore.py', 'main') in places, 'the walk finds what there is'


@pytest.mark.parametrize(
    'error', [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
)
def test_an_error_of_ours_becomes_one_line_and_status_1(error):
    with pytest.raises(SystemExit, match='^command: a.yml: what is wrong$') as end, errors.exit_on_error('command'):
        raise error('a.yml: what is wrong')
    assert isinstance(end.value.code, str), 'which Python prints, with exit status 1'


def test_an_error_of_the_system_names_the_file_first(tmp_path):
    for path, reason in ((tmp_path, 'Is a directory'), (tmp_path / 'none', 'No such file or directory')):
        with pytest.raises(SystemExit) as ended, errors.exit_on_error('command', OSError):
            path.read_bytes()
        assert ended.value.code == f'command: {path}: {reason}'


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), errors.exit_on_error('command', OSError):
        raise ZeroDivisionError
