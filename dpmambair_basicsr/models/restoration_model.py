from collections import OrderedDict
from copy import deepcopy

from basicsr.losses import build_loss
from torch import Tensor, nn

from dpmambair_basicsr.models.restoration_mixin import RestorationMixin
from dpmambair_basicsr.registry import MODEL_REGISTRY
from dpmambair_basicsr.training.extractor import load_extractor

# Names in the log are l_<key without _opt>, except for the two that BasicSR abbreviates.
LOG_NAMES = {'pixel_opt': 'l_pix', 'perceptual_opt': 'l_percep'}


@MODEL_REGISTRY.register()
class RestorationModel(RestorationMixin):
    """SRModel with any number of losses, gradient clipping, a frozen degradation extractor, and inference at any size.

    Options in addition to SRModel's:
        train.<name>_opt: type and arguments of a loss, logged as l_<name>. Their sum is minimised.
        train.grad_clip_norm: maximum gradient norm; default: none.
        train.pbar: show a progress bar.
        train.amp, train.compile: mixed precision and compilation, see `Precision`.
        train.cuda_graph: the step as CUDA graphs, see `GraphedStep`.
        train.accum_iter: micro-batches per step, see `GradientAccumulation`.
        train.freeze: patterns of parameters to freeze, see `training.parameters.freeze`.
        path.pretrain_network_e: stage 1 checkpoint, for a network with a degradation extractor (DPMambaIR). The
            extractor becomes part of this model's checkpoints, so testing and resuming do not need it.
    """

    scales_loss = True
    has_one_step = True

    @classmethod
    def check_training(cls, opt: dict) -> None:
        super().check_training(opt)
        if not any(key.endswith('_opt') and value is not None for key, value in opt['train'].items()):
            raise ValueError('train: has no loss; add at least one, e.g. pixel_opt: {type: L1Loss}')
        if opt['train'].get('ldl_opt') is not None:
            raise ValueError('train.ldl_opt: LDL needs a GAN model; choose another name for another loss')

    def init_training_settings(self) -> None:
        self.check_training(self.opt)
        train_opt = self.opt['train']
        self.net_g.train()
        load_extractor(self.get_bare_model(self.net_g), self.opt['path'])
        self.losses = {
            key: build_loss(opt).to(self.device)
            for key, opt in train_opt.items()
            if key.endswith('_opt') and opt is not None
        }

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

    def get_losses(self) -> list[nn.Module]:
        return [*self.losses.values()]

    def optimize_micro_batch(self, current_iter: int) -> None:
        if self.graphed_step is not None:
            self.log_dict = self.reduce_loss_dict(self.graphed_step.run())
            return
        loss_dict = self.compute_gradients()
        if self.accumulation.is_last:
            self.precision.step(self.optimizer_g, if_left_out=self.step_guard.check)

        self.log_dict = self.reduce_loss_dict(loss_dict)
        self.average()

    def compute_gradients(self) -> 'OrderedDict[str, Tensor]':
        """Those of the network's parameters for the batch; returns the losses, see `compute_losses`."""
        self.optimizer_g.zero_grad()
        self.output = self.net_g(*self.network_inputs())
        loss_dict = self.compute_losses(self.output, self.gt)
        self.precision.backward(sum(loss_dict.values()))
        return loss_dict

    def average(self) -> None:
        """Updates the EMA network, if there is one."""
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def compute_losses(self, output: Tensor, target: Tensor) -> 'OrderedDict[str, Tensor]':
        """Log name -> weighted loss.

        Raises:
            ValueError: if two losses have the same log name.
        """
        loss_dict, origin = OrderedDict(), {}
        for key, loss in self.losses.items():
            names = (LOG_NAMES.get(key, f'l_{key.removesuffix("_opt")}'), 'l_style')
            value = loss(output, target)
            # BasicSR's PerceptualLoss returns (perceptual, style), either may be None.
            for name, part in zip(names, value if isinstance(value, tuple) else (value,), strict=False):
                if part is None:
                    continue
                if name in origin:
                    raise ValueError(f'train.{key}: logged as {name}, as train.{origin[name]} is; rename one of them')
                loss_dict[name], origin[name] = part, key
        return loss_dict
