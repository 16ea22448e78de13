"""The model of one rank: read in slices, quantized, adapted, cut into stages."""

import logging

# bitsandbytes advises on import to install a CPU kernel for a forward pass that is not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
