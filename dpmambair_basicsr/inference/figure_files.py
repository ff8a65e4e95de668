"""Write a figure as a table, CSV, and as a drawing, PNG."""

import csv
import importlib
from dataclasses import dataclass
from pathlib import Path

from dpmambair_basicsr.files.atomic import check_file, replacing
from dpmambair_basicsr.files.errors import InputError, MissingLibraryError

Row = dict[str, str | float]


@dataclass
class Figure:
    """
    Args:
        rows: of the table, all with the same columns.
        lines: label -> the rows that the line passes through.
        x: name of a column of numbers, or of text in the order of the rows.
        ys: names of columns, one panel each.
    """

    rows: list[Row]
    lines: dict[str, list[Row]]
    x: str
    ys: list[str]
    title: str


def check_figure(file: Path) -> None:
    """Check up front that the figure can be drawn.

    Raises:
        InputError: the file is not named .png, or cannot be written.
        MissingLibraryError: matplotlib is not installed.
    """
    if file.suffix.lower() != '.png':
        raise InputError(f'{file}: must end in .png; the table is written beside it as .csv')
    check_file(file)
    try:
        importlib.import_module('matplotlib.figure')
    except ImportError as error:
        raise MissingLibraryError(f'figures need matplotlib ({error}); pip install matplotlib') from None


def write_figure(file: Path, figure: Figure) -> None:
    """Write the drawing to `file` and the table beside it, as .csv."""
    from matplotlib import figure as matplotlib_figure

    drawing = matplotlib_figure.Figure(figsize=(9, 3.5 * len(figure.ys)), layout='constrained')
    for y, axes in zip(figure.ys, drawing.subplots(len(figure.ys), sharex=True, squeeze=False)[:, 0], strict=True):
        for label, rows in figure.lines.items():
            axes.plot([row[figure.x] for row in rows], [row[y] for row in rows], marker='o', markersize=3, label=label)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
    axes.set_xlabel(figure.x)
    axes.tick_params(axis='x', labelsize='small', rotation=90 if isinstance(figure.rows[0][figure.x], str) else 0)
    drawing.suptitle(figure.title, fontsize='medium')
    drawing.axes[0].legend(fontsize='small')
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file.with_suffix('.csv')) as part, part.open('w', encoding='utf-8', newline='') as stream:
        writer = csv.DictWriter(stream, list(figure.rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(figure.rows)
    with replacing(file) as part:
        drawing.savefig(part, format='png', dpi=120)
