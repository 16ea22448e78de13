"""The model of one rank: read in slices, quantized, adapted, cut into stages."""

import logging
import os

# Microbatches differ in length from step to step, which would leave gaps that no later tensor fits into. Set here, since torch
# reads it when it first uses a GPU, which bitsandbytes makes it do on import; a setting of the user's stays.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# on import bitsandbytes recommends a CPU kernel for its own forward pass, which this project does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
