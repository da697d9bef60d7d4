"""The HTTP client against a loopback server; tests of its users cover server failures."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemocascade.runtime import http
from nemocascade.runtime.http import HttpClient, HttpError, read_key

CONNECTIONS = 3


class Handler(BaseHTTPRequestHandler):
    """Answers with the request, or with the next of `server.statuses`."""

    server: Any
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.times.append(time.monotonic())
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if statuses else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.lock, found.connections, found.statuses, found.times = threading.Lock(), 0, [], []
    found.url = f"http://127.0.0.1:{found.server_port}/path"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def client() -> Iterator[HttpClient]:
    found = HttpClient(connections=CONNECTIONS, max_bytes=1000)
    yield found
    found.close()


def test_connections_are_kept(server: Any, client: HttpClient) -> None:
    bodies = [f"{i}".encode() for i in range(60)]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda body: client.post(server.url, body, 30.0), bodies))
    assert found == bodies
    assert server.connections < len(bodies) / 2


class Closing(Handler):
    """Closes a kept connection as soon as the next request arrives on it, without a reply."""

    used = False

    def do_POST(self) -> None:
        if self.used or self.server.is_gone:
            self.close_connection = True
            self.server.dropped += 1
            return
        self.used = True
        super().do_POST()


def test_a_kept_connection_that_the_server_closes_costs_nothing(
    server: Any, client: HttpClient
) -> None:
    """The request is repeated on a new connection. One that breaks there is an error."""
    server.RequestHandlerClass, server.dropped, server.is_gone = Closing, 0, False
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        bodies = [f"{i}".encode() for i in range(30)]
        assert list(pool.map(lambda body: client.post(server.url, body, 30.0), bodies)) == bodies
    assert server.dropped
    server.is_gone = True
    with pytest.raises(HttpError, match="connection"):
        client.post(server.url, b"x", 5.0)


def test_proxies_of_the_environment_are_not_used(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    client = HttpClient()
    assert client.post(server.url, b"x", 10.0) == b"x"
    client.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_certificates(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site's own authority counts; a certificate that nobody vouches for is not a busy server."""
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(make, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    http._certificates.cache_clear()
    client = HttpClient()
    with pytest.raises(HttpError, match=r"connection: .*certificate"):
        client.post(url, b"x", 10.0)
    client.close()
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    http._certificates.cache_clear()
    client = HttpClient()
    assert client.post(url, b"x", 10.0) == b"x"
    client.close()
    http._certificates.cache_clear()


def test_a_rejection_says_how_long_to_wait(server: Any, client: HttpClient) -> None:
    server.statuses = [429]
    with pytest.raises(HttpError, match="status 429: 'why'") as error:
        client.post(server.url, b"why", 30.0)
    assert (error.value.status, error.value.wait_s, error.value.final) == (429, 1.0, False)
    assert http.backoff(0, 0.0, error.value.wait_s) >= 1.0


def test_a_final_error_is_not_to_be_retried(server: Any, client: HttpClient) -> None:
    server.statuses = [400]
    with pytest.raises(HttpError) as error:
        client.post(server.url, b"why", 30.0)
    assert error.value.final


def test_a_long_reply_is_rejected(server: Any, client: HttpClient) -> None:
    assert len(client.post(server.url, b" " * 1000, 10.0)) == 1000
    with pytest.raises(HttpError, match="longer than 1000 bytes"):
        client.post(server.url, b" " * 1001, 10.0)


class Silent(Handler):
    """Never answers."""

    def do_POST(self) -> None:
        self.server.times.append(time.monotonic())
        self.server.end.wait()
        self.close_connection = True


def test_closing_cancels_running_requests(server: Any, client: HttpClient) -> None:
    server.RequestHandlerClass, server.end = Silent, threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.post, server.url, b"", 90.0)
        while not server.times:
            time.sleep(0.01)
        started = time.monotonic()
        client.close()
        with pytest.raises(HttpError, match="closed"):
            asking.result(timeout=30)
    server.end.set()
    assert time.monotonic() - started < 30
    with pytest.raises(HttpError, match="closed"):
        client.post(server.url, b"", 1.0)


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret\n")
    assert read_key("SOME_KEY") == "secret"
    assert read_key("") == ""
    with pytest.raises(ValueError, match="no HTTP header") as error:
        HttpClient(key="two\nsecrets")
    assert "secrets" not in str(error.value)
