"""Mixed precision and compilation of the network in training."""

import os
import shutil
import sys
from collections.abc import Callable
from types import MethodType
from typing import Literal

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn
from torch.optim import Optimizer

from dpmambair_basicsr.files.option_row import Option

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


class Precision:
    """Runs the network in lower precision, or compiled, during training.

    Testing and validation are unaffected: fp32, not compiled.

    Args:
        train: the section `train` of the options.
            amp: bf16 or fp16, the type of the network's convolutions etc.; losses, parameters, optimizer and selective
                scans stay in fp32. fp16 needs a GPU and a model that scales its loss. Default: fp32.
            compile: whether to torch.compile the network's blocks, or all of it if it has no repeated blocks; takes
                some minutes at the first iteration, and again when the crops change their size.
        device: the network's.
    """

    option_keys = (
        Option('train', 'amp', Literal['bf16', 'fp16'] | None, 'mixed precision'),
        Option('train', 'compile', bool | None, 'compile the blocks of the network'),
    )

    def __init__(self, train: dict, device: torch.device):
        self.amp, self.compile = train.get('amp'), train.get('compile')
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == 'fp16')
        self.device = device

    @staticmethod
    def check_options(opt: dict, model: str, scales_loss: bool) -> None:
        """Raises ValueError naming the option that is invalid or unsupported here.

        Args:
            model: its name.
            scales_loss: whether its optimize_parameters uses `scaler`, without which fp16 gradients vanish.
        """
        amp, compiled = (opt['train'].get(key) for key in ('amp', 'compile'))
        if amp is not None and amp not in DTYPES:
            raise ValueError(f'train.amp: must be one of {", ".join(DTYPES)}, ~, got {amp!r}')
        if amp == 'fp16' and not scales_loss:
            raise ValueError(f'train.amp: {model} does not scale its losses, as fp16 requires; write bf16')
        if amp == 'fp16' and opt['num_gpu'] == 0:
            raise ValueError('train.amp: fp16 needs a GPU; write bf16')
        if compiled not in (None, True, False):
            raise ValueError(f'train.compile: expected true or false, got {compiled!r}')
        if (amp or compiled) and opt['num_gpu'] > 1 and not opt['dist']:
            key = 'amp' if amp else 'compile'
            raise ValueError(f'train.{key}: needs a process for each of the {opt["num_gpu"]} GPUs: --launcher pytorch')
        if compiled and (missing := missing_compiler(opt['num_gpu'] > 0)):
            raise ValueError(
                f'train.compile: needs a C++ compiler, and {missing} was not found; install one or write false'
            )

    def prepare(self, net: nn.Module) -> None:
        """Must be called after the network and its EMA have been created."""
        if not self.amp and not self.compile:
            return
        forward = type(net).forward
        if self.compile and not compile_blocks(net):
            forward = torch.compile(forward)
        if self.amp:
            forward = mixed(DTYPES[self.amp], forward)
        in_training(net, forward)
        how = [f'{self.amp}, but losses, parameters and scans fp32'] * bool(self.amp)
        how += ['compiled'] * bool(self.compile)
        get_root_logger().info(f'Training {type(net).__name__} on {self.device.type}: {", ".join(how)}.')

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss; with fp16, multiplied by `scaler`'s factor."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, if_left_out: Callable[[Optimizer], None]) -> None:
        """Step with the gradients of `backward`.

        If they are not finite, fp16's scaler skips the optimizer, and with it the hook that counts skipped steps;
        `if_left_out` is called instead.
        """
        scale = self.scaler.get_scale()
        self.scaler.unscale_(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            if_left_out(optimizer)


def in_training(module: nn.Module, forward: Callable) -> None:
    """Makes `forward(module, *inputs)` replace the module's own while the module is in training mode.

    State dict names are unchanged; a deepcopy uses its own parameters, as bound methods are copied with their object.
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
    """Compiles the blocks of a U-Net, once per feature shape, which is faster than compiling the whole network.

    Returns:
        Whether there are any.
    """
    blocks = [block for stage in getattr(net, 'stages', ()) for block in stage]
    compiled = {kind: torch.compile(kind.forward) for kind in {type(block) for block in blocks}}
    for block in blocks:
        in_training(block, compiled[type(block)])
    return bool(blocks)


def missing_compiler(gpu: bool) -> str | None:
    """The compiler that torch.compile needs for this kind of device, if it is missing."""
    if gpu:
        names = [os.environ['CC']] if 'CC' in os.environ else ['cc', 'gcc', 'clang']
    else:
        names = [os.environ.get('CXX', {'darwin': 'clang++', 'win32': 'cl'}.get(sys.platform, 'g++'))]
    return None if any(map(shutil.which, names)) else names[-1]
