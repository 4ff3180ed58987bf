"""One limit for a whole request, whatever the other side does; proxies and certificates. What servers send in place of
HTTP is the battery's (`benchmarks/batteries/judges.py`).
"""

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest

from hintsd_jax.hindsight.post import Poster, TooLong
from tests.chat_server import PROXIES, in_turn, right, serving

PATIENT, HURRIED = 20.0, 0.3
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def post(url, timeout=PATIENT, max_bytes=1000, use_proxy=False):
    poster = Poster(f"{url}/chat", timeout, max_bytes, use_proxy)
    return poster.post(b'{"messages": [{"content": "hi"}]}', {"Content-Type": "application/json"})


def no_request_left():
    """Whether no thread of a request goes on for long after its limit."""
    end = time.monotonic() + 10
    while any(thread.name == "endpoint-request" for thread in threading.enumerate()):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def test_a_status_is_no_exception_and_a_redirect_is_not_followed():
    there = {"Location": "/elsewhere"}
    with serving(in_turn(right, lambda e: e.refuse(503, "later"), lambda e: e.refuse(307, "there", there))) as server:
        status, headers, content = post(server.url)
        assert status == 200 and int(headers["content-length"]) == len(content) and b'"yes"' in content
        assert post(server.url)[0] == 503 and post(server.url)[0] == 307
        assert [(request.path, request.question) for request in server.requests] == [("/v1/chat", "hi")] * 3
        assert all(request.headers["Connection"] == "close" for request in server.requests)


def test_chunks_are_put_together():
    chunks = HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n4\r\nlast\r\n0\r\n\r\n"
    with serving(lambda e: e.wfile.write(chunks)) as server:
        assert post(server.url)[2] == b"firstlast"


FRAMES = [b"Content-Length: 1000000000\r\n\r\n", b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n-1\r\n"]


@pytest.mark.parametrize("frame", FRAMES)
def test_no_more_is_read_than_allowed(frame):
    """A server that would go on for ever is left, after what its sockets hold."""
    sent = []

    def babble(exchange):
        exchange.wfile.write(HEAD + frame)
        while not exchange.server.ended.is_set():
            sent.append(exchange.wfile.write(b"x" * 65536))

    with serving(babble) as server, pytest.raises(TooLong):
        post(server.url)
    assert sum(sent) < 50_000_000


SLOW = {
    "headers": lambda e: e.trickle(HEAD + b"X: y\r\n" * 200),
    "body": lambda e: (e.wfile.write(HEAD + b"Content-Length: 500\r\n\r\n"), e.trickle(b"x" * 500)),
    "chunk sizes": lambda e: (e.wfile.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), e.trickle(b"0" * 500)),
    "no length": lambda e: (e.wfile.write(HEAD + b"\r\n"), e.trickle(b"x" * 500)),
}


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW.keys())
def test_the_limit_is_for_all_of_it(script):
    """Each byte comes well within the limit, all of them would take 10 s or more."""
    with serving(script) as server:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            post(server.url, timeout=HURRIED)
        assert HURRIED <= time.monotonic() - began < 5
        assert no_request_left()  # before the server ends


def test_the_limit_holds_where_no_socket_is_yet(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *unused, **unused_too: release.wait(30) and [])
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        post("http://a-name-that-takes-long.invalid", timeout=HURRIED)
    assert time.monotonic() - began < 5
    release.set()
    assert no_request_left()


@pytest.mark.parametrize("sent", [HEAD[:9], HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nhalf"])
def test_a_reply_that_ends_early_is_none(sent):
    with serving(lambda e: e.wfile.write(sent)) as server:
        with pytest.raises((OSError, http.client.HTTPException)) as caught:
            post(server.url)
        assert not isinstance(caught.value, TimeoutError)


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening
        with pytest.raises(OSError, match="refused"):
            post(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_the_proxy_of_the_environment_is_used_where_that_is_asked_for(monkeypatch):
    with serving(right) as proxy, serving(right) as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert post("http://model.invalid/v1", use_proxy=True)[0] == 200
        assert [request.path for request in proxy.requests] == ["http://model.invalid/v1/chat"]
        assert post(server.url)[0] == 200 and len(proxy.requests) == 1
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert post(server.url, use_proxy=True)[0] == 200 and len(proxy.requests) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here to make a certificate")
def test_certificates_are_checked(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    slow = lambda e: e.trickle(HEAD + b"X: y\r\n" * 200)
    with serving(in_turn(right, slow), lambda sock: context.wrap_socket(sock, server_side=True)) as server:
        url = f"https://localhost:{server.server_address[1]}"
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            post(url)
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert post(url)[0] == 200
        with pytest.raises(OSError, match="Hostname mismatch|IP address mismatch"):
            post(url.replace("localhost", "127.0.0.1"))
        with pytest.raises(TimeoutError):
            post(url, timeout=1.0)
        assert no_request_left()
