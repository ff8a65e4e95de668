"""Run benchmarks/scan.py and network.py on the GPU, and write their tables into docs/benchmarks.md.

    python benchmarks/gpu.py                     # minutes; bash scripts/gpu_check.sh runs the tests first

The tables, with the date, the GPU and the versions, replace everything between two marker lines of that page. Nothing
is written if a benchmark fails.
"""

import argparse
import datetime
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dpmambair_basicsr.files.atomic import replacing

HERE = Path(__file__).parent
PAGE = HERE.parent / 'docs/benchmarks.md'
BEGIN, END = '<!-- gpu_check begin -->\n', '<!-- gpu_check end -->\n'
SCAN = ['scan.py', '--device', 'cuda', '--repeats', '9', '--tables']
NETWORK = ['network.py', '--devices', 'cuda', '--repeats', '5']
# {heading: command}
BENCHMARKS = {
    'The selective scan': [*SCAN, 'backends'],
    'The selective scan in bf16': [*SCAN, 'backends', '--dtype', 'bfloat16'],
    'The omni scan': [*SCAN, 'omni', '--images', '1x96x256x256', '1x48x256x256', '8x96x128x128', '1x96x64x64'],
    'Networks, inference': NETWORK,
    'Networks, a training step': [*NETWORK, '--train', '--batch', '8', '--size', '128'],
    'Networks as CUDA graphs, inference': [*NETWORK, '--versus', 'cuda_graph', 'off', 'on'],
    'Networks as CUDA graphs, a training step': [
        *(*NETWORK, '--train', '--batch', '8', '--size', '128'),
        *('--versus', 'cuda_graph', 'off', 'on'),
    ],
    'A training step in fp32 and bf16': [
        *(*NETWORK, '--networks', 'DPMambaIR', '--train', '--batch', '8', '--size', '128'),
        *('--versus', 'amp', 'off', 'bf16'),
    ],
}
PACKAGES = ('torch', 'cuda-bindings', 'nvidia-cuda-nvrtc', 'mamba-ssm', 'mambapy')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--restormer', type=Path, metavar='FILE', help='restormer_arch.py, to time Restormer too')
    parser.add_argument('--page', type=Path, default=PAGE, help='page to write to (default: docs/benchmarks.md)')
    arguments = parser.parse_args()
    parts(arguments.page)
    extra = ['--restormer', str(arguments.restormer)] if arguments.restormer else []
    texts = [where()]
    for heading, command in BENCHMARKS.items():
        print(f'{heading}: {" ".join(command)}', flush=True)
        more = extra if command[0] == 'network.py' and '--versus' not in command else []
        texts.append(f'**{heading}**, `{" ".join(command)}`\n\n{run([*command, *more])}')
    write(arguments.page, '\n\n'.join(texts))
    print(f'wrote {arguments.page}')


def run(command: list[str]) -> str:
    """Run a benchmark and return its output."""
    done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f'{command[0]} failed, see above; nothing was written')
    return done.stdout.strip()


def where() -> str:
    """The date, the GPU and the versions."""
    found = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found.append(f'{package} {version(package)}')
    gpu = torch.cuda.get_device_name()
    return f'{datetime.date.today()}, {gpu}, CUDA {torch.version.cuda}, {", ".join(found)}.'


def parts(page: Path) -> tuple[str, str]:
    """The text before and after the tables."""
    text = page.read_text(encoding='utf-8')
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f'{page}: expected one line {BEGIN.strip()} followed by one {END.strip()}')
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def write(page: Path, tables: str) -> None:
    """Write the page with these tables."""
    before, behind = parts(page)
    with replacing(page) as part:
        part.write_text(f'{before}{BEGIN}{tables}\n{END}{behind}', encoding='utf-8')


if __name__ == '__main__':
    main()
