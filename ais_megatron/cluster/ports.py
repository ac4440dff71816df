"""Finds TCP ports that a server on this host can bind to."""

from __future__ import annotations

import random
import socket

# Linux gives outgoing connections ports from 32768 on. Below that, no connection takes a port between its check and its use.
_LOWEST, _HIGHEST = 10_000, 32_767


def try_bind(host: str, port: int) -> None:
    """Raise `OSError` if no server can bind to (host, port) now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port whose last server has just closed is free
        probe.bind((host, port))


def free_port(count: int = 1, host: str = "127.0.0.1") -> int:
    """The first of `count` consecutive ports that are free now.

    Raises:
        OSError: none was found in a hundred tries.
    """
    for _ in range(100):
        first = random.SystemRandom().randint(
            _LOWEST, _HIGHEST - count + 1
        )  # the global generator is seeded and would give every process the same ports
        try:
            for port in range(first, first + count):
                try_bind(host, port)
        except OSError:
            continue
        return first
    raise OSError(f"found no {count} consecutive free ports on {host} between {_LOWEST} and {_HIGHEST}")
