"""One table that compares several tests with each other and with the papers."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from dpmambair_basicsr.results.published_tables import MARKS, TABLES, PublishedTable
from dpmambair_basicsr.results.run import (
    Run,
    describe_metric,
    escape_markdown,
    markdown_table,
    mean,
    number,
    read_run,
    settings_of,
)

DIGITS = {'calculate_psnr': 2, 'calculate_ssim': 3}  # as in the papers; results.json has all digits
AVERAGE = ''  # in place of a set's key


@dataclass
class Row:
    """A line of the table.

    Args:
        kind: input, run or published.
        cells: {key of the set, or AVERAGE: {metric: number as text}}.
        own: whether a published row is the paper's own method.
        marks: {metric: mark} of numbers not measured like the runs', see `published_tables.MARKS`. Marked numbers are
            shown but not compared: they are in no bar, and in no average except that of their own row.
    """

    label: str
    kind: str
    source: str
    cells: dict[str, dict[str, str]]
    own: bool = False
    marks: dict[str, str] = field(default_factory=dict)

    def text(self, key: str, metric: str) -> str:
        """A number with its mark, or a dash."""
        number = self.cells[key].get(metric, '-')
        return f'{number} ({self.marks[metric]})' if metric in self.marks and number != '-' else number


@dataclass
class Comparison:
    """
    Args:
        metrics: {name: type and arguments}.
        sets: {key: name}.
        degradations: {key: degradation of the set's images}; '' if unknown or mixed.
    """

    metrics: dict[str, dict]
    sets: dict[str, str]
    degradations: dict[str, str]
    rows: list[Row]
    notes: list[str]

    def columns(self) -> dict[str, str]:
        """{key: heading}"""
        return {**self.sets, AVERAGE: 'average'} if len(self.sets) > 1 else self.sets

    def numbers(self, row: Row, key: str) -> list[str]:
        """The content of a cell: one number per metric, or a single dash."""
        return [row.text(key, metric) for metric in self.metrics] if row.cells.get(key) else ['-']


def key_of(name: str) -> str:
    """The part of a dataset's name that is compared: without case and punctuation."""
    return re.sub(r'[\W_]', '', name.lower()) or name


def compare(runs: dict[str, Run]) -> Comparison:
    """One table of the runs, {label: run}.

    Raises:
        ValueError: runs measure a metric in different ways.
    """
    metrics, measured_by, sets, degradations = {}, {}, {}, {}
    for label, run in runs.items():
        for name, metric in run.metrics.items():
            other = metrics.setdefault(name, metric)
            if settings_of(other) != settings_of(metric):
                ways = f'{describe_metric(other)} in {measured_by[name]}, {describe_metric(metric)} in {label}'
                raise ValueError(f'{name} is measured in two ways: {ways}; these runs cannot share a table')
            measured_by.setdefault(name, label)
        for part in run.sets:
            sets.setdefault(key_of(part.name), part.name)
            degradations.setdefault(key_of(part.name), part.degradation)
    comparison = Comparison(metrics, sets, degradations, [], [])
    unrestored = input_values(runs, comparison)
    if unrestored:
        comparison.rows.append(Row('degraded image', 'input', '', cells(comparison, unrestored)))
    for label, run in runs.items():
        values = {key_of(part.name): part.restored for part in run.sets}
        network = f'{Path(run.checkpoint).name} {run.sha256[:8]}' if run.checkpoint else 'no checkpoint'
        comparison.rows.append(Row(label, 'run', f'{Path(run.options).name}, {network}', cells(comparison, values)))
    for table in TABLES:
        add_published(comparison, table)
    return comparison


def input_values(runs: dict[str, Run], comparison: Comparison) -> dict[str, dict[str, float]]:
    """{key of the set: {metric: value of the degraded images}}. Adds a note where runs disagree on them."""
    values, counts = {}, {}
    for run in runs.values():
        for part in run.sets:
            key = key_of(part.name)
            known = values.setdefault(key, part.unrestored)
            same = all(
                known[metric] == value or math.isclose(known[metric], value, rel_tol=1e-6)
                for metric, value in part.unrestored.items()
                if metric in known
            )
            if not same or counts.setdefault(key, part.count) != part.count:
                note = f'{part.name}: the runs were not tested on the same images; do not compare them.'
                comparison.notes += [note] * (note not in comparison.notes)
    return {key: numbers for key, numbers in values.items() if numbers}


def cells(comparison: Comparison, values: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    """Numbers as text, with the average if every set of the table has a value."""
    every = [values.get(key, {}) for key in comparison.sets]
    digits = {name: DIGITS.get(metric['type'], 4) for name, metric in comparison.metrics.items()}
    return {
        key: {metric: number(value, digits[metric]) for metric, value in numbers.items()}
        for key, numbers in {**values, AVERAGE: mean(every)}.items()
    }


def add_published(comparison: Comparison, table: PublishedTable) -> None:
    """Add the rows of a published table, for the sets and metrics that it shares with the runs."""
    keys = {key_of(name): name for name in table.sets if key_of(name) in comparison.sets}
    if not keys:
        return
    common = {name: metric for name, metric in comparison.metrics.items() if metric['type'] in table.settings}
    others = [name for name, metric in common.items() if not is_measured_with(metric, table.settings[metric['type']])]
    if others:
        ways = '; '.join(
            f'{name} with {argument} {value}'
            for name in others
            for argument, value in table.settings[common.pop(name)['type']].items()
        )
        comparison.notes.append(f'{table.source}: metrics measured in another way were left out: {ways}.')
    if not common:
        return
    rows = table.rows()
    for method, printed in rows.items():
        texts = {
            key: {name: printed[column][metric['type']] for name, metric in common.items()}
            for key, column in keys.items()
        }
        values = {key: {name: float(text) for name, text in numbers.items()} for key, numbers in texts.items()}
        marks = {name: mark for name, metric in common.items() if (mark := table.marks_of(method).get(metric['type']))}
        own = method == list(rows)[-1]
        comparison.rows.append(Row(method, 'published', table.source, cells(comparison, values) | texts, own, marks))
        notes = [f'{mark}: {MARKS[mark]}.' for mark in dict.fromkeys(marks.values())]
        comparison.notes += [note for note in notes if note not in comparison.notes]


def is_measured_with(metric: dict, arguments: dict) -> bool:
    defaults = {'test_y_channel': False, 'net': 'alex', 'crop_border': 0}  # of BasicSR's PSNR and SSIM, and our LPIPS
    return all(metric.get(name, defaults[name]) == value for name, value in arguments.items())


def label_runs(paths: list[str]) -> dict[str, Run]:
    """{label: run}; the label is the run's name, with its folder if the name is not unique."""
    runs = [(path, read_run(path)) for path in dict.fromkeys(paths)]
    names = [run.name for _, run in runs]
    return {run.name if names.count(run.name) == 1 else f'{run.name} ({path})': run for path, run in runs}


def to_markdown(comparison: Comparison) -> str:
    columns = comparison.columns()
    heading = [' / '.join(comparison.metrics), *columns.values(), 'source']
    rows = [
        [row.label, *(' / '.join(comparison.numbers(row, key)) for key in columns), row.source]
        for row in comparison.rows
    ]
    notes = ''.join(f'\n- {escape_markdown(note)}' for note in comparison.notes)
    return markdown_table(heading, rows) + ('\n' + notes if notes else '')
