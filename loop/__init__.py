"""The training loop and the commands around it."""

import model  # noqa: F401  first, because it quiets bitsandbytes before anything here imports it
