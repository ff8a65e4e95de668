"""What test_selective_scan.py, which covers this backend too if it is installed, does not test."""

import pytest
import torch
from test_selective_scan import TOLERANCE, run_with_grads, scan_inputs

from dpmambair_basicsr.ops.selective_scan import BACKENDS, available_backends
from dpmambair_basicsr.ops.selective_scan import mamba_ssm as mamba_ssm_backend

installed = torch.cuda.is_available() and mamba_ssm_backend.why_unavailable(torch.device('cuda'), torch.float32) is None


@pytest.mark.skipif(installed, reason='mamba_ssm works here')
def test_says_what_to_install():
    reason = mamba_ssm_backend.why_unavailable(torch.device('cuda'), torch.float32)
    assert 'mamba_ssm does not work' in reason and 'pip install --no-build-isolation mamba-ssm' in reason
    assert '\n' not in reason


def test_is_used_on_request_only():
    assert list(BACKENDS).index('mamba_ssm') > list(BACKENDS).index('torch')
    assert 'mamba_ssm' not in available_backends('cpu')
    assert 'mamba_ssm' not in available_backends('cuda', torch.float64)


def test_supports_at_most_256_states():
    inputs = scan_inputs(b=1, d=1, n=257, length=1)
    with pytest.raises(ValueError, match='mamba_ssm supports up to n = 256 states, got 257'):
        mamba_ssm_backend.scan(*inputs.values(), True)


@pytest.mark.skipif(not installed, reason='needs a GPU and mamba_ssm')
def test_gradients_have_the_dtypes_of_the_inputs():
    """Half u; parameters in fp32, half and half."""
    inputs = scan_inputs(d=8, n=16, length=300, g=2, dtype=torch.float32, device='cuda')
    halves = {name: x if name in ('A', 'B', 'D') else x.bfloat16() for name, x in inputs.items()}
    exact = run_with_grads({name: x.double() for name, x in halves.items()}, backend='reference', delta_softplus=True)
    for name, x in run_with_grads(halves, backend='mamba_ssm', delta_softplus=True).items():
        assert x.dtype == halves['u' if name == 'y' else name[1:]].dtype
        # B is rounded on its way in: all are one type there.
        assert (x - exact[name]).abs().max() <= 3 * TOLERANCE[torch.bfloat16] * exact[name].abs().max(), name
