"""The results of a test: one table per run, as Markdown, CSV and JSON. Needs neither torch nor BasicSR."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.regular import open_regular

MAX_BYTES = 2**26  # of a results.json: a few hundred thousand images
NAMES = {dict: 'a mapping', list: 'a list', str: 'a text', int: 'an int', float: 'a number'}


@dataclass
class Sample:
    """An image of a test, with what is needed to verify it.

    Args:
        index: in the dataset.
        truth: SHA-256 of the clean image's tensor, '' if there is none.
        restored: SHA-256 of the measured 8-bit image.
        values: {metric: value of this image}.
    """

    index: int
    truth: str
    restored: str
    values: dict[str, float]


@dataclass
class SetResult:
    """One dataset.

    Args:
        count: number of images.
        degradation: of its images, '' if unknown or mixed.
        images: {name: file of the degraded image}.
        restored: {metric: mean over the images}.
        unrestored: the same for the degraded images; empty if their size differs from that of the restored ones.
        hashes: {name: SHA-256 of the network's input tensor}; empty in results of earlier versions.
        samples: {name: `Sample`}; likewise.
    """

    name: str
    count: int = 0
    degradation: str = ''
    images: dict[str, str] = field(default_factory=dict)
    restored: dict[str, float] = field(default_factory=dict)
    unrestored: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)


@dataclass
class Run:
    """One test.

    Args:
        options: the option file; `forced`: the `--force_yml` entries.
        checkpoint: the file of the network, '' without one; `param_key`: the key used, '' for the whole file;
            `sha256`: of the file.
        versions: {package: version}.
        metrics: {name: type and arguments}, the section `val.metrics`.
        suffix: restored images are visualization/<dataset>/<image>_<suffix>.png.
        device: on which images were restored, '' in results of earlier versions.
    """

    name: str
    options: str
    forced: list[str]
    checkpoint: str
    param_key: str
    sha256: str
    versions: dict[str, str]
    metrics: dict[str, dict]
    suffix: str
    sets: list[SetResult]
    device: str = ''


def mean(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """{metric: mean} of the metrics that all parts have. Datasets have equal weights, whatever their size."""
    common = [metric for metric in parts[0] if all(metric in part for part in parts)] if parts else []
    return {metric: math.fsum(part[metric] for part in parts) / len(parts) for metric in common}


def average_of(run: Run) -> SetResult:
    """The last row of the table."""
    restored, unrestored = ([getattr(part, kind) for part in run.sets] for kind in ('restored', 'unrestored'))
    return SetResult('average', restored=mean(restored), unrestored=mean(unrestored))


def columns(run: Run) -> list[tuple[str, str, str]]:
    """(heading, SetResult's dictionary, metric); the input's column follows the restored image's."""
    kinds = ['restored'] + ['unrestored'] * any(part.unrestored for part in run.sets)
    headings = {'restored': '{}', 'unrestored': '{} of the input'}
    return [(headings[kind].format(metric), kind, metric) for metric in run.metrics for kind in kinds]


def to_markdown(run: Run) -> str:
    """The table and, below it, options, checkpoint and versions."""
    wanted = columns(run)
    header = ['dataset', 'images', *(heading for heading, _, _ in wanted)]
    rows = [
        [part.name, part.count or '', *(number(getattr(part, kind).get(metric)) for _, kind, metric in wanted)]
        for part in [*run.sets, average_of(run)]
    ]
    facts = [f'- {name}: {escape_markdown(value)}' for name, value in provenance(run).items()]
    return '\n'.join([markdown_table(header, rows), '', *facts, ''])


def provenance(run: Run) -> dict[str, str]:
    measures = '; '.join(f'{name} {describe_metric(metric)}' for name, metric in run.metrics.items())
    return {
        'options': ' '.join([run.options, *run.forced]),
        'checkpoint': (run.checkpoint or 'none') + (f' ({run.param_key})' if run.param_key else ''),
        'sha256': run.sha256 or 'none',
        'versions': ', '.join(f'{package} {version}' for package, version in run.versions.items()),
        'metrics': measures,
    }


def describe_metric(metric: dict) -> str:
    arguments = ', '.join(f'{key} {value}' for key, value in settings_of(metric).items() if key != 'type')
    return f'{metric["type"]} ({arguments})' if arguments else metric['type']


def settings_of(metric: dict) -> dict:
    """A metric's type and arguments, without those that do not change its value."""
    ignored = ('better', 'weights')
    return {
        key: value for key, value in metric.items() if key not in ignored and value is not None and value is not False
    }


def to_csv(run: Run) -> str:
    """One line per dataset and one for the average, each with everything that identifies the run, for joining files."""
    wanted = columns(run)
    facts = {'run': run.name} | provenance(run)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator='\n')
    writer.writerow(['dataset', 'degradation', 'images', *(heading for heading, _, _ in wanted), *facts])
    for part in [*run.sets, average_of(run)]:
        values = [getattr(part, kind).get(metric, '') for _, kind, metric in wanted]
        writer.writerow([part.name, part.degradation, part.count or '', *values, *facts.values()])
    return stream.getvalue()


def to_json(run: Run) -> str:
    """As JSON; infinity and NaN, which JSON does not have, are text."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    average = asdict(average_of(run))
    content = asdict(run) | {'average': {kind: average[kind] for kind in ('restored', 'unrestored')}}
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + '\n'


def write_run(run: Run, folder: str | Path) -> None:
    """Write results.md, results.csv and results.json."""
    for suffix, content in {'md': to_markdown(run), 'csv': to_csv(run), 'json': to_json(run)}.items():
        with replacing(Path(folder) / f'results.{suffix}') as part:
            part.write_text(content, encoding='utf-8')


def read_run(path: str | Path) -> Run:
    """Read the run of a results folder, or of the results.json in one.

    Raises:
        ValueError: naming the file and the place in it: there is no such file, or `write_run` did not write it.
    """
    file = Path(path) / 'results.json' if Path(path).is_dir() else Path(path)
    try:
        with open_regular(file) as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f'larger than {MAX_BYTES} bytes')
        content = json.loads(content.decode())
        if isinstance(content, dict):
            content.pop('average', None)  # recomputed
        run = converted(content, Run, 'the file')
        if not run.metrics:
            raise ValueError('metrics: must not be empty')
        for name, metric in run.metrics.items():
            converted(metric.get('type'), str, f'metrics.{name}.type')
        for index, part in enumerate(run.sets):
            for kind in ('restored', 'unrestored'):
                if unknown := getattr(part, kind).keys() - run.metrics:
                    raise ValueError(f'sets[{index}].{kind}: {min(unknown)!r} is not in metrics')
    except OSError as error:
        raise ValueError(f'{file}: {error.strerror}; it is written by a test with val.metrics') from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file}: not the results.json of a test ({error})') from None
    return run


def converted(value, kind, place: str) -> Any:
    """Convert a value from JSON to a type: str, a number, list, dict or dataclass.

    Raises:
        ValueError: naming the place, if the value is of another type.
    """
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if kind is float and type(value) in (int, str):
        try:
            return float(value)  # infinity and NaN are text
        except (ValueError, OverflowError):
            pass
    wanted = dict if is_dataclass(kind) else origin
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f'{place}: expected {NAMES[wanted]}, got {json.dumps(value)[:60]}')
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        required = [part.name for part in fields(kind) if part.default is part.default_factory is MISSING]
        missing = [name for name in required if name not in value]
        unknown = [name for name in value if name not in kinds]
        if wrong := [f'unknown {name!r}' for name in unknown] + [f'{name} is missing' for name in missing]:
            raise ValueError(f'{place}: {"; ".join(wrong)}')
        inside = '' if place == 'the file' else f'{place}.'
        return kind(**{name: converted(part, kinds[name], inside + name) for name, part in value.items()})
    if origin is list:
        return [converted(part, parts[0], f'{place}[{index}]') for index, part in enumerate(value)]
    if origin is dict and parts:
        for name in value:
            if not isinstance(name, parts[0]):
                raise ValueError(f'{place}: {name!r} must be text: write it in quotes')
        return {name: converted(part, parts[1], f'{place}.{name}') for name, part in value.items()}
    return value


def number(value: float | None, digits: int = 4) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def markdown_table(header: Sequence, rows: Sequence[Sequence]) -> str:
    """A Markdown table; cells are escaped, and all columns except the first are right-aligned."""
    lines = [[escape_markdown(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    aligned = [
        [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ['-' * width if column == 0 else '-' * (width - 1) + ':' for column, width in enumerate(widths)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in [aligned[0], rule, *aligned[1:]])


def escape_markdown(value) -> str:
    """Escape a value as text of a table cell: markup, column and line separators. Underscores inside words are safe."""
    text = ' '.join(str(value).split())
    return re.sub(r'[\\`*\[\]<>|&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])', r'\\\g<0>', text)
