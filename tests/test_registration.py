"""Importing dpmambair_basicsr registers everything, whatever is imported first, and imports nothing needlessly."""

import json

import pytest
from support.commands import basicsr_source, python
from support.projects import replace_in, with_own_losses, without_vgg

# Imports torch and torchvision once, then runs each case in a fork of itself: separate interpreters, but fast.
DRIVER = """
import json, os, sys, traceback, warnings
import cv2, scipy.stats, torch, torchvision
warnings.simplefilter('error', RuntimeWarning)  # the hook warns where it cannot register
outcomes = {}
for name, code in json.loads(sys.argv[1]).items():
    receiver, sender = os.pipe()
    if os.fork() == 0:
        try:
            exec(code, {'__name__': 'case'})
            outcome = 'ok'
        except BaseException:
            outcome = traceback.format_exc()
        os.write(sender, outcome[-4000:].encode())
        os._exit(0)
    os.close(sender)
    outcomes[name] = os.fdopen(receiver).read()
    os.wait()
print(json.dumps(outcomes))
"""

EVERYTHING_IS_REGISTERED = """
import basicsr.test, basicsr.train
from basicsr.utils import options, registry
expected = {
    'ARCH': 'DPMambaIR DegradationAutoencoder DegradationExtractor HighFrequencyEnhancementBlock VmambaIR',
    'DATASET': 'MixedDegradationDataset PairedDegradationDataset SyntheticDegradationDataset',
    'LOSS': 'FFTLoss LPIPSLoss',
    'METRIC': 'calculate_lpips',
    'MODEL': 'DegradationExtractorModel RestorationModel RestorationGANModel RealWorldSRModel RealWorldSRGANModel',
}
for kind, names in expected.items():
    missing = set(names.split()) - set(getattr(registry, f'{kind}_REGISTRY').keys())
    assert not missing, f'{kind}: {missing}'
assert options.parse_options.patched_by == 'dpmambair_basicsr.patches.apply'
assert basicsr.train.parse_options is basicsr.test.parse_options is options.parse_options
"""

# BasicSR 1.4.2 alone cannot be imported with today's torchvision.
FUNCTIONAL_TENSOR = """
import sys, types
from torchvision.transforms import functional
module = types.ModuleType('torchvision.transforms.functional_tensor')
module.rgb_to_grayscale = functional.rgb_to_grayscale
sys.modules[module.__name__] = module
"""

ORDERS = {
    'ours first': 'import dpmambair_basicsr, basicsr',
    'basicsr first': FUNCTIONAL_TENSOR + 'import basicsr, dpmambair_basicsr',
    'basicsr.archs first': FUNCTIONAL_TENSOR + 'import basicsr.archs, dpmambair_basicsr',
    'twice and reloaded': """
import importlib, dpmambair_basicsr, basicsr, dpmambair_basicsr
dpmambair_basicsr.register()
importlib.reload(dpmambair_basicsr.patches.imports)
importlib.reload(dpmambair_basicsr.patches.apply)
importlib.reload(dpmambair_basicsr)
importlib.reload(basicsr.utils.options)
dpmambair_basicsr.register()
importlib.reload(basicsr.train), importlib.reload(basicsr.test)
""",
    'our archs first': 'import dpmambair_basicsr.archs',
    'our data first': 'import dpmambair_basicsr.data',
    'our losses first': 'import dpmambair_basicsr.losses',
    'our metrics first': 'import dpmambair_basicsr.metrics',
    'our models first': 'import dpmambair_basicsr.models',
    'by a file in basicsr/archs': "import sys; sys.path.insert(0, 'in_archs'); import basicsr",
    'by a file in basicsr/models': FUNCTIONAL_TENSOR + "sys.path.insert(0, 'in_models'); import basicsr",
}
ORDERS |= {
    f'our {module} first': f'import dpmambair_basicsr.{module}'
    for module in (
        'registry',
        'files.images',
        'files.pictures',
        'files.checkpoints',
        'files.option_files',
        'inference.restorer',
        'inference.embedder',
        'option_checks.dry_run',
        'option_checks.sections',
        'prepare.job',
        'results.run',
        'training.lr_schedulers',
        'data.paired_degradation_dataset',
        'models.restoration_model',
        'models.step_guard',
    )
}
FORKS = {
    'without VGG': """
import sys, warnings; sys.path.insert(0, 'without_vgg')
import dpmambair_basicsr
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', RuntimeWarning)
    import basicsr
    result = dpmambair_basicsr.register()
(said,) = [str(warning.message) for warning in caught if 'dpmambair' in str(warning.message)]
assert 'losses: VGGPerceptualLoss is not available' in said and 'vgg_arch' in said and 'without_vgg' in said
missing = {(kind, name) for kind, names in result.unavailable.items() for name in names}
assert missing == {('losses', 'VGGPerceptualLoss')}, missing
assert 'LPIPSLoss' in result.available['losses'] and 'RestorationModel' in result.available['models']
from dpmambair_basicsr.registry import look_up, registered
_, (problem,) = look_up(registered('LOSS'), 'train.perceptual_opt.type', 'VGGPerceptualLoss')
assert 'train.perceptual_opt.type: VGGPerceptualLoss is not available with this BasicSR' in problem, problem
""",
    'with losses of its own': """
import sys, warnings; sys.path.insert(0, 'with_own_losses')
import dpmambair_basicsr
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', RuntimeWarning)
    import basicsr
    result = dpmambair_basicsr.register()
(said,) = [str(warning.message) for warning in caught if 'dpmambair' in str(warning.message)]
assert 'losses: PSNRLoss is already another class here, ours is dpmambair_PSNRLoss' in said, said
from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY
from dpmambair_basicsr.losses import LPIPSLoss, PSNRLoss
assert LOSS_REGISTRY.get('PSNRLoss').__module__ == 'basicsr.losses.basic_loss'
assert LOSS_REGISTRY.get('dpmambair_PSNRLoss') is PSNRLoss
assert ARCH_REGISTRY.get('dpmambair_VmambaIR') is ARCH_REGISTRY.get('VmambaIR')
assert set(result.available['losses']) >= {'FFTLoss', 'dpmambair_PSNRLoss', 'dpmambair_LPIPSLoss', 'VGGPerceptualLoss'}
assert set(result.unavailable['patches']) == {'seeding'}, result.unavailable  # the sampler has another name here
""",
    'with losses registered later': """
import sys, warnings; sys.path.insert(0, 'in_archs')
import dpmambair_basicsr, basicsr
from basicsr.utils.registry import LOSS_REGISTRY, METRIC_REGISTRY
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', RuntimeWarning)
    class FFTLoss: pass
    LOSS_REGISTRY.register(FFTLoss)
    @METRIC_REGISTRY.register()
    def calculate_lpips(img, img2): pass
    result = dpmambair_basicsr.register()
said = [str(warning.message) for warning in caught if 'dpmambair' in str(warning.message)]
assert len(said) == 2 and 'losses: FFTLoss is already another class here, ours is dpmambair_FFTLoss' in said[0], said
assert LOSS_REGISTRY.get('FFTLoss') is FFTLoss and METRIC_REGISTRY.get('calculate_lpips') is calculate_lpips
assert LOSS_REGISTRY.get('dpmambair_FFTLoss') is dpmambair_basicsr.losses.FFTLoss
assert 'dpmambair_FFTLoss' in result.available['losses'] and 'FFTLoss' not in result.available['losses']
for name in ('FFTLoss', 'dpmambair_FFTLoss', 'L1Loss'):
    try:
        LOSS_REGISTRY.register(type(name, (), {}))
    except AssertionError as error:
        assert 'already registered' in str(error)
    else:
        raise SystemExit(f'{name} has been replaced')
LOSS_REGISTRY.register(type('PSNRLoss', (), {}), suffix='mine')
assert LOSS_REGISTRY.get('PSNRLoss') is dpmambair_basicsr.losses.PSNRLoss
""",
    'without registry': """
import sys; sys.path.insert(0, 'without_registry')
import dpmambair_basicsr, basicsr.models
assert not any(name.startswith('dpmambair_basicsr.') for name in sys.modules if '.patches' not in name)
""",
    'with another registry': """
import sys, warnings; sys.path.insert(0, 'with_another_registry')
import dpmambair_basicsr
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import basicsr
assert basicsr.models.here
said = str(caught[-1].message)
assert 'with_another_registry' in said
assert 'archs: VmambaIR is not available (basicsr.utils.registry has no ARCH_REGISTRY)' in said
assert 'models: RestorationModel is not available (ModuleNotFoundError: No module named' in said
assert not any(dpmambair_basicsr.register().available.values()) and len(caught) == 1
""",
}


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('registration')
    for kind in ('archs', 'models'):
        source = basicsr_source(folder)
        (source / 'basicsr' / kind / f'zz_{kind[:-1]}.py').write_text('import dpmambair_basicsr\n')
        source.rename(folder / f'in_{kind}')
    for change in (without_vgg, with_own_losses):
        change(basicsr_source(folder)).rename(folder / change.__name__)
    for name in ('train.py', 'data/data_sampler.py'):
        replace_in(folder / 'with_own_losses/basicsr' / name, ('EnlargedSampler', 'RepeatingSampler'))
    files = {'__init__.py': 'from .models import *\n', 'models/__init__.py': 'here = True\n', 'utils/__init__.py': ''}
    write_package(folder / 'without_registry' / 'basicsr', files)
    write_package(folder / 'with_another_registry' / 'basicsr', files | {'utils/registry.py': 'ARCHS = {}\n'})
    cases = {name: code + EVERYTHING_IS_REGISTERED for name, code in ORDERS.items()} | FORKS
    result = python('-c', DRIVER, json.dumps(cases), cwd=folder)
    assert result.returncode == 0, result.stdout
    return json.loads(result.stdout.splitlines()[-1])


def write_package(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize('order', ORDERS)
def test_everything_is_registered_in_any_order_of_imports(outcomes, order):
    assert outcomes[order] == 'ok', outcomes[order]


@pytest.mark.parametrize('fork', FORKS)
def test_an_incompatible_fork_can_still_be_imported(outcomes, fork):
    assert outcomes[fork] == 'ok', outcomes[fork]


def test_importing_the_package_imports_no_large_library(tmp_path):
    code = """
import sys, dpmambair_basicsr
large = {'torch', 'torchvision', 'basicsr', 'numpy', 'cv2', 'yaml'} & set(sys.modules)
assert not large, large
import torch
before = set(sys.modules)  # recent ones import cuda.bindings
import dpmambair_basicsr.ops
large = {'basicsr', 'cv2', 'numba', 'cuda.bindings'} & (set(sys.modules) - before)
assert not large, large
"""
    result = python('-c', code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
