"""CUDA graphs on a CPU, for tests: the memory operations of a function are recorded and replayed on the same memory.

As in CUDA graphs, the function's Python code is not run again: numbers are those of the recording, inputs are read at
their addresses. Waiting for the device, `.item()`, is an error. And as in CUDA graphs, a recording changes nothing.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape:
    """Replaces `CudaGraphs`.

    Attributes:
        recordings: one per function.
    """

    def __init__(self):
        self.recordings = []

    def aside(self):
        return nullcontext()

    def record(self, function):
        recording = Recording()
        try:
            with recording:
                results = function()
        finally:
            for tensor, before in recording.before.values():
                tensor.copy_(before)
        self.recordings.append(recording)

        def replay():
            recording.replay()
            return results

        return replay


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = {}  # of tensors that are written
        self.made = set()  # memory that did not exist before
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WAITS:
            raise RuntimeError(f'{function} waits for the device')
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [
            leaf
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        for tensor in written:
            if memory(tensor) not in self.made | self.before.keys():
                self.before[memory(tensor)] = tensor.detach(), tensor.detach().clone()
        results = function(*args, **kwargs)
        known = {memory(tensor) for tensor in read}
        new = [x for x in tree_leaves(results) if isinstance(x, Tensor) and memory(x) not in known]
        self.made |= {memory(tensor) for tensor in new}
        if new or written:
            self.operations.append((function, args, kwargs, results, new))
        return results

    def replay(self):
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results, new in self.operations:
                again = function(*args, **kwargs)
                for old, tensor in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if any(old is x for x in new):
                        old.copy_(tensor)


def memory(tensor):
    return tensor.untyped_storage()._cdata
