"""Which operators a scan runs, and how torch.compile and torch.export handle a module that contains one."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dpmambair_basicsr.ops.selective_scan.operators import Operator


def add_parameters(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """One by one: PyTorch 2.11's Dynamo cannot unpack an nn.ParameterList."""
    module.parts = []
    for i, tensor in enumerate(tensors):
        module.parts.append(f'part_{i}')
        module.register_parameter(module.parts[-1], nn.Parameter(tensor))


def added_parameters(module: nn.Module) -> list[Tensor]:
    return [getattr(module, name) for name in module.parts]


def skip_where_forks_have_no_gradients() -> None:
    if torch.cuda.is_initialized():
        pytest.skip('PyTorch refuses gradients in a fork of a process that has used CUDA')


def scans_run_by(function: Callable[[], object]) -> list[str]:
    """The names of our operators that a call runs, including the backward pass."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        function()
    names = [event.name.partition('dpmambair_basicsr::')[2] for event in record.events()]
    return [name for name in names if name]


def assert_passes_opcheck(operator: Operator, inputs: tuple, **tolerances: float) -> None:
    """PyTorch's own checks: no mutation or aliasing, correct fake tensors, correct tracing by torch.compile."""
    torch.library.opcheck(operator.recorded, inputs, **tolerances)
    with torch.no_grad():
        torch.library.opcheck(operator.eager, inputs, test_utils=('test_schema', 'test_faketensor'))


def assert_compiles_without_a_graph_break(module: nn.Module, x: Tensor) -> None:
    """module(x) must be a scalar; parameter gradients are compared too."""
    loss = module(x)
    expected = torch.autograd.grad(loss, list(module.parameters()))
    compiled = torch.compile(module, backend='aot_eager', fullgraph=True)(x)
    torch.testing.assert_close(compiled, loss)
    for gradient, other in zip(torch.autograd.grad(compiled, list(module.parameters())), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def assert_exports_as_one_node(module: nn.Module, x: Tensor, operator: str) -> None:
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))
    calls = [str(node.target) for node in program.graph.nodes if node.op == 'call_function']
    scans = [name for name in calls if 'scan' in name]
    assert scans == [f'dpmambair_basicsr.{operator}.default']
