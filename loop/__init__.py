"""The training loop and the commands around it."""

import os

import model  # noqa: F401  first, because it quiets bitsandbytes before anything here imports it

# torch's C++ code tells a lost connection in some 20 lines of frames; the run says the same in one. A setting of the user's stays
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
