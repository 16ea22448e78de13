"""torchrun without its own traceback: a rank that fails has already said why.

python -m loop.launch --nproc-per-node 2 train.py --config configs/4b.yaml
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

if __name__ == "__main__":
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        sys.exit(min(codes, default=1))
