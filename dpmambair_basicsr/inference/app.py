"""A page in your browser that restores the picture you drop on it: `dpmambair app`.

It shows what it finds in the picture, lets you choose what to undo and how much, compares before and after, and offers
the result as a file. Pictures stay on this machine: the page is served locally only and fetches nothing from elsewhere.
Its temporary files are deleted on exit.
"""

import argparse
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import cv2

from dpmambair_basicsr.files.errors import exit_on_error
from dpmambair_basicsr.files.pictures import check_format, read_picture, restored_picture, write_picture
from dpmambair_basicsr.inference.restorer import load

AS_FOUND = 'what is found'


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes the folder then too
    with (
        exit_on_error('dpmambair app', ValueError, OSError),
        tempfile.TemporaryDirectory(prefix='dpmambair_', ignore_cleanup_errors=True) as folder,
    ):
        os.environ['GRADIO_TEMP_DIR'] = folder  # read on import: where it copies the pictures to
        gradio = import_gradio()
        restorer = load(arguments.weights, device=arguments.device)
        page = build(gradio, restorer, folder)
        page.queue(default_concurrency_limit=1)  # one picture at a time, to bound the memory
        look = {'theme': gradio.themes.Default(font='system-ui', font_mono='monospace'), 'footer_links': []}
        page.launch(
            server_name='127.0.0.1',
            server_port=arguments.port or free_port(),
            inbrowser=not arguments.no_browser,
            **look,
        )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='dpmambair app', description=__doc__.partition('\n\n')[2])
    add = parser.add_argument
    add('-w', '--weights', metavar='FILE', help='checkpoint; default: the bundled weights')
    add('--device', default='auto', help='auto, cpu, mps, cuda or cuda:<n>; default: %(default)s')
    add('--port', type=int, default=7860, help='0: any free port; default: %(default)s')
    add('--no-browser', action='store_true', help='only print the address')
    arguments = parser.parse_args()
    if not 0 <= arguments.port <= 65535:
        parser.error('--port: must be from 0 to 65535')
    return arguments


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as server:  # gradio does not support port 0
        return server.getsockname()[1]


def import_gradio():
    """Raises ValueError naming the extra."""
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')  # read on import
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"needs gradio ({error}); pip install gradio, or the extra 'app'") from None
    return gradio


def build(gradio, restorer, folder: str):
    """The page, a `gradio.Blocks`; its pictures are written to sub-folders of `folder`."""
    kinds = [] if restorer.classifier is None else [name for name in restorer.classifier.names if name != 'clean']
    with gradio.Blocks(title='dpmambair', analytics_enabled=False) as page:
        gradio.Markdown('# Restore a picture\nWhat it finds is a guess, and results are not evidence: compare.')
        with gradio.Row():
            with gradio.Column(scale=1):
                source = gradio.File(label='Picture', type='filepath', file_types=['image'], elem_id='source')
                found = gradio.Label(label='Found', num_top_classes=3, visible=bool(kinds), elem_id='found')
                kind = gradio.Dropdown([AS_FOUND, *kinds], value=AS_FOUND, label='Undo', elem_id='kind')
                strength = gradio.Slider(0, 1, value=1, step=0.05, label='Strength', elem_id='strength')
                start = gradio.Button('Restore', variant='primary', elem_id='restore')
            with gradio.Column(scale=2):
                slider = gradio.ImageSlider(label='Before and after', type='filepath', format='png', elem_id='slider')
                note = gradio.Markdown(elem_id='note')
                download = gradio.DownloadButton('Download', interactive=False, elem_id='download')

        def look(path: str | None):
            return None if path is None else find(gradio, restorer, path)

        def act(path: str | None, chosen: str, amount: float):
            if path is None:
                raise gradio.Error('Choose a picture first.')
            before, after, file, text = restore(gradio, restorer, Path(path), chosen, amount, folder)
            return (before, after), text, gradio.DownloadButton(value=file, interactive=True)

        source.change(look, source, found)
        start.click(act, [source, kind, strength], [slider, note, download])
    return page


def find(gradio, restorer, path: str) -> dict[str, float] | None:
    """The probabilities of the degradations in a picture, for the page."""
    try:
        finding = restorer.find(read_picture(Path(path)).visible_image())
    except (OSError, ValueError) as error:
        raise gradio.Error(str(error)) from None
    return None if finding is None else finding.probabilities


def restore(gradio, restorer, path: Path, kind: str, strength: float, parent: str) -> tuple[str, str, str, str]:
    """The picture and its restoration as PNG for the page, the result in the format of the picture, a note."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    result = folder / f'{path.stem}_restored{path.suffix}'
    try:
        picture = read_picture(path)
        check_format(result, [picture])
        seen = picture.visible_image()
        finding = restorer.find(seen)
        by_kind = kind != AS_FOUND
        embedding = restorer.classifier.embedding_of(kind) if by_kind else restorer.embedding_for(seen, finding)
        image = restorer.restore(seen, strength=strength, embedding=embedding)
        write_picture(result, restored_picture(picture, image))
        for name, shown in {'before.png': picture.image, 'after.png': image}.items():
            write_picture(folder / name, restored_picture(picture, shown))
    except (OSError, ValueError, MemoryError, RuntimeError, cv2.error) as error:
        raise gradio.Error(f'{path.name}: {error}') from None
    notes = [f'Done: {result.name}.']
    if finding is not None and finding.is_clean:
        notes.append('**The picture looks clean: restoring may make it worse.**')
    if finding is not None and not finding.familiar:
        notes.append('**The picture is unlike the training data: do not trust the result.**')
    return str(folder / 'before.png'), str(folder / 'after.png'), str(result), ' '.join(notes)


if __name__ == '__main__':
    sys.exit(main())
