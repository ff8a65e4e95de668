"""Gradient accumulation: one optimizer step for several micro-batches."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import MethodType

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dpmambair_basicsr.files.option_row import Option


class GradientAccumulation:
    """Makes the model process its batch in `train.accum_iter` micro-batches and step once, with their mean gradient.

    As in traiNNer-redux, an iteration is a step: total_iter, schedules, EMA, validation and checkpoints count as for
    a single batch of the full size, to which the training is equal up to rounding. Batch normalization sees
    micro-batches, and spectral normalization iterates with each.

    The loader delivers the micro-batches of an iteration together (`patches/seeding`), so training is only interrupted
    and resumed between steps.

    Args:
        opt: of the training.
    """

    option_keys = (
        Option('train', 'accum_iter', int, 'micro-batches of batch_size_per_gpu for one step; default 1', low=1),
    )

    def __init__(self, opt: dict):
        self.opt = opt
        self.count = (opt.get('train') or {}).get('accum_iter', 1)
        self.index: int | None = None  # of the current micro-batch

    @property
    def is_first(self) -> bool:
        return self.index in (None, 0)

    @property
    def is_last(self) -> bool:
        return self.index in (None, self.count - 1)

    def watch(self, optimizer: Optimizer) -> None:
        """BasicSR's models call zero_grad and step with each micro-batch: makes these calls no-ops in between."""
        if self.count > 1:
            optimizer.zero_grad = only_if(lambda: self.is_first, optimizer.zero_grad)
            optimizer.step = only_if(lambda: self.is_last, optimizer.step)
            optimizer.register_step_pre_hook(self.average)

    def average(self, optimizer: Optimizer, *_) -> None:
        """Called before a step: replaces the sum of the gradients by their mean."""
        for group in optimizer.param_groups:
            for parameter in group['params']:
                if parameter.grad is not None:
                    parameter.grad.div_(self.count)

    def micro_batches(self, model, nets: dict[str, nn.Module]) -> Iterator[None]:
        """Sets the model's `batch_names` to each micro-batch in turn, and back to the whole batch at the end.

        Processes exchange gradients with the last one.

        Args:
            nets: the model's, including their DistributedDataParallel wrappers.

        Raises:
            ValueError: if the batch cannot be divided, or does not have the size that `accum_iter` requires.
        """
        if self.count == 1:
            yield
            return
        whole = {name: value for name in model.batch_names if isinstance(value := getattr(model, name, None), Tensor)}
        self.check_size(len(model.lq))
        parallel = [net for net in nets.values() if isinstance(net, DistributedDataParallel)]
        try:
            for index in range(self.count):
                self.index = index
                for name, value in whole.items():
                    setattr(model, name, value.chunk(self.count)[index])
                with ExitStack() as stack:
                    for net in parallel if not self.is_last else ():
                        stack.enter_context(net.no_sync())
                    yield
        finally:
            self.index = None
            for name, value in whole.items():
                setattr(model, name, value)

    def check_size(self, size: int) -> None:
        train = self.opt['datasets']['train']
        expected = train.get('batch_size_per_gpu', size // self.count) * self.count
        if not self.opt['dist']:
            expected *= max(self.opt['num_gpu'], 1)
        if size % self.count or (size != expected and not train.get('progressive')):
            raise ValueError(
                f'train.accum_iter: {self.count} micro-batches have {expected} images, but the loader gives {size}: '
                'train with dpmambair_basicsr.train, or make your loader give as many'
            )


def only_if(condition: Callable[[], bool], method: MethodType) -> MethodType:
    """The method, turned into a no-op while the condition is not met."""

    @functools.wraps(method.__func__)
    def call(self, *args, **kwargs):
        return method(*args, **kwargs) if condition() else None

    return MethodType(call, method.__self__)
