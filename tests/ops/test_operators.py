"""Our operators: eager calls, and calls that PyTorch records, give the same; nobody is given a wrong gradient."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip('numba')

from dpmambair_basicsr.ops.selective_scan.numba import omni, selective
from dpmambair_basicsr.ops.selective_scan.operators import Operator

OPERATORS = [omni._forward, omni._backward, selective._forward, selective._backward]


def arguments():
    """Of the plain scan, its tensors requiring gradients."""
    torch.manual_seed(0)
    b, d, n, length = 2, 3, 2, 70
    u, delta, B, C = (torch.randn(b, *shape, length) for shape in ((d,), (d,), (1, n), (1, n)))
    tensors = u, delta, -torch.rand(d, n), B, C, torch.randn(d), torch.randn(d)
    return [x.requires_grad_() for x in tensors], (True, True)


def gradients(operator):
    tensors, settings = arguments()
    y, _ = operator(*tensors, *settings)
    return y, *torch.autograd.grad(y.sin().sum(), tensors)


def test_eager_and_recorded_calls_are_bit_equal():
    for result, other in zip(gradients(selective._forward), gradients(selective._forward.recorded), strict=True):
        assert torch.equal(result, other)


def test_only_what_records_takes_the_recorded_operator(monkeypatch):
    tensors, settings = arguments()
    recorded = []
    for operator in OPERATORS:
        monkeypatch.setattr(operator, 'recorded', lambda *_, name=operator: recorded.append(name) or 1 / 0)
    gradients(selective._forward)
    with torch.no_grad():
        selective._forward(*tensors, *settings)
    assert not recorded
    with pytest.raises(ZeroDivisionError):
        torch.jit.trace(lambda *x: selective._forward(*x, *settings)[0], tuple(tensors))


def test_a_trace_stays_differentiable():
    tensors, settings = arguments()
    traced = torch.jit.trace(lambda *x: selective._forward(*x, *settings)[0], tuple(tensors))
    found = torch.autograd.grad(traced(*tensors).sin().sum(), tensors)
    for result, other in zip(found, gradients(selective._forward)[1:], strict=True):
        assert torch.equal(result, other)


def test_a_second_derivative_is_refused():
    tensors, settings = arguments()
    y, _ = selective._forward(*tensors, *settings)
    (du,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'):
        torch.autograd.grad(du.sum(), tensors[0])


@pytest.mark.parametrize('with_gradients', [False, True])
def test_fake_tensors_pass_through(with_gradients):
    tensors, settings = arguments()
    with FakeTensorMode() as mode, torch.set_grad_enabled(with_gradients):
        fakes = [mode.from_tensor(x) for x in tensors]
        y, _ = selective._forward(*fakes, *settings)
    assert y.shape == tensors[0].shape and y.requires_grad == with_gradients


def test_a_function_without_annotations_is_refused():
    with pytest.raises(ValueError, match='infer_schema'):
        Operator('untyped', lambda x: x, None)
