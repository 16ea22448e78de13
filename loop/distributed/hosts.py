"""Lets torch's launcher, started with --node-rank, say which hosts it waits for, and wait no longer than its ranks may.
Costs a connection between the launchers of the hosts."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta
from pathlib import Path

from loop.config import DistributedConfig, parse_command_line


def meet_in_time(arguments: list[str]) -> None:
    """Replaces how torch's launchers wait for each other under `--node-rank`: without a word, and for 15 minutes.

    Args:
        arguments: of the launcher; those of its script say how long a wait may be.
    """
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from loop.distributed.roll_call import Roll, wait_for_port

    stores: list[TCPStore] = []  # one, kept for the launcher's next attempts

    def next_rendezvous(handler: StaticTCPRendezvous) -> RendezvousInfo:
        address, port, rank, number = handler.master_addr, handler.master_port, handler.rank, handler.world_size
        if not stores:
            timeout_s = timeout_of(arguments)
            if rank > 0:
                wait_for_port(address, port, f"the first host to open port {port} at {address}", timeout_s)
            stores.append(TCPStore(address, port, is_master=rank == 0, timeout=timedelta(seconds=timeout_s),
                                   wait_for_workers=False, multi_tenant=True))
            roll = Roll(PrefixStore("launchers", stores[0]), "node", number)
            roll.call(rank, {"host": socket.gethostname()}, says=True, timeout_s=timeout_s)
        return RendezvousInfo(
            PrefixStore(handler.run_id, stores[0]), rank, number, RendezvousStoreInfo(address, port))

    setattr(StaticTCPRendezvous, "next_rendezvous", next_rendezvous)


def timeout_of(arguments: list[str]) -> int:
    """`distributed.timeout_s` of the script that a launcher starts, or its default where the script is not a trainer's.

    Raises:
        ValueError: the script's arguments are wrong.
    """
    for number, argument in enumerate(arguments):
        if Path(argument).name in ("train.py", "pipeline_train.py"):
            own, sys.argv = sys.argv, arguments[number:]
            try:
                return parse_command_line(splits=Path(argument).name == "pipeline_train.py").distributed.timeout_s
            finally:
                sys.argv = own
    return DistributedConfig.timeout_s
