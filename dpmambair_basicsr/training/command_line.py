"""The command-line arguments of BasicSR's train and test."""

import argparse
import sys
from pathlib import Path

from dpmambair_basicsr.files.option_files import packaged_folder


def command_line() -> tuple[str | None, list[str]]:
    """The option file and the `--force_yml` entries, as BasicSR's own parser will read them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('-opt')
    parser.add_argument('--force_yml', nargs='+', default=[])
    arguments, _ = parser.parse_known_args()
    return arguments.opt, arguments.force_yml


def find_option_file() -> None:
    """Makes `-opt train_dpmambair.yml` use the packaged option file if there is no such file here.

    Only for a name without a folder; a line is printed.
    """
    name, _ = command_line()
    if name is None or Path(name).name != name or Path(name).exists():
        return
    packaged = packaged_folder() / name
    if packaged.is_file():
        print(f'-opt {name}: no such file here; using {packaged}')
        full = {name: str(packaged), f'-opt={name}': f'-opt={packaged}'}
        sys.argv[1:] = [full.get(argument, argument) for argument in sys.argv[1:]]
