"""A trained network as a safetensors file: `python -m dpmambair_basicsr.convert net_g_best.pth net_g.safetensors`.

A safetensors file holds tensors and text and can run no code, so it may be passed on. `load`, `restore`, spandrel and
`path.pretrain_network_g` read it like the checkpoint it was made from, with the options of its network.
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
        help='state dict of the checkpoint; default: params_ema, params, state_dict, ..., the file',
    )
    arguments = parser.parse_args()

    # Not before: PyTorch takes seconds, and --help needs none of it.
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
