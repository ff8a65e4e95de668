"""Package metadata. Install with `pip install -e .` (add `[cpu]`, `[cuda]` or `[test]`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDER = Path(__file__).parent

setup(
    name='dpmambair_basicsr',
    version=re.search(r"__version__ = '(.+)'", (FOLDER / 'dpmambair_basicsr/__init__.py').read_text())[1],
    description='Mamba-based image restoration (VmambaIR, DPMambaIR) as a BasicSR extension',
    long_description=(FOLDER / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=[*find_packages(include=['dpmambair_basicsr', 'dpmambair_basicsr.*']), 'dpmambair_basicsr.option_files'],
    package_dir={'dpmambair_basicsr.option_files': 'options'},  # for `python -m dpmambair_basicsr.dropin`
    package_data={'dpmambair_basicsr.option_files': ['*.yml']},
    python_requires='>=3.10,<3.13',  # BasicSR 1.4.2 cannot be built on 3.13
    # basicsr 1.4.2 asks for tb-nightly and builds against torch: README, "Install", says how to get it in six seconds.
    install_requires=['torch>=2.10', 'torchvision', 'basicsr>=1.4.2', 'lpips', 'opencv-python>=4.13', 'pyyaml'],
    extras_require={
        'cuda': ['mamba-ssm', 'causal-conv1d'],
        'cpu': ['numba>=0.60'],
        'safetensors': ['safetensors'],
        'spandrel': ['spandrel>=0.4'],
        'viewer': ['matplotlib>=3.8', 'scikit-learn>=1.3'],
        'export': ['onnx', 'onnxscript>=0.5', 'onnxruntime>=1.20'],
        'test': [
            'pytest',
            'pytest-xdist',
            'hypothesis',
            'ruff',
            'fvcore',
            'safetensors',
            'scikit-image',
            'scikit-learn',
        ],
    },
)
