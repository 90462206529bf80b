"""Fetch an image from the web, from public addresses only, within a time and a size.

The address comes from a user or, in a prompt, from anyone: it must not reach services inside the
network of the machine that fetches it.
"""

from __future__ import annotations

import io
import os
import re
import time
import urllib.parse
from concurrent import futures
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from socket import SOCK_STREAM, create_connection, getaddrinfo, socket
from ssl import SSLContext, create_default_context
from typing import Any

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://|data:", re.IGNORECASE)
_MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_TARGET_SAFE = "/?&=%:+,;@!$'()*~[]"  # what stays unquoted in a path and query
_NAT64 = IPv6Network("64:ff9b::/96")
#: Control characters but for the line's end and the tabulator.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redact(text: str) -> str:
    """``text`` without the passwords of URLs in it: a log is no place for them."""
    return re.sub("//[^/]*@", "//***@", text)


def shown(name: str) -> str:
    """``name`` fit to be printed and stored.

    No passwords of URLs, no undecodable bytes, and nothing that a terminal would obey.
    """
    text = os.fsencode(redact(name)).decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def fetch(url: str, name: str, max_bytes: int, timeout: float) -> bytes:
    """The body that ``url`` answers with, after at most ``_MAX_REDIRECTS`` redirects.

    Args:
        url: http(s) address.
        name: what errors call it.
        max_bytes: most bytes of the body.
        timeout: seconds for everything together.

    Raises:
        ValueError: the address, or one that it redirects to, is refused; or the body is too long.
        TimeoutError: after ``timeout`` seconds.
        OSError: it cannot be fetched.
    """
    deadline = time.monotonic() + timeout
    location = url
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            body, redirect = _get(location, max_bytes, deadline)
            if redirect is None:
                return body
            location = redirect
        raise OSError(f"more than {_MAX_REDIRECTS} redirects")
    except (TimeoutError, futures.TimeoutError):
        raise TimeoutError(f"source {name} took more than timeout = {timeout} s") from None
    except (OSError, HTTPException) as error:
        raise OSError(f"source {name} could not be fetched: {error}") from error
    except ValueError as error:
        raise ValueError(f"source {name} is refused: {error}") from error


def _get(url: str, max_bytes: int, deadline: float) -> tuple[bytes, str | None]:
    """One GET: the body, or the address of a redirect."""
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("it must not hold a user name or password")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"it leads to {url[:80]!r}, which is no http(s) URL with a host")
    host, path = parts.hostname, parts.path or "/"
    target = f"{path}?{parts.query}" if parts.query else path
    connection: HTTPConnection
    if parts.scheme == "https":
        context = create_default_context()
        connection = HTTPSConnection(host, parts.port, context=context)
    else:
        context = None
        connection = HTTPConnection(host, parts.port)
    with _connect(host, connection.port, context, deadline) as sock:
        # Given its socket, http.client resolves and dials nothing itself.
        connection.sock = _DeadlineSocket(sock, deadline)
        headers = {"Accept": "image/*", "User-Agent": "monkey-vision"}
        connection.request("GET", urllib.parse.quote(target, _TARGET_SAFE), headers=headers)
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            return b"", urllib.parse.urljoin(url, location)
        if response.status != 200:
            raise OSError(f"HTTP status {response.status} {response.reason}; expected 200")
        body = bytearray()
        while chunk := response.read(1 << 16):  # counted here: Content-Length may lie
            body += chunk
            if len(body) > max_bytes:
                raise ValueError(f"it sends more than max_bytes = {max_bytes} bytes")
        if response.length:  # what Content-Length still promises
            raise OSError(f"the body ended {response.length} bytes before its Content-Length")
        return bytes(body), None


def _connect(host: str, port: int, context: SSLContext | None, deadline: float) -> socket:
    """A socket to a checked address of ``host``, which TLS still verifies by its name.

    The name is resolved once, and the address that was checked is the one that is dialled: a name
    server cannot answer the check with one address and the connection with another.
    """
    # In a thread, because getaddrinfo has no time limit.
    resolver = futures.ThreadPoolExecutor(1)
    try:
        addresses = resolver.submit(_public_addresses, host, port).result(_remaining(deadline))
    finally:
        resolver.shutdown(wait=False)
    failure = OSError(f"{host} has no address")
    for address in addresses:
        try:
            sock = create_connection((address, port), _remaining(deadline))
            return context.wrap_socket(sock, server_hostname=host) if context else sock
        except OSError as error:
            failure = error
    raise failure


def _public_addresses(host: str, port: int) -> list[str]:
    """The addresses of ``host``. ValueError if one of them is not on the public internet."""
    addresses = [str(info[4][0]) for info in getaddrinfo(host, port, type=SOCK_STREAM)]
    for address in addresses:
        if not _is_public(address):
            what = address if address == host else f"{host} is {address}, which"
            raise ValueError(f"{what} is not a public address")
    return addresses


def _is_public(address: str) -> bool:
    ip = ip_address(address)
    if isinstance(ip, IPv6Address):
        embedded = IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip.ipv4_mapped
        if embedded is None:
            # 6to4 and Teredo addresses hold an IPv4 one as well, and nothing serves images there.
            tunnel = ip.sixtofour or ip.teredo
            return ip in _GLOBAL_UNICAST and ip.is_global and not tunnel
        ip = embedded
    return ip.is_global and not ip.is_multicast


def _remaining(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class _DeadlineSocket(io.RawIOBase):
    """What http.client uses of a socket, with one deadline for all reads together: a socket's own
    timeout starts anew with every byte that a slow server sends."""

    def __init__(self, sock: socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_remaining(self._deadline))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_remaining(self._deadline))
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        """Nothing: http.client closes its socket before it reads the body; ``_get`` closes it."""
