"""TCP ports that a server of this host can bind: is this one free, which ones are."""

from __future__ import annotations

import random
import socket

# Below what Linux hands to outgoing connections (32768 and up): such a port is nobody's by chance between the check and its use.
_LOWEST, _HIGHEST = 10_000, 32_767


def try_bind(host: str, port: int) -> None:
    """Raises `OSError` if no server could bind (host, port) now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last server has just closed is free
        probe.bind((host, port))


def free_port(count: int = 1, host: str = "127.0.0.1") -> int:
    """A port that is free now; the first of `count` ports in a row that are free now.

    Raises:
        OSError: a hundred tries found none.
    """
    for _ in range(100):
        first = random.SystemRandom().randint(_LOWEST, _HIGHEST - count + 1)  # the global one is seeded: the same ports in every process
        try:
            for port in range(first, first + count):
                try_bind(host, port)
        except OSError:
            continue
        return first
    raise OSError(f"no {count} free ports in a row on {host} between {_LOWEST} and {_HIGHEST}")
