"""Cuts the power of a run on an ext4 image at random moments, and checks what is left on the disk and what comes of a resume.

python -m tests.power_cut [--cuts 32] [--seed S] [--cut K]

The image is copied while it is mounted and the run stands still. The copy has what had been synced or written back, and nothing
of the page cache. The mount options let ext4 write as late as it may; in half of the cuts another process syncs a file of its
own, which commits the renames of all others, but not their contents. Needs root and a loop device. Takes about 3 s a cut.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from tests import strace

IMAGE_MIB = 48
OPTIONS = "loop,noauto_da_alloc,commit=300"
STEPS = 8
WAIT_S = 240
FAULTS = ("lost", "torn", "config", "metrics", "refusing", "differing")


def missing():
    """Why no power can be cut here, or None."""
    if os.geteuid() != 0:
        return "mounting an image needs root"
    with tempfile.TemporaryDirectory(prefix="power-cut-") as directory:
        try:
            make_image(Path(directory) / "image")
            with mounted(Path(directory) / "image", Path(directory)):
                return None
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no ext4 image can be mounted here: {getattr(error, 'stderr', None) or error}"


def make_image(image):
    with open(image, "wb") as file:
        file.truncate(IMAGE_MIB * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True,
                   capture_output=True, text=True)


@contextmanager
def mounted(image, at):
    subprocess.run(["mount", "-t", "ext4", "-o", OPTIONS, image, at], check=True, capture_output=True, text=True)
    try:
        yield
    finally:
        subprocess.run(["umount", at], check=True, capture_output=True, text=True)


@contextmanager
def neighbour(directory, rng):
    """Syncs a file every now and then, as another process on the same file system would."""
    stop, pauses_s = threading.Event(), [rng.uniform(0, 0.1) for _ in range(1000)]

    def sync():
        with open(directory / "neighbour", "wb", buffering=0) as file:
            for pause_s in pauses_s:
                if stop.wait(pause_s):
                    return
                file.write(b".")
                os.fsync(file.fileno())

    thread = threading.Thread(target=sync)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def saved(run):
    """The checkpoints that a run has reported, by name."""
    lines = run.stdout.split("\n")[:-1]  # the last one may be half written
    return [Path(line.split()[1]).name for line in lines if line.startswith("saved ")]


class Cuts:
    """Cuts of one seed.

    Args:
        directory: for the images and all files of the runs.
        seed: decides, with a cut's number, when it comes: after how many checkpoints, and how long after that.
    """

    def __init__(self, directory, seed):
        from tests.runs import Place

        self.seed, self.directory = seed, Path(directory)
        self.place = Place(self.directory / "place", train__max_steps=STEPS, checkpoint__every=1, eval__every=3)
        self.disk, self.whole = self.place.directory / "checkpoints", self.place.directory / "whole"
        make_image(self.directory / "empty")
        for _ in range(2):  # the first start also starts the server that the processes are forked from
            started = time.monotonic()
            self.place.clear("whole")
            run = self.place.start("whole")
            assert run.wait(WAIT_S) == [0], run.said
            self.lasts_s = time.monotonic() - started
        self.place.run_dir("whole").rename(self.whole)

    def cut(self, number):
        """Cuts one run; returns what is wrong by its kind, and how many checkpoints had been reported as saved."""
        rng = random.Random(f"{self.seed}/{number}")
        # so many checkpoints first, whatever a run takes here and now; before the first one lies most of a run's time
        saved_first = rng.choice([0, 0, *range(1, STEPS + 1)])
        moment_s = rng.uniform(0, self.lasts_s * (0.1 if saved_first else 1.1))  # a tenth are about two steps
        keep, is_alone = rng.choice((1, 9)), rng.random() < 0.5
        # files of their own: a loop device that is not yet given back would show what it has read of the file before
        image, copy = (self.directory / f"{name}-{number}" for name in ("image", "copy"))
        shutil.copy(self.directory / "empty", image)
        with mounted(image, self.disk):
            run = self.place.start("cut", f"checkpoint.keep={keep}")
            with neighbour(self.disk, rng) if not is_alone else threading.Lock():
                while len(saved(run)) < saved_first and run.running:
                    time.sleep(0.005)
                time.sleep(moment_s)
            with suppress(OSError):  # the run may have ended
                strace.stop(run.processes[0].pid)
            reported = saved(run)
            shutil.copy(image, copy)
            run.kill()
        with mounted(copy, self.disk):  # which replays the journal
            wrong = self.left(self.place.run_dir("cut"), reported if keep > 1 else reported[-1:])
            wrong |= self.resumed(keep)
        for file in (image, copy, *run.files):
            file.unlink(missing_ok=True)
        return wrong, len(reported)

    def left(self, run_dir, reported):
        """What is wrong with what is left on the disk."""
        from loop.checkpoint import list_checkpoints, verify
        from loop.line_file import read_metrics
        from tests.conftest import comparable, metrics

        wrong = {}
        found = {path.name: verify(path) for path in list_checkpoints(run_dir)} if run_dir.exists() else {}
        if lost := [name for name in reported if name not in found]:
            wrong["lost"] = f"{', '.join(lost)} had been saved; there is {', '.join(found) or 'none'}"
        if torn := list(filter(None, found.values())):
            wrong["torn"] = "; ".join(torn)
        config = run_dir / "config.yaml"
        if config.exists() or found:
            text = config.read_text() if config.exists() else ""
            if not text or yaml.safe_load(text)["train"] != yaml.safe_load((self.whole / "config.yaml").read_text())["train"]:
                wrong["config"] = f"config.yaml has {len(text)} bytes"
        if found:
            step = int(max(found)[5:])
            due = [line for line in metrics(self.whole) if line["step"] <= step]
            try:
                there = comparable(read_metrics(run_dir / "metrics.jsonl"))[: len(due)]  # a torn end may follow
            except (OSError, ValueError) as error:
                wrong["metrics"] = str(error)
            else:
                if there != due:
                    wrong["metrics"] = f"{len(there)} lines, of which {len(due)} are due up to {max(found)}"
        return wrong

    def resumed(self, keep):
        """What is wrong with the run when it has been resumed and has ended."""
        from tests.runs import differences, last_line

        run = self.place.start("cut", f"checkpoint.keep={keep}")
        codes = run.wait(WAIT_S)
        try:
            if any(codes):
                return {"refusing": f"exit status {codes}: {last_line(run)}"}
            different = differences(self.place.run_dir("cut"), self.whole)
            return {"differing": "; ".join(different)} if different else {}
        finally:
            for file in run.files:
                file.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cut", type=int, help="the cut of this number only")
    asked = parser.parse_args()
    if why := missing():
        sys.exit(why)
    counts, num_saved, started = dict.fromkeys(FAULTS, 0), 0, time.monotonic()
    chosen = range(asked.cuts) if asked.cut is None else [asked.cut]
    with tempfile.TemporaryDirectory(prefix="power-cut-") as directory:
        cuts = Cuts(directory, asked.seed)
        for number in chosen:
            wrong, reported = cuts.cut(number)
            num_saved += reported
            for fault, what in wrong.items():
                counts[fault] += 1
                print(f"cut {number}: {fault}: {what}\n    python -m tests.power_cut --seed {asked.seed} --cut {number}",
                      flush=True)
    print("\n  cuts  saved before" + "".join(f"{fault:>11}" for fault in FAULTS) + "      time")
    print(f"{len(chosen):>6}{num_saved:>14}" + "".join(f"{number:>11}" for number in counts.values())
          + f"{time.monotonic() - started:>8.0f} s")
    sys.exit(any(counts.values()))


if __name__ == "__main__":
    main()
