"""Make PyTorch allocate large CPU tensors in huge pages (Linux). Must be imported before PyTorch.

PyTorch requests each large CPU tensor from the system anew, which clears it page by page: two fifths of the CPU time
of a forward pass at 256 x 256; a quarter with huge pages. For programs, not for libraries: it applies to all tensors of
the process. `THP_MEM_ALLOC_ENABLE=0` in the environment disables it.

Making malloc keep freed memory (mallopt) would save all of that time. But with small objects between the tensors, as in
a training, the process then grows without limit: to five times its size in three passes.
"""

import os

os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
