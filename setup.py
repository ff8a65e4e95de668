"""What pyproject.toml cannot say: options/ is `dpmambair_basicsr.option_files` in a wheel, and what an index shows."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup


def for_an_index(readme: str) -> str:
    """Links into the repository lead nowhere from there: their text stays, and its pictures go."""
    readme = re.sub(r'^!\[[^\]]*\]\((?!https?://)[^)]*\)\n', '', readme, flags=re.M)
    readme = re.sub(r'^<img src="(?!https?://)[^>]*>\n', '', readme, flags=re.M)
    return re.sub(r'\[([^\]]*)\]\((?!https?://)[^)]*\)', r'\1', readme)


# setuptools puts all that lies there into the wheel, also modules that only an earlier version had.
shutil.rmtree(Path(__file__).with_name('build') / 'lib', ignore_errors=True)

setup(
    long_description=for_an_index(Path(__file__).with_name('README.md').read_text(encoding='utf-8')),
    long_description_content_type='text/markdown',
    packages=[
        *find_packages(include=['dpmambair_basicsr', 'dpmambair_basicsr.*']),
        'dpmambair_basicsr.option_files',
        'dpmambair_basicsr.weights',
    ],
    package_dir={'dpmambair_basicsr.option_files': 'options'},  # `files.option_files.packaged_folder` finds them there
    package_data={
        'dpmambair_basicsr': ['py.typed'],
        'dpmambair_basicsr.ops.selective_scan.cuda': ['*.cu', '*.cuh'],
        'dpmambair_basicsr.option_files': ['*.yml', '*.json', 'studies/*.yml'],
        'dpmambair_basicsr.weights': ['*.safetensors', '*.md'],
    },
)
