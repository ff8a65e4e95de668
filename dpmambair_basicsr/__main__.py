"""All commands under one name: `dpmambair restore ...` is `python -m dpmambair_basicsr.restore ...`."""

import argparse
import importlib
import sys

import dpmambair_basicsr

COMMANDS = {
    'train': "train with BasicSR's loop and arguments",
    'test': "test with BasicSR's loop and arguments, and write a table of the results",
    'restore': 'restore image files of any size with a trained network',
    'app': 'open a page in your browser that restores the image you drop on it',
    'degradation': 'name the degradations of image files, and map their embeddings',
    'figures': 'draw spectra, step sizes, the extractor and the blocks of trained networks',
    'report': "compare test results with each other and with the papers'",
    'study': 'train and test variants of a network over several seeds, and compare them with intervals',
    'verify': "restore three images of a test's results again, and check that the numbers repeat",
    'convert': 'write a checkpoint as a safetensors file',
    'export': 'write a trained network as ONNX or as a program of torch.export',
    'prepare_data': 'arrange a downloaded public dataset as the option files expect it',
    'push': 'upload a trained network to the Hugging Face Hub',
    'run': 'run a script of another project without mamba_ssm or causal_conv1d',
    'fetch': 'download the weights that LPIPS, DISTS and the perceptual loss need',
    'dropin': 'make the option files work in a BasicSR checkout, or undo that',
    'init': 'copy the option files into a folder, for editing',
    'install_basicsr': 'install BasicSR 1.4.2 on any Python, without downloading a second PyTorch',
}
MODULES = {  # the others have their own names
    'app': 'inference.app',
    'fetch': 'prepare.fetch',
    'figures': 'inference.figures',
    'init': 'prepare.init',
    'install_basicsr': 'prepare.install_basicsr',
    'push': 'integrations.push',
    'study': 'evidence.study',
    'verify': 'evidence.verify',
}


def main() -> None:
    """Runs the command that the first argument names with the arguments after it, and ends with its exit status."""
    parser = argparse.ArgumentParser(
        prog='dpmambair',
        usage='dpmambair COMMAND [ARGUMENTS]',
        description=(dpmambair_basicsr.__doc__ or '').partition('\n')[0],
        epilog='\n'.join(['commands:', *(f'  {name:15} {line}' for name, line in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {dpmambair_basicsr.__version__}')
    parser.add_argument('command', metavar='COMMAND', choices=COMMANDS, help='followed by --help: its arguments')
    command = parser.parse_args(sys.argv[1:2]).command
    sys.argv[:2] = [f'dpmambair {command}']  # what the commands, and BasicSR for train and test, parse
    sys.exit(importlib.import_module(f'dpmambair_basicsr.{MODULES.get(command, command)}').main())


if __name__ == '__main__':
    main()
