"""Option files of earlier versions: options whose defaults have changed are inferred from the checkpoints."""

import logging

from dpmambair_basicsr.files.checkpoints import read_weights, wanted_keys
from dpmambair_basicsr.registry import our_type, told_by_weights


def complete_networks(opt: dict) -> None:
    """Completes the sections network_* with options inferred from their initial weights, and logs them.

    A resumed training or a test thus gets the network that was saved, and stage 2 the extractor of stage 1.

    Raises:
        FileNotFoundError, ValueError: naming the file, if it cannot be read.
    """
    for network, section in opt.items():
        target = our_type('ARCH', section) if str(network).startswith('network_') else None
        if target is None or not hasattr(target, 'options_of_weights'):
            continue
        if (file := opt['path'].get(f'pretrain_{network}')) is not None:
            keys = wanted_keys(opt['path'], network.removeprefix('network_'), opt['is_train'])
        elif network == 'network_g' and (file := opt['path'].get('pretrain_network_e')) is not None:
            keys = 'params_ema', 'params', None
        else:
            continue
        told = told_by_weights(target, section, read_weights(file, *keys), file)
        if told:
            section |= told
            found = ', '.join(f'{key}: {value}' for key, value in told.items())
            logging.getLogger('basicsr').info(f'{network}: {found}, as in {file}.')
