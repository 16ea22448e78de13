"""Before training every rank says on which host, with which code and which settings it runs, and rank 0 compares.
Costs about 10 KB a rank in the store of the ranks, and one reading of the source."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import socket
import struct
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Callable, Iterator

from torch.distributed import PrefixStore, Store, TCPStore

from loop.config import Config, by_name
from loop.distributed.watch import Watch
from loop.errors import ROOT

POLL_S = 0.1
SAID_AFTER_S = 5.0  # a rank that is late is named after so many seconds, and again whenever others have joined
LEAVE_S = 5.0  # after a difference: how long ranks wait for each other, so that none is ended before the difference is said
# settings that only rank 0 uses, and where a host has the model, whose weights are compared when they are loaded
MAY_DIFFER = ("log", "data.train", "data.eval", "model.path")
SIOCGIFADDR = 0x8915  # asks Linux for the address of an interface


class Roll:
    """Who of a number of participants has signed in, and with what.

    Args:
        store: where all sign in.
        kind: what a participant is called in messages, such as "rank".
        number: of participants.
    """

    def __init__(self, store: Store, kind: str, number: int) -> None:
        self.store, self.kind, self.number = store, kind, number
        self.entries: dict[int, dict[str, Any]] = {}

    def missing(self) -> str:
        """For messages, such as "ranks 2, 3 of 4 (signed in: ranks 0, 1 on host0)"."""
        absent = [other for other in range(self.number) if other not in self.entries]
        present = by_host({other: entry["host"] for other, entry in sorted(self.entries.items())}, self.kind)
        return f"{plural(self.kind, absent)} of {self.number} (signed in: {present or 'none'})"

    def call(self, own: int, entry: dict[str, Any], says: bool, timeout_s: float = math.inf) -> dict[int, dict[str, Any]]:
        """Signs in and waits for all others. Polls, since a blocking wait for a key would not say who is missing.

        Raises:
            ValueError: somebody has not signed in when the time is over.
        """
        self.store.set(f"roll/{own}", json.dumps(entry))
        started = changed = time.monotonic()
        while len(self.entries) < self.number:
            for other in range(self.number):
                if other not in self.entries and self.store.check([f"roll/{other}"]):
                    self.entries[other] = json.loads(self.store.get(f"roll/{other}"))
                    changed = time.monotonic()
            now = time.monotonic()
            if says and now - changed > SAID_AFTER_S:
                print(f"waiting for {self.missing()}", flush=True)
                changed = math.inf  # said once, until somebody else signs in
            if now - started > timeout_s:
                raise ValueError(f"waited for {self.missing()} to sign in: no answer in {timeout_s:.0f} s "
                                 "(see distributed.timeout_s)")
            time.sleep(POLL_S)
        return self.entries


def open_store(rank: int, local_rank: int, watch: Watch, timeout: timedelta) -> Store:
    """The store of keys and values that all ranks of a run share; waits for rank 0's host, which keeps the store.

    Under torchrun the launcher of rank 0 keeps the store, else rank 0 itself. Unlike torch's own `rendezvous`, rank 0 does not
    wait for the others here: who is missing is said by `call_roll`.

    Raises:
        ValueError: the launcher has not set where the store is.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise ValueError(f"MASTER_ADDR is {address!r} and MASTER_PORT {port!r}, expected rank 0's host and a port, as torchrun "
                         "sets them. Start several ranks with python -m loop.distributed.launch, see README.md")
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"rank 0's host to open port {port} at {address}"
    with waits(watch, lambda: where):
        if not keeps:
            wait_for_port(address, int(port), where if local_rank == 0 else "")
        store = TCPStore(address, int(port), is_master=keeps, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    # torchrun keeps one store for all its attempts; what an earlier attempt has written must not be taken for this one's
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def wait_for_port(address: str, port: int, said: str, timeout_s: float = math.inf) -> None:
    """Waits until a port can be reached; says so after some seconds.

    Raises:
        ValueError: the time is over.
    """
    started = time.monotonic()
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
            return
        except OSError as error:  # also a name that is not known yet, as while a cluster starts
            waited_s = time.monotonic() - started
            if said and waited_s > SAID_AFTER_S:
                print(f"waiting for {said}", flush=True)
                said = ""
            if waited_s > timeout_s:
                raise ValueError(f"{address}:{port}: no answer in {timeout_s:.0f} s (see distributed.timeout_s): {error}. "
                                 "Expected the launcher of the first host there") from None
            time.sleep(POLL_S)


def choose_interface(heads: list[str]) -> None:
    """Tells gloo the network interface that joins the hosts. Alone, gloo looks up this host's own name, which on many systems
    is a loopback address that no other host can reach.

    Args:
        heads: the address of rank 0's host as each rank sees it; on that host it may be a loopback address as well.
    """
    head = next((address for address in heads if address and not address.startswith("127.")), "")
    if not head:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # sends nothing; the system only chooses the way
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has no address
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def call_roll(store: Store, rank: int, world_size: int, local_rank: int, watch: Watch, config: Config) -> list[str]:
    """Waits until all ranks have signed in, and compares their code and their settings. Returns the host of each rank.

    Raises:
        ValueError: on rank 0, with the first difference. The other ranks exit; one on each other host says it too.
    """
    roll = Roll(store, "rank", world_size)
    with waits(watch, lambda: f"{roll.missing()} to sign in"):
        entries = roll.call(rank, sign_in(config), says=local_rank == 0)
    hosts = [entries[other]["host"] for other in range(world_size)]
    choose_interface([entry["head"] for entry in entries.values()])
    if rank == 0:
        found = difference(entries)
        store.set("roll/verdict", found)
        if found:
            wait_for_keys(store, [f"roll/{other}/read" for other in range(1, world_size)])
            raise ValueError(found)
        return hosts
    with waits(watch, lambda: f"rank 0 on {hosts[0]} to compare the hosts"):
        while not store.check(["roll/verdict"]):
            time.sleep(POLL_S)
        found = store.get("roll/verdict").decode()
    if found:
        if local_rank == 0 and hosts[rank] != hosts[0]:
            print(f"error: {found}", file=sys.stderr, flush=True)
        store.set(f"roll/{rank}/read", "")
        time.sleep(LEAVE_S)  # a launcher that sees this rank end ends the others, rank 0 among them
        raise SystemExit(2)
    return hosts


def sign_in(config: Config) -> dict[str, Any]:
    """What a rank says of itself."""
    files = [ROOT / "train.py", ROOT / "pipeline_train.py"]
    files += [path for package in ("data", "model", "loop") for path in (ROOT / package).glob("**/*.py")]
    code = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files if path.exists()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    settings = {"run": config.run, "resume": config.resume, **by_name(config)}
    compared = {name: str(value) for name, value in settings.items() if name not in MAY_DIFFER}
    try:
        head = socket.gethostbyname(os.environ["MASTER_ADDR"])
    except OSError:  # known by an IPv6 address alone
        head = ""
    return {"host": socket.gethostname(), "head": head, "code": code, "versions": versions, "settings": compared}


def wait_for_keys(store: Store, keys: list[str]) -> None:
    """Waits until all keys are set, for LEAVE_S at most."""
    deadline = time.monotonic() + LEAVE_S
    while time.monotonic() < deadline and not store.check(keys):
        time.sleep(POLL_S)


def difference(entries: dict[int, dict[str, Any]]) -> str:
    """The first rank that differs from rank 0, and in what; empty where all agree."""
    first = entries[0]
    for rank, other in sorted(entries.items()):
        who = f"rank {rank} on {other['host']}"
        keys = {kind: differing(first[kind], other[kind]) for kind in ("code", "versions", "settings")}
        if keys["code"]:
            more = f" and {len(keys['code']) - 3} more" if len(keys["code"]) > 3 else ""
            return (f"{who} runs another version of this code than rank 0 on {first['host']}, which differs in "
                    f"{', '.join(keys['code'][:3])}{more}. Bring all hosts to the same commit, without local changes")
        for kind, told, remedy in (("versions", "has other libraries", "Install the same on all hosts"),
                                   ("settings", "has another configuration", "Give all hosts the same file and arguments")):
            if keys[kind]:
                values = "; ".join(f"{key} is {other[kind].get(key)}, on rank 0 {first[kind].get(key)}" for key in keys[kind])
                return f"{who} {told} than rank 0 on {first['host']}: {values}. {remedy}"
    return ""


def differing(first: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))


def by_host(hosts: dict[int, str], kind: str = "rank") -> str:
    """Ranks and their hosts, such as "ranks 0, 1 on host0; rank 2 on host1"."""
    ranks: dict[str, list[int]] = {}
    for rank, host in hosts.items():
        ranks.setdefault(host, []).append(rank)
    return "; ".join(f"{plural(kind, numbers)} on {host}" for host, numbers in ranks.items())


def plural(kind: str, numbers: list[int]) -> str:
    return f"{kind}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


@contextmanager
def waits(watch: Watch, awaited: Callable[[], str]) -> Iterator[None]:
    """As `watch.waiting`, for what can say anew at any time what is awaited."""
    watch.begin(awaited)
    with watch.ends_when_peers_are_gone():
        yield
    watch.done()
