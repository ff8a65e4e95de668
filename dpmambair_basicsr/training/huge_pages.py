"""Importing this before PyTorch lets it put large CPU tensors into huge pages (Linux), where it would use small ones.

PyTorch requests each large CPU tensor from the system again, which clears it page by page: two fifths of the CPU time
of a forward pass at 256 x 256; a quarter with huge pages. For programs, not for libraries: it holds for all tensors of
the process. `THP_MEM_ALLOC_ENABLE=0` in the environment keeps it off.

Telling malloc to keep freed memory (mallopt) would save all of that time. But with small objects between the tensors,
such as a training's, the process then grows without limit: to five times its size in three passes.
"""

import os

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
