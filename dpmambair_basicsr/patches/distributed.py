"""Patches of BasicSR for several processes: with and without GPUs, and consistency checks between them."""

import os
from datetime import timedelta
from typing import Any

import torch

from dpmambair_basicsr.option_checks.values import is_kind
from dpmambair_basicsr.patches.registry import replaces
from dpmambair_basicsr.training.heartbeat import Heartbeat

timeout: float | None = None  # dist_params.timeout of the option file, in seconds; None: torch's default


def obey_timeout(opt: dict) -> None:
    """BasicSR reads `dist_params` only for Slurm (utils/options.py:103); applies `timeout`, in s, to torchrun too.

    A value that is not a number is left to the option checks, which come later.
    """
    global timeout
    value = (opt.get('dist_params') or {}).get('timeout')
    timeout = value if value is not None and is_kind(value, float) and value >= 1 else None


@replaces('basicsr.utils.dist_util', '_init_dist_pytorch')
def init_dist_anywhere(original):
    """Initialises process groups with gloo if there is no GPU, otherwise with the GPU of the local rank.

    Fixes: `_init_dist_pytorch` divides by the number of GPUs, which may be 0, always uses NCCL, and picks the wrong
        GPU with several nodes. If a process is stopped or never starts, the others wait silently: see
        `training/heartbeat`.
    Remove once: BasicSR uses gloo without CUDA and the device of LOCAL_RANK, and names the process it waits for.
    """

    def init_dist_pytorch(backend, **kwargs):
        import torch

        if torch.cuda.is_available():
            local_rank = int(os.environ.get('LOCAL_RANK', os.environ['RANK']))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        else:
            backend = 'gloo'
        if timeout is not None:
            kwargs['timeout'] = timedelta(seconds=timeout)
        if int(os.environ['WORLD_SIZE']) > 1:
            Heartbeat(timeout).start()
        torch.distributed.init_process_group(backend=backend, **kwargs)

    return init_dist_pytorch


@replaces('basicsr.utils.dist_util', '_init_dist_slurm')
def init_dist_slurm_without_shell(original):
    """Calls scontrol with an argument list; needs no GPU.

    Fixes: `_init_dist_slurm` pastes SLURM_NODELIST into a shell command (CVE-2024-27763).
    Remove once: BasicSR passes an argument list.
    """

    def init_dist_slurm(backend, port=None, timeout=None):  # see `obey_timeout`
        import subprocess

        from basicsr.utils import dist_util

        command = ['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        os.environ['MASTER_ADDR'] = hosts[0]
        if port is not None:
            os.environ['MASTER_PORT'] = str(port)
        os.environ.setdefault('MASTER_PORT', '29500')
        os.environ['WORLD_SIZE'] = os.environ['SLURM_NTASKS']
        os.environ['RANK'] = os.environ['SLURM_PROCID']
        os.environ['LOCAL_RANK'] = os.environ.get('SLURM_LOCALID', os.environ['SLURM_PROCID'])
        dist_util._init_dist_pytorch(backend)

    return init_dist_slurm


@replaces('basicsr.models.base_model:BaseModel', 'model_to_device')
def model_to_any_device(original):
    """Wraps a network on the CPU for distributed training.

    Fixes: `BaseModel.model_to_device` gives DistributedDataParallel a CUDA device.
    Remove once: BasicSR passes device_ids only for CUDA.
    """

    def model_to_device(self, net):
        if self.opt['dist'] and self.device.type == 'cpu':
            from torch.nn.parallel import DistributedDataParallel

            unused = self.opt.get('find_unused_parameters', False)
            return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
        return original(self, net)

    return model_to_device


def check_processes_agree(**facts: int) -> None:
    """Raises ValueError in each process, naming a fact on which they differ, e.g. nodes that see different files."""
    of_all: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, facts)
    for name in facts:
        values = [of_one[name] for of_one in of_all]
        if len(set(values)) > 1:
            fact, values = name.replace('_', ' '), ', '.join(map(str, values))
            raise ValueError(f'The processes disagree on {fact}: {values}. All must see the same files')
