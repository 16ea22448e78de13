"""The machine itself: cards and what the libraries were built for, memory of the host, room on the disks.
Takes less than a second."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from loop.check.findings import Finding, in_gib
from loop.config import Config
from model.delta_rule import why_no_kernel

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED = 64 * 2**20  # NCCL's buffers between two cards without direct access
HUB_CACHE = "~/.cache/huggingface"


def machine(config: Config, has_delta_rule: bool) -> list[Finding]:
    """Everything but what has to be computed."""
    found = [Finding("machine", "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")]
    if torch.cuda.is_available():
        found += [card(number, has_delta_rule) for number in range(torch.cuda.device_count())]
        found.append(quantizers())
        found += direct_access()
    else:
        found.append(Finding("machine", "GPU", "none is visible: the CPU's paths are checked instead"))
    found.append(Finding("machine", "host memory", in_gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))))
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        few = free < LEAST_SHARED
        found.append(Finding("machine", str(SHARED_MEMORY), f"{in_gib(free)} free",
                             "NCCL needs more: start the container with --shm-size=1g" if few else ""))
    weights = Path(config.model.path).expanduser()
    cache = Path(os.environ.get("HF_HOME", HUB_CACHE)).expanduser()
    places = {"disk of the weights": weights if weights.exists() else cache, "disk of the checkpoints": Path.cwd()}
    for name, path in places.items():
        while not path.exists():
            path = path.parent
        found.append(Finding("machine", name, f"{in_gib(shutil.disk_usage(path).free)} free at {path}"))
    return found


def card(number: int, has_delta_rule: bool) -> Finding:
    """One GPU: whether torch has code for it, and whether flash-linear-attention computes right on it."""
    properties = torch.cuda.get_device_properties(number)
    code = f"sm_{properties.major}{properties.minor}"
    built = torch.cuda.get_arch_list()
    # code for an earlier card of the same generation runs as well, and so does the `compute_` code of any earlier card
    own = 10 * properties.major + properties.minor
    earlier = {kind: [int(arch.removeprefix(kind).rstrip("af")) for arch in built if arch.startswith(kind)]
               for kind in ("sm_", "compute_")}
    has_code = any(code <= own for code in earlier["compute_"]) or any(
        code <= own and code // 10 == properties.major for code in earlier["sm_"])
    problem = "" if has_code else (
        f"this torch has no code for {code}, only for {', '.join(built)}: install one that has (pytorch.org)")
    why = why_no_kernel(properties.major) if has_delta_rule else ""
    words = f"{properties.name}, {code}, {in_gib(properties.total_memory)}, driver {driver()}"
    return Finding("machine", f"GPU {number}", words + (f"; the delta rule runs in plain torch: {why}" if why else ""), problem)


def driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown (nvidia-smi does not run)"


def quantizers() -> Finding:
    """Whether bitsandbytes found its library for this CUDA."""
    from bitsandbytes.cextension import lib

    built = bool(getattr(lib, "compiled_with_cuda", False))
    words = f"{version('bitsandbytes')}, {'with' if built else 'without'} CUDA"
    upgrade = f"it has no library for CUDA {torch.version.cuda}: pip install --upgrade bitsandbytes"
    return Finding("machine", "bitsandbytes", words, "" if built else upgrade)


def direct_access() -> list[Finding]:
    """Whether each pair of cards can read each other's memory. Without it NCCL goes by way of the host, and is slower."""
    num = torch.cuda.device_count()
    return [Finding("machine", f"GPU {a} to GPU {b}",
                    "direct access" if torch.cuda.can_device_access_peer(a, b) else "by way of the host's memory")
            for a in range(num) for b in range(a + 1, num)]
