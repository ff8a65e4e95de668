from collections import OrderedDict
from copy import deepcopy

import torch
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor

from dpmambair_basicsr.models.restoration_hooks import RestorationHooks

# Names in the log are l_<key without _opt>, except for the two that BasicSR abbreviates.
LOG_NAMES = {'pixel_opt': 'l_pix', 'perceptual_opt': 'l_percep'}


@MODEL_REGISTRY.register()
class RestorationModel(RestorationHooks, SRModel):
    """SRModel with any number of losses, gradient clipping, a frozen degradation extractor, and inference at any size.

    Options beside SRModel's:
        train.<name>_opt: a loss, type and arguments; logged as l_<name>. The sum is minimised.
        train.grad_clip_norm: limit of the gradient's norm; default: none.
        train.pbar: show a progress bar.
        path.pretrain_network_e: checkpoint of stage 1 for a network with a degradation extractor (DPMambaIR). The
            extractor is saved in this model's checkpoints, so testing and resuming do not need it.
    """

    def init_training_settings(self) -> None:
        train_opt = self.opt['train']
        self.net_g.train()
        self.load_extractor()
        self.losses = {
            LOG_NAMES.get(key, f'l_{key.removesuffix("_opt")}'): build_loss(opt).to(self.device)
            for key, opt in train_opt.items()
            if key.endswith('_opt') and opt is not None
        }
        if not self.losses:
            raise ValueError('train: names no loss; give at least one, e.g. pixel_opt: {type: L1Loss}')

        self.ema_decay = train_opt.get('ema_decay', 0)
        if self.ema_decay > 0:
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).eval()
            path = self.opt['path']
            if path.get('pretrain_network_g') is not None:
                self.load_network(
                    self.net_g_ema, path['pretrain_network_g'], path.get('strict_load_g', True), 'params_ema'
                )
        self.setup_optimizers()
        self.setup_schedulers()

    def load_extractor(self) -> None:
        """Give the network stage 1's extractor. A checkpoint of the whole network brings its own.

        Raises:
            ValueError: if the network needs one and no checkpoint holds one, or if the file does not fit.
        """
        net = self.get_bare_model(self.net_g)
        path = self.opt['path'].get('pretrain_network_e')
        if getattr(net, 'extractor', None) is None or self.opt['path'].get('pretrain_network_g') is not None:
            return
        if path is None:
            raise ValueError(
                "path.pretrain_network_e: missing. The network's degradation extractor is frozen during training: "
                'pre-train it with options/train_degradation_extractor.yml and name the checkpoint here'
            )
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        try:
            net.load_extractor(checkpoint.get('params_ema', checkpoint.get('params')))
        except Exception as error:
            raise ValueError(f'{path}: not a checkpoint of stage 1 for this network: {error}') from error
        get_root_logger().info(f'Loading the degradation extractor from {path}; it stays frozen.')

    def optimize_parameters(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        self.output = self.net_g(*self.network_inputs())
        loss_dict = self.compute_losses(self.output, self.gt)
        sum(loss_dict.values()).backward()
        self.optimizer_g.step()

        self.log_dict = self.reduce_loss_dict(loss_dict)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
        self.show_progress(current_iter)

    def compute_losses(self, output: Tensor, target: Tensor) -> 'OrderedDict[str, Tensor]':
        """Log name -> weighted loss."""
        loss_dict = OrderedDict()
        for name, loss in self.losses.items():
            value = loss(output, target)
            if isinstance(value, tuple):  # BasicSR's PerceptualLoss: (perceptual, style), either may be None
                values = {name: value[0], 'l_style': value[1]}
                loss_dict.update({key: part for key, part in values.items() if part is not None})
            else:
                loss_dict[name] = value
        return loss_dict
