"""Train and test variants of a network over several seeds, and compare them: `dpmambair study FILE`.

FILE lists the variants, seeds, data and iterations; its keys are in docs/evidence.md. Studies bundled with the package
can be named without a folder: dpmambair_table3.yml. Everything is written to studies/<name>: the trials and, after each
of them, the table, study.{md,csv,json,html} and study.png. To resume an interrupted study, repeat the command.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dpmambair_basicsr.evidence.check import problems_of
from dpmambair_basicsr.evidence.jobs import Command, Job, call, device_slots, run_jobs
from dpmambair_basicsr.files import lock
from dpmambair_basicsr.files.atomic import sha256
from dpmambair_basicsr.files.errors import OptionError, exit_on_error
from dpmambair_basicsr.files.names import name_problem
from dpmambair_basicsr.files.option_files import packaged_folder, read_options
from dpmambair_basicsr.inference.figure_files import check_figure
from dpmambair_basicsr.results.run import average_of, converted, read_run
from dpmambair_basicsr.results.study_table import StudyTable, Trial, tabulate, write_table

CHECKPOINT = Path('models', 'net_g_latest.pth')  # written at the end of a training
MAX_SEED = 2**32 - 1
PLACEHOLDER = r'\{(\w+)\}'


@dataclass
class Stage:
    """A training or a test: an option file, possibly one of the package, and `--force_yml` entries."""

    options: str
    iterations: int = 0
    force_yml: list[str] = field(default_factory=list)


@dataclass
class Variant:
    """Differences from the study's `train` and `test`. Entries of `network_g` are passed to the test as well."""

    force_yml: list[str] = field(default_factory=list)
    train: str = ''
    test: str = ''


@dataclass
class Study:
    """The content of a study file.

    Args:
        baseline: the variant that the others are compared with.
        before: trainings that run first, once per seed, in order. In later entries, `{name}` stands for their
            checkpoint, `{seed}` for the seed and `{iterations}` for the number of iterations.
    """

    name: str
    baseline: str
    seeds: list[int]
    train: Stage
    test: Stage
    variants: dict[str, Variant]
    before: dict[str, Stage] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='dpmambair study', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', help='study file')
    parser.add_argument('-o', '--output', type=Path, metavar='FOLDER', help='results; default: studies/<name>')
    parser.add_argument(
        '--jobs',
        type=int,
        metavar='N',
        help='trainings at a time, each with one thread on a CPU; default: one per GPU, or one',
    )
    parser.add_argument('--iterations', type=int, metavar='N', help="of each variant; overrides the file's")
    arguments = parser.parse_args()
    for name in ('jobs', 'iterations'):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f'--{name}: must be 1 or more')
    try:
        with exit_on_error('dpmambair study', ValueError, OSError):
            study = read_study(find_study(arguments.file))
            if arguments.iterations is not None:
                study = with_iterations(study, arguments.iterations)
            folder = arguments.output or Path('studies', study.name)
            check_figure(folder / 'study.png')
            lock.hold(folder)
            table = run_study(study, folder, arguments.jobs)
            print((folder / 'study.md').read_text(encoding='utf-8'))
            print(f'{len(table.trials)} trials; {folder / "study.html"}')
    except KeyboardInterrupt:
        print('interrupted; to continue, repeat the command', file=sys.stderr)
        sys.exit(130)
    finally:
        lock.release()


# The study file


def find_study(name: str) -> Path:
    """The file, or the bundled study of this name."""
    packaged = packaged_folder() / 'studies' / name
    return packaged if Path(name).name == name and not Path(name).exists() and packaged.is_file() else Path(name)


def read_study(file: Path) -> Study:
    """Read a study file. Raises OptionError, naming the file and the key."""
    try:
        study = converted(read_options(file), Study, 'the file')
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f'{file}: {error}') from None
    for key, problem in problems(study):
        raise OptionError(f'{file}: {key}: {problem}')
    return study


def problems(study: Study) -> Iterator[tuple[str, str]]:
    """(key, what is wrong with it)."""
    names = {'name': study.name} | {
        f'{key}.{name}': name for key in ('variants', 'before') for name in getattr(study, key)
    }
    for key, name in names.items():
        problem = name_problem(name) or ('must not have a =, as --force_yml cannot' if '=' in name else '')
        if problem:
            yield key, problem
    if study.baseline not in study.variants:
        yield 'baseline', f'{study.baseline!r} is not one of the variants: {", ".join(study.variants)}'
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        yield 'seeds', 'expected one or more, all different'
    for seed in study.seeds:
        if not 0 <= seed <= MAX_SEED:
            yield 'seeds', f'must be in [0, {MAX_SEED}], got {seed}'
    for name in study.before:
        if not name.isidentifier() or name in ('seed', 'iterations'):
            yield f'before.{name}', 'expected a name of letters, other than seed and iterations'
    for key, stage in stages(study).items():
        if stage.iterations < 1 and key != 'test':
            yield f'{key}.iterations', 'expected 1 or more'
        yield from option_file_problems(f'{key}.options', stage.options)
    known = ['seed', 'iterations', *study.before]
    for key, variant in study.variants.items():
        for part in ('train', 'test'):
            if getattr(variant, part):
                yield from option_file_problems(f'variants.{key}.{part}', getattr(variant, part))
    entries = {key: stage.force_yml for key, stage in stages(study).items()}
    entries |= {f'variants.{name}': variant.force_yml for name, variant in study.variants.items()}
    for key, forced in entries.items():
        for entry in forced:
            for name in re.findall(PLACEHOLDER, entry):
                if name not in known:
                    yield f'{key}.force_yml', f'{{{name}}} must be one of {", ".join(known)}'


def stages(study: Study) -> dict[str, Stage]:
    return {
        **{f'before.{name}': stage for name, stage in study.before.items()},
        'train': study.train,
        'test': study.test,
    }


def with_iterations(study: Study, iterations: int) -> Study:
    """The study with another budget per variant; earlier trainings, which all variants share, keep theirs."""
    return replace(study, train=replace(study.train, iterations=iterations))


def option_file_problems(key: str, name: str) -> Iterator[tuple[str, str]]:
    if not find_options(name).is_file():
        yield key, f'{name}: no such option file here or in the package'


def find_options(name: str) -> Path:
    """As `-opt` finds it, see `training.command_line.find_option_file`."""
    packaged = packaged_folder() / name
    return packaged if Path(name).name == name and not Path(name).exists() else Path(name)


# The trials

Place = tuple[str, int]  # variant and seed


def run_study(study: Study, folder: Path, jobs: int | None) -> StudyTable:
    """Run the unfinished trials and return the table of all.

    Raises:
        InputError: a command failed, or one in the folder was started with other options.
        OptionError: some options are wrong; nothing was started.
    """
    places = [(variant, seed) for seed in study.seeds for variant in study.variants]  # so that pairs are complete early
    trainings_before = [[[before(study, folder, name, seed)] for seed in study.seeds] for name in study.before]
    work = {place: trial(study, folder, *place) for place in places}
    for job in [*sum(trainings_before, []), *work.values()]:
        for command in job:
            command.check_record()
    trials = {place: read_trial(folder, *place) for place, job in work.items() if job[-1].is_done}
    print(f'{study.name}: {len(trials)} of {len(places)} trials finished, in {folder}', flush=True)

    def tabulated() -> StudyTable:
        found = [trials[place] for place in places if place in trials]
        table = tabulate(study.name, study.baseline, [*study.variants], len(places), found)
        write_table(table, folder)
        return table

    def done(job: Job) -> None:
        place = next(place for place, own in work.items() if own is job)
        trials[place] = read_trial(folder, *place)
        print(f'[{len(trials)}/{len(places)}] {describe(trials[place])}', flush=True)
        tabulated()

    def started(command: Command) -> None:
        print(f'{command.module} started, output in {command.output}', flush=True)

    slots = device_slots(jobs)
    check_options(study, folder, slots)
    for trainings in trainings_before:
        run_jobs(trainings, slots, lambda job: print(f'{job[0].output.parent}: done', flush=True), started)
    run_jobs([work[place] for place in places if place not in trials], slots, done, started)
    return tabulated()


def check_options(study: Study, folder: Path, slots: list[str]) -> None:
    """Raise OptionError with all problems in the options of the commands left, before the first one starts."""
    seed = study.seeds[0]
    jobs = {f'before.{name}': [before(study, folder, name, seed)] for name in study.before}
    jobs |= {f'variants.{name}': trial(study, folder, name, seed) for name in study.variants}
    commands = {f'{name}, {command.module}': command for name, job in jobs.items() for command in job}
    is_over = all(command.is_done for command in commands.values())
    problems = [] if is_over else call(problems_of, commands, slots=slots)
    if problems:
        raise OptionError('\n  '.join([f'{study.name}: problems in the options:', *problems]))


def before(study: Study, folder: Path, name: str, seed: int) -> Command:
    """The earlier training `name` of a seed."""
    return training(study, folder, folder / 'before' / name / f'seed_{seed}', study.before[name], seed)


def trial(study: Study, folder: Path, variant: str, seed: int) -> Job:
    """The training and the test of a variant and a seed."""
    place, own = trial_folder(folder, variant, seed), study.variants[variant]
    stage = Stage(own.train or study.train.options, study.train.iterations, [*study.train.force_yml, *own.force_yml])
    train = training(study, folder, place, stage, seed)
    network = [entry for entry in own.force_yml if re.match(r'network_g\b', entry)]
    entries = [
        f'name={run_name(study, place)}',
        *filled([*study.test.force_yml, *network], study, folder, seed, study.train.iterations),
        f'path:pretrain_network_g={train.result}',
        f'path:results_root={place / "test"}',
    ]
    result = place / 'test' / 'results.json'
    return [train, command('test', place, own.test or study.test.options, entries, result)]


def trial_folder(folder: Path, variant: str, seed: int) -> Path:
    return folder / 'trials' / variant / f'seed_{seed}'


def training(study: Study, folder: Path, place: Path, stage: Stage, seed: int) -> Command:
    entries = [
        f'name={run_name(study, place)}',
        f'train:total_iter={stage.iterations}',
        f'logger:save_checkpoint_freq={max(1, stage.iterations // 2)}',  # at most half a training is lost when killed
        f'logger:print_freq={max(1, stage.iterations // 4)}',
        'logger:use_tb_logger=false',
        *filled(stage.force_yml, study, folder, seed, stage.iterations),
        f'manual_seed={seed}',
        f'path:experiments_root={place / "train"}',
    ]
    return command('train', place, stage.options, entries, place / 'train' / CHECKPOINT, '--auto_resume')


def run_name(study: Study, place: Path) -> str:
    return re.sub(r'\W+', '_', '_'.join([study.name, *place.parts[-2:]]))


def filled(entries: list[str], study: Study, folder: Path, seed: int, iterations: int) -> list[str]:
    """The entries with the names in braces replaced by values."""
    values = {'seed': seed, 'iterations': iterations}
    values |= {name: before_checkpoint(folder, name, seed) for name in study.before}
    return [re.sub(PLACEHOLDER, lambda match: str(values[match[1]]), entry) for entry in entries]


def before_checkpoint(folder: Path, name: str, seed: int) -> Path:
    return folder / 'before' / name / f'seed_{seed}' / 'train' / CHECKPOINT


def command(module: str, place: Path, options: str, entries: list[str], result: Path, *more: str) -> Command:
    file = find_options(options)
    record = {'options': options, 'sha256': sha256(file), 'force_yml': entries}
    arguments = ['-opt', str(file), *more, '--force_yml', *entries]
    return Command(module, arguments, place / 'output.txt', result, record)


# The results


def read_trial(folder: Path, variant: str, seed: int) -> Trial:
    place = trial_folder(folder, variant, seed)
    output = (place / 'output.txt').read_text(encoding='utf-8', errors='replace')
    parameters = re.findall(r'with parameters: ([\d,]+)', output)
    seconds = re.findall(r'time \(data\): ([\d.]+)', output)
    return Trial(
        variant,
        seed,
        place / 'test',
        read_run(place / 'test'),
        int(parameters[-1].replace(',', '')) if parameters else 0,
        float(seconds[-1]) if seconds else float('nan'),
    )


def describe(trial: Trial) -> str:
    values = ', '.join(f'{metric} {value:.4f}' for metric, value in average_of(trial.run).restored.items())
    return f'{trial.variant}, seed {trial.seed}: {values}, {trial.seconds:.3f} s per iteration'


if __name__ == '__main__':
    main()
