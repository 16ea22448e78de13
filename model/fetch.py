"""Finds a model's directory: the path as given, the Hugging Face cache, or a download after saying how large it is."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chess-coach-trainer"
NEEDED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*", "vocab*",
          "merges.txt", "*.jinja", "special_tokens_map.json", "added_tokens.json"]


def model_directory(path: str, quiet: bool = False) -> Path:
    """The directory with config.json, tokenizer and safetensors files.

    Args:
        path: a directory, or `owner/name` on the Hugging Face hub.
        quiet: print nothing (ranks that wait for another one's download).

    Raises:
        ValueError: no such directory or repository, too little space, or no network; with the command that fetches it.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"model.path: {path}: no such directory. Expected one, or a hub name such as Qwen/Qwen3-4B-Thinking-2507")
    cached = from_cache(path)
    return cached or download(path, quiet)


def from_cache(repo: str) -> Path | None:
    """The repository's directory in the Hugging Face cache, if all its weights are there."""
    try:
        directory = Path(snapshot_download(repo, allow_patterns=NEEDED, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    index = list(directory.glob("*.safetensors.index.json"))
    if not index:
        return directory if list(directory.glob("*.safetensors")) else None
    shards = set(json.loads(index[0].read_text())["weight_map"].values())
    return directory if all((directory / shard).exists() for shard in shards) else None


def download(repo: str, quiet: bool) -> Path:
    command = f"hf download {repo}"
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        size = sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors"))
        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        if not quiet:
            print(f"{repo} is not here yet: {size / 1e9:.1f} GB to download into {cache}, {free / 1e9:.1f} GB free", file=sys.stderr)
        if free < size:
            raise ValueError(f"{repo} needs {size / 1e9:.1f} GB in {cache}, {free / 1e9:.1f} GB are free. Set HF_HOME to a larger disk")
        if quiet:
            disable_progress_bars()
        return Path(snapshot_download(repo, allow_patterns=NEEDED))  # its lock files let one process of a host download
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.path: {repo} is not in the Hugging Face cache and could not be downloaded ({reason}). "
            f"Where there is a network, fetch it with: {command}   then copy ~/.cache/huggingface here, or set model.path to a directory"
        ) from None
