"""Hosts on one machine: network namespaces with names and addresses of their own, joined by a hub that can be slow or cut.

Needs Linux, root and iproute2. The hub is a thread that passes Ethernet frames between the hosts, since many kernels are built
without `tc netem`: it delays each frame, or loses all frames of a host, as a switch does that loses its power.

python tests/hosts.py NAMESPACE HOSTNAME HOSTS_FILE COMMAND...    runs a command on a host; the tests use it
"""

import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x4000000, 0x40000000, 4096, 1 << 14, 1 << 18
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000


def enter(namespace, name, hosts_file):
    """Makes this process a process of a host: its network, its name, and its /etc/hosts. Other processes see none of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    steps = (lambda: libc.setns(handle, CLONE_NEWNET), lambda: libc.unshare(CLONE_NEWUTS | CLONE_NEWNS),
             lambda: libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None),
             lambda: libc.mount(str(hosts_file).encode(), b"/etc/hosts", None, MS_BIND, None))
    for step in steps:
        if step():
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(handle)
    socket.sethostname(name)


def run_on_host(place, directory, run, *arguments):
    """In a new process: enters the host, then calls `run`."""
    enter(*place)
    os.chdir(directory)
    run(*arguments)


def why_not():
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        Hosts(1).close()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"needs iproute2, network namespaces and /dev/net/tun: {error}"
    return ""


class Hosts:
    """Hosts host0, host1, ... with the addresses 10.77.0.1, 10.77.0.2, ... and one directory each.

    Args:
        number: of hosts.
        root: where the directories are made; the one of host0 is meant to have the rows.
    """

    made = 0

    def __init__(self, number, root=None):
        Hosts.made += 1
        self.names = [f"host{host}" for host in range(number)]
        self.spaces = [f"trainer-{os.getpid()}-{Hosts.made}-{host}" for host in range(number)]
        self.root = Path(root) if root is not None else None
        self.delay_s, self.lost, self.frames, self.closing = 0.0, set(), 0, False
        self.taps = []
        try:
            for host in range(number):
                self.add(host)
        except BaseException:
            self.close()
            raise
        if self.root is not None:
            for own, directory in enumerate(self.names):  # as on Debian, a host's own name is a loopback address
                addresses = ["127.0.1.1" if host == own else f"10.77.0.{host + 1}" for host in range(number)]
                lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(addresses, self.names))]
                (self.root / directory).mkdir()
                (self.root / directory / "hosts").write_text("\n".join(lines) + "\n")
        self.hub = threading.Thread(target=self.pass_frames, daemon=True)
        self.hub.start()

    def add(self, host):
        import fcntl  # absent on other systems, where `why_not` must still answer

        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self.taps.append(tap)
        name = f"tap{os.getpid() % 1000000}-{host}".encode()
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name, IFF_TAP | IFF_NO_PI))
        space = self.spaces[host]
        for command in (f"netns add {space}", f"link set {name.decode()} netns {space} name lan0", f"-n {space} link set lo up",
                        f"-n {space} address add 10.77.0.{host + 1}/24 dev lan0", f"-n {space} link set lan0 up"):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)

    def pass_frames(self):
        """The hub: every frame goes to all other hosts, `delay_s` after it came."""
        waiting = deque()
        while not self.closing:
            timeout = max(min(waiting[0][0] - time.monotonic(), 0.2), 0) if waiting else 0.2
            for tap in select.select(self.taps, [], [], timeout)[0]:
                try:
                    waiting.append((time.monotonic() + self.delay_s, self.taps.index(tap), os.read(tap, 65536)))
                except OSError:  # the interface is down
                    time.sleep(0.01)
            while waiting and waiting[0][0] <= time.monotonic():
                _, source, frame = waiting.popleft()
                self.frames += 1
                for host, tap in enumerate(self.taps):
                    if host != source and not {host, source} & self.lost:
                        try:
                            os.write(tap, frame)
                        except OSError:
                            pass

    def place(self, host):
        """For `enter`."""
        return self.spaces[host], self.names[host], str(self.root / self.names[host] / "hosts")

    def command(self, host, *command):
        """The arguments of a command that runs on a host."""
        return [sys.executable, "-S", str(Path(__file__).resolve()), *self.place(host), *map(str, command)]

    def cut(self, host):
        """Takes a host's network interface down: `ip link set lan0 down`."""
        subprocess.run(["ip", "-n", self.spaces[host], "link", "set", "lan0", "down"], check=True)

    def join(self, host):
        subprocess.run(["ip", "-n", self.spaces[host], "link", "set", "lan0", "up"], check=True)

    def close(self):
        self.closing = True
        if hasattr(self, "hub"):
            self.hub.join()
        for tap in self.taps:
            os.close(tap)
        for space in self.spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


if __name__ == "__main__":
    enter(*sys.argv[1:4])
    os.execvp(sys.argv[4], sys.argv[4:])
