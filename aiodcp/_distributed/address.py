"""Under which address the other ranks reach this one.

gloo asks for the addresses of the host's name, which clusters do not always resolve: it waits for the name server, and
takes the loopback address then, which the other hosts cannot connect to. Training with NCCL never asks, and works.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from typing import Any


def own_address_towards(store: Any) -> str | None:
    """Return the address from which this host reaches the store, as all ranks do.

    Args:
        store: of a process group, which may lie under prefixes.

    Returns:
        None if the store has no address, or this host's end is none that other hosts can reach.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not hasattr(store, "host"):  # a file's, say
        return None
    for family in (socket.AF_INET, socket.AF_INET6):  # in one order on all ranks: gloo wants one family
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((store.host, store.port))  # sends nothing: it only looks for the way there
            address: str = probe.getsockname()[0]
            # The host of the store may call itself localhost, and be another one to the others.
            is_ours_only = ipaddress.ip_address(address.partition("%")[0]).is_loopback and not _is_one_host()
            return None if is_ours_only else address
    return None


def _is_one_host() -> bool:
    """Whether torchrun says that all ranks are here."""
    return os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ.get("WORLD_SIZE", "unknown")
