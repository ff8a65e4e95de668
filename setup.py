"""Package metadata. Install with `pip install -e .` (add `[cpu]`, `[cuda]` or `[test]`)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name='dpmambair_basicsr',
    version='0.1.0',
    description='Mamba-based image restoration (VmambaIR, DPMambaIR) as a BasicSR extension',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=[*find_packages(include=['dpmambair_basicsr', 'dpmambair_basicsr.*']), 'dpmambair_basicsr.option_files'],
    package_dir={'dpmambair_basicsr.option_files': 'options'},  # for `python -m dpmambair_basicsr.dropin`
    package_data={'dpmambair_basicsr.option_files': ['*.yml']},
    python_requires='>=3.10',
    # basicsr 1.4.2 asks for tb-nightly and builds against torch: README, "Install", says how to get it in six seconds.
    install_requires=['torch>=2.10', 'torchvision', 'basicsr>=1.4.2', 'lpips', 'opencv-python', 'pyyaml'],
    extras_require={
        'cuda': ['mamba-ssm', 'causal-conv1d'],
        'cpu': ['numba>=0.60'],
        'test': ['pytest', 'ruff', 'fvcore', 'scikit-image', 'scikit-learn', 'hypothesis'],
    },
)
