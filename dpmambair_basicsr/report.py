"""Compares tests with each other and with the papers: `python -m dpmambair_basicsr.report results/A results/B`.

Prints one Markdown table with a row for the degraded images, for each run and for each published method on the same
test sets. Your test set is compared with a published one of the same name (see `results.published_tables`), ignoring
case and punctuation: Rain100H, RESIDE-6K, "BSD400 noise". `--html FILE` writes a self-contained page with the table,
bars, and sliders between degraded and restored images.
"""

import argparse
from pathlib import Path

from dpmambair_basicsr.files.atomic import replacing
from dpmambair_basicsr.files.errors import exit_on_error
from dpmambair_basicsr.results.comparison import compare, label_runs, to_markdown


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.report', description=(__doc__ or '').partition('\n')[0]
    )
    parser.add_argument('results', nargs='+', help='results folder of a test, or the results.json in it')
    parser.add_argument('--html', metavar='FILE', help='write a page with table, bars and sliders')
    parser.add_argument(
        '--image', metavar='SET/IMAGE', action='append', help="for the page; repeatable; default: each set's first"
    )
    parser.add_argument(
        '--data',
        metavar='FOLDER',
        action='append',
        help='for the page; repeatable; degraded images are shown from the results and from here; default: datasets',
    )
    arguments = parser.parse_args()
    if (arguments.image or arguments.data) and not arguments.html:
        parser.error('--image and --data are for the page, --html')
    with exit_on_error('dpmambair_basicsr.report', ValueError, OSError):
        runs = label_runs(arguments.results)
        comparison = compare(runs)
        print(to_markdown(comparison))
        if arguments.html:
            from dpmambair_basicsr.results.page import page  # OpenCV is needed for its pictures alone

            folders = [
                Path(path) if Path(path).is_dir() else Path(path).parent for path in dict.fromkeys(arguments.results)
            ]
            data = arguments.data or ['datasets']
            text = page(comparison, dict(zip(runs, folders, strict=True)), runs, arguments.image, data)
            with replacing(arguments.html) as part:
                part.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
