"""Patches of BasicSR for several processes: with and without GPUs, and all on the same files."""

import os

import torch

from dpmambair_basicsr.patches.registry import replaces


@replaces('basicsr.utils.dist_util', '_init_dist_pytorch')
def init_dist_anywhere(original):
    """torchrun without a GPU: `ZeroDivisionError`, then NCCL; utils/dist_util.py:24. With several nodes: the wrong GPU.

    Can go when BasicSR chooses gloo without CUDA and the device by LOCAL_RANK.
    """

    def init_dist_pytorch(backend, **kwargs):
        import torch

        if torch.cuda.is_available():
            local_rank = int(os.environ.get('LOCAL_RANK', os.environ['RANK']))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        else:
            backend = 'gloo'
        torch.distributed.init_process_group(backend=backend, **kwargs)

    return init_dist_pytorch


@replaces('basicsr.utils.dist_util', '_init_dist_slurm')
def init_dist_slurm_without_shell(original):
    """SLURM_NODELIST is pasted into a shell command (CVE-2024-27763), utils/dist_util.py:44; needs a GPU too.

    Can go when BasicSR passes an argument list.
    """

    def init_dist_slurm(backend, port=None):
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
    """Distributed training without a GPU: DistributedDataParallel is given a CUDA device, models/base_model.py:98.

    Can go when BasicSR passes device_ids only for CUDA.
    """

    def model_to_device(self, net):
        if self.opt['dist'] and self.device.type == 'cpu':
            from torch.nn.parallel import DistributedDataParallel

            unused = self.opt.get('find_unused_parameters', False)
            return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)
        return original(self, net)

    return model_to_device


def check_processes_agree(**facts: int) -> None:
    """Raises ValueError, in each process, naming a fact that is not the same in all: nodes that see other files."""
    of_all = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, facts)
    for name in facts:
        values = [of_one[name] for of_one in of_all]
        if len(set(values)) > 1:
            fact, values = name.replace('_', ' '), ', '.join(map(str, values))
            raise ValueError(f'The processes do not agree on {fact}: {values}. All of them have to see the same files')
