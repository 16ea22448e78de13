"""The model of one rank: read in slices, quantized, adapted, cut into stages."""

import logging

# on import bitsandbytes recommends a CPU kernel for its own forward pass, which this project does not use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
