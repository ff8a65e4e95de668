"""A trained network as a safetensors file: `python -m dpmambair_basicsr.convert net_g_best.pth net_g.safetensors`.

A safetensors file holds only tensors and text and cannot run code, so it is safe to share. `load`, `restore`, spandrel
and `path.pretrain_network_g` read it like the original checkpoint, including the options of its network.
"""

import argparse
from pathlib import Path

from dpmambair_basicsr.files.errors import exit_on_error


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m dpmambair_basicsr.convert', description=__doc__)
    parser.add_argument('checkpoint', help='net_g_*.pth')
    parser.add_argument('output', help='file to write, .safetensors')
    parser.add_argument(
        '--key',
        help='key of the state dict; default: the first of params_ema, params, state_dict, ..., else the file itself',
    )
    arguments = parser.parse_args()

    # Imported late: PyTorch takes seconds, and --help does not need it.
    from dpmambair_basicsr.archs.recognition import network_options, own_names
    from dpmambair_basicsr.files.checkpoints import (
        SAFETENSORS,
        WRAPPINGS,
        read_checkpoint,
        select_weights,
        write_safetensors,
    )

    if not arguments.output.endswith(SAFETENSORS):
        parser.error(f'{arguments.output}: must end in {SAFETENSORS}')
    with exit_on_error('dpmambair_basicsr.convert', ValueError, OSError):
        checkpoint = read_checkpoint(arguments.checkpoint)
        weights = select_weights(arguments.checkpoint, checkpoint, *([arguments.key] if arguments.key else WRAPPINGS))
        weights = own_names(weights)
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        network = checkpoint.get('network_g') or network_options(weights)
        write_safetensors(arguments.output, weights, network, checkpoint.get('degradation_classifier'))
    print(f'{arguments.output}: {len(weights)} tensors')


if __name__ == '__main__':
    main()
