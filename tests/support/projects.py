"""Projects of others, derived from BasicSR's source: each differs from it in the ways that are typical of its kind."""

import re
from pathlib import Path

from support.commands import warm_python


def replace_in(file: Path, *changes: tuple[str, str]) -> None:
    """Replaces each old text, a regular expression that must match, by the new one."""
    text = file.read_text()
    for old, new in changes:
        text, count = re.subn(old, new, text, flags=re.DOTALL)
        assert count, f'{file}: {old}'
    file.write_text(text)


def without_vgg(source: Path) -> Path:
    """Without VGG and the loss that needs it, like MambaIR's fork."""
    for name in ('vgg_arch.py', 'dfdnet_arch.py'):
        (source / 'basicsr/archs' / name).unlink()
    replace_in(
        source / 'basicsr/losses/basic_loss.py',
        (r'from basicsr.archs.vgg_arch import VGGFeatureExtractor\n', ''),
        (r'@LOSS_REGISTRY.register\(\)\nclass PerceptualLoss.*', ''),
    )
    return source


def with_own_losses(source: Path) -> Path:
    """With losses of the same names as ours, like the forks of CodeFormer and others."""
    with open(source / 'basicsr/losses/basic_loss.py', 'a') as file:
        for name in ('PSNRLoss', 'LPIPSLoss'):
            file.write(f'\n\n@LOSS_REGISTRY.register()\nclass {name}(L1Loss):\n    """The project\'s own."""\n')
    return source


def without_registry(source: Path) -> Path:
    """Like Restormer's fork: classes are looked up in the modules of a folder, and basicsr has no __init__.py."""
    package = source / 'basicsr'
    (package / 'archs').rename(package / 'models/archs')
    for file in package.rglob('*.py'):
        text = file.read_text().replace('basicsr.archs', 'basicsr.models.archs')
        text = re.sub(r'from basicsr.utils.registry import .*\n', '', text)
        file.write_text(re.sub(r'@\w+_REGISTRY.register\(.*?\)\n', '', text))
    folders = {'models/archs': '_arch_modules', 'data': '_dataset_modules', 'models': '_model_modules'}
    folders |= {'losses': '_model_modules', 'metrics': '[psnr_ssim, niqe]'}
    for folder, modules in folders.items():
        found = rf'next(getattr(module, \1) for module in {modules} if hasattr(module, \1))('
        replace_in(package / folder / '__init__.py', (r'\w+_REGISTRY.get\((.*?)\)\(', found))
    replace_in(package / 'metrics/__init__.py', ('from .niqe', 'from . import niqe, psnr_ssim\nfrom .niqe'))
    for name in ('utils/registry.py', '__init__.py'):
        (package / name).unlink()
    return source


def with_a_package_of_its_own(folder: Path) -> Path:
    """Like HAT and Real-ESRGAN: its own networks and command, for an installed BasicSR."""
    archs = folder / 'own/archs'
    archs.mkdir(parents=True)
    (folder / 'own/__init__.py').touch()
    (archs / '__init__.py').write_text("""
import importlib
from pathlib import Path

from basicsr.utils import scandir

names = [Path(name).stem for name in scandir(str(Path(__file__).parent)) if name.endswith('_arch.py')]
modules = [importlib.import_module(f'own.archs.{name}') for name in names]
""")
    (archs / 'own_arch.py').write_text("""
from basicsr.archs.srresnet_arch import MSRResNet
from basicsr.utils.registry import ARCH_REGISTRY


@ARCH_REGISTRY.register()
class OwnNet(MSRResNet):
    pass
""")
    (folder / 'own/train.py').write_text("""
import os.path as osp

import own.archs
from basicsr.train import train_pipeline

if __name__ == '__main__':
    train_pipeline(osp.abspath(osp.join(__file__, osp.pardir, osp.pardir)))
""")
    return folder


# The environment that a project expects: an older torchvision, and no basicsr before its own on the path.
WHERE_IT_STARTS = """
import sys, types
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from torchvision.transforms import functional
module = types.ModuleType('torchvision.transforms.functional_tensor')
module.rgb_to_grayscale = functional.rgb_to_grayscale
sys.modules[module.__name__] = module
sys.path.insert(1, '.')
spec = PathFinder.find_spec('basicsr', ['.'])
if spec is not None and spec.loader is None:
    sys.modules['basicsr'] = module_from_spec(spec)
"""

FIRST = """
import os, runpy, sys
first, *sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
exec(first, {})
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def output(*arguments, cwd: Path, expected: int = 0) -> str:
    """Of `python ARGUMENTS`; `expected` is its exit status."""
    done = warm_python(*arguments, cwd=cwd)
    assert done.returncode == expected, f'{arguments}: {done.returncode}\n{done.stdout}'
    return done.stdout


def output_of_script(*arguments, cwd: Path, first: str = '') -> str:
    """Of `python SCRIPT ...`; `first` is Python code to run before it."""
    return output('-c', FIRST, first, *arguments, cwd=cwd)
