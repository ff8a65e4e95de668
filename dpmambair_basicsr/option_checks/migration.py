"""Names and keys of the published VmambaIR option files, with their replacements: the table of docs/migration.md."""

from typing import Any

from dpmambair_basicsr.registry import look_up

# name there -> names here; the checks continue with the first
TYPES = {
    'ImageCleanModel': ('RestorationModel',),
    'MambaRealSR': ('RealWorldSRModel',),
    'MambaRealSRGAN': ('RealWorldSRGANModel',),
    'MambaRealSRGANtest': ('RestorationModel',),
    'MambaSISRModel': ('RestorationModel',),
    'MambaSISRGANModel': ('RestorationGANModel',),
    'Mamber32': ('VmambaIR', 'with channel_scan: lifted, channel_fusion: add'),
    'MambaSISR6': ('VmambaIR', 'with scale: 4, channel_scan: lifted, channel_fusion: modulate'),
    'MambaRealSR11': ('VmambaIR', 'with scale: 4, channel_scan: scalar, channel_fusion: modulate'),
    'Dataset_PairedImage': ('PairedDegradationDataset',),
    'RealESRGANDataset_memory': ('RealESRGANDataset',),
}
SEE = ' (docs/migration.md)'
PROGRESSIVE = 'write progressive: {gt_sizes, batch_sizes, iters}'
KEYS = {
    'heads': 'leave it out, it had no effect',
    'LayerNorm_type': 'leave it out, WithBias is the only kind',
    'dual_pixel_task': 'leave it out, it had no effect',
    'geometric_augs': 'write use_hflip: true, use_rot: true',
    'mini_batch_sizes': PROGRESSIVE,
    'gt_sizes': PROGRESSIVE,
    'iters': PROGRESSIVE,
    'use_grad_clip': 'write grad_clip_norm: 0.01',
    'mixing_augs': 'leave it out, there is no mixup',
    'lr_sr': 'leave it out, the rate is that of optim_g, train.scheduler and train.scheduler_d',
    'gamma_sr': 'leave it out, write train.scheduler and train.scheduler_d',
    'lr_decay_sr': 'leave it out, write train.scheduler and train.scheduler_d',
    'window_size': 'leave it out, images of any size are padded and cropped back',
    'rgb2bgr': 'leave it out, images are RGB',
    'use_image': 'leave it out, metrics are those of the 8-bit images',
    'max_minibatch': 'leave it out, it had no effect',
    'accumulation_steps': 'write train.accum_iter',
    'accumulate_steps': 'write train.accum_iter',
    'accumulate': 'write train.accum_iter',
}


def find(known: dict[str, Any], path: str, name) -> tuple[Any, list[str]]:
    """Like `look_up`; for a name of the published files, also the replacement, so that checks can continue with it."""
    target, problems = look_up(known, path, name)
    if target is None and isinstance(name, str) and name in TYPES:
        here, *more = TYPES[name]
        return known.get(here, known.get(f'{here}_basicsr')), [f'{path}: {name} is here {" ".join((here, *more))}{SEE}']
    return target, problems


def advice(key: str) -> str | None:
    """What to write in place of an unknown key, if it is one of these."""
    return f'{KEYS[key]}{SEE}' if key in KEYS else None
