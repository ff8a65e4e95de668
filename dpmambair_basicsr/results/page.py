"""The page of `python -m dpmambair_basicsr.report --html`: one self-contained file."""

import base64
import math
import os
from html import escape
from pathlib import Path

import cv2
import numpy as np

from dpmambair_basicsr.files.codec import decode
from dpmambair_basicsr.files.regular import open_regular
from dpmambair_basicsr.results.comparison import Comparison
from dpmambair_basicsr.results.run import Run, provenance

MAX_PAIRS = 24  # image pairs per page
MAX_SIDE = 640  # pixels
LOSSLESS_BYTES = 300_000  # up to this size images are embedded as PNG

STYLE = """
:root { color-scheme: light dark; --line: #8886; --input: #8a8f98; --run: #2f6fde; --published: #d08a1e; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
body { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
.scroll { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
th small { display: block; font-weight: 400; opacity: .75; }
tr.run td { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dd { margin: 0; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; font: 13px system-ui, sans-serif; }
svg .set { font-weight: 600; }
svg .input { fill: var(--input); } svg .run { fill: var(--run); } svg .published { fill: var(--published); }
.sliders { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; }
.pair { position: relative; overflow: hidden; }
.pair img { position: absolute; inset: 0; width: 100%; height: 100%; }
.pair .before { clip-path: inset(0 calc(100% - var(--split)) 0 0); }
.pair::after { content: ''; position: absolute; inset: 0 auto 0 var(--split); width: 2px; background: #fff; }
figure input { width: 100%; margin: .4rem 0 0; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem; }
"""

SCRIPT = """
for (const figure of document.querySelectorAll('figure')) {
  const range = figure.querySelector('input');
  const show = () => {
    figure.style.setProperty('--split', range.value + '%');
    range.setAttribute('aria-valuetext', range.value + ' % degraded, ' + (100 - range.value) + ' % restored');
  };
  range.addEventListener('input', show);
  show();
}
"""


def page(
    comparison: Comparison, folders: dict[str, Path], runs: dict[str, Run], images: list[str] | None, data: list[str]
) -> str:
    """The page's text.

    Args:
        folders, runs: by label.
        data: folders whose pictures may be shown, besides the results; a results.json can name any file.
        images: 'set/image', or None for the first image of each set.

    Raises:
        ValueError: no run has an image of this name.
    """
    figures, notes = sliders(folders, runs, images, data)
    title = 'Restoration results: ' + ', '.join(runs)
    facts = ''.join(
        f'<h3>{escape(label)}</h3><dl>'
        + ''.join(f'<dt>{escape(name)}</dt><dd>{escape(value)}</dd>' for name, value in provenance(run).items())
        + '</dl>'
        for label, run in runs.items()
    )
    shrunk = f'Images larger than {MAX_SIDE} pixels are reduced, with some loss: for viewing, not for measuring.'
    pictures = f'<h2>Degraded and restored</h2><p>{shrunk}</p><div class="sliders">{"".join(figures)}</div>'
    table = html_table(comparison)
    body = f"""<div class="scroll" tabindex="0" role="region" aria-label="table of results">{table}</div>
{''.join(f'<p>{escape(note)}</p>' for note in comparison.notes + notes)}
{bars(comparison)}
{pictures if figures else ''}
<h2>What was tested</h2>
{facts}"""
    return document(title, body)


def document(title: str, body: str) -> str:
    """A self-contained page, with the script of `slider`; the title is text, the body HTML."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<script>{SCRIPT}</script>
</body>
</html>
"""


def html_table(comparison: Comparison) -> str:
    """The table as HTML; the metrics of a cell are stacked."""

    def lines(texts) -> str:
        return '<br>'.join(escape(text) for text in texts)

    columns = comparison.columns()
    head = ''.join(
        f'<th scope="col">{text}</th>' for text in [lines(comparison.metrics), *map(escape, columns.values())]
    )
    body = ''.join(
        f'<tr class="{row.kind}"><th scope="row">{escape(row.label)}<small>{escape(row.source)}</small></th>'
        + ''.join(f'<td>{lines(comparison.numbers(row, key))}</td>' for key in columns)
        + '</tr>'
        for row in comparison.rows
    )
    return f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def bars(comparison: Comparison) -> str:
    """Bars for PSNR, or else the first metric, of degraded images, runs and the papers' own methods, by set."""
    metric = next((name for name, m in comparison.metrics.items() if m['type'] == 'calculate_psnr'), None)
    metric = metric or next(iter(comparison.metrics))
    groups = {
        name: [
            (row, row.cells[key][metric])
            for row in comparison.rows
            if metric in row.cells.get(key, {}) and metric not in row.marks and (row.kind != 'published' or row.own)
        ]
        for key, name in comparison.sets.items()
    }
    values = [float(text) for group in groups.values() for _, text in group]
    longest = max((value for value in values if math.isfinite(value)), default=0)
    kinds = {name: comparison.degradations[key] for key, name in comparison.sets.items()}
    left, width, step, y, parts = 260, 360, 20, 0, []
    for name, group in groups.items():
        y += 26
        heading = f'{name} ({kinds[name]})' if kinds[name] not in ('', name) else name
        parts.append(f'<text x="0" y="{y}" class="set">{escape(heading)}</text>')
        for row, text in group:
            y, value = y + step, float(text)
            label = row.label if row.kind != 'published' else f'{row.label}, {row.source.rpartition(": ")[2]}'
            length = width * value / longest if longest > 0 and math.isfinite(value) and value > 0 else 0
            parts.append(
                f'<g><title>{escape(f"{name}, {label} ({row.source})" if row.source else f"{name}, {label}")}</title>'
                f'<text x="12" y="{y}">{escape(label if len(label) <= 34 else label[:33] + "…")}</text>'
                f'<rect class="{row.kind}" x="{left}" y="{y - 12}" width="{length:.1f}" height="14"/>'
                f'<text x="{left + length + 6:.1f}" y="{y}">{escape(text)}</text></g>'
            )
    label = escape(f'{metric} of each dataset as bars; the numbers are in the table above')
    size = f'viewBox="0 0 {left + width + 70} {y + 10}" width="{left + width + 70}"'
    return f'<h2>{escape(metric)} by dataset</h2><svg {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def sliders(
    folders: dict[str, Path], runs: dict[str, Run], images: list[str] | None, data: list[str]
) -> tuple[list[str], list[str]]:
    """The figures, and notes on images that are missing or not shown."""
    pairs = {}  # {set/image: {label: (degraded, restored)}}
    first = []
    for label, run in runs.items():
        for part in run.sets:
            names = [f'{part.name}/{image}' for image in part.images]
            first += [name for name in names[:1] if name not in first]
            for name, (image, degraded) in zip(names, part.images.items(), strict=True):
                restored = Path('visualization', part.name, f'{image}_{run.suffix}.png')
                files = [Path(os.path.normpath(folders[label] / file)) for file in (degraded, restored)]
                pairs.setdefault(name, {})[label] = files
    for name in images or ():
        if name not in pairs:
            some = ', '.join(list(pairs)[:5])
            raise ValueError(
                f'--image {name}: no run has this image; available: {len(pairs)}, {some}{", ..." * (len(pairs) > 5)}'
            )
    wanted = [(name, label, *files) for name in images or first for label, files in pairs[name].items()]
    figures, notes = [], []
    for name, label, *files in wanted[:MAX_PAIRS]:
        outside = [str(file) for file in files if not may_be_shown(file, folders[label], data)]
        missing = [str(file) for file in files if not file.is_file()]
        if outside:
            known = ' or '.join([str(folders[label]), *data])
            notes.append(f'{name}, {label}: no slider: {outside[0]} is outside {known}; pass its folder as --data.')
        elif missing:
            notes.append(f'{name}, {label}: no slider: {" and ".join(missing)} not found.')
        else:
            figures.append(slider(name, label, *map(read_image, files)))
    if len(wanted) > MAX_PAIRS:
        notes.append(f'{MAX_PAIRS} of {len(wanted)} images are shown; select with --image.')
    return figures, notes


def may_be_shown(file: Path, results: Path, data: list[str]) -> bool:
    """Whether a file is really inside the results, links resolved, or in a folder of `data`, by name."""
    real, absolute = file.resolve(), Path(os.path.abspath(file))
    return any(real.is_relative_to(folder.resolve()) for folder in (results, *map(Path, data))) or any(
        absolute.is_relative_to(os.path.abspath(folder)) for folder in data
    )


def slider(name: str, label: str, degraded: np.ndarray, restored: np.ndarray) -> str:
    height, width = restored.shape[:2]
    what = escape(f'{name}, {label}')
    return (
        f'<figure style="--split: 50%"><div class="pair" style="aspect-ratio: {width} / {height}">'
        f'<img alt="restored: {what}" src="{data_uri(restored)}">'
        f'<img alt="degraded: {what}" src="{data_uri(degraded)}" class="before"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="degraded to restored: {what}">'
        f'<figcaption><span>degraded</span><span>{what}</span><span>restored</span></figcaption></figure>'
    )


def read_image(file: Path) -> np.ndarray:
    """(H, W, 3) BGR uint8."""
    try:
        with open_regular(file) as stream:
            image = decode(stream.read())
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f'{file}: not an image of 8 or 16 bits')
    return image if image.dtype == np.uint8 else np.round(image / 257).astype(np.uint8)


def data_uri(image: np.ndarray) -> str:
    factor = MAX_SIDE / max(image.shape[:2])
    if factor < 1:
        size = [max(1, round(factor * side)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    kind, data = 'png', cv2.imencode('.png', image)[1]
    if len(data) > LOSSLESS_BYTES:
        quality = [cv2.IMWRITE_JPEG_QUALITY, 92]
        kind, data = 'jpeg', cv2.imencode('.jpg', image, quality)[1]
    return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'
