"""Faults for tests/soak.py: what happens to a run while it runs, and to its files between two starts.

A fault is a function of a case and of a random generator of its own; it returns what it did, in a few words. A new one is a
function more in WHILE_RUNNING or BETWEEN_STARTS.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress

from tests.runs import differences, last_line

TIMEOUT_S = 8  # distributed.timeout_s of all runs
STEPS = 16  # of all runs
WAIT_S = 240
ENDS_S = 120  # for ranks whose peer has ended or was stopped: far above TIMEOUT_S, since the machine may be busy
TMPFS_MIB = 24
FREE_KIB = (0, 4, 12, 40, 120)  # that a disk has left when it begins to be full
DAY_S = 86400
TRAINING = " rank(s) on "  # in what a run says when its training begins


class Case:
    """One run under one name, started as often as it is broken.

    Attributes:
        did: what was done, in order.
        wrong: what was found wrong, one sentence each.
        spoiled: whether lines of metrics.jsonl were damaged, which no checkpoint can bring back.
    """

    def __init__(self, place, setup, name):
        self.place, self.setup, self.name = place, setup, name
        self.run_dir, self.runs = place.run_dir(name), []
        self.did, self.wrong, self.spoiled = [], [], False

    def start(self, **environment):
        run = self.place.start(self.name, *self.setup.arguments, ranks=self.setup.ranks, script=self.setup.script,
                               environment=environment)
        self.runs.append(run)
        return run

    def wait_for_moment(self, run, rng):
        """Lets a run get to a random moment: a time after its start, a step, or a save. Returns the moment in words."""
        kind, step, delay_s = rng.choice(("time", "step", "step", "save")), rng.randint(1, STEPS - 2), rng.uniform(0, 1.2)
        deadline, before = time.monotonic() + WAIT_S, self.in_work()
        reached = {"time": lambda: False, "step": lambda: self.last_step() >= step,
                   "save": lambda: self.in_work() - before}[kind]
        if kind == "time":
            deadline = time.monotonic() + delay_s
        while run.running and time.monotonic() < deadline and not reached():
            time.sleep(0.0003)
        return {"time": f"after {delay_s:.2f} s", "step": f"at step {step}", "save": "in a save"}[kind]

    def in_work(self):
        """Checkpoints that are being written or removed, or were left so."""
        try:
            return {name for name in os.listdir(self.run_dir) if name.startswith(".step-")}
        except OSError:
            return set()

    def last_step(self):
        try:
            return max((int(step) for step in re.findall(r'^{"step": (\d+)', self.metrics(), re.M)), default=0)
        except OSError:
            return 0

    def metrics(self):
        return (self.run_dir / "metrics.jsonl").read_text(errors="replace")

    def ended(self, run, seconds):
        """Waits until all ranks have ended; notes what a run must not do however it is broken."""
        try:
            codes = run.wait(seconds)
        except AssertionError:
            self.wrong.append(f"the ranks have not ended after {seconds} s: {last_line(run)}")
            return "hung"
        if "Traceback (most recent call last)" in run.stderr:
            self.wrong.append(f"a traceback: {last_line(run)}")
        return f"exit status {codes}"

    def expect(self, run, allowed):
        """Notes exit statuses that no rank should have."""
        codes = [process.exitcode for process in run.processes]
        if not set(codes) <= allowed:
            self.wrong.append(f"exit status {codes}, expected one of {sorted(allowed)}: {last_line(run)}")

    def finish(self):
        """Starts the run for the last time, lets it end, and compares it with the uninterrupted one."""
        run = self.start()
        self.ended(run, WAIT_S)
        self.expect(run, {0})
        found = differences(self.run_dir, self.place.run_dir("whole"))
        self.wrong += [what for what in found if not (self.spoiled and what.startswith("metrics.jsonl"))]

    def end(self):
        for run in self.runs:
            run.kill()
            if not self.wrong:
                self.place.clear(self.name, run)


# While a run runs


def kill_one(case, rng):
    run = case.start()
    rank, when = rng.randrange(case.setup.ranks), case.wait_for_moment(run, rng)
    run.processes[rank].kill()
    return f"rank {rank} {when}, {case.ended(run, ENDS_S)}"


def kill_all(case, rng):
    run = case.start()
    when = case.wait_for_moment(run, rng)
    run.kill()
    return f"{when}, {case.ended(run, ENDS_S)}"


def stop_one(case, rng):
    """Stops a rank, for a moment or for good."""
    run = case.start()
    rank, is_short = rng.randrange(case.setup.ranks), rng.random() < 0.4
    when = case.wait_for_moment(run, rng)
    send(run, signal.SIGSTOP, rank)
    if is_short or case.setup.ranks == 1:
        time.sleep(0.3)
        send(run, signal.SIGCONT, rank)
        said = case.ended(run, WAIT_S)
        case.expect(run, {0})
        return f"rank {rank} {when} for 0.3 s, {said}"
    others = [process for other, process in enumerate(run.processes) if other != rank]
    for process in others:
        process.join(ENDS_S)
    if any(process.is_alive() for process in others):
        case.wrong.append(f"rank {rank} was stopped {when}, and the others have not ended after {ENDS_S} s: {last_line(run)}")
    run.processes[rank].kill()
    return f"rank {rank} {when}, {case.ended(run, ENDS_S)}"


def cut_link(case, rng):
    """Takes down the network through which the ranks talk: each waits in vain, and ends in the configured time."""
    if case.setup.ranks == 1 or os.getuid() or not shutil.which("ip"):
        return "not here: it needs two ranks, root, and iproute2"
    name = f"soak-{os.getpid()}-{case.name}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        run = case.start(NETWORK_NAMESPACE=name, GLOO_SOCKET_IFNAME="lo")
        when = case.wait_for_moment(run, rng)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "down"], check=True)
        said = case.ended(run, ENDS_S)
        case.expect(run, {0, 1})
        return f"{when}, {said}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


def tell_to_stop(number, to_all, case, rng):
    """Sends SIGTERM or SIGINT, which a run answers by saving its last step."""
    run = case.start()
    rank, when = rng.randrange(case.setup.ranks), case.wait_for_moment(run, rng)
    for each in range(case.setup.ranks) if to_all else [rank]:
        send(run, number, each)
    whom = "all" if to_all else f"rank {rank}"
    said = case.ended(run, ENDS_S)
    # before training, a rank that is told leaves alone, and the others find that it is gone
    allowed = {0, 128 + number} if TRAINING in run.stdout else {0, 1, 128 + number, -number}
    case.expect(run, allowed)
    return f"{whom} {when}, {said}"


def fill_disk(case, rng):
    """Leaves only some KiB of the run's file system free until the run has ended."""
    if not mount(case.place):
        return "left out: no tmpfs can be mounted here"
    free_kib, run = rng.choice(FREE_KIB), case.start()
    when = case.wait_for_moment(run, rng)
    filler = case.place.directory / "checkpoints" / "filler"
    with open(filler, "wb") as file:
        for _ in range(100):  # the run takes room meanwhile
            free = os.statvfs(filler.parent)
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - 1024 * free_kib, 1))
                break
    said = case.ended(run, WAIT_S)
    codes = {process.exitcode for process in run.processes}
    case.expect(run, {0, 1, 2} if 2 in codes else {0})  # one rank says what is wrong, the others that it is gone
    filler.unlink(missing_ok=True)
    return f"{free_kib} KiB left {when}, {said}"


# Between two starts


def flip_bit(case, rng):
    """Flips one bit of a file that the run reads when it starts again."""
    kind, which, where, bit = rng.choice(("checkpoint", "cache", "metrics")), rng.random(), rng.random(), rng.randrange(8)
    patterns = {"checkpoint": "step-*/*", "cache": "data/*.safetensors", "metrics": "metrics.jsonl"}
    found = sorted(path for path in case.run_dir.glob(patterns[kind]) if path.stat().st_size)
    if not found:
        return f"no {kind} yet"
    path = found[int(which * len(found))]
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    case.spoiled |= kind == "metrics"
    return f"bit {bit} of byte {at} of {path.relative_to(case.run_dir)}"


def move_clock(case, rng):
    """Gives all files times of another day, as a clock that was set back or forward would."""
    days = rng.choice((-4000, -1, 1, 4000))
    now = time.time() + days * DAY_S
    for path in [case.run_dir, *case.run_dir.rglob("*")] if case.run_dir.exists() else []:
        os.utime(path, (now, now))
    return f"{days:+} days"


WHILE_RUNNING = {
    "SIGKILL to one": kill_one,
    "SIGKILL to all": kill_all,
    "SIGSTOP": stop_one,
    "SIGTERM to all": lambda case, rng: tell_to_stop(signal.SIGTERM, True, case, rng),
    "SIGTERM to one": lambda case, rng: tell_to_stop(signal.SIGTERM, False, case, rng),
    "SIGINT to all": lambda case, rng: tell_to_stop(signal.SIGINT, True, case, rng),
    "SIGINT to one": lambda case, rng: tell_to_stop(signal.SIGINT, False, case, rng),
    "full disk": fill_disk,
    "cut link": cut_link,
}
BETWEEN_STARTS = {"flipped bit": flip_bit, "clock": move_clock}
ALL = WHILE_RUNNING | BETWEEN_STARTS


def send(run, number, rank):
    """Sends a signal to a rank that has not ended."""
    if run.processes[rank].is_alive():
        os.kill(run.processes[rank].pid, number)


def mount(place):
    """Puts the runs of a place on a small file system of their own; False where that is not allowed."""
    checkpoints = place.directory / "checkpoints"
    if os.path.ismount(checkpoints):
        return True
    aside = place.directory / "whole"
    place.run_dir("whole").rename(aside)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", checkpoints], capture_output=True)
    subprocess.run(["mv", aside, checkpoints], check=True)
    return done.returncode == 0


def unmount(place):
    if os.path.ismount(place.directory / "checkpoints"):
        subprocess.run(["umount", "-l", place.directory / "checkpoints"], check=True)
