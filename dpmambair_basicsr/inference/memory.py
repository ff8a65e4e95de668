"""How much memory is available, and how much a network needs."""

import re
import weakref
from pathlib import Path

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpmambair_basicsr.files.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

CGROUP = Path('/sys/fs/cgroup')


class OutOfMemory(UserError, MemoryError):
    """An image is too large for the memory. The message names its size, and what needs less."""


# Messages of libraries without a dedicated exception: PyTorch's allocator, C++, OpenCV, cuBLAS, and oneDNN, whose
# message is not specific.
MESSAGES = re.compile(
    r"can't allocate memory|std::bad_alloc|Insufficient memory|CUBLAS_STATUS_ALLOC_FAILED|could not create a primitive"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, NumPy, PyTorch on any device, or OpenCV means out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or MESSAGES.search(str(error)) is not None


def smaller_tile(tile: int, height: int, width: int) -> int:
    """A tile size that may fit where `tile` (0: the whole image) does not."""
    return min(tile or max(height, width), 1024) // 2


def out_of_memory(height: int, width: int, tile: int, option: str, prefix: str = '') -> OutOfMemory:
    """The error for an image in tiles of `tile` pixels (0: none); `option` is the format of the option to suggest."""
    how = f' in tiles of {tile}' if tile else ''
    advice = option.format(smaller_tile(tile, height, width))
    return OutOfMemory(f'{prefix}{width} x {height} pixels{how}: out of memory; {advice} needs less')


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, on the device or, on a CPU, within system, control group and `ulimit -v`."""
    if device.type == 'cuda':
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = [psutil.virtual_memory().available]
    limit, used, kinds = (read(CGROUP / f'memory.{name}').strip() for name in ('max', 'current', 'stat'))
    if limit.isdecimal() and used.isdecimal():
        cached = kinds.partition('inactive_file ')[2].split()  # page cache, reclaimed when needed
        free.append(int(limit) - int(used) + int(cached[0] if cached else 0))
    if resource is not None:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    return max(min(free), 0)


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ''


class PeakMemory(TorchDispatchMode):
    """Inside `with PeakMemory() as memory:`, `memory.peak` is the peak size in bytes of the tensors created there.

    Allocations inside kernels are not counted: on a CPU, resident memory grew by 1.2 to 1.5 times as much.

    Args:
        known: tensors that existed before.
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
