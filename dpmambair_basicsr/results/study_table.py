"""The table of a study: variants against a baseline over seeds, as Markdown, CSV, JSON, a drawing and a page."""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.errors import InputError
from dpmambair_basicsr.results.comparison import DIGITS
from dpmambair_basicsr.results.page import document, sliders
from dpmambair_basicsr.results.run import (
    Run,
    average_of,
    describe_metric,
    escape_markdown,
    markdown_table,
    number,
    settings_of,
)
from dpmambair_basicsr.results.statistics import Difference, paired_difference, spread

AVERAGE = 'average'  # over the test sets, with equal weights
NOTE = (
    'Differences are paired by seed; in brackets, their 95% t confidence interval, which assumes normally distributed '
    'differences and is not corrected for multiple comparisons. Where it includes 0, this study is inconclusive.'
)


@dataclass(frozen=True)
class Trial:
    """One training and its test.

    Args:
        parameters: number of the network's parameters.
        seconds: per training iteration, mean over the run's last process.
    """

    variant: str
    seed: int
    folder: Path
    run: Run
    parameters: int
    seconds: float


@dataclass
class Row:
    """A variant, a test set or the average over them, and a metric.

    Args:
        values: by seed.
        difference: from the baseline, over the seeds that both have; None for the baseline itself, or without a pair.
    """

    variant: str
    set: str
    metric: str
    values: dict[int, float]
    difference: Difference | None = None

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def sd(self) -> float:
        return spread([*self.values.values()])

    def text(self, digits: int) -> str:
        """The mean as text, 23.456 ± 0.123."""
        sd = '' if math.isnan(self.sd) else f' ± {number(self.sd, digits)}'
        return f'{number(self.mean, digits)}{sd}'

    def difference_text(self, digits: int) -> str:
        if self.difference is None:
            return ''
        mean, low, high = (f'{value:+.{digits}f}' for value in asdict(self.difference).values())
        if mean == '+nan':
            return '(not finite)'
        return f'{mean} (one seed)' if low == '+nan' else f'{mean} [{low}, {high}]'


@dataclass
class StudyTable:
    """
    Args:
        baseline: a variant.
        variants: all of them, in order.
        wanted: number of trials of the study.
        rows: for variants with a trial only.
        inputs: {(set, metric): value of the unrestored images}.
    """

    name: str
    baseline: str
    variants: list[str]
    wanted: int
    trials: list[Trial]
    rows: list[Row] = field(default_factory=list)
    inputs: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, dict]:
        return self.trials[0].run.metrics

    @property
    def sets(self) -> list[str]:
        names = [part.name for part in self.trials[0].run.sets]
        return [AVERAGE, *names] if len(names) > 1 else names

    def row(self, variant: str, set_name: str, metric: str) -> Row | None:
        wanted = variant, set_name, metric
        return next((row for row in self.rows if (row.variant, row.set, row.metric) == wanted), None)

    def digits(self, metric: str) -> int:
        """One digit more than in the papers, since differences are small."""
        return DIGITS.get(self.metrics[metric]['type'], 4) + 1


def tabulate(name: str, baseline: str, variants: list[str], wanted: int, trials: list[Trial]) -> StudyTable:
    """The table of the finished trials.

    Raises:
        InputError: there are none, or two were measured in different ways or on different images.
    """
    if not trials:
        raise InputError(f'{name}: no trial has finished yet')
    for trial in trials:
        check_comparable(trials[0], trial)
    table = StudyTable(name, baseline, variants, wanted, trials)
    values = {}
    for trial in trials:
        average = average_of(trial.run)
        for part in [*trial.run.sets, average]:
            for metric, value in part.restored.items():
                values.setdefault((trial.variant, part.name, metric), {})[trial.seed] = value
                if metric in part.unrestored:
                    table.inputs[part.name, metric] = part.unrestored[metric]
    for variant in variants:
        for set_name in table.sets:
            for metric in table.metrics:
                if own := values.get((variant, set_name, metric)):
                    other = values.get((baseline, set_name, metric), {})
                    table.rows.append(
                        Row(variant, set_name, metric, own, difference_of(own, other, variant == baseline))
                    )
    return table


def difference_of(own: dict[int, float], other: dict[int, float], is_baseline: bool) -> Difference | None:
    seeds = [seed for seed in own if seed in other]
    if is_baseline or not seeds:
        return None
    return paired_difference([own[seed] for seed in seeds], [other[seed] for seed in seeds])


def check_comparable(first: Trial, trial: Trial) -> None:
    """Raise InputError, naming both folders and what differs, unless two trials are comparable."""
    ways = [{name: settings_of(metric) for name, metric in each.run.metrics.items()} for each in (first, trial)]
    images = [{part.name: part.hashes or [*part.images] for part in each.run.sets} for each in (first, trial)]
    for what, (one, other) in {'metrics': ways, 'test images': images}.items():
        if one != other:
            raise InputError(f'{first.folder} and {trial.folder} have different {what}: they cannot share a table')


Grid = tuple[str, list[str], list[list[str]]]  # heading, header, lines


def grids(table: StudyTable) -> list[Grid]:
    """The main table and, for several test sets, one table per metric with a column per set."""
    first = table.sets[0]
    columns = [text for metric in table.metrics for text in (metric, f'{metric} - {table.baseline}')]
    found = [(first, ['', 'seeds', 'parameters', 's/iteration', *columns], main_lines(table, first))]
    for metric in table.metrics if len(table.sets) > 1 else ():
        sets = table.sets[1:]
        lines = [[variant, *(cell(table, variant, name, metric) for name in sets)] for variant in done(table)]
        found.append((f'{metric}: the baseline, and differences from it', ['', *sets], lines))
    return found


def main_lines(table: StudyTable, set_name: str) -> list[list[str]]:
    lines = []
    if table.inputs:
        values = [table.inputs.get((set_name, metric)) for metric in table.metrics]
        texts = [(number(value, table.digits(metric)), '') for metric, value in zip(table.metrics, values, strict=True)]
        lines.append(['degraded image', '', '', '', *(text for pair in texts for text in pair)])
    for variant in done(table):
        own = [trial for trial in table.trials if trial.variant == variant]
        rows = {metric: table.row(variant, set_name, metric) for metric in table.metrics}
        texts = [
            (row.text(table.digits(metric)), row.difference_text(table.digits(metric))) if row else ('-', '-')
            for metric, row in rows.items()
        ]
        seconds = median(trial.seconds for trial in own)
        facts = [str(len(own)), f'{own[0].parameters:,}', f'{seconds:.3f}']
        lines.append([variant, *facts, *(text for pair in texts for text in pair)])
    return lines


def done(table: StudyTable) -> list[str]:
    """Variants with a trial."""
    return [variant for variant in table.variants if any(trial.variant == variant for trial in table.trials)]


def cell(table: StudyTable, variant: str, set_name: str, metric: str) -> str:
    row, digits = table.row(variant, set_name, metric), table.digits(metric)
    return '-' if row is None else row.text(digits) if variant == table.baseline else row.difference_text(digits)


def facts(table: StudyTable) -> dict[str, str]:
    """Metrics, versions, devices and number of trials."""
    run = table.trials[0].run
    measures = '; '.join(f'{name} {describe_metric(metric)}' for name, metric in run.metrics.items())
    unique = {
        'versions': {', '.join(f'{name} {version}' for name, version in t.run.versions.items()) for t in table.trials},
        'devices': {trial.run.device or 'not recorded' for trial in table.trials},
    }
    return {
        'trials': f'{len(table.trials)} of {table.wanted} finished',
        'baseline': table.baseline,
        'metrics': measures,
        **{name: '; '.join(sorted(values)) for name, values in unique.items()},
    }


def to_markdown(table: StudyTable) -> str:
    (_, header, lines), *others = grids(table)
    parts = [f'# {escape_markdown(table.name)}', markdown_table(header, lines), NOTE]
    for heading, header, lines in others:
        parts += [f'## {escape_markdown(heading)}', markdown_table(header, lines)]
    parts.append('\n'.join(f'- {name}: {escape_markdown(value)}' for name, value in facts(table).items()))
    return '\n\n'.join(parts) + '\n'


def to_csv(table: StudyTable) -> str:
    """One line per variant, test set and metric."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator='\n')
    names = ['variant', 'set', 'metric', 'seeds', 'mean', 'sd', 'difference', 'low', 'high']
    writer.writerow([*names, *facts(table)])
    for row in table.rows:
        difference = ['', '', ''] if row.difference is None else [*asdict(row.difference).values()]
        values = [row.variant, row.set, row.metric, len(row.values), row.mean, row.sd, *difference]
        writer.writerow([*values, *facts(table).values()])
    return stream.getvalue()


def to_json(table: StudyTable) -> str:
    """As JSON, with the value of every seed. What is not finite is null."""
    rows = [
        asdict(row) | {'mean': row.mean, 'sd': row.sd, 'values': {str(seed): row.values[seed] for seed in row.values}}
        for row in table.rows
    ]
    content = {
        'name': table.name,
        'facts': facts(table),
        'rows': rows,
        'inputs': [{'set': name, 'metric': metric, 'value': value} for (name, metric), value in table.inputs.items()],
        'trials': [
            {'variant': trial.variant, 'seed': trial.seed, 'parameters': trial.parameters, 'sha256': trial.run.sha256}
            for trial in table.trials
        ],
    }
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + '\n'


def plain(value):
    """Replace NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(table: StudyTable) -> bytes:
    """PNG: for each metric, the value of every seed and, beside it, the differences with their intervals."""
    from matplotlib.figure import Figure

    variants, first = done(table)[::-1], table.sets[0]
    height = 1.2 + 0.35 * len(variants) * len(table.metrics)
    figure = Figure(figsize=(10, height), layout='constrained')
    panels = figure.subplots(len(table.metrics), 2, sharey=True, squeeze=False)
    for (values, differences), metric in zip(panels, table.metrics, strict=True):
        for position, variant in enumerate(variants):
            row = table.row(variant, first, metric)
            if row is None:
                continue
            values.plot([*row.values.values()], [position] * len(row.values), 'o', color='C0', alpha=0.5)
            values.plot(row.mean, position, '|', color='C0', markersize=14)
            if row.difference is not None:
                mean, low, high = asdict(row.difference).values()
                error = None if math.isnan(low) else [[mean - low], [high - mean]]
                differences.errorbar(mean, position, xerr=error, fmt='o', color='C1', capsize=3)
        values.set_yticks(range(len(variants)), variants)
        values.set_ylim(-0.6, len(variants) - 0.4)
        values.set_xlabel(f'{metric}, {first}; one dot per seed')
        differences.set_xlabel(f'{metric} - {table.baseline}, 95% interval')
        differences.axvline(0, color='0.5', linewidth=1)
        for axes in (values, differences):
            axes.locator_params(axis='x', nbins=5)  # so that labels do not overlap
    stream = io.BytesIO()
    figure.savefig(stream, format='png', dpi=110)
    return stream.getvalue()


def page(table: StudyTable, drawing: bytes, data: Sequence[str] = ('datasets',)) -> str:
    """The text of a self-contained page; sliders show the first trial of each variant.

    Args:
        data: folders from which degraded images may be shown, besides the results.
    """
    firsts = {variant: next(t for t in table.trials if t.variant == variant) for variant in done(table)}
    folders = {variant: trial.folder for variant, trial in firsts.items()}
    runs = {variant: trial.run for variant, trial in firsts.items()}
    figures, notes = sliders(folders, runs, None, list(data))
    uri = f'data:image/png;base64,{base64.b64encode(drawing).decode()}'
    parts = [html_table(*grid) for grid in grids(table)]
    parts.insert(
        1, f'<p>{escape(NOTE)}</p><img alt="values and differences, as in the table" src="{uri}" width="100%">'
    )
    parts += [f'<p>{escape(note)}</p>' for note in notes]
    parts += [f'<h2>Degraded and restored</h2><div class="sliders">{"".join(figures)}</div>'] if figures else []
    listed = ''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in facts(table).items())
    return document(f'Study: {table.name}', f'{"".join(parts)}<h2>What was run</h2><dl>{listed}</dl>')


def html_table(heading: str, header: list[str], lines: list[list[str]]) -> str:
    head = ''.join(f'<th scope="col">{escape(text)}</th>' for text in header)
    body = ''.join(
        f'<tr><th scope="row">{escape(label)}</th>' + ''.join(f'<td>{escape(text)}</td>' for text in cells) + '</tr>'
        for label, *cells in lines
    )
    table = f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    label = escape(heading)
    return f'<h2>{label}</h2><div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def write_table(table: StudyTable, folder: Path) -> None:
    """Write study.md, .csv, .json, .png and .html, each atomically."""
    drawing = draw(table)
    texts = {'md': to_markdown(table), 'csv': to_csv(table), 'json': to_json(table), 'html': page(table, drawing)}
    contents = {suffix: text.encode() for suffix, text in texts.items()} | {'png': drawing}
    for suffix, content in contents.items():
        with replacing(folder / f'study.{suffix}') as part:
            part.write_bytes(content)
