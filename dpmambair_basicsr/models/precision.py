"""Mixed precision and compilation of the network in training."""

import os
import shutil
import sys
from collections.abc import Callable
from types import MethodType
from typing import Literal

import torch
from basicsr.utils import get_root_logger
from torch import nn

from dpmambair_basicsr.files.option_row import Option

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


class SpeedHooks:
    """Mix-in for SRModel and its descendants. Testing and validation are as without it: fp32, not compiled.

    Options:
        train.amp: bf16 or fp16: the network's convolutions and the like compute in it, losses, parameters, the
            optimiser and the selective scans in fp32. fp16 needs a GPU and a model that scales its loss. Default: fp32.
        train.compile: whether torch.compile compiles the network's blocks, or all of it if it has none of a kind: some
            minutes at the first iteration, and again where the crops change their size.
    """

    option_keys = (
        Option('train', 'amp', Literal['bf16', 'fp16'] | None, 'mixed precision'),
        Option('train', 'compile', bool | None, 'compile the blocks of the network'),
    )
    scales_loss = False  # whether optimize_parameters uses `scaler`, without which fp16 gradients vanish

    @classmethod
    def check_training(cls, opt: dict) -> None:
        """Raises ValueError naming the option that is wrong or does not work here."""
        amp, compiled = (opt['train'].get(key) for key in ('amp', 'compile'))
        if amp is not None and amp not in DTYPES:
            raise ValueError(f'train.amp: {amp!r} is none of {", ".join(DTYPES)}, ~')
        if amp == 'fp16' and not cls.scales_loss:
            raise ValueError(f'train.amp: {cls.__name__} does not scale its losses, as fp16 needs it; write bf16')
        if amp == 'fp16' and opt['num_gpu'] == 0:
            raise ValueError('train.amp: fp16 needs a GPU; write bf16')
        if compiled not in (None, True, False):
            raise ValueError(f'train.compile: has to be true or false, not {compiled!r}')
        if (amp or compiled) and opt['num_gpu'] > 1 and not opt['dist']:
            key = 'amp' if amp else 'compile'
            raise ValueError(f'train.{key}: needs a process for each of the {opt["num_gpu"]} GPUs: --launcher pytorch')
        if compiled and (missing := missing_compiler(opt['num_gpu'] > 0)):
            raise ValueError(
                f'train.compile: needs a C++ compiler, and {missing} is not there; install one or write false'
            )

    def set_up_speed(self) -> None:
        """Called once the network, its average and its parallel form have been made."""
        amp, compiled = (self.opt['train'].get(key) for key in ('amp', 'compile'))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == 'fp16')
        if not amp and not compiled:
            return
        net = self.get_bare_model(self.net_g)
        forward = type(net).forward
        if compiled and not compile_blocks(net):
            forward = torch.compile(forward)
        if amp:
            forward = mixed(DTYPES[amp], forward)
        in_training(net, forward)
        how = [f'{amp}, but losses, parameters and scans fp32'] * bool(amp) + ['compiled'] * bool(compiled)
        get_root_logger().info(f'Training {type(net).__name__} on {self.device.type}: {", ".join(how)}.')


def in_training(module: nn.Module, forward: Callable) -> None:
    """Let `forward(module, *inputs)` take the place of the module's own while the module is in training mode.

    The state dict's names stay; a deepcopy runs on its own parameters, as a method is copied with what it is bound to.
    """

    def choose(module, *inputs):
        return (forward if module.training else type(module).forward)(module, *inputs)

    module.forward = MethodType(choose, module)


def mixed(dtype: torch.dtype, forward: Callable) -> Callable:
    def forward_mixed(module, *inputs):
        with torch.autocast(inputs[0].device.type, dtype):
            output = forward(module, *inputs)
        return output.float()

    return forward_mixed


def compile_blocks(net: nn.Module) -> bool:
    """Compile the blocks of a U-Net, once for each shape of the features, which takes less time than the whole would.

    Returns:
        Whether it has any.
    """
    blocks = [block for stage in getattr(net, 'stages', ()) for block in stage]
    compiled = {kind: torch.compile(kind.forward) for kind in {type(block) for block in blocks}}
    for block in blocks:
        in_training(block, compiled[type(block)])
    return bool(blocks)


def missing_compiler(gpu: bool) -> str | None:
    """The program that torch.compile calls on this kind of device, if it is not there."""
    if gpu:
        names = [os.environ['CC']] if 'CC' in os.environ else ['cc', 'gcc', 'clang']
    else:
        names = [os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')]
    return None if any(map(shutil.which, names)) else names[-1]
