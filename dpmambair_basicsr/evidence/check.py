"""Checks the options of a study's commands before any of them runs, as their own check would come hours later."""

from dpmambair_basicsr.evidence.jobs import Command
from dpmambair_basicsr.files.option_files import read_options
from dpmambair_basicsr.results.run import settings_of


def problems_of(commands: dict[str, Command]) -> list[str]:
    """The problems of all commands, each once, after the name of the first command that has it.

    Of those that are done only whether the others' results can share a table with theirs.
    """
    from dpmambair_basicsr import registration
    from dpmambair_basicsr.option_checks.structure import add_sections, apply_forced

    found, first = {}, None
    for name, command in commands.items():
        registration.pipeline(command.module)
        opt = read_options(command.arguments[command.arguments.index('-opt') + 1])
        problems = apply_forced(opt, add_sections(opt, command.record['force_yml']))
        if not command.is_done:
            problems = problems or option_problems(command.module, opt)
        if command.module == 'test' and not problems:
            first = first or (name, measure_of(opt))
            problems = measure_problems(measure_of(opt), *first)
        for problem in problems:
            found.setdefault(problem, name)
    return [f'{name}: {problem}' for problem, name in found.items()]


def measure_of(opt: dict) -> dict[str, object]:
    """What a test measures."""
    metrics = (opt.get('val') or {}).get('metrics') or {}
    return {
        'val.metrics': {name: settings_of(metric) for name, metric in metrics.items()},
        'the names of datasets': sorted(data['name'] for data in opt['datasets'].values()),
    }


def measure_problems(own: dict, name: str, wanted: dict) -> list[str]:
    """Problems of a test without metrics, or whose results cannot share a table with those of the test `name`."""
    if not own['val.metrics']:
        return ['val.metrics: required, as a study compares them']
    return [f'{what}: must be those of {name}' for what in own if own[what] != wanted[what]]


def option_problems(name: str, opt: dict) -> list[str]:
    """Problems of the options of `train` or `test` that do not depend on which files exist.

    Args:
        name: 'train' or 'test'.
        opt: the content of an option file, after `--force_yml`.
    """
    from dpmambair_basicsr.option_checks.migration import find
    from dpmambair_basicsr.option_checks.schema import rows_of
    from dpmambair_basicsr.option_checks.sections import check_calls, check_sections
    from dpmambair_basicsr.option_checks.structure import check_structure
    from dpmambair_basicsr.registry import registered

    is_train = name == 'train'
    if problems := check_structure(opt, is_train):
        return problems
    model, problems = find(registered('MODEL'), 'model_type', opt['model_type'])
    if hasattr(model, 'option_keys'):
        opt = opt | {'is_train': is_train}
        problems += check_sections(opt, model) + check_calls(opt, rows_of(model))
    return problems
