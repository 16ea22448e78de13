"""Before training every rank says on which host, with which code and which settings it runs, and compares.
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
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

from loop.config import Config, by_name
from loop.distributed.watch import Watch
from loop.errors import FOR_USER, ROOT

POLL_S = 0.1
SAID_AFTER_S = 5.0  # a rank that is late is named after so many seconds, and again whenever others have joined
LEAVE_S = 2.0  # how long rank 0 waits before it says a difference
# settings that only rank 0 uses, and where a host has the model, whose weights are compared when they are loaded
MAY_DIFFER = ("log", "data.train", "data.eval", "model.path")
SIOCGIFADDR = 0x8915  # asks Linux for the address of an interface


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
    with watch.waiting(where):
        if not keeps:
            wait_for_port(address, int(port), where if local_rank == 0 else "")
        store = TCPStore(address, int(port), is_master=keeps, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    # torchrun keeps one store for all its attempts; what an earlier attempt has written must not be taken for this one's
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def wait_for_port(address: str, port: int, said: str) -> None:
    """Waits until a port can be reached, and says so after some seconds; the watch ends a wait that is too long."""
    started = time.monotonic()
    while True:
        with suppress(OSError):  # also a name that is not known yet, as while a cluster starts
            return socket.create_connection((address, port), timeout=1).close()
        if said and time.monotonic() - started > SAID_AFTER_S:
            print(f"waiting for {said}", flush=True)
            said = ""
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
    entries: dict[int, dict[str, Any]] = {}
    with watch.waiting(lambda: f"{missing(entries, world_size)} to sign in"):
        wait_for_entries(store, rank, world_size, sign_in(config), entries, says=local_rank == 0)
    hosts = [entries[other]["host"] for other in range(world_size)]
    choose_interface([entry["head"] for entry in entries.values()])
    found = difference(entries)
    if found:
        # a launcher that sees one rank end stops the others: rank 0, which keeps the store, lets all read, and speaks first
        time.sleep(LEAVE_S if rank == 0 else 2 * LEAVE_S)
        if rank == 0:
            raise ValueError(found)
        if local_rank == 0 and hosts[rank] != hosts[0]:
            print(f"error: {found}", file=sys.stderr, flush=True)
        raise SystemExit(FOR_USER)
    return hosts


def wait_for_entries(
    store: Store, rank: int, world_size: int, own: dict[str, Any], entries: dict[int, dict[str, Any]], says: bool
) -> None:
    """Signs in, and fills `entries` by rank until all have signed in. Polls: a blocking wait would not say who is missing."""
    store.set(f"roll/{rank}", json.dumps(own))
    changed_at = time.monotonic()
    while len(entries) < world_size:
        for other in range(world_size):
            if other not in entries and store.check([f"roll/{other}"]):
                entries[other] = json.loads(store.get(f"roll/{other}"))
                changed_at = time.monotonic()
        if says and time.monotonic() - changed_at > SAID_AFTER_S:
            print(f"waiting for {missing(entries, world_size)}", flush=True)
            changed_at = math.inf  # said once, until somebody else signs in
        time.sleep(POLL_S)


def missing(entries: dict[int, dict[str, Any]], world_size: int) -> str:
    """For messages, such as "ranks 2, 3 of 4 (signed in: ranks 0, 1 on host0)"."""
    absent = [rank for rank in range(world_size) if rank not in entries]
    present = by_host({rank: entry["host"] for rank, entry in sorted(entries.items())})
    return f"{plural(absent)} of {world_size} (signed in: {present or 'none'})"


def sign_in(config: Config) -> dict[str, Any]:
    """What a rank says of itself."""
    files = [ROOT / "train.py", ROOT / "pipeline_train.py"]
    files += [path for package in ("data", "model", "loop") for path in (ROOT / package).glob("**/*.py")]
    code = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files if path.exists()}
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    settings = {"run": config.run, "resume": config.resume, **by_name(config)}
    compared = {name: str(value) for name, value in settings.items() if name not in MAY_DIFFER}
    try:
        head = socket.gethostbyname(os.environ["MASTER_ADDR"])
    except OSError:  # known by an IPv6 address alone
        head = ""
    return {"host": socket.gethostname(), "head": head, "code": code, "libraries": libraries, "settings": compared}


def difference(entries: dict[int, dict[str, Any]]) -> str:
    """The first rank that differs from rank 0, in what, and what to do; empty where all agree."""
    first = entries[0]
    for rank, other in sorted(entries.items()):
        for kind, remedy in (("code", "Bring all hosts to the same commit, without local changes"),
                             ("libraries", "Install the same on all hosts"),
                             ("settings", "Give all hosts the same file and arguments")):
            keys = differing(first[kind], other[kind])
            if keys:
                shown = [f"{key} ({other[kind].get(key)}, on rank 0 {first[kind].get(key)})" for key in keys[:3]]
                more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
                return (f"rank {rank} on {other['host']} has other {kind} than rank 0 on {first['host']}: "
                        f"{', '.join(shown)}{more}. {remedy}")
    return ""


def differing(first: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))


def by_host(hosts: dict[int, str]) -> str:
    """Ranks and their hosts, such as "ranks 0, 1 on host0; rank 2 on host1"."""
    ranks: dict[str, list[int]] = {}
    for rank, host in hosts.items():
        ranks.setdefault(host, []).append(rank)
    return "; ".join(f"{plural(numbers)} on {host}" for host, numbers in ranks.items())


def plural(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
