"""What the tools that break runs share: tiny runs, how they are started, and what of a run's results is compared.

The processes are forked from the server of tests/processes.py, which here imports what draws the pictures as well.
"""

import hashlib
import os
import shutil
import threading
from pathlib import Path

import yaml

from loop import checkpoint
from tests.conftest import metrics, tiny_settings, write_llama, write_two_sources
from tests.processes import FORKS, ROOT, Run

# tests.runs as well: a tool's own module is imported once more in each process that it starts
FORKS.set_forkserver_preload(
    ["train", "pipeline_train", "loop.plan.__main__", "loop.curves", "matplotlib.pyplot", "tests.runs"])
# semaphores of killed processes, which the server of multiprocessing would report
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
COMPARED = (checkpoint.ADAPTER, checkpoint.OPTIMIZER)
STARTING = threading.Lock()  # `Run` changes this process's environment while it starts one


class Place:
    """A directory with a model, rows and a configuration, in which runs are started under names of their own.

    Args:
        directory: is made.
        write_model: takes a directory, in which it writes a model.
        changes: of the configuration, such as train__max_steps=3.
    """

    def __init__(self, directory, write_model=write_llama, **changes):
        self.directory = Path(directory).resolve()
        rows = self.directory / "rows"
        rows.mkdir(parents=True)
        (self.directory / "checkpoints").mkdir()
        write_two_sources(rows)
        settings = tiny_settings(write_model(self.directory / "model"), rows, self.directory / "train.log", changes)
        (self.directory / "config.yaml").write_text(yaml.safe_dump(settings))

    def run_dir(self, name):
        return self.directory / "checkpoints" / name

    def start(self, name, *arguments, ranks=1, script="train.py", environment=None):
        with STARTING:
            return Run(ROOT / script, *arguments, "--config", self.directory / "config.yaml", f"run={name}", ranks=ranks,
                       directory=self.directory, environment=environment)

    def clear(self, name, run=None):
        """Removes a run's directory, and what its processes said."""
        shutil.rmtree(self.run_dir(name), ignore_errors=True)
        for file in run.files if run else ():
            file.unlink(missing_ok=True)


def last_line(run):
    """What a run said last, for a report."""
    return (run.said.strip().splitlines() or ["nothing was said"])[-1][:300]


def files(run_dir):
    """All files and directories of a run, by their paths in its directory."""
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}


def differences(run_dir, whole):
    """What of a run's results is not as those of the uninterrupted run in the directory `whole`, one sentence each."""
    found = []
    try:
        # the first step after a start has a line more: how long each stage of a pipeline was busy
        ours, theirs = ([line for line in metrics(directory) if "stage_busy_s" not in line] for directory in (run_dir, whole))
        if ours != theirs:
            line = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
            found.append(f"metrics.jsonl differs from line {line + 1} on ({len(ours)} lines, expected {len(theirs)})")
        last, expected = (checkpoint.list_checkpoints(directory)[-1:] for directory in (run_dir, whole))
        if [path.name for path in last] != [path.name for path in expected]:
            return [*found, f"the last checkpoint is {last}, expected {expected}"]
        for name in COMPARED:
            if digest(last[0] / name) != digest(expected[0] / name):
                found.append(f"{last[0].name}/{name} has other bytes")
    except (OSError, ValueError) as error:
        found.append(f"results cannot be read: {error}")
    return found


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
