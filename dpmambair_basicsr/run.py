"""Run another project's script where mamba_ssm, causal_conv1d or VMamba's CUDA extensions are missing.

    python -m dpmambair_basicsr.run train.py --its --own arguments
    python -m dpmambair_basicsr.run -m package.train --its --own arguments

The script is not changed. Missing modules are imported from `dpmambair_basicsr.standins`.
"""

import argparse
import importlib.util
import os
import runpy
import sys

from dpmambair_basicsr import standins


def main() -> None:
    arguments = parse_arguments()
    names = standins.install(replace=arguments.replace)
    if names:
        print(f'dpmambair_basicsr stands in for {", ".join(names)}.', file=sys.stderr)
    else:
        print('dpmambair_basicsr stands in for nothing: all are installed; --replace replaces them.', file=sys.stderr)
    if arguments.module is not None:
        sys.argv = [arguments.module, *arguments.arguments]
        sys.path[0] = os.getcwd()
        if importlib.util.find_spec(arguments.module.partition('.')[0]) is None:
            raise SystemExit(f'dpmambair_basicsr.run: no module named {arguments.module}')
        runpy.run_module(arguments.module, run_name='__main__', alter_sys=True)
    else:
        script, *rest = arguments.arguments
        if not os.path.isfile(script):
            raise SystemExit(f'dpmambair_basicsr.run: {script} is not a file')
        sys.argv = [script, *rest]
        sys.path[0] = os.path.dirname(os.path.abspath(script))
        runpy.run_path(script, run_name='__main__')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m dpmambair_basicsr.run',
        usage='%(prog)s [--replace] (SCRIPT | -m MODULE) [ARGUMENTS of it ...]',
        description=(__doc__ or '').partition('\n')[0],
    )
    parser.add_argument('--replace', action='store_true', help='also replace installed modules')
    parser.add_argument('-m', dest='module', metavar='MODULE', help='run a module, as python -m does')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='SCRIPT and its arguments')
    # What follows SCRIPT or MODULE is theirs, so it is cut off before argparse sees it.
    given = sys.argv[1:]
    own = next((i for i, word in enumerate(given) if not word.startswith('-')), len(given))
    arguments = parser.parse_args(given[: own + 1 if own and given[own - 1] == '-m' else own])
    arguments.arguments = given[own + (arguments.module is not None) :]
    if arguments.module is None and not arguments.arguments:
        parser.error('no SCRIPT')
    return arguments


if __name__ == '__main__':
    main()
