"""Checks the options of a study's commands before any of them runs, as their own check would come hours later."""

from dpmambair_basicsr.evidence.jobs import Command
from dpmambair_basicsr.files.option_files import read_options
from dpmambair_basicsr.results.run import settings_of


def problems_of(commands: dict[str, Command]) -> list[str]:
    """The problems of all commands, each once, after the name of the first command that has it."""
    found, measures = {}, {}
    for name, command in commands.items():
        file = command.arguments[command.arguments.index('-opt') + 1]
        opt = read_options(file)
        problems = option_problems(command.module, opt, command.record['force_yml'])
        if command.module == 'test' and not problems:
            measures[name] = measure_of(opt)
            problems = measure_problems(measures)
        for problem in problems:
            found.setdefault(problem, name)
    return [f'{name}: {problem}' for problem, name in found.items()]


def measure_of(opt: dict) -> dict[str, object]:
    """What a test measures."""
    metrics = (opt.get('val') or {}).get('metrics') or {}
    return {
        'val.metrics': {name: settings_of(metric) for name, metric in metrics.items()},
        'the names of datasets': [data['name'] for data in opt['datasets'].values()],
    }


def measure_problems(measures: dict[str, dict]) -> list[str]:
    """Problems of the last one: it has no metrics, or its results cannot share a table with those of the first."""
    (first, wanted), (_, own) = next(iter(measures.items())), [*measures.items()][-1]
    if not own['val.metrics']:
        return ['val.metrics: required, as a study compares them']
    return [f'{what}: must be those of {first}' for what in own if own[what] != wanted[what]]


def option_problems(name: str, opt: dict, forced: list[str]) -> list[str]:
    """Problems of the options of `train` or `test` that do not depend on which files exist.

    Args:
        name: 'train' or 'test'.
        opt: the content of an option file; changed by `forced`.
        forced: entries of `--force_yml`.
    """
    from dpmambair_basicsr import registration
    from dpmambair_basicsr.option_checks.migration import find
    from dpmambair_basicsr.option_checks.schema import rows_of
    from dpmambair_basicsr.option_checks.sections import check_calls, check_sections
    from dpmambair_basicsr.option_checks.structure import add_sections, apply_forced, check_structure
    from dpmambair_basicsr.registry import registered

    registration.pipeline(name)
    is_train = name == 'train'
    problems = apply_forced(opt, add_sections(opt, forced)) or check_structure(opt, is_train)
    if problems:
        return problems
    model, problems = find(registered('MODEL'), 'model_type', opt['model_type'])
    if hasattr(model, 'option_keys'):
        opt = opt | {'is_train': is_train}
        problems += check_sections(opt, model) + check_calls(opt, rows_of(model))
    return problems
