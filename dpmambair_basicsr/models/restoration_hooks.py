"""What our models change in BasicSR's: inference at any size, labels, readable checkpoint errors, optimiser groups."""

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from tqdm import tqdm

from dpmambair_basicsr.data import progressive
from dpmambair_basicsr.models import lr_scheduler
from dpmambair_basicsr.ops import pad_to_multiple


class RestorationHooks:
    """Mix-in for SRModel and its descendants; each method overrides the hook of the same name there."""

    option_keys = {
        'path': frozenset({'pretrain_network_e'}),
        'train': frozenset({'grad_clip_norm', 'pbar'}),
    }

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
        """Set `output` from `lq`, padded to the network's stride and cropped back, by the EMA network."""
        # The bare network: the DDP wrapper would broadcast buffers from rank 0 alone, and hang.
        net = getattr(self, 'net_g_ema', self.get_bare_model(self.net_g))
        was_training = net.training
        net.eval()
        h, w = self.lq.shape[-2:]
        scale = self.opt.get('scale', 1)
        inputs = [
            pad_to_multiple(x, net.stride) if x is not None and x.dim() == 4 else x for x in self.network_inputs()
        ]
        with torch.no_grad():
            self.output = net(*inputs)[..., : h * scale, : w * scale]
        net.train(was_training)

    def setup_optimizers(self) -> None:
        """One optimiser over what is trainable; parameters marked `no_weight_decay` get none."""
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
        """One scheduler per optimiser, BasicSR's or one of `dpmambair_basicsr.models.lr_scheduler`.

        `train.scheduler_d`, if given, is the discriminator's, `train.scheduler` otherwise.

        Raises:
            ValueError: if BasicSR's CosineAnnealingRestartLR is to go on after its periods, where it fails.
        """
        train_opt, optimizers = self.opt['train'], self.optimizers
        of_generator = train_opt['scheduler']
        of_discriminator = train_opt.get('scheduler_d') or of_generator
        for optimizer, scheduler in zip(optimizers, (of_generator, of_discriminator), strict=False):
            self.check_periods(scheduler)
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

    def check_periods(self, scheduler: dict) -> None:
        total, planned = int(self.opt['train']['total_iter']), sum(scheduler.get('periods', ()))
        if not planned or planned >= total:
            return
        message = f'train.scheduler.periods sum to {planned}, train.total_iter is {total}'
        if scheduler['type'] == 'CosineAnnealingRestartLR':
            raise ValueError(f'{message}: CosineAnnealingRestartLR ends there; lengthen periods')
        get_root_logger().warning(f'{message}: the learning rate stays at the last of eta_mins.')

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        progressive.report_iteration(current_iter)
        super().update_learning_rate(current_iter, warmup_iter)

    def resume_training(self, resume_state: dict) -> None:
        progressive.report_iteration(resume_state['iter'])
        super().resume_training(resume_state)

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

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """As BasicSR's.

        Raises:
            ValueError: naming the file and what is wrong with it, before the network is touched.
        """
        try:
            super().load_network(net, load_path, strict, param_key)
        except FileNotFoundError:
            raise
        except KeyError as error:
            raise ValueError(f'{load_path}: holds no key {error}; set path.param_key_g to the one it has') from error
        except Exception as error:
            raise ValueError(f'{load_path}: {error}') from error

    def _print_different_keys_loading(self, crt_net: nn.Module, load_net: dict, strict: bool = True) -> None:
        if not strict:
            return super()._print_different_keys_loading(crt_net, load_net, strict)
        report = differences(self.get_bare_model(crt_net), load_net)
        if report:
            raise ValueError(report)


def differences(net: nn.Module, state_dict: dict) -> str:
    """One readable report of how a state dict does not fit a network; '' if it fits."""
    own = net.state_dict()
    parts = {
        'missing in the file': sorted(own.keys() - state_dict.keys()),
        'not in the network': sorted(state_dict.keys() - own.keys()),
        'of another shape': [
            f'{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}'
            for name in own
            if name in state_dict and own[name].shape != state_dict[name].shape
        ],
    }
    lines = [
        f'  {len(names)} {what}: {", ".join(names[:5])}{", ..." if len(names) > 5 else ""}'
        for what, names in parts.items()
        if names
    ]
    return '\n'.join([f'does not fit {type(net).__name__}:', *lines]) if lines else ''
