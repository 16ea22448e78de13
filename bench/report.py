"""What the benches share: the line that says where and when, and how a table gets into bench/README.md."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

README = Path(__file__).resolve().parent / "README.md"


def machine(*packages: str) -> str:
    """Date, commit, processor, load and versions."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=README.parent, capture_output=True, text=True).stdout
    return (f"{datetime.date.today()}, {commit.strip() or 'no repository'}. {names[0] if names else platform.machine()}, "
            f"{os.cpu_count()} cores, a load of "
            f"{os.getloadavg()[0]:.1f} at the end; {platform.system()}, Python {platform.python_version()}, {versions}.")


def write(mark: str, text: str) -> None:
    """Puts a text between <!-- mark --> and <!-- /mark -->."""
    before, start, rest = README.read_text(encoding="utf-8").partition(f"<!-- {mark} -->")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    assert start and end, f"{README}: no place for {mark}"
    README.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")
