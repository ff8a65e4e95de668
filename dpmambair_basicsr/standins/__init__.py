"""Stand-ins for mamba_ssm, causal_conv1d and VMamba's CUDA extensions, to run other people's Mamba networks.

    import dpmambair_basicsr.standins
    dpmambair_basicsr.standins.install()      # before the project's own imports
    from mamba_ssm import Mamba               # ours, unless the real one is installed

`python -m dpmambair_basicsr.run SCRIPT` does this for an unmodified script. The scans are `ops.selective_scan`'s, on
any device that PyTorch supports. For the coverage, see docs/mamba_ssm.md. torch is imported only with a stand-in.
"""

import importlib.abc
import importlib.util
import logging
import sys

# Name of the module that others import -> module of ours that fills it.
MODULES = {
    'mamba_ssm': 'mamba_ssm',
    'mamba_ssm.modules': 'mamba_ssm',
    'mamba_ssm.modules.mamba_simple': 'mamba_simple',
    'mamba_ssm.ops': 'mamba_ssm',
    'mamba_ssm.ops.selective_scan_interface': 'selective_scan_interface',
    'causal_conv1d': 'causal_conv1d',
    'causal_conv1d.causal_conv1d_interface': 'causal_conv1d',
    'selective_scan_cuda': 'selective_scan_cuda',
    'selective_scan_cuda_core': 'selective_scan_cuda_core',
    'selective_scan_cuda_oflex': 'selective_scan_cuda_oflex',
}
PACKAGES = sorted({name.partition('.')[0] for name in MODULES})


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `packages`; for what is not covered, the ImportError says so."""

    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        package = name.partition('.')[0]
        if package not in self.packages:
            return None
        if name not in MODULES:
            covered = ', '.join(module for module in MODULES if module.partition('.')[0] == package)
            raise ModuleNotFoundError(
                f'dpmambair_basicsr stands in for {package}, but not for {name}; covered: {covered}', name=name
            )
        is_package = any(module.startswith(f'{name}.') for module in MODULES)
        return importlib.util.spec_from_loader(name, self, origin=__name__, is_package=is_package)

    def exec_module(self, module) -> None:
        ours = importlib.import_module(f'{__name__}.{MODULES[module.__name__]}')
        public = {name: value for name, value in vars(ours).items() if name in ours.__all__}

        def __getattr__(name):
            if name.startswith('__'):
                raise AttributeError(name)
            raise ImportError(
                f'dpmambair_basicsr stands in for {module.__name__}, but not for its {name}; '
                f'covered: {", ".join(public) or "its modules"}'
            )

        vars(module).update(public, __getattr__=__getattr__, __version__='stand-in of dpmambair_basicsr')


def install(*, replace: bool = False) -> list[str]:
    """Makes the missing ones of `PACKAGES` importable. Idempotent.

    Args:
        replace: also replace those that are installed, such as a build that does not load.

    Returns:
        The packages now provided by stand-ins.

    Raises:
        ImportError: with `replace`, if a real one is already imported.
    """
    uninstall()
    show_backend()
    real = [name for name in PACKAGES if is_real(name)]
    if replace:
        if imported := [name for name in real if name in sys.modules]:
            raise ImportError(f'{", ".join(imported)}: imported already, so it cannot be replaced; install() first')
        sys.meta_path.insert(0, StandInFinder(PACKAGES))
        return PACKAGES
    missing = [name for name in PACKAGES if name not in real]
    sys.meta_path.append(StandInFinder(missing))
    return missing


def show_backend() -> None:
    """Prints the scan backend to the terminal unless a log of BasicSR names it. Idempotent."""
    logger = logging.getLogger('basicsr.selective_scan')
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(lambda record: not logging.getLogger('basicsr').handlers)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def uninstall() -> None:
    """Undoes `install`, except for stand-ins that have been imported."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, StandInFinder)]


def is_real(package: str) -> bool:
    """Whether another package of this name is imported or can be found."""
    if package in sys.modules:
        spec = sys.modules[package].__spec__
        return spec is None or spec.origin != __name__
    return importlib.util.find_spec(package) is not None
