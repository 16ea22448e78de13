"""Kills a run at each system call that changes its directory, resumes the run, and compares it with the uninterrupted one.

python -m tests.kill_sweep [--ranks 1 2] [--phase fresh save rotation end resume interruption] [--every N]

SIGKILL comes from strace, before the call is carried out, and on rank 0, which alone writes. Takes about 1 s a kill.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests import strace

PHASES = ("fresh", "save", "rotation", "end", "resume", "interruption")
TRIES = 4  # a call that comes at another time than in the listing run is tried again
WAIT_S = 240
STEPS = 12  # of a run that is interrupted
FAULTS = ("lost", "differing", "refusing", "debris", "missed")


@dataclass
class Row:
    """What the kills of one phase did: numbers, and a line for each problem."""

    phase: str
    ranks: int
    kills: int = 0
    counts: dict = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    problems: list = field(default_factory=list)
    seconds: float = 0

    def __str__(self):
        counts = "".join(f"{self.counts[fault]:>11}" for fault in FAULTS)
        return f"{self.phase:<14}{self.ranks:>5}{self.kills:>8}{counts}{self.seconds:>8.0f} s"


class Sweep:
    """The runs of one number of ranks.

    Args:
        directory: for all files of the sweep.
        ranks: how many processes a run has.
    """

    def __init__(self, directory, ranks):
        from tests.runs import Place

        self.ranks, self.traces = ranks, Path(directory) / f"traces-{ranks}"
        self.traces.mkdir()
        # with keep=1 each save from the second on removes the checkpoint before it, which is older and worse
        self.saving = Place(Path(directory) / f"saving-{ranks}", train__max_steps=3, checkpoint__every=1, eval__every=100)
        self.signalled = Place(Path(directory) / f"signalled-{ranks}", train__max_steps=STEPS,
                               checkpoint__every=1000, eval__every=1000)

    def place(self, phase):
        return self.signalled if phase == "interruption" else self.saving

    def traced(self, phase, name, kill_at=None):
        """A run, traced to its end or until it is killed; and its calls."""
        place, log = self.place(phase), self.traces / name
        if phase == "resume":
            shutil.copytree(place.run_dir("torn"), place.run_dir(name))
        if phase == "interruption":
            run = place.start(name, ranks=self.ranks)
            self.wait_for_step(run, place.run_dir(name) / "metrics.jsonl")
            for process in run.processes:
                strace.stop(process.pid)
        else:
            run = place.start(name, "train.py", ranks=self.ranks, script="tests/traced.py")
            strace.wait_until_stopped(run.processes[0].pid)
        tracer = strace.attach(run.processes[0].pid, log, kill_at, self.paths(phase, name, kill_at))
        for process in run.processes:
            if phase == "interruption":
                os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGCONT)
        while kill_at and kill_at.met is not kill_at.call and run.processes[0].is_alive():
            if kill_at.is_done(log):
                run.processes[0].kill()
                tracer.kill()  # which would hold the dead process too
            time.sleep(0.002)
        run.processes[0].join(WAIT_S)
        if kill_at is None and phase != "interruption":
            run.wait(WAIT_S)
        run.kill()
        tracer.communicate(timeout=WAIT_S)
        return run, strace.read_trace(log)

    def paths(self, phase, name, kill_at):
        """The path of a call of the listing run in this one. An interruption may come a few steps earlier or later."""
        if kill_at is None or kill_at.path is None:
            return []
        path = re.sub("checkpoints/[^/]*", f"checkpoints/{name}", kill_at.path)
        steps = range(1, STEPS) if phase == "interruption" and "step-" in path else [None]
        return [path if step is None else re.sub(r"step-\d+", f"step-{step:08d}", path) for step in steps]

    def wait_for_step(self, run, metrics, seconds=WAIT_S):
        deadline = time.monotonic() + seconds
        while not (metrics.exists() and '"step": 2, "epoch"' in metrics.read_text()):
            assert run.running and time.monotonic() < deadline, f"no second step: {run.said}"
            time.sleep(0.002)

    def prepare(self, phases):
        """The uninterrupted runs, the calls of a run from its start to its end, and a run torn in its second save."""
        if {*phases} - {"interruption"}:
            run, calls = self.traced("fresh", "whole")
            assert run.processes[0].exitcode == 0, run.said
            self.whole = strace.targets(calls, "checkpoints/whole")
            if "resume" in phases:
                self.traced("save", "torn", next(target for target in self.whole if target.call.renamed and
                                                 target.call.renamed[1] == "step-00000002"))
        if "interruption" in phases:
            assert self.signalled.start("whole", ranks=self.ranks).wait(WAIT_S) == [0] * self.ranks

    def targets(self, phase):
        """The calls at which this phase kills."""
        if phase in ("resume", "interruption"):
            found = strace.targets(self.traced(phase, phase)[1], f"checkpoints/{phase}")
            self.place(phase).clear(phase)
            if phase == "interruption":
                return found
            end = next(i for i, target in enumerate(found) if target.call.renamed and
                       target.call.renamed[1] == "step-00000002")
            return found[: end + 1]
        first, second, third = (next(i for i, target in enumerate(self.whole) if f"step-0000000{step}" in target.call.text)
                                for step in (1, 2, 3))
        last = max(i for i, target in enumerate(self.whole) if "step-0000000" in target.call.text) + 1
        return self.whole[{"fresh": slice(first), "save": slice(first, second), "rotation": slice(second, third),
                           "end": slice(last, None)}[phase]]

    def sweep(self, phase, every=1, only=None, workers=1):
        """Kills at every Nth call of a phase, or at the one with the index `only`."""
        row, started = Row(phase, self.ranks), time.monotonic()
        targets = self.targets(phase)
        chosen = range(0, len(targets), every) if only is None else [only]
        with ThreadPoolExecutor(workers) as pool:
            results = pool.map(lambda index: self.kill(phase, index, targets), chosen)
            for index, found in zip(chosen, results):
                row.kills += "missed" not in found
                for fault, what in found.items():
                    row.counts[fault] += 1
                    row.problems.append(f"{fault}: {what}\n    {targets[index].call.text[:200]}\n    python -m "
                                        f"tests.kill_sweep --ranks {self.ranks} --phase {phase} --call {index}")
        row.seconds = time.monotonic() - started
        return row

    def kill(self, phase, index, targets):
        """Kills a run at the call of an index and resumes it. Returns what went wrong, by its kind."""
        from tests.runs import differences, files, last_line

        place, name = self.place(phase), f"{phase}-{index}"
        for _ in range(TRIES):
            place.clear(name)
            run, calls = self.traced(phase, name, targets[index])
            if run.processes[0].exitcode == -signal.SIGKILL and calls and (
                    targets[index].met is not targets[index].call or calls[-1].touches(f"checkpoints/{name}")):
                break
        else:
            return {"missed": f"not killed at this call in {TRIES} runs: {last_line(run)}"}
        found, whole = {}, place.run_dir("whole")
        # other threads may have come less far than in the listing run
        done = [target for target in targets[:index] if target.call.thread == targets[index].call.thread]
        lost = self.lost(phase, place.run_dir(name), done)
        resumed = place.start(name, ranks=self.ranks)
        try:
            codes = resumed.wait(WAIT_S)
        except AssertionError:
            codes = [f"none after {WAIT_S} s"]
        if lost:
            found["lost"] = "; ".join(lost)
        if any(codes):
            found["refusing"] = f"exit status {codes}: {last_line(resumed)}"
        elif different := differences(place.run_dir(name), whole):
            found["differing"] = "; ".join(different)
        if not any(codes) and (debris := files(place.run_dir(name)) - files(whole)):
            found["debris"] = ", ".join(sorted(debris))
        place.clear(name, run)
        place.clear(name, resumed)
        return found

    def lost(self, phase, run_dir, done):
        """Checkpoints that the calls before the kill had committed and that are gone or damaged, one sentence each."""
        from loop.checkpoint import list_checkpoints, verify

        committed = {"step-00000001"} if phase in ("resume", "rotation") else set()
        for source, target in filter(None, (each.call.renamed for each in done)):
            committed -= {source}  # moved away by a rotation, which the uninterrupted run does as well
            committed |= {target} if target.startswith("step-") else set()
        found = {path.name: verify(path) for path in list_checkpoints(run_dir)}
        if phase == "interruption" and committed and found:
            committed = set(found)  # the interruption may have come at another step than in the listing run
        # of a call of another thread it is not known how far the thread that writes had come: it may have committed a newer
        # checkpoint, and removed the older one in the rotation that follows
        gone = [name for name in sorted(committed - found.keys()) if name > max(found, default="")]
        return [f"{name} is gone" for name in gone] + list(filter(None, found.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--every", type=int, default=1, help="kill at every Nth call only")
    parser.add_argument("--call", type=int, help="kill at the call of this index only")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at once")
    asked = parser.parse_args()
    if strace.is_missing():
        sys.exit("strace is missing: apt-get install strace")
    rows = []
    with tempfile.TemporaryDirectory(prefix="kill-sweep-") as directory:
        for ranks in asked.ranks:
            sweep = Sweep(directory, ranks)
            sweep.prepare(asked.phase)
            for phase in asked.phase:
                rows.append(sweep.sweep(phase, asked.every, asked.call, asked.workers))
                print(rows[-1], *rows[-1].problems, sep="\n", flush=True)
    print(f"\n{'phase':<14}ranks   kills" + "".join(f"{fault:>11}" for fault in FAULTS) + "      time", *rows, sep="\n")
    sys.exit(any(sum(row.counts.values()) for row in rows))


if __name__ == "__main__":
    main()
