"""The frozen degradation extractor of a network in training: which checkpoint it comes from."""

from basicsr.utils import get_root_logger
from torch import nn

from dpmambair_basicsr.files.checkpoints import read_weights, wanted_keys


def load_extractor(net: nn.Module, path: dict) -> None:
    """Give a network that needs one (DPMambaIR) its degradation extractor, which is frozen.

    It is in `path.pretrain_network_g` if that is a checkpoint of a whole DPMambaIR, as it is when a training is
    resumed; otherwise `path.pretrain_network_e` names the checkpoint of stage 1.

    Args:
        path: the section `path` of the options.

    Raises:
        ValueError: if neither file holds one that fits, if both do, or if the network takes none.
    """
    whole, stage_1 = path.get('pretrain_network_g'), path.get('pretrain_network_e')
    if not getattr(net, 'needs_extractor', False):
        if stage_1 is not None:
            raise ValueError(f'path.pretrain_network_e: this {type(net).__name__} takes no extractor; write ~')
        return
    # Even strict_load_g: false has loaded what the file holds.
    if whole is not None and holds_extractor(whole, path, net):
        if stage_1 is not None and not path.get('resume_state'):
            raise ValueError(f'path.pretrain_network_e: {whole} brings its own extractor; write ~')
        return
    if stage_1 is None:
        also = '' if whole is None else f', and {whole} holds none that fits'
        raise ValueError(
            f"path.pretrain_network_e: missing{also}. The network's degradation extractor is frozen during "
            'training: pre-train it with options/train_degradation_extractor.yml and name the checkpoint here'
        )
    try:
        net.load_extractor(read_weights(stage_1, 'params_ema', 'params', None))
    except RuntimeError as error:
        raise ValueError(f'{stage_1}: not a checkpoint of stage 1 for this network: {error}') from error
    get_root_logger().info(f'Loading the degradation extractor from {stage_1}; it stays frozen.')


def holds_extractor(file: str, path: dict, net: nn.Module) -> bool:
    weights = read_weights(file, *wanted_keys(path, 'g', is_train=True))
    own = {f'extractor.{name}': value.shape for name, value in net.extractor.state_dict().items()}
    return all(name in weights and weights[name].shape == shape for name, shape in own.items())
