"""Which backend runs: argument, `use_backend`, environment variable, the best; in threads, tasks and compiled code."""

import asyncio
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from operator_checks import scans_run_by
from test_omni_scan import omni_inputs
from test_selective_scan import scan_inputs

from dpmambair_basicsr.archs import VmambaIR
from dpmambair_basicsr.ops import omni_scan, selective_scan, use_backend
from dpmambair_basicsr.ops.selective_scan import BACKENDS, BackendError, available_backends
from dpmambair_basicsr.ops.selective_scan.backend import VARIABLE, get_backend

INPUTS = scan_inputs(dtype=torch.float32, length=9) | {'delta_softplus': True}
# Both run everywhere. The definition runs PyTorch's own operators.
RUNS = {'torch': ['chunked_scan'], 'reference': []}


class Counting:
    """The definition as a custom backend that counts its calls."""

    name, reads_half, omni_scan = 'counting', False, None

    def __init__(self):
        self.calls = 0

    def why_unavailable(self, device, dtype):
        return None

    def scan(self, *inputs):
        self.calls += 1
        return get_backend('reference').scan(*inputs)


def plain_scan(backend=None):
    return scans_run_by(lambda: selective_scan(**INPUTS, backend=backend))


def test_every_backend_has_the_attributes_of_the_protocol():
    for name in BACKENDS:
        backend = get_backend(name)
        assert backend.name == name and backend.reads_half in (True, False)
        assert callable(backend.scan) and callable(backend.why_unavailable)
        assert backend.omni_scan is None or callable(backend.omni_scan)


@pytest.mark.parametrize('name', RUNS)
def test_a_context_sets_the_backend_of_all_scans_inside(name):
    with use_backend(name):
        assert plain_scan() == RUNS[name]
        assert scans_run_by(lambda: omni_scan(**omni_inputs(d=4))) == RUNS[name]


def test_contexts_nest_and_exit_on_an_exception():
    before = plain_scan()
    with use_backend('reference'):
        with pytest.raises(ZeroDivisionError), use_backend('torch'):
            assert plain_scan() == RUNS['torch']
            1 / 0  # noqa: B018
        with use_backend(None):
            assert plain_scan() == RUNS['reference']
    assert plain_scan() == before


def test_the_argument_overrides_the_context_and_the_context_the_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, 'reference')
    assert plain_scan() == RUNS['reference']
    with use_backend('torch'):
        assert plain_scan() == RUNS['torch']
        assert plain_scan('reference') == RUNS['reference']
    monkeypatch.setenv(VARIABLE, '')
    assert plain_scan() == plain_scan(available_backends()[0])


def test_errors_about_unknown_names_say_where_they_were_given(monkeypatch):
    choices = "no backend 'cuad'; choose from cuda, numba, torch, reference, mamba_ssm"
    with pytest.raises(BackendError, match=f'^selective_scan: {choices}$'):
        selective_scan(**INPUTS, backend='cuad')
    with pytest.raises(BackendError, match=f'^omni_scan: {choices}$'):
        omni_scan(**omni_inputs(), backend='cuad')
    with pytest.raises(BackendError, match=f'^use_backend: {choices}$'), use_backend('cuad'):
        pass
    monkeypatch.setenv(VARIABLE, 'cuad')
    for scan in (lambda: selective_scan(**INPUTS), lambda: omni_scan(**omni_inputs())):
        with pytest.raises(BackendError, match=f'^DPMAMBAIR_SCAN_BACKEND: {choices}$'):
            scan()


def test_an_unavailable_backend_is_refused_and_not_replaced(monkeypatch):
    """For each kind of scan; the message says where it was requested, what it needs, and which backends there are."""
    for scan in (lambda: selective_scan(**INPUTS), lambda: omni_scan(**omni_inputs())):
        with (
            use_backend('mamba_ssm'),
            pytest.raises(BackendError, match=r"^use_backend: backend 'mamba_ssm' is not av"),
        ):
            scan()
        monkeypatch.setenv(VARIABLE, 'mamba_ssm')
        with pytest.raises(
            BackendError, match=r'^DPMAMBAIR_SCAN_BACKEND: .* CUDA .*Available here: .*torch, reference'
        ):
            scan()
        monkeypatch.delenv(VARIABLE)


def test_contexts_are_local_to_threads_and_tasks():
    def in_thread(results):
        results.append(plain_scan())

    async def task(name, others_turn, my_turn):
        with use_backend(name):
            others_turn.set()
            await my_turn.wait()
            return plain_scan()

    async def tasks():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task('torch', second, first), task('reference', first, second))

    before, seen = plain_scan(), []
    with use_backend('reference'):
        thread = threading.Thread(target=in_thread, args=(seen,))
        thread.start()
        thread.join()
    assert seen == [before]
    assert asyncio.run(tasks()) == [RUNS['torch'], RUNS['reference']]


def test_a_custom_backend_runs():
    backend = Counting()
    with use_backend(backend):
        y = selective_scan(**INPUTS)
        omni_scan(**omni_inputs())
    assert backend.calls == 2
    torch.testing.assert_close(y, selective_scan(**INPUTS, backend='reference'))


def test_a_custom_fused_backend_gets_the_image_and_its_projections():
    seen = []

    def fused(pixels, projected, *others):
        seen.extend([pixels.shape, projected.shape])
        return pixels * 3

    own = SimpleNamespace(name='own', reads_half=False, omni_scan=fused, why_unavailable=lambda *_: None, scan=None)
    inputs = omni_inputs(b=2, d=6, size=(5, 7), n=4, rank=3)
    with use_backend(own):
        torch.testing.assert_close(omni_scan(**inputs), 3 * inputs['x'])
    assert seen == [(2, 35, 6), (2, 35, 4 * (3 + 2 * 4))]


def test_a_recomputed_block_uses_the_backend_of_its_forward_pass():
    """Activation checkpointing: the backward pass runs outside the context, as in the autograd threads of a GPU."""
    torch.manual_seed(0)
    options = {'dim': 4, 'num_blocks': [1, 0, 0, 0], 'num_refinement_blocks': 0, 'd_state': 2}
    net, image = VmambaIR(**options, checkpoint_levels=[0, 1]), torch.rand(1, 3, 8, 8)
    backend = Counting()
    with use_backend(backend):
        loss = net(image).square().sum()
    forward = backend.calls
    loss.backward()
    assert forward > 0 and backend.calls == 2 * forward
    gradients = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    with use_backend('reference'):
        net(image).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, net.parameters(), strict=True))


def test_compiled_and_exported_code_uses_the_backend_of_its_context():
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return selective_scan(*inputs, delta_softplus=True)

    *inputs, _ = INPUTS.values()
    inputs = tuple(inputs)
    with use_backend('torch'):
        compiled = torch.compile(Scan(), backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), selective_scan(**INPUTS, backend='reference'))
        assert scans_run_by(lambda: compiled(*inputs)) == RUNS['torch']
        program = torch.export.export(Scan(), inputs)
    assert [str(n.target) for n in program.graph.nodes if 'scan' in str(n.target)] == [
        'dpmambair_basicsr.chunked_scan.default'
    ]


def test_the_backend_that_runs_is_logged_once():
    code = (
        'import logging, sys, torch\n'
        'logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")\n'
        'from dpmambair_basicsr.ops import selective_scan, use_backend\n'
        'x = torch.ones(1, 2, 3)\n'
        'for _ in range(2):\n'
        '    selective_scan(x, x, -x[0, :, :1], x[:, :1], x[:, :1], backend="reference")\n'
        'with use_backend("torch"): selective_scan(x, x, -x[0, :, :1], x[:, :1], x[:, :1])\n'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    lines = [f"selective_scan: backend '{name}' on cpu" for name in ('reference', 'torch')]
    assert done.stdout.splitlines() == lines, done.stderr
