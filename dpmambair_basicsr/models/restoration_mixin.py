"""What our models change in BasicSR's: inference at any size, labels, readable checkpoint errors, optimiser groups."""

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from tqdm import tqdm

from dpmambair_basicsr.data import progressive
from dpmambair_basicsr.files.checkpoints import PlainValue, differences, read_weights
from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.models.precision import SpeedHooks
from dpmambair_basicsr.models.step_guard import NumberHooks
from dpmambair_basicsr.models.validation_monitor import MonitoringHooks
from dpmambair_basicsr.ops import pad_to_multiple
from dpmambair_basicsr.training import lr_schedulers as lr_scheduler


class RestorationHooks(NumberHooks, SpeedHooks, MonitoringHooks):
    """Mix-in for SRModel and its descendants; each method overrides the hook of the same name there."""

    option_keys = (
        Option('logger', 'keep_last', int | None, 'checkpoints that are kept; ~: all', low=1),
        Option('path', 'pretrain_network_e', str | None, 'checkpoint of stage 1, for DPMambaIR'),
        Option('train', 'grad_clip_norm', float | None, "limit of the gradient's norm; ~: none", low=0),
        Option('train', 'pbar', bool | None, 'a progress bar'),
    )

    @classmethod
    def check_training(cls, opt: dict) -> None:
        """Raises ValueError naming an option that this model cannot train with.

        The option checker calls it before anything is created; a model made without it calls it itself.
        """
        super().check_training(opt)
        for name in ('scheduler', 'scheduler_d'):
            scheduler = opt['train'].get(name) or {}
            if scheduler.get('type') == 'CosineAnnealingRestartLR' and (message := too_short(opt, scheduler)):
                raise ValueError(f'train.{name}.{message}: CosineAnnealingRestartLR ends there; lengthen periods')

    def init_training_settings(self) -> None:
        self.check_training(self.opt)
        self.load_extractor()
        super().init_training_settings()

    def load_extractor(self) -> None:
        """Give a network that needs one (DPMambaIR) its degradation extractor, which is frozen.

        It is in `path.pretrain_network_g` if that is a checkpoint of a whole DPMambaIR, as it is when a training is
        resumed; otherwise `path.pretrain_network_e` names the checkpoint of stage 1.

        Raises:
            ValueError: if neither file holds one that fits, if both do, or if the network takes none.
        """
        net, path = self.get_bare_model(self.net_g), self.opt['path']
        whole, stage_1 = path.get('pretrain_network_g'), path.get('pretrain_network_e')
        if not getattr(net, 'needs_extractor', False):
            if stage_1 is not None:
                raise ValueError(f'path.pretrain_network_e: this {type(net).__name__} takes no extractor; write ~')
            return
        if whole is not None:
            weights = read_weights(whole, path.get('param_key_g', 'params'), 'params')
            own = {f'extractor.{name}': value.shape for name, value in net.extractor.state_dict().items()}
            # Even strict_load_g: false has loaded these.
            if all(name in weights and weights[name].shape == shape for name, shape in own.items()):
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

    def feed_data(self, data: dict) -> None:
        """`lq`, `gt` (b, 3, h, w) in [0, 1]; `label` (b,) where the data set knows the degradation."""
        super().feed_data(data)
        self.label = data['label'].to(self.device) if 'label' in data else None

    def network_inputs(self) -> tuple[Tensor, ...]:
        """What the network is called with."""
        if getattr(self.get_bare_model(self.net_g), 'needs_label', False):
            return self.lq, self.label
        return (self.lq,)

    def test(self) -> None:
        """Set `output` from `lq`, padded to the network's stride and cropped back, by the EMA network.

        The scale is the network's own: the padded output's width over the padded input's.
        """
        # The bare network: the DDP wrapper would broadcast buffers from rank 0 alone, and hang.
        net = getattr(self, 'net_g_ema', self.get_bare_model(self.net_g))
        was_training = net.training
        net.eval()
        h, w = self.lq.shape[-2:]
        inputs = [
            pad_to_multiple(x, net.stride) if x is not None and x.dim() == 4 else x for x in self.network_inputs()
        ]
        with torch.no_grad():
            output = net(*inputs)
        scale = output.shape[-1] // inputs[0].shape[-1]
        self.output = output[..., : h * scale, : w * scale]
        net.train(was_training)

    def setup_optimizers(self) -> None:
        """One optimiser over what is trainable; parameters marked `no_weight_decay` get none."""
        self.set_up_speed()
        groups = {'decay': [], 'no_decay': []}
        for parameter in self.net_g.parameters():
            if parameter.requires_grad:
                groups['no_decay' if getattr(parameter, 'no_weight_decay', False) else 'decay'].append(parameter)
        params = [{'params': groups['decay']}]
        if groups['no_decay']:
            params.append({'params': groups['no_decay'], 'weight_decay': 0.0})
        optim_opt = self.opt['train']['optim_g']
        self.optimizer_g = self.get_optimizer(optim_opt.pop('type'), params, **optim_opt)
        self.optimizers.append(self.optimizer_g)
        if self.opt['train'].get('grad_clip_norm') is not None:
            # A hook, because BasicSR's GAN models call step() deep inside optimize_parameters.
            self.optimizer_g.register_step_pre_hook(self.clip_gradient)

    def clip_gradient(self, *_) -> None:
        """Limit the norm of the network's gradient to `train.grad_clip_norm`."""
        nn.utils.clip_grad_norm_(self.net_g.parameters(), self.opt['train']['grad_clip_norm'])

    def setup_schedulers(self) -> None:
        """One scheduler per optimiser, BasicSR's or one of `dpmambair_basicsr.training.lr_schedulers`.

        `train.scheduler_d`, if given, is the discriminator's, `train.scheduler` otherwise.
        """
        train_opt, optimizers = self.opt['train'], self.optimizers
        of_generator = train_opt['scheduler']
        of_discriminator = train_opt.get('scheduler_d') or of_generator
        for optimizer, scheduler in zip(optimizers, (of_generator, of_discriminator), strict=False):
            if message := too_short(self.opt, scheduler):
                get_root_logger().warning(
                    f'train.scheduler.{message}: the learning rate stays at the last of eta_mins.'
                )
            kind, options = scheduler['type'], {key: value for key, value in scheduler.items() if key != 'type'}
            if hasattr(lr_scheduler, kind):
                self.schedulers.append(getattr(lr_scheduler, kind)(optimizer, **options))
            else:
                self.optimizers, train_opt['scheduler'] = [optimizer], dict(scheduler)
                super().setup_schedulers()
        self.optimizers = optimizers

        warning = progressive.compare_lengths(self.opt)
        if warning:
            get_root_logger().warning(warning)

    def model_ema(self, decay: float = 0.999) -> None:
        """As BasicSR's, but what is frozen is copied: rounding would move it, by 1.7e-4 in 100000 steps at 0.9999."""
        super().model_ema(decay)
        own = dict(self.get_bare_model(self.net_g).named_parameters())
        for name, parameter in self.net_g_ema.named_parameters():
            if not own[name].requires_grad:
                parameter.data.copy_(own[name].data)

    def show_progress(self, current_iter: int) -> None:
        """Advance the bar of `train.pbar`."""
        if not self.opt['train'].get('pbar') or self.opt['rank'] != 0:
            return
        if not hasattr(self, 'pbar'):
            total = int(self.opt['train']['total_iter'])
            self.pbar = tqdm(total=total, initial=current_iter - 1, unit='iter', desc=self.opt['name'])
        self.pbar.update()
        if self.pbar.n >= self.pbar.total:
            self.pbar.close()

    def save_network(
        self, net: nn.Module | list, net_label: str, current_iter: int, param_key: str | list[str] = 'params'
    ) -> None:
        """As BasicSR's, and the options of the network with it: `network_g` in net_g_*.pth, `network_d` in net_d_*.pth.

        So a checkpoint can be used without its option file, see `dpmambair_basicsr.load`.
        """
        nets = [*net] if isinstance(net, list) else [net]
        keys = [*param_key] if isinstance(param_key, list) else [param_key]
        section = net_label.replace('net_', 'network_', 1)
        if section in self.opt:
            nets.append(PlainValue(self.opt[section]))
            keys.append(section)
        super().save_network(nets, net_label, current_iter, keys)

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """As BasicSR's; where `param_key` is missing, `params` is read.

        Raises:
            FileNotFoundError: no such file.
            ValueError: naming the file and what is wrong with it, before the network is touched.
        """
        keys = [param_key, 'params']
        if net is getattr(self, 'net_g_ema', None):
            # BasicSR asks for params_ema of the file of net_g, which may be a bare state dict or have a key of its own.
            keys.insert(1, self.opt['path'].get('param_key_g', 'params'))
        weights = read_weights(load_path, *keys)
        net = self.get_bare_model(net)
        if not strict:
            self._print_different_keys_loading(net, weights, strict)
        elif report := differences(net, weights):
            raise ValueError(f'{load_path}: {report}')
        net.load_state_dict(weights, strict=strict)
        self.note_checkpoint(load_path, param_key)
        get_root_logger().info(
            f'Loading {type(net).__name__} from {load_path}, param_key {param_key} (or else params).'
        )


def too_short(opt: dict, scheduler: dict) -> str:
    """In what way a schedule of several periods ends before the training, or ''."""
    total, planned = int(opt['train']['total_iter']), sum(scheduler.get('periods', ()))
    if not planned or planned >= total - 1:  # schedulers count from 0
        return ''
    return f'periods sum to {planned}, train.total_iter is {total}'
