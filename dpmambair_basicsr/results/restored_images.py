"""Report what `restore` did with each image: a table (CSV, JSON) and a self-contained page with sliders."""

import csv
import io
import json
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path

import cv2
import numpy as np

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.pictures import read_pictures
from dpmambair_basicsr.files.videos import VIDEOS, read_frames
from dpmambair_basicsr.results.page import MAX_PAIRS, data_uri, document, slider

SURE = 0.6  # below this probability of the first class, the page calls it unsure
RESTORED, LEFT, NOT_TRIED = 'restored', 'left unchanged', 'not tried'  # actions
DISAGREEMENT = 4 / 255  # mean difference of eight flips over an image above which the page warns


@dataclass(frozen=True)
class RestoredImage:
    """A row of the table.

    Attributes:
        image, result: files; result is None after a failure.
        action: 'restored', 'left unchanged', 'not tried' or 'failed: ...'.
        seconds: including reading and writing.
        notes: text for users: size, tiles, seconds, what the result does not keep.
        found, probability, second, second_probability: the two most probable classes; None without a classifier.
        distance, familiar: see `inference.degradation_classifier.Finding`.
        found_after, probability_after: the most probable class of the result, if it was classified.
        spread: mean standard deviation of eight flips, in [0, 1]; None without --self-ensemble.
        spread_map: the standard deviations, (H, W), not in the table.
    """

    image: str
    result: str | None
    action: str
    seconds: float
    notes: str = ''
    found: str | None = None
    probability: float | None = None
    second: str | None = None
    second_probability: float | None = None
    distance: float | None = None
    familiar: bool | None = None
    found_after: str | None = None
    probability_after: float | None = None
    spread: float | None = None
    spread_map: np.ndarray | None = None

    def columns(self) -> dict:
        return {name: getattr(self, name) for name in COLUMNS}

    def line(self) -> str:
        """Text for users: photo.jpg: rain 0.91 (snow 0.06), restored, 320 x 240, 1.8 s."""
        found = '' if self.found is None else f'{self.findings()}, {self.action}, '
        return f'{self.image}: {found}{self.notes}'

    def findings(self) -> str:
        text = f'{self.found} {self.probability:.2f} ({self.second} {self.second_probability:.2f})'
        return text if self.familiar else f'{text}, unlike the training images'


COLUMNS = [field.name for field in fields(RestoredImage) if field.name != 'spread_map']


def write_table(file: Path, images: list[RestoredImage]) -> None:
    rows = [image.columns() for image in images]
    if file.suffix == '.json':
        text = json.dumps(rows, indent=1, ensure_ascii=False) + '\n'
    else:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    write_text(file, text)


def write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(text, encoding='utf-8', errors='surrogateescape')


def page(images: list[RestoredImage], weights: str) -> str:
    """The page's text; the first `MAX_PAIRS` images have sliders."""
    done = [image for image in images if image.result is not None]
    figures = ''.join(figure(image) for image in done[:MAX_PAIRS])
    notes = [f'{MAX_PAIRS} of {len(done)} images have a slider.'] if len(done) > MAX_PAIRS else []
    if all(image.spread is None for image in images):
        notes.append('With --self-ensemble, each image has a map of where the results of eight flips differ.')
    summary = [f'{sum(image.action == action for image in images)} {action}' for action in (RESTORED, LEFT)]
    summary.append(f'{len(images) - len(done)} failed or not tried')
    notes.append(
        'The degradation found is a guess of a classifier, and so is whether restoring helped: there is no clean '
        'original to compare with. Do not use restored images to measure, diagnose or identify.'
    )
    body = (
        f'<p>{escape(", ".join(summary))}, with {escape(weights)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="table of images">{html_table(images)}</div>'
        + ''.join(f'<p>{escape(note)}</p>' for note in notes)
        + f'<h2>Before and after</h2><div class="sliders">{figures}</div>'
    )
    return document('Restored images', body)


def html_table(images: list[RestoredImage]) -> str:
    head = ''.join(f'<th scope="col">{text}</th>' for text in ('', 'found', 'done', 'result', 'seconds'))
    rows = ''.join(
        f'<tr><th scope="row">{escape(image.image)}</th><td>{escape(image.findings() if image.found else "")}</td>'
        f'<td>{escape(image.action)}</td><td>{escape(after(image))}</td><td>{image.seconds:.1f}</td></tr>'
        for image in images
    )
    return f'<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def after(image: RestoredImage) -> str:
    return '' if image.found_after is None else f'{image.found_after} {image.probability_after:.2f}'


def figure(image: RestoredImage) -> str:
    before, restored = (read_bgr(Path(file)) for file in (image.image, image.result))
    parts = [slider(Path(image.image).name, image.action, before, restored)]
    parts += [f'<p>{escape(text)}</p>' for text in judgement(image)]
    if image.spread_map is not None:
        uri = data_uri(heat(image.spread_map))
        alt = escape(f'where eight flips disagree: {Path(image.image).name}')
        parts.append(f'<p>Where eight flips disagree; white: {8 * DISAGREEMENT * 255:.0f}/255 or more</p>')
        parts.append(f'<img class="map" alt="{alt}" src="{uri}" style="width: 100%">')
    return f'<section>{"".join(parts)}</section>'


def judgement(image: RestoredImage) -> list[str]:
    """Sentences: what is wrong with the image, whether restoring helped, and reasons not to trust the result."""
    texts = []
    if image.found is not None:
        texts.append(f'Found: {image.findings()}.')
        if image.probability < SURE:
            texts.append('Unsure what is wrong: compare before you use it.')
        if not image.familiar:
            texts.append('Do not trust the result: this image is less like the training data than 99% of that data.')
    if image.found_after is not None:
        helped = {
            'clean': 'according to the classifier, restoring helped',
            image.found: 'according to the classifier, restoring did not help, or not enough',
        }.get(image.found_after, 'the classifier now finds something else')
        texts.append(f'The result looks {after(image)}: {helped}.')
    if image.spread is not None:
        doubt = 'more than usual: details may be invented' if image.spread > DISAGREEMENT else 'little'
        texts.append(f'The results of eight flips differ by {255 * image.spread:.1f}/255 on average, {doubt}.')
    return texts


def heat(spread: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] -> BGR uint8, black at 0 to white at 8 times `DISAGREEMENT`."""
    grey = np.uint8(255 * np.clip(spread / (8 * DISAGREEMENT), 0, 1))
    return cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO)


def read_bgr(file: Path) -> np.ndarray:
    """The first frame or page, (H, W, 3) uint8, upright."""
    is_video = file.suffix.lower() in VIDEOS
    image = next(read_frames(file)).image if is_video else read_pictures(file)[0][0].image
    return cv2.cvtColor(image if image.dtype == np.uint8 else np.uint8(image // 257), cv2.COLOR_RGB2BGR)
