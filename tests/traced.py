"""Runs an entry point that stops before it begins, until a tracer has attached: `traced.py train.py --config ...`.

Only rank 0 stops, since only rank 0 writes.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGSTOP)
    sys.argv.pop(0)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    runpy.run_path(str(Path(__file__).parents[1] / sys.argv[0]), run_name="__main__")
