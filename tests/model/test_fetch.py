"""load_image of web addresses: which are asked, for how long, and what they may answer."""

from __future__ import annotations

import itertools
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from monkey_model.inputs import fetch as fetching
from monkey_model.inputs.images import load_image
from tests.helpers.pictures import RGB, assert_pixels, encoded, exif


class Handler(BaseHTTPRequestHandler):
    """Answers by path; the server counts requests and keeps the headers of the last one."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        name, _, argument = self.path.lstrip("/").partition("/")
        try:
            getattr(self, f"send_{name.partition('?')[0]}")(argument)
        except OSError:  # the client hung up, as it should
            self.close_connection = True

    def body(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_image(self, _: str) -> None:
        self.body(encoded(Image.fromarray(RGB)))

    def send_text(self, _: str) -> None:
        self.body(b"<html>no image</html>")

    def send_zeros(self, count: str) -> None:
        # A small Content-Length in front of an endless body must not be believed.
        self.body(b"", **{"Transfer-Encoding": "chunked"})
        for _ in range(int(count) // 1000):
            self.wfile.write(b"3e8\r\n" + bytes(1000) + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def send_short(self, missing: str) -> None:
        data = encoded(Image.fromarray(RGB))
        self.body(data[: len(data) - int(missing)], **{"Content-Length": str(len(data))})

    def send_missing(self, _: str) -> None:
        self.body(b"", 404)

    def send_redirect(self, target: str) -> None:
        self.body(b"", 302, Location=target.replace("PORT", str(self.server.server_port)))

    def send_nowhere(self, _: str) -> None:
        self.body(b"", 302)

    def send_drip(self, where: str) -> None:
        if where == "body":
            self.body(b"")
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:  # until the client hangs up
            self.wfile.write(b"x")

    def send_garbage(self, _: str) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    requests: list[tuple[str, dict[str, str]]]


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running_server: Server) -> Server:
    running_server.requests.clear()
    return running_server


@pytest.fixture
def web(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the server under a name that passes as public; others are really checked."""
    real = fetching._public_addresses

    def addresses(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "images.test" else real(host, port)

    monkeypatch.setattr(fetching, "_public_addresses", addresses)
    return f"http://images.test:{server.server_port}"


def fetch(url: str, **options: object) -> torch.Tensor:
    return load_image(url, allow_urls=True, **{"timeout": 60, **options})


def test_urls_are_refused_unless_allowed(server: Server) -> None:
    for scheme in ("http", "https", "HTTP", "HttpS"):
        url = f"{scheme}://127.0.0.1:{server.server_port}/image"
        message = f"source is a URL, and allow_urls is False; got '{url}'"
        with pytest.raises(ValueError, match=re.escape(message)):
            load_image(url)
    assert not server.requests


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://x/y.png", "data:image/png;base64,AA"])
@pytest.mark.parametrize("allow_urls", [False, True])
def test_other_schemes(url: str, allow_urls: bool) -> None:
    message = f"source must be a path or an http(s) URL; got '{url}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image(url, allow_urls=allow_urls)


def test_fetch(web: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody asks the proxy
    assert_pixels(fetch(f"{web}/image/a b\u00e9%20?q=1&r=\u00fc#part"), RGB)
    ((path, headers),) = server.requests
    assert path == "/image/a%20b%C3%A9%20?q=1&r=%C3%BC"
    assert headers["Host"] == web.removeprefix("http://")


def test_fetch_with_fast_decode_and_exif(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (400, 100)), "JPEG", exif=exif(6))
    monkeypatch.setattr(Handler, "send_image", lambda self, _: self.body(data))
    assert fetch(f"{web}/image", fast_decode=(200, 50)).shape == (200, 50, 3)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_loopback_is_refused(server: Server, host: str) -> None:
    with pytest.raises(ValueError, match=r"' is refused: .* is not a public address"):
        fetch(f"http://{host}:{server.server_port}/image")
    assert not server.requests


PRIVATE = """0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
172.31.255.255 192.0.2.1 192.168.0.1 198.18.0.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 fe80::1 fe80::1%lo fec0::1 fc00::1 fd12::1 ff02::1 ff0e::1 2001:db8::1 100::1 ::127.0.0.1
::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1
2002:7f00:1:: 2002:808:808:: 2001:0:7f00:1::1"""
PUBLIC = "8.8.8.8 172.32.0.1 100.128.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"


def test_which_addresses_are_public() -> None:
    assert [address for address in PRIVATE.split() if fetching._is_public(address)] == []
    assert [address for address in PUBLIC.split() if not fetching._is_public(address)] == []


def fake_dns(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[object]:
    """Makes every name resolve to ``addresses``; returns the list of what is dialled."""
    kind = socket.SOCK_STREAM
    answers = [(socket.AF_INET, kind, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(fetching, "getaddrinfo", lambda *_, **__: answers)
    dialled: list[object] = []

    def dial(address: object, timeout: float) -> socket.socket:
        dialled.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(fetching, "create_connection", dial)
    return dialled


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = fake_dns(monkeypatch, "8.8.8.8", "10.0.0.1")
    message = "images.test is 10.0.0.1, which is not a public address"
    with pytest.raises(ValueError, match=message):
        fetch("http://images.test/a.png")
    assert dialled == []


def test_the_checked_addresses_are_the_ones_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = fake_dns(monkeypatch, "8.8.8.8", "8.8.4.4")
    with pytest.raises(OSError, match="could not be fetched: nobody there"):
        fetch("http://images.test/a.png")
    assert dialled == [("8.8.8.8", 80), ("8.8.4.4", 80)]


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_dns(monkeypatch)
    with pytest.raises(OSError, match=r"could not be fetched: images\.test has no address"):
        fetch("http://images.test/a.png")


def test_slow_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(fetching, "getaddrinfo", lambda *_, **__: answer.wait() and [])
    try:
        with pytest.raises(TimeoutError, match=r"took more than timeout = 0\.1 s"):
            fetch("http://images.test/a.png", timeout=0.1)
    finally:
        answer.set()


def test_tls_verifies_the_host_by_name(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    create = fetching.create_default_context

    def context() -> object:
        result = create()
        assert result.check_hostname
        assert result.verify_mode.name == "CERT_REQUIRED"
        wrap = result.wrap_socket

        class Context(type(result)):
            def wrap_socket(self, sock: socket.socket, server_hostname: str) -> object:
                names.append(server_hostname)
                return wrap(sock, server_hostname=server_hostname)

        result.__class__ = Context
        return result

    monkeypatch.setattr(fetching, "create_default_context", context)
    with pytest.raises(OSError, match=r"could not be fetched: .*SSL"):  # the server speaks no TLS
        fetch(web.replace("http:", "https:") + "/image")
    assert names == ["images.test"]


@pytest.mark.parametrize("location", ["/image", "http://images.test:PORT/image"])
def test_redirect(web: str, server: Server, location: str) -> None:
    assert_pixels(fetch(f"{web}/redirect/{location}"), RGB)
    assert [path for path, _ in server.requests][1:] == ["/image"]


def test_redirect_to_a_private_address(web: str, server: Server) -> None:
    url = f"{web}/redirect/http://127.0.0.1:PORT/image"
    with pytest.raises(ValueError, match=r"is refused: 127\.0\.0\.1 is not a public"):
        fetch(url)
    assert len(server.requests) == 1


def test_redirect_to_another_scheme(web: str) -> None:
    message = "is refused: it leads to 'file:///etc/hosts', which is no http(s) URL with a host"
    with pytest.raises(ValueError, match=re.escape(message)):
        fetch(f"{web}/redirect/file:///etc/hosts")


def test_redirect_loop(web: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Handler, "send_redirect", lambda self, _: self.body(b"", 301, Location="/redirect")
    )
    with pytest.raises(OSError, match="could not be fetched: more than 5 redirects"):
        fetch(f"{web}/redirect")
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("path", "status"), [("missing", "404 Not Found"), ("nowhere", "302 Found")]
)
def test_other_status(web: str, path: str, status: str) -> None:
    message = f"source '{web}/{path}' could not be fetched: HTTP status {status}; expected 200"
    with pytest.raises(OSError, match=re.escape(message)):
        fetch(f"{web}/{path}")


def test_size_limit(web: str) -> None:
    with pytest.raises(ValueError, match="is refused: it sends more than max_bytes = 4999 bytes"):
        fetch(f"{web}/zeros/5000", max_bytes=4999)
    with pytest.raises(ValueError, match="is not a readable image"):
        fetch(f"{web}/zeros/5000", max_bytes=5000)
    size = len(encoded(Image.fromarray(RGB)))
    assert_pixels(fetch(f"{web}/image", max_bytes=size), RGB)


@pytest.mark.parametrize("where", ["headers", "body"])
def test_deadline_of_the_whole_transfer(
    web: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte is in time; all together never end. The clock here goes by what asks for it."""
    seconds = itertools.count()
    monkeypatch.setattr(fetching, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    message = rf"source '{web}/drip/{where}' took more than timeout = 10 s"
    with pytest.raises(TimeoutError, match=message):
        fetch(f"{web}/drip/{where}", timeout=10)


def test_bodies_that_are_no_image(web: str) -> None:
    with pytest.raises(ValueError, match=f"source '{web}/text' is not a readable image"):
        fetch(f"{web}/text")
    with pytest.raises(OSError, match=f"source '{web}/garbage' could not be fetched"):
        fetch(f"{web}/garbage")


def test_a_body_shorter_than_its_content_length(web: str) -> None:
    """What came may well decode, as half a JPEG does."""
    size = len(encoded(Image.fromarray(RGB)))
    message = f"source '{web}/short/1' could not be fetched: the body ended 1 bytes before its"
    with pytest.raises(OSError, match=message):
        fetch(f"{web}/short/1")
    with pytest.raises(OSError, match=f"ended {size} bytes before its Content-Length"):
        fetch(f"{web}/short/{size}")
    assert_pixels(fetch(f"{web}/short/0"), RGB)


def test_credentials_are_refused_and_not_repeated(server: Server) -> None:
    for allow_urls in (False, True):
        with pytest.raises(ValueError, match=r"\*\*\*@images.test") as caught:
            load_image("http://me:secret@images.test/a.png", allow_urls=allow_urls)
        assert "secret" not in str(caught.value)
    assert "is refused: it must not hold a user name or password" in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http:///a.png", "http://[::1/a", "http://x:99999/"])
def test_malformed_urls(url: str) -> None:
    with pytest.raises(ValueError, match="is refused: "):
        fetch(url)


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_bytes must be positive; got 0"):
        load_image(RGB, max_bytes=0)
    for timeout in (0, -1.0, float("nan")):
        message = f"timeout must be a positive number of seconds; got {timeout}"
        with pytest.raises(ValueError, match=message):
            load_image(RGB, timeout=timeout)
