"""Finds a model's directory: the given path, the Hugging Face cache, or a download whose size is printed first."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from model.config import local_directory

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chess-coach-trainer"
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
REST = ["config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja",
        "special_tokens_map.json", "added_tokens.json"]


def model_directory(path: str, weights: bool = True, quiet: bool = False) -> Path:
    """The directory with config.json, tokenizer and safetensors files.

    Args:
        path: a directory, or `owner/name` on the Hugging Face hub.
        weights: False where configuration and tokenizer are enough.
        quiet: print nothing; for ranks that wait while another rank downloads.

    Raises:
        ValueError: no such directory or repository, too little space, or no network; says how to fetch the model.
    """
    return local_directory(path) or from_cache(path, weights) or download(path, weights, quiet)


def from_cache(repo: str, weights: bool) -> Path | None:
    """The repository's directory in the Hugging Face cache, or None if a needed file is missing."""
    try:
        directory = Path(snapshot_download(repo, allow_patterns=REST + WEIGHTS, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    if not weights:
        return directory if (directory / "tokenizer.json").exists() else None
    index = list(directory.glob("*.safetensors.index.json"))
    if not index:
        return directory if list(directory.glob("*.safetensors")) else None
    shards = set(json.loads(index[0].read_text())["weight_map"].values())
    return directory if all((directory / shard).exists() for shard in shards) else None


def download(repo: str, weights: bool, quiet: bool) -> Path:
    try:
        size = weights_bytes(repo) if weights else 0
    except Exception as error:  # the HTTP client's errors and the hub's share no base class
        raise ValueError(unreachable(repo, weights, error)) from None
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    sizes = f"{size / 1e9:.1f} GB" if weights else "configuration and tokenizer, some MB"
    sizes += f" to download into {cache}, {free / 1e9:.1f} GB free"
    if free < size:
        raise ValueError(f"{repo}: {sizes}. Set HF_HOME to a directory on a larger disk")
    if quiet:
        disable_progress_bars()
    else:
        print(f"{repo} is not here yet: {sizes}", file=sys.stderr)
    try:  # lock files in the cache let one process of a host download while the others wait
        return Path(snapshot_download(repo, allow_patterns=REST + (WEIGHTS if weights else [])))
    except Exception as error:
        raise ValueError(unreachable(repo, weights, error)) from None


def weights_bytes(repo: str) -> int:
    """Size of the repository's safetensors files."""
    info = HfApi().model_info(repo, files_metadata=True)
    return sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors"))


def unreachable(repo: str, weights: bool, error: Exception) -> str:
    """What to do where there is no network; only the small files are asked for where no weights are needed."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    missing, small = (repo, "") if weights else (f"the tokenizer of {repo}", ' --exclude "*.safetensors"')
    those = "" if weights else " with config.json, tokenizer.json, tokenizer_config.json and the chat template"
    return (
        f"model.path: {missing} is not in the Hugging Face cache and could not be downloaded ({reason}). "
        f"Where there is a network, fetch it with: hf download {repo}{small}   then copy {constants.HF_HUB_CACHE} here, "
        f"or set model.path to a directory{those}"
    )


if __name__ == "__main__":
    try:
        print(model_directory(sys.argv[1]))
    except ValueError as error:
        sys.exit(f"error: {error}")
