"""Sockets on which process 0 waits for the others: on the address that they are told, and on no other."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import selectors
import socket
from typing import Self

from stepjax.errors import ClusterError


class Listener:
    """Listens on one port of the addresses that a host name stands for.

    A name of this host that stands for an address which it does not have, as behind a Kubernetes service, or for a
    loopback address, as ``/etc/hosts`` of some distributions says, means all addresses: others must find it.
    """

    def __init__(self, host: str, port: int, backlog: int):
        """
        Args:
          port: 0 takes any that is free.

        Raises:
          ClusterError: something else listens there.
        """
        self._sockets: list[socket.socket] = []
        try:
            for address in addresses(host):
                with contextlib.suppress(_NotHere):
                    self._sockets.append(_bound(address, self.port or port, backlog))
            if not self._sockets:
                self._sockets.append(_everywhere(port, backlog))
        except OSError as error:
            self.close()
            raise ClusterError(
                f"port {port}: process 0 cannot listen there ({error.strerror}); choose a free pair, the "
                "coordinator's and the next, by STEPJAX_COORDINATOR or --coordinator"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port; 0 before there is one."""
        return self._sockets[0].getsockname()[1] if self._sockets else 0

    @property
    def hosts(self) -> list[str]:
        """The addresses."""
        return [server.getsockname()[0] for server in self._sockets]

    def accept(self, timeout_s: float) -> socket.socket:
        """The next connection. TimeoutError: none comes."""
        with selectors.DefaultSelector() as selector:
            for server in self._sockets:
                selector.register(server, selectors.EVENT_READ, server)
            for key, _ in selector.select(timeout=max(timeout_s, 0.01)):
                return key.data.accept()[0]
        raise TimeoutError("no connection")

    def close(self) -> None:
        for server in self._sockets:
            server.close()


def addresses(host: str) -> list[str]:
    """The addresses of process 0 to listen on; none: all that this host has."""
    host = host.strip("[]")
    if is_loopback(host):
        return ["::1", "127.0.0.1"]
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    found = list(dict.fromkeys(str(info[4][0]).partition("%")[0] for info in infos))
    return [] if any(ipaddress.ip_address(address).is_loopback for address in found) else found


def is_loopback(host: str) -> bool:
    """Whether the others run on this host, by the address that they are told."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _NotHere(Exception):
    """This host does not have the address."""


def _bound(address: str, port: int, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=backlog)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise _NotHere from None
        raise


def _everywhere(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # switched off on this host; a port in use fails again below
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)
