"""Checks the options of a study's commands before any of them runs, as their own check would come hours later."""

from dpmambair_basicsr.evidence.jobs import Command
from dpmambair_basicsr.files.option_files import read_options


def problems_of(commands: dict[str, Command]) -> list[str]:
    """The problems of all commands, each once, after the name of the first command that has it."""
    found = {}
    for name, command in commands.items():
        file = command.arguments[command.arguments.index('-opt') + 1]
        for problem in option_problems(command.module, file, command.record['force_yml']):
            found.setdefault(problem, name)
    return [f'{name}: {problem}' for problem, name in found.items()]


def option_problems(name: str, file: str, forced: list[str]) -> list[str]:
    """Problems of the options of `train` or `test` that do not depend on which files exist.

    Args:
        name: 'train' or 'test'.
        file: option file.
        forced: entries of `--force_yml`.
    """
    from dpmambair_basicsr import registration
    from dpmambair_basicsr.option_checks.migration import find
    from dpmambair_basicsr.option_checks.schema import rows_of
    from dpmambair_basicsr.option_checks.sections import check_calls, check_sections
    from dpmambair_basicsr.option_checks.structure import add_sections, apply_forced, check_structure
    from dpmambair_basicsr.registry import registered

    registration.pipeline(name)
    is_train, opt = name == 'train', read_options(file)
    problems = apply_forced(opt, add_sections(opt, forced)) or check_structure(opt, is_train)
    if problems:
        return problems
    model, problems = find(registered('MODEL'), 'model_type', opt['model_type'])
    if hasattr(model, 'option_keys'):
        problems += check_sections(opt | {'is_train': is_train}, model) + check_calls(opt, rows_of(model))
    return problems
