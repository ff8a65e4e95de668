"""`train.cuda_graph`: a training step by two launches instead of thousands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from basicsr.utils import get_root_logger
from torch import Tensor
from torch.optim import Optimizer

from dpmambair_basicsr.files.option_row import Option
from dpmambair_basicsr.ops.cuda_graphs import CudaGraphs, Recorder, RecordingError, Replayed

WARM_UP = 3  # iterations of each batch shape before it is recorded


class GraphedStep:
    """The step of a RestorationModel as two CUDA graphs: forward and backward; clipping, optimizer and average.

    Between them, `StepGuard` decides on the host, as in any step. The first iterations of a batch shape run as usual,
    then the next one is recorded; another shape, as in the next phase of a progressive training, forgets the graphs of
    the one before. What the graphs compute is what the same functions compute without them.

    Args:
        model: a RestorationModel with its optimizer.
        make_recorder: for each batch shape.
    """

    option_keys = (
        Option('train', 'cuda_graph', bool | None, 'replay the training step as CUDA graphs, one pair a batch shape'),
    )

    def __init__(self, model, make_recorder: Callable[[], Recorder]):
        self.model, self.make_recorder = model, make_recorder
        self.optimizer: Optimizer = model.optimizer_g
        self.optimizer.defaults['capturable'] = True
        apply_capturable(self.optimizer)
        self.optimizer._warned_capturable_if_run_uncaptured = True  # torch's advice; the warm-up is meant to
        self.rates = [torch.zeros((), device=model.device) for _ in self.optimizer.param_groups]
        self.shape: dict[str, torch.Size] = {}
        self.failed = False

    @classmethod
    def of(cls, model) -> 'GraphedStep | None':
        """If the options ask for it; the log says why, if it cannot be."""
        if not model.opt['train'].get('cuda_graph'):
            return None
        if reason := why_not(model):
            get_root_logger().warning(f'train.cuda_graph: {reason}; every step runs without a graph.')
            return None
        return cls(model, lambda: CudaGraphs(model.device))

    def run(self) -> dict[str, Tensor]:
        """One step; the losses by their names in the log."""
        names = self.model.batch_names
        batch = {name: value for name in names if isinstance(value := getattr(self.model, name, None), Tensor)}
        shape = {name: value.shape for name, value in batch.items()}
        if shape != self.shape:
            self.shape, recorder = shape, self.make_recorder()
            self.differentiate = Replayed(self.gradients_of, recorder, WARM_UP)
            self.update = Replayed(self.step, recorder, WARM_UP)
        losses, bad, gradients = self.replay_or_run(self.differentiate, batch)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group['lr'])
        if self.model.step_guard.skip_if_bad(self.optimizer, bad):
            self.model.average()
        else:
            self.replay_or_run(self.update)
        return losses

    def replay_or_run(self, part: Replayed, *inputs):
        if not self.failed:
            try:
                return part(*inputs)
            except RecordingError as error:
                self.failed = True
                self.model.step_guard.losses_are_finite.clear()  # those of the recording were never computed
                get_root_logger().warning(
                    f'train.cuda_graph: the step cannot be recorded ({error}); every step runs without a graph.'
                )
        return part.function(*inputs)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group['params']]

    def gradients_of(self, batch: dict[str, Tensor]):
        """The losses, whether they or the gradients are not finite, and the gradients; waits for nothing."""
        vars(self.model).update(batch)
        losses = {name: loss.detach() for name, loss in self.model.compute_gradients().items()}
        self.model.output = self.model.output.detach()
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        return losses, self.model.step_guard.badness(trained), [parameter.grad for parameter in self.parameters]

    def step(self) -> None:
        with self.model.step_guard.decided(), self.rates_on_device():
            self.optimizer.step()
        self.model.average()

    @contextmanager
    def rates_on_device(self) -> Iterator[None]:
        """The learning rates are read when a graph is replayed; a number would be that of its recording."""
        groups = self.optimizer.param_groups
        numbers = [group['lr'] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group['lr'] = rate
        try:
            yield
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group['lr'] = number


def why_not(model) -> str | None:
    """Why the training step of this model cannot be graphs; None if it can."""
    if not model.has_one_step:
        return f'{type(model).__name__} has no single step of one network'
    if model.device.type != 'cuda':
        return 'needs a GPU'
    if model.opt['dist'] or model.opt['num_gpu'] > 1:
        return 'the processes of several GPUs exchange gradients within a step'
    if model.accumulation.count > 1:
        return 'train.accum_iter divides the step'
    if model.precision.amp == 'fp16':
        return 'train.amp fp16 looks for its scale within a step; bf16 does not'
    if 'capturable' not in model.optimizer_g.defaults:
        return f'train.optim_g: {type(model.optimizer_g).__name__} has no argument capturable; Adam and AdamW have'
    return None


def apply_capturable(optimizer: Optimizer) -> None:
    """Makes the optimizer, which may have loaded another run's state, compute as its own options say."""
    if 'capturable' not in optimizer.defaults:
        return
    for group in optimizer.param_groups:
        group['capturable'] = optimizer.defaults['capturable']
        on_device = group['capturable'] or group.get('fused')
        for parameter in group['params']:
            state = optimizer.state.get(parameter, {})
            if isinstance(step := state.get('step'), Tensor):
                state['step'] = step.to(parameter.device if on_device else 'cpu')
