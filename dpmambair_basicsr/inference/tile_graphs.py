"""Calls of a network on tiles of one shape, by one launch each: CUDA graphs."""

import logging
import os
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor, nn

from dpmambair_basicsr.archs.blocks import ImageMean, MeansOverTiles
from dpmambair_basicsr.ops.cuda_graphs import CudaGraphs, Recorder, RecordingError, Replayed
from dpmambair_basicsr.ops.selective_scan.backend import backend_in_force

WARM_UP = 2  # calls of each shape before it is recorded: an image that is alone with its size is not worth it
VARIABLE = 'DPMAMBAIR_CUDA_GRAPHS'


class TileGraphs:
    """A function of a tile, recorded at the third call with tiles of one shape, from then on replayed.

    The graphs of a shape are forgotten, with their memory, when a tile of another comes. A graph is used only where its
    first replay gives the bits that the function gives; otherwise the log says so once, and the function is called.
    Several threads may share one. `look_at` the network before each image.

    Args:
        function: (image, embedding or None) -> a tensor, all on one device; its ImageMeans may be shared over tiles.
        make_recorder: for each shape.
    """

    def __init__(self, function: Callable[[Tensor, Tensor | None], Tensor], make_recorder: Callable[[], Recorder]):
        self.function, self.make_recorder = function, make_recorder
        self.lock = Lock()
        self.failed = self.hooked = False
        self.parts: list = []
        self.forget()

    @classmethod
    def on(cls, device: torch.device, function: Callable[[Tensor, Tensor | None], Tensor]) -> 'TileGraphs | None':
        """On a GPU, unless the environment variable is 0."""
        wanted = device.type == 'cuda' and os.environ.get(VARIABLE) != '0'
        return cls(function, lambda: CudaGraphs(device)) if wanted else None

    def look_at(self, net: nn.Module) -> None:
        """Record a network anew if layers or a `forward` were replaced or moved, and call it while it has hooks."""
        modules = list(net.modules())
        with self.lock:
            self.hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
            forwards = [vars(module).get('forward') for module in modules]
            self.parts = [*modules, *forwards, *(parameter.data_ptr() for parameter in net.parameters())]

    def forget(self) -> None:
        self.setting: tuple | None = None
        self.calls: dict[bool | None, Replayed] = {}

    def __call__(self, image: Tensor, embedding: Tensor | None, means: MeansOverTiles | None) -> Tensor:
        """The function's result, on the CPU, in the context of `means`."""
        with self.lock:
            if not (self.failed or self.hooked):
                try:
                    return self.replay(image, embedding, means)
                except RecordingError as error:
                    self.failed = True
                    self.forget()
                    logging.getLogger('dpmambair_basicsr').warning(f'no CUDA graphs for tiles: {error}')
            return call(self.function, image, embedding, means).cpu()

    def replay(self, image: Tensor, embedding: Tensor | None, means: MeansOverTiles | None) -> Tensor:
        setting = image.shape, backend_in_force(), self.parts
        if setting != self.setting:
            self.forget()
            self.setting, self.recorder = setting, self.make_recorder()
        kind = None if means is None else means.complete
        if kind not in self.calls:
            function = {None: self.alone, False: self.collecting, True: self.sharing}[kind]
            self.calls[kind] = Replayed(function, self.recorder, WARM_UP, pure=True)
        given = () if means is None or not means.complete else (means.of_variant(),)
        output, found = self.calls[kind](image, embedding, *given)
        if means is not None:
            means.add(*found)
        return output.cpu()

    def alone(self, image, embedding):
        return self.function(image, embedding), ({}, {})

    def collecting(self, image, embedding):
        means = MeansOverTiles()
        return call(self.function, image, embedding, means), (means.sums, means.pixels)

    def sharing(self, image, embedding, given: dict[ImageMean, Tensor]):
        return call(self.function, image, embedding, MeansOverTiles.of(given)), ({}, {})


def call(function, image: Tensor, embedding: Tensor | None, means: MeansOverTiles | None) -> Tensor:
    if means is None:
        return function(image, embedding)
    with means:
        return function(image, embedding)
