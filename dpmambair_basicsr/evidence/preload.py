"""Imported by the process that others are forked from: everything that train and test need."""

import dpmambair_basicsr.training.huge_pages  # noqa: F401  (before PyTorch)

# isort: split
from dpmambair_basicsr import registration

for name in ('train', 'test'):
    registration.pipeline(name)
