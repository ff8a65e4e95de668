"""How much memory there is, and how much a network needs."""

import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNKNOWN = 2 * 2**30  # bytes, where the system does not tell


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated; on a CPU what Linux and the control group say, 2 GiB on other systems."""
    if device.type == 'cuda':
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = []
    meminfo = read(Path('/proc/meminfo'))
    if 'MemAvailable:' in meminfo:
        free.append(int(meminfo.partition('MemAvailable:')[2].split()[0]) * 1024)
    limit, used = (read(Path('/sys/fs/cgroup') / name).strip() for name in ('memory.max', 'memory.current'))
    if limit.isdecimal() and used.isdecimal():
        free.append(int(limit) - int(used))
    return max(min(free, default=UNKNOWN), 0)


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ''


class PeakMemory(TorchDispatchMode):
    """Inside `with PeakMemory() as memory:`, `memory.peak` is the most bytes that tensors made there held at once.

    What kernels allocate for themselves is not seen: on a CPU, resident memory grew by 1.2 to 1.5 times as much.

    Args:
        known: tensors that were there before.
    """

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known or key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)
