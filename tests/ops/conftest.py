import pytest
import torch

from dpmambair_basicsr.ops.selective_scan.numba import runtime as numba_runtime


@pytest.fixture
def nan_in_new_memory():
    """Fills new memory with NaN, which reveals reads of uninitialized memory."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads(monkeypatch):
    """A function that sets the number of threads; even tiny scans then use all of them."""
    monkeypatch.setattr(numba_runtime, '_STATES_PER_THREAD', 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
