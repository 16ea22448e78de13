"""The training loop and the commands around it."""

import os

# torch's C++ code tells a lost connection in some 20 lines of frames, the run in one line; a setting of the user's stays
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported

import model  # noqa: E402, F401  first, because it quiets bitsandbytes before anything here imports it
