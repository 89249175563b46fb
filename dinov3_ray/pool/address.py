"""Where pools are found: the address of a Ray's head, which is read here alone, and their namespace in that Ray."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from dinov3_ray.errors import ConfigError

__all__ = ["NAMESPACE", "Address"]

NAMESPACE = "dinov3_ray"
"""The default Ray namespace of pools, whatever namespace the driver uses for itself."""

_RAYS_PORT = 6379
_FORM = re.compile(r"(?:\[(?P<number>[^\[\]]*)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]+)", re.ASCII)
_HOST_NAME = re.compile(r"\w(?:[\w.-]*\w)?\.?")
_SCHEMES = {"ray": "over Ray Client pools do not work", "http": "the dashboard takes jobs only"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Ray's head listens.

    Attributes:
        host: a host name, or an IPv4 or IPv6 address without brackets.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        """``host:port``, with an IPv6 address in brackets (RFC 3986, section 3.2.2), as Ray and gRPC take it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, name: str = "address") -> Address | None:
        """What ``text`` says; None for ``auto``, which leaves the search to Ray.

        Args:
            text: ``host:port``, with an IPv6 address in brackets (``[::1]:6379``), or ``auto``.
            name: of the parameter or variable that ``text`` is from, for errors.

        Raises:
            ConfigError: it names no head: it is of another form, or the address of Ray Client or of the dashboard.
        """
        if text == "auto":
            return None
        found = _FORM.fullmatch(text)
        if found is not None and 0 < int(found["port"]) < 65536:
            number, host = found["number"], found["host"]
            if _is_host(number or host or "", in_brackets=bool(number)):
                return cls(number or host, int(found["port"]))
        reason, instead = _mistake(text)
        raise ConfigError(
            f"{name} must be HOST:PORT of a running Ray's head, or auto; got {text!r} ({reason}): use '{instead}', or "
            "the port that `ray start --head` printed, on a machine that reaches all nodes, or run the script there as "
            "a job (`ray job submit`)"
        )

    @classmethod
    def of(cls, gcs_address: str) -> Address:
        """What Ray itself says of the head that this process is connected to."""
        address = cls.parse(gcs_address)
        assert address is not None
        return address

    def is_same(self, other: Address) -> bool:
        """Whether both lead to one head, as far as this machine can tell: users name it, and Ray knows its number."""
        if self.port != other.port:
            return False
        numbers, others = _numbers(self.host), _numbers(other.host)
        if numbers & others or self.host.lower() == other.host.lower():
            return True
        # One of them is this machine by its loopback address, and the other by that of a network card.
        return any(
            any(ipaddress.ip_address(number).is_loopback for number in near) and any(map(_is_here, far))
            for near, far in ((numbers, others), (others, numbers))
        )


def _mistake(text: str) -> tuple[str, Address]:
    """Why ``text`` is not the address of a head, and what may have been meant."""
    usual = Address("HOST", _RAYS_PORT)
    scheme, colon, _ = text.partition("://")
    if colon:
        try:
            host = urlsplit(text).hostname
        except ValueError:  # an odd number of brackets
            host = None
        reason = _SCHEMES.get(scheme.removesuffix("s"), "that names no running Ray")
        return reason, Address(host, _RAYS_PORT) if host else usual
    if text == "local":
        return "that names no running Ray", usual
    bare = text.removeprefix("[").removesuffix("]")
    if ":" in bare and _is_host(bare, in_brackets=True):
        return "an IPv6 address stands in brackets, and a port follows it", Address(bare, _RAYS_PORT)
    if _is_host(text, in_brackets=False):
        return "it has no port", Address(text, _RAYS_PORT)
    return "that is not a host with a port from 1 to 65535", usual


def _is_host(text: str, *, in_brackets: bool) -> bool:
    if not in_brackets and re.search(r"[^0-9.]", text):
        return bool(_HOST_NAME.fullmatch(text))
    try:
        (ipaddress.IPv6Address if in_brackets else ipaddress.IPv4Address)(text)
    except ValueError:
        return False
    return True


def _numbers(host: str) -> set[str]:
    """The IP addresses of ``host``; none if it is not known here."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {str(place[0]) for *_, place in found}


def _is_here(number: str) -> bool:
    """Whether it is an address of this machine: only such can be bound to."""
    with socket.socket(socket.AF_INET6 if ":" in number else socket.AF_INET, socket.SOCK_DGRAM) as listener:
        try:
            listener.bind((number, 0))
        except OSError:
            return False
    return True
