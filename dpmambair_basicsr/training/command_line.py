"""What BasicSR is called with."""

import argparse


def command_line() -> tuple[str | None, list[str]]:
    """The option file and the `--force_yml` entries, as BasicSR's own parser will find them."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('-opt')
    parser.add_argument('--force_yml', nargs='+', default=[])
    arguments, _ = parser.parse_known_args()
    return arguments.opt, arguments.force_yml
