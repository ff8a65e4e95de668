"""What pyproject.toml cannot say: options/ of the checkout is `dpmambair_basicsr.option_files` in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=['dpmambair_basicsr', 'dpmambair_basicsr.*']), 'dpmambair_basicsr.option_files'],
    package_dir={'dpmambair_basicsr.option_files': 'options'},  # `dropin.option_files` finds them there
    package_data={'dpmambair_basicsr': ['py.typed'], 'dpmambair_basicsr.option_files': ['*.yml', '*.json']},
)
