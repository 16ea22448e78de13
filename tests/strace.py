"""Attaches strace to a process: lists the system calls that change files, or kills the process at one of them.

strace counts the calls of each thread by their names, if need be only those with given paths. By its number a call is met again
in another run.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

CHANGING = (
    "open openat creat write writev pwrite64 pwritev pwritev2 sendfile copy_file_range truncate ftruncate fallocate rename "
    "renameat renameat2 unlink unlinkat mkdir mkdirat rmdir link linkat symlink symlinkat chmod fchmod fchmodat fsync fdatasync"
).split()
HELD_S = 60
WRITING = re.compile(r"O_(CREAT|WRONLY|RDWR|TRUNC|TMPFILE)")


def is_missing():
    return shutil.which("strace") is None


@dataclass(frozen=True)
class Call:
    """A system call, as strace prints it."""

    thread: int
    name: str
    text: str

    def touches(self, directory):
        """Whether the call changes something in a directory, given as the end of its path."""
        return directory in self.text and (not self.name.startswith("open") or WRITING.search(self.text) is not None)

    @property
    def paths(self):
        """The paths by which strace finds the call: those that it names, and those of its open files."""
        paths = [either for pair in re.findall(r'"([^"]*)"|<([^>]*)>', self.text) for either in pair if either]
        return paths[:1] if self.name == "rename" else paths

    def fixed(self, directory):
        """Its paths in a directory that are the same in each run."""
        return [path for path in self.paths if directory in path and "/.tmp" not in path]

    @property
    def renamed(self):
        """The names from and to which something was moved, or None."""
        paths = re.findall(r'"([^"]*)"', self.text)
        done = self.name.startswith("rename") and self.text.endswith("= 0") and len(paths) == 2
        return tuple(Path(path).name for path in paths) if done else None


@dataclass(frozen=True)
class Target:
    """A call that changes something, and how to meet it in another run that does the same.

    Args:
        met: the call itself; where its path is random, or another thread makes as many such calls, the last one of the same
            thread that can be told apart.
        path: one of the paths of `met`, or None where they are random.
        number: which `met` is of the calls of its thread with its name and this path, counted from 1.
    """

    call: Call
    met: Call
    path: str | None
    number: int

    def is_done(self, log):
        """Whether a trace has the call `met`, to its end."""
        calls = [call for call in read_trace(log) if call.name == self.met.name and " = " in call.text]
        return max(Counter(call.thread for call in calls).values(), default=0) >= self.number


def targets(calls, directory):
    """The calls that change something in a directory."""
    found = []
    for i, call in enumerate(calls):
        if call.touches(directory):
            for at in range(i, -1, -1):
                met = calls[at]
                # safetensors writes into files with random names. Other threads open and write files too, but truncate none
                if met.thread != call.thread or met is call and not (call.fixed(directory) or call.name == "ftruncate"):
                    continue
                path = next(iter(met.fixed(directory)), None)
                same = [j for j, other in enumerate(calls) if other.name == met.name and (path is None or path in other.paths)]
                number = sum(calls[j].thread == met.thread for j in same if j <= at)
                others = Counter(calls[j].thread for j in same if calls[j].thread != met.thread)
                if max(others.values(), default=0) < number:
                    break
            else:
                raise AssertionError(f"cannot be met again: {call.text}")
            found.append(Target(call, met, path, number))
    return found


def attach(process_id, log, kill_at=None, paths=()):
    """Starts strace on all threads of a stopped process; the process may go on when this returns.

    Args:
        log: file for the trace.
        kill_at: the Target before which the process is killed; or held, after the call by which the target is met.
        paths: under which the target's path is known in this run.
    """
    command = ["strace", "-y", "-s", "0", "-o", str(log), "-e", "trace=" + ",".join(CHANGING), "-f"]
    if kill_at:
        action = "signal=KILL" if kill_at.met is kill_at.call else f"delay_exit={HELD_S * 10**6}"
        command += ["-e", f"inject={kill_at.met.name}:{action}:when={kill_at.number}"]
    command += [part for path in paths for part in ("-P", path)]
    # a copy, since other threads change the environment while this process forks
    tracer = subprocess.Popen([*command, "-p", str(process_id)], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    said = []
    while not said or "Requested path" in said[-1]:
        said.append(tracer.stderr.readline())
    if "attached" not in said[-1]:
        tracer.kill()
        raise RuntimeError(f"strace could not attach: {''.join(said) + tracer.communicate()[1]}")
    return tracer


def stop(process_id, seconds=60):
    """Stops a process, and waits until it stands."""
    os.kill(process_id, signal.SIGSTOP)
    wait_until_stopped(process_id, seconds)


def wait_until_stopped(process_id, seconds=60):
    """
    Raises:
        OSError: the process has ended.
    """
    deadline = time.monotonic() + seconds
    while (state := Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
        if state == "Z":
            raise ProcessLookupError(f"process {process_id} has ended")
        assert time.monotonic() < deadline, f"process {process_id} does not stop"
        time.sleep(0.002)


def read_trace(log):
    """All calls of a trace, in order. A call whose line was cut in two by another thread's stands where it began."""
    calls, cut = [], {}
    for line in Path(log).read_text(errors="replace").splitlines():
        thread, _, text = line.partition(" ")
        text = text.strip()
        called, resumed = re.match(r"(\w+)\(", text), re.match(r"<\.\.\. \w+ resumed>(.*)", text)
        if resumed and thread in cut:
            at = cut.pop(thread)
            calls[at] = replace(calls[at], text=calls[at].text + resumed[1])
        if called:  # all else is a signal, or the end of a process
            if text.endswith("<unfinished ...>"):
                text, cut[thread] = text.removesuffix("<unfinished ...>"), len(calls)
            calls.append(Call(int(thread), called[1], text))
    return calls
