from basicsr.models.srgan_model import SRGANModel

from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.models.restoration_mixin import RestorationMixin
from dpmambair_basicsr.registry import MODEL_REGISTRY


@MODEL_REGISTRY.register()
class RestorationGANModel(RestorationMixin, SRGANModel):
    """SRGANModel (pixel, perceptual and adversarial loss, EMA) with inference at any size: VmambaIR's single-image SR.

    Options in addition to SRGANModel's:
        train.ldl_opt: a pixel loss of output and ground truth, each multiplied by BasicSR's artefact map (LDL, Liang et
            al., CVPR 2022, arXiv 2203.09195); requires `ema_decay`. Not part of VmambaIR.
        train.scheduler_d: scheduler of the discriminator; default: `scheduler`, the generator's.
        train.grad_clip_norm: maximum gradient norm of the generator; default: none.
        train.pbar: show a progress bar.
        train.amp (bf16), train.compile: of the generator, see `Precision`.
        train.accum_iter, train.freeze (of the generator): as RestorationModel's.

    Raises:
        ValueError: an option that GAN training requires is missing, BasicSR's code would skip a loss, or the network
            needs labels, which that code does not pass on.
    """

    option_keys = (
        Option('', 'network_d', dict, 'the discriminator', calls='ARCH'),
        Option('train', 'optim_d', dict, 'optimizer of network_d', calls='optimizer'),
        Option('train', 'scheduler_d', dict | None, "of network_d; default: network_g's", calls='scheduler'),
        Option('train', 'net_d_iters', float, 'network_g is trained once every net_d_iters iterations', low=1),
        Option('train', 'net_d_init_iters', float, 'iterations before network_g is trained', low=0),
    )
    loss_keys = ('pixel_opt', 'perceptual_opt', 'gan_opt', 'ldl_opt')  # those that optimize_micro_batch uses

    @classmethod
    def check_training(cls, opt: dict) -> None:
        super().check_training(opt)
        train_opt = opt['train']
        parts = {'network_d': opt, 'train.optim_d': train_opt, 'train.gan_opt': train_opt}
        for name, section in parts.items():
            if not section.get(name.removeprefix('train.')):
                raise ValueError(f'{name}: missing, required by {cls.__name__}')
        for name, loss in train_opt.items():
            if name.endswith('_opt') and loss is not None and name not in cls.loss_keys:
                raise ValueError(f'train.{name}: {cls.__name__} supports only {", ".join(cls.loss_keys)}')
        if train_opt.get('ldl_opt') and not train_opt.get('ema_decay'):
            raise ValueError('train.ema_decay: missing, required by train.ldl_opt')

    def init_training_settings(self) -> None:
        net = self.get_bare_model(self.net_g)
        if getattr(net, 'needs_label', False):
            raise ValueError(
                f'network_g: {type(net).__name__} needs labels, which {type(self).__name__} does not provide'
            )
        super().init_training_settings()
        if self.opt['train'].get('ldl_opt'):
            if not getattr(self, 'cri_ldl', None):
                raise ValueError('train.ldl_opt: this BasicSR has no LDL; 1.4.2 does')
            self.net_g_ema.requires_grad_(False)  # its output is only compared with

    def optimize_micro_batch(self, current_iter: int) -> None:
        """SRGANModel's iteration, or with LDL RealESRGANModel's, which adds only LDL. Nothing is sharpened."""
        if not self.opt['train'].get('ldl_opt'):
            super().optimize_micro_batch(current_iter)
            return
        from basicsr.models.realesrgan_model import RealESRGANModel

        self.gt_usm = self.gt
        for key in ('l1_gt_usm', 'percep_gt_usm', 'gan_gt_usm'):
            self.opt.setdefault(key, False)
        RealESRGANModel.optimize_parameters(self, current_iter)

    def setup_optimizers(self) -> None:
        super().setup_optimizers()
        optim_opt = self.opt['train']['optim_d']
        self.optimizer_d = self.get_optimizer(optim_opt.pop('type'), self.net_d.parameters(), **optim_opt)
        self.optimizers.append(self.optimizer_d)
