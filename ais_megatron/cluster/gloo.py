"""One gloo device for all process groups of a rank.

torch gives every gloo group a device of its own, and the thread of a device looks for messages a hundred times a second. Megatron-Core
makes dozens of groups. So idle ranks cost time: with 45 groups 15 ms of CPU time a second, and 2 ms with one device (torch 2.13). torch's
Python interface has no argument for the device. So its class for gloo groups is replaced by one that sets it.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

THREADS_PER_DEVICE = 2  # which run a group's collectives; as in torch


def share_devices() -> None:
    """Let all gloo groups that this process makes from now on share their devices. Call it before the first group is made."""
    c10d.ProcessGroupGloo = _GlooGroup  # type: ignore[misc]


@functools.cache
def _devices() -> list[object]:
    """One device for each network interface in GLOO_SOCKET_IFNAME, or the host's default one, as torch chooses them."""
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    gloo = dist.ProcessGroupGloo
    return [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]


class _GlooGroup(dist.ProcessGroupGloo):
    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices, options._timeout = _devices(), timeout
        options._threads = THREADS_PER_DEVICE * len(options._devices)
        super().__init__(store, rank, size, options)
