"""Extends BasicSR's models with inference at any size, labels, readable checkpoint errors and optimizer groups.

Anything longer than a few lines is in parts owned by the model: `StepGuard`, `Precision`, `Evaluation`,
`BatchAugment`, `GradientAccumulation`, `GraphedStep`, `ValidationMonitor`, `BestCheckpoint`.
"""

from collections import OrderedDict
from typing import Literal

from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from dpmambair_basicsr.data import progressive
from dpmambair_basicsr.files.checkpoints import (
    PlainValue,
    differences,
    found_key,
    import_safetensors,
    read_checkpoint,
    select_weights,
    wanted_keys,
)
from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.models.batch_augment import BatchAugment
from dpmambair_basicsr.models.best_checkpoint import BestCheckpoint
from dpmambair_basicsr.models.evaluation import Evaluation
from dpmambair_basicsr.models.gradient_accumulation import GradientAccumulation
from dpmambair_basicsr.models.graphed_step import GraphedStep, apply_capturable
from dpmambair_basicsr.models.precision import Precision
from dpmambair_basicsr.models.step_guard import StepGuard
from dpmambair_basicsr.models.validation_monitor import ValidationMonitor, folder_of_set
from dpmambair_basicsr.ops.selective_scan.backend import set_default_backend
from dpmambair_basicsr.registry import arguments_of, make_without_storage, our_type
from dpmambair_basicsr.results.run import SetResult, mean
from dpmambair_basicsr.training import lr_schedulers
from dpmambair_basicsr.training.earlier_options import complete_networks
from dpmambair_basicsr.training.extractor import load_extractor
from dpmambair_basicsr.training.parameters import freeze, log_frozen, parameter_groups
from dpmambair_basicsr.training.state import find_networks


def needs_label(network: dict) -> bool:
    """Whether these are options of one of our networks that takes the degradation label."""
    target = our_type('ARCH', network)
    return target is not None and getattr(make_without_storage(target, arguments_of(network)), 'needs_label', False)


class OneImage(Subset):
    """A dataset of one image of another."""

    def __init__(self, dataset, index: int):
        super().__init__(dataset, [index])
        self.opt = dataset.opt


class RestorationMixin(SRModel):
    """Mix-in for SRModel and its subclasses; each method overrides the hook of the same name."""

    option_keys = (
        Option('logger', 'keep_last', int | None, 'number of checkpoints to keep; ~: all', low=1),
        Option('logger', 'save_format', Literal['pth', 'safetensors'], 'file format of saved networks; default pth'),
        Option('path', 'pretrain_network_e', str | None, 'stage 1 checkpoint, for DPMambaIR'),
        Option('train', 'grad_clip_norm', float | None, 'maximum gradient norm; ~: none', low=0),
        Option('train', 'pbar', bool | None, 'show a progress bar'),
        Option(
            'train', 'freeze', list[str] | None, 'patterns of parameter names of network_g to freeze, e.g. encoder.*'
        ),
        *BatchAugment.option_keys,
        *GradientAccumulation.option_keys,
        *GraphedStep.option_keys,
        *StepGuard.option_keys,
        *Precision.option_keys,
        *Evaluation.option_keys,
    )
    scales_loss = False  # whether optimize_parameters uses Precision's `backward` and `step`, as fp16 requires
    has_one_step = False  # whether an iteration is one step of net_g, by `compute_gradients` and `optimizer_g`
    learns_degradations = False  # whether the model learns the kind of degradation
    batch_names: tuple[str, ...] = ('lq', 'gt', 'label')  # attributes set by feed_data

    def __init__(self, opt: dict):
        self.batch_augment = BatchAugment(opt)
        self.accumulation = GradientAccumulation(opt)
        self.step_guard = StepGuard(opt)
        self.monitor = ValidationMonitor(opt)
        self.evaluation = Evaluation(opt)
        self.network_suffix = f'.{(opt.get("logger") or {}).get("save_format", "pth")}'
        self.best_checkpoint = BestCheckpoint(opt, self.network_suffix)
        if opt['path'].get('resume_state'):
            find_networks(opt)
        complete_networks(opt)
        set_default_backend(opt.get('scan_backend'))  # a program's own loop has not parsed an option file
        super().__init__(opt)

    @classmethod
    def check_training(cls, opt: dict) -> None:
        """Raises ValueError naming an option that this model cannot train with.

        Called by the option checks before anything is created, and by the model itself for programs without them.
        """
        Precision.check_options(opt, cls.__name__, cls.scales_loss)
        limit = opt['train'].get('grad_clip_norm')
        if limit is not None and limit <= 0:
            raise ValueError(f'train.grad_clip_norm: must be above 0, got {limit}; write ~ for no limit')
        if opt['train'].get('batch_augment'):
            BatchAugment.check_options(opt, cls.learns_degradations or needs_label(opt['network_g']))
        if (opt.get('logger') or {}).get('save_format') == 'safetensors':
            import_safetensors('logger.save_format')
        lr_schedulers.check_periods(opt)

    def init_training_settings(self) -> None:
        self.check_training(self.opt)
        load_extractor(self.get_bare_model(self.net_g), self.opt['path'])
        super().init_training_settings()

    # Training

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Freezes `train.freeze` first, since DistributedDataParallel looks at requires_grad."""
        if self.is_train and net is self.net_g and (patterns := self.opt['train'].get('freeze')):
            freeze(net, patterns)
            log_frozen(net)
        return super().model_to_device(net)

    def feed_data(self, data: dict) -> None:
        """`lq`, `gt` (b, 3, h, w) in [0, 1], `label` (b,); `gt` and `label` only if the dataset provides them."""
        if 'gt' not in data:  # BasicSR keeps that of an earlier batch
            self.__dict__.pop('gt', None)
        super().feed_data(data)
        self.monitor.note_items(data)
        self.label = data['label'].to(self.device) if 'label' in data else None
        self.lq_path = data.get('lq_path', ['lq'])[0]

    def network_inputs(self) -> tuple[Tensor, ...]:
        """The inputs of the network."""
        if getattr(self.get_bare_model(self.net_g), 'needs_label', False):
            return self.lq, self.label
        return (self.lq,)

    def setup_optimizers(self) -> None:
        """One optimizer over the trainable parameters; those marked `no_weight_decay` are not decayed."""
        net = self.get_bare_model(self.net_g)
        self.precision = Precision(self.opt['train'], self.device)
        self.precision.prepare(net)
        optim_opt = self.opt['train']['optim_g']
        self.optimizer_g = self.get_optimizer(optim_opt.pop('type'), parameter_groups(net), **optim_opt)
        self.optimizers.append(self.optimizer_g)
        if self.opt['train'].get('grad_clip_norm') is not None:
            # A hook, because BasicSR's GAN models call step() deep inside optimize_parameters.
            self.optimizer_g.register_step_pre_hook(self.clip_gradient)
        self.graphed_step = GraphedStep.of(self)

    def get_optimizer(self, optim_type: str, params, lr: float, **kwargs) -> Optimizer:
        """Guards the optimizer and, at the first call, the losses, which exist by then."""
        if not self.optimizers:
            for loss in self.get_losses():
                self.step_guard.watch_loss(loss)
        optimizer = super().get_optimizer(optim_type, params, lr, **kwargs)
        self.accumulation.watch(optimizer)
        self.step_guard.watch(optimizer, {name: self.get_bare_model(net) for name, net in self.get_nets().items()})
        return optimizer

    def get_losses(self) -> list[nn.Module]:
        """BasicSR's models keep them as `cri_<name>`."""
        return [value for name, value in vars(self).items() if name.startswith('cri_') and isinstance(value, nn.Module)]

    def get_nets(self) -> dict[str, nn.Module]:
        return {name: net for name, net in vars(self).items() if name.startswith('net_') and isinstance(net, nn.Module)}

    def clip_gradient(self, *_) -> None:
        """Limits the norm of the network's gradient to `train.grad_clip_norm`."""
        nn.utils.clip_grad_norm_(self.net_g.parameters(), self.opt['train']['grad_clip_norm'])

    def setup_schedulers(self) -> None:
        """One scheduler per optimizer, BasicSR's or one of `dpmambair_basicsr.training.lr_schedulers`.

        `train.scheduler_d`, if given, is the discriminator's, `train.scheduler` otherwise.
        """
        train_opt, optimizers = self.opt['train'], self.optimizers
        of_generator = train_opt['scheduler']
        of_discriminator = train_opt.get('scheduler_d') or of_generator
        for optimizer, scheduler in zip(optimizers, (of_generator, of_discriminator), strict=False):
            if message := lr_schedulers.too_short(self.opt, scheduler):
                get_root_logger().warning(
                    f'train.scheduler.{message}: the learning rate stays at the last of eta_mins.'
                )
            kind, options = scheduler['type'], {key: value for key, value in scheduler.items() if key != 'type'}
            if hasattr(lr_schedulers, kind):
                self.schedulers.append(getattr(lr_schedulers, kind)(optimizer, **options))
            else:
                self.optimizers, train_opt['scheduler'] = [optimizer], dict(scheduler)
                super().setup_schedulers()
        self.optimizers = optimizers

        warning = progressive.compare_lengths(self.opt)
        if warning:
            get_root_logger().warning(warning)

    def optimize_parameters(self, current_iter: int) -> None:
        """One step of each optimizer; the log has the mean over the micro-batches."""
        self.mix_batch()
        logs = []
        for _ in self.accumulation.micro_batches(self, self.get_nets()):
            self.step_guard.begin_micro_batch(self.accumulation.is_first)
            self.optimize_micro_batch(current_iter)
            logs.append(self.log_dict)
        self.log_dict = mean(logs)
        self.show_progress(current_iter)

    def mix_batch(self) -> None:
        """Applies `train.batch_augment` to the images."""
        batch = {name: getattr(self, name, None) for name in self.batch_names}
        images = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() == 4}
        self.__dict__.update(self.batch_augment.apply(images))

    def optimize_micro_batch(self, current_iter: int) -> None:
        """BasicSR's iteration. Anything but optimizers that should run once per step checks `accumulation.is_last`."""
        super().optimize_parameters(current_iter)

    def model_ema(self, decay: float = 0.999) -> None:
        """As BasicSR's, but copies frozen parameters: rounding would shift them (1.7e-4 in 100000 steps at 0.9999).

        It also copies the buffers that are saved, such as the statistics of batch normalization.
        """
        if not self.accumulation.is_last:
            return
        super().model_ema(decay)
        net = self.get_bare_model(self.net_g)
        own = dict(net.named_parameters())
        for name, parameter in self.net_g_ema.named_parameters():
            if not own[name].requires_grad:
                parameter.data.copy_(own[name].data)
        if buffers := dict(net.named_buffers()):
            average = self.net_g_ema.state_dict()
            for name, buffer in buffers.items():
                if name in average and average[name].shape == buffer.shape:  # else one that depends on the input
                    average[name].copy_(buffer)

    def get_current_log(self) -> dict:
        """Called by BasicSR every `logger.print_freq` iterations; networks may add values by `values_to_log`."""
        self.monitor.log_drawn()
        values = getattr(self.get_bare_model(self.net_g), 'values_to_log', dict)()
        return self.step_guard.add_to_log({**super().get_current_log(), **values})

    def show_progress(self, current_iter: int) -> None:
        """Advances the progress bar of `train.pbar`."""
        if not self.opt['train'].get('pbar') or self.opt['rank'] != 0:
            return
        if not hasattr(self, 'pbar'):
            total = int(self.opt['train']['total_iter'])
            self.pbar = tqdm(total=total, initial=current_iter - 1, unit='iter', desc=self.opt['name'])
        self.pbar.update()
        if self.pbar.n >= self.pbar.total:
            self.pbar.close()

    # Validation and testing

    def test(self) -> None:
        """Set `output` from `lq` by the EMA network, whole or in tiles: see `Evaluation`."""
        # The bare network: the DDP wrapper would broadcast buffers from rank 0 only, and hang.
        net = getattr(self, 'net_g_ema', self.get_bare_model(self.net_g))
        self.output = self.evaluation.restore(net, self.network_inputs(), self.lq_path)

    def nondist_validation(self, dataloader, current_iter: int | str, tb_logger, save_img: bool) -> None:
        with (
            self.monitor.watching(dataloader, tb_logger, current_iter),
            self.evaluation.explained(self),
            folder_of_set(self.opt, dataloader.dataset.opt['name']),
        ):
            super().nondist_validation(dataloader, current_iter, tb_logger, save_img)
        averages = self.monitor.finish_set(getattr(self, 'metric_results', {}), tb_logger, current_iter)
        if averages is not None:
            assert isinstance(current_iter, int), 'a name only in a test, which has no averages'
            self.best_checkpoint.offer(self, averages, current_iter)

    def get_current_visuals(self) -> 'OrderedDict[str, Tensor]':
        """Called once per image by BasicSR's validation."""
        visuals, degraded = super().get_current_visuals(), self.network_inputs()[0]
        self.monitor.note_image(degraded, degraded is self.lq, visuals)
        return visuals

    def measure_again(self, dataset, index: int) -> SetResult:
        """One image of a test set, as `nondist_validation` does it; writes nothing."""
        loader = DataLoader(OneImage(dataset, index))
        with self.monitor.watching(loader, None, self.opt['name']):
            super().nondist_validation(loader, self.opt['name'], None, False)
        return self.monitor.done

    # Checkpoints

    def resume_training(self, resume_state: dict) -> None:
        """See `patches.resume`."""
        super().resume_training(resume_state)
        for optimizer in self.optimizers:
            apply_capturable(optimizer)
        self.best_checkpoint.resume()

    def save_network(
        self, net: nn.Module | list, net_label: str, current_iter: int, param_key: str | list[str] = 'params'
    ) -> None:
        """As BasicSR's, plus the options of the network: `network_g` in net_g_*.pth, `network_d` in net_d_*.pth.

        A checkpoint can thus be used without its option file, see `dpmambair_basicsr.load`.
        """
        nets: list = [*net] if isinstance(net, list) else [net]
        keys = [*param_key] if isinstance(param_key, list) else [param_key]
        section = net_label.replace('net_', 'network_', 1)
        if section in self.opt:
            nets.append(PlainValue(self.opt[section]))
            keys.append(section)
        super().save_network(nets, net_label, current_iter, keys)

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """As BasicSR's, but the key in the file is chosen by `wanted_keys`; `param_key` applies only to other networks.

        If the file has no params_ema, the EMA of a training starts from its network.

        Raises:
            FileNotFoundError: no such file.
            ValueError: naming the file and what is wrong with it, before the network is touched.
        """
        name = next((name for name, value in vars(self).items() if value is net and name.startswith('net_')), None)
        keys = [param_key]
        if name is not None:
            label = name.removeprefix('net_').removesuffix('_ema')
            keys = [*['params_ema'] * name.endswith('_ema'), *wanted_keys(self.opt['path'], label, self.is_train)]
        checkpoint = read_checkpoint(load_path)
        key = found_key(load_path, checkpoint, *keys)
        weights = select_weights(load_path, checkpoint, key)
        net = self.get_bare_model(net)
        if not strict:
            self._print_different_keys_loading(net, weights, strict)
        elif report := differences(net, weights):
            raise ValueError(f'{load_path}: {report}')
        net.load_state_dict(weights, strict=strict)
        self.monitor.note_checkpoint(load_path, key)
        what = 'the whole file' if key is None else f'its {key}'
        get_root_logger().info(f'Loading {type(net).__name__} from {load_path}: {what}.')
