"""Records what a function does on a GPU, and does it again by one launch: CUDA graphs.

A network is thousands of launches, which take Python longer than a small image takes the GPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


class RecordingError(RuntimeError):
    """What a function does cannot be recorded, or does not repeat."""


class Recorder(Protocol):
    """`CudaGraphs`, or in tests what computes likewise on a CPU."""

    def aside(self) -> AbstractContextManager:
        """In it, functions that will be recorded run as usual."""
        ...

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A function that repeats on the same memory what `function` would do; the latter's Python is not run again.

        Its results are the same tensors each time, with new values.
        """
        ...


class CudaGraphs:
    """CUDA graphs that share memory: replay them in the order of their recording, and keep no other's results.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self):
        """On the stream of the recording: nodes of autograd keep the stream in which they were made."""
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            yield
        outer.wait_stream(self.stream)

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        # The outer context because torch.cuda.graph, where it fails, leaves its own stream the current one.
        # thread_local: the loader's thread that pins memory may go on.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.stream.device)),
            torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode='thread_local'),
        ):
            results = function()

        def replay():
            graph.replay()
            return results

        return replay


class Replayed:
    """A function of tensors, whose calls are replayed once it has been recorded.

    Args:
        function: of (nested dicts and lists of) tensors, whose shapes and types are the same in each call. Its results,
            and what else it writes, are on the same device. It must not wait for the device.
        recorder: that of all functions which are replayed in turn.
        warm_up: calls before the recording, at least one; they load kernels, choose algorithms and make buffers.
        pure: whether it writes to nothing else; the first replay is then compared with a call.

    A call raises RecordingError, once and having changed nothing, if the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder, warm_up: int, pure: bool = False):
        self.function, self.recorder, self.warm_up, self.pure = function, recorder, warm_up, pure
        self.calls = 0
        self.buffers: list[Tensor] = []  # the inputs
        self.replay: Callable[[], Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The function's results: those of replays change with the next one."""
        self.calls += 1
        if self.calls <= self.warm_up:
            with self.recorder.aside():
                return self.function(*inputs)
        if self.replay is None:
            return self.record(inputs)
        for buffer, tensor in zip(self.buffers, tensors_of(inputs), strict=True):
            buffer.copy_(tensor)
        return self.replay()

    def record(self, inputs: tuple) -> Any:
        copies = tree_map_only(Tensor, torch.clone, inputs)
        expected = tensors_of(self.function(*inputs)) if self.pure else ()
        try:
            replay = self.recorder.record(lambda: self.function(*copies))
        except RuntimeError as error:
            raise RecordingError(' '.join(str(error).split())) from error
        results = replay()
        if self.pure and not all(map(torch.equal, expected, tensors_of(results))):
            raise RecordingError('its first replay gives another result')
        self.buffers, self.replay = tensors_of(copies), replay
        return results


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
