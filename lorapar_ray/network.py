"""How processes of several machines meet: on the interface of the machine's address in Ray, within a time limit."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

GLOO_INTERFACE, NCCL_INTERFACE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
COLLECTIVE_LIMIT_S = 7200
"""Time limit of one collective operation, for gloo and NCCL: ranks may come to one at very different times. What takes
longest, they await on the host (`collectives.HostWait`). A dead rank is found by Ray, not by this."""


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The interface with an address; None if there is none (a machine behind address translation).

    Args:
        interfaces: addresses by interface, an IPv6 one perhaps with its zone (`fe80::1%eth0`).
    """
    for name, addresses in interfaces.items():
        if address in (each.partition("%")[0] for each in addresses):
            return name
    return None


def meet_on_rays_interface() -> None:
    """Let gloo and NCCL in this process, a Ray worker, meet on the interface of this machine's address in Ray.

    By default gloo uses the address to which the host's name resolves: on Debian 127.0.1.1, which other machines cannot
    reach. NCCL chooses one by its name, perhaps another network's. An interface that the user has chosen
    (`GLOO_SOCKET_IFNAME`, `NCCL_SOCKET_IFNAME`) stays. What NCCL sends over InfiniBand is not concerned.
    """
    import psutil
    import ray

    found = {name: [each.address for each in listed] for name, listed in psutil.net_if_addrs().items()}
    interface = interface_of(ray.util.get_node_ip_address(), found)
    if interface is not None:
        os.environ.setdefault(GLOO_INTERFACE, interface)
        os.environ.setdefault(NCCL_INTERFACE, f"={interface}")  # without the sign: all whose names begin so
