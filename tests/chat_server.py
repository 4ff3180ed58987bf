"""A real HTTP server on this machine that answers chat requests as a test's script says, and counts them."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Exchange(BaseHTTPRequestHandler):
    """One request, as the script gets it: `path`, `headers`, `body` (the JSON), `number` (from 0, as they arrive)."""

    def do_POST(self):
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.number = len(self.server.requests)
            self.server.requests.append(self)
            self.time = time.monotonic()
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        self.counted = True
        try:
            self.server.script(self)
        except OSError:  # the client has given up
            self.close_connection = True
        finally:
            self.over()

    def over(self):
        """Counted before the answer is out: the client may send its next request at once."""
        if self.counted:
            with self.server.lock:
                self.server.under_way -= 1
            self.counted = False

    @property
    def question(self):
        return self.body["messages"][-1]["content"]

    def send(self, content, status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.over()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer(self, text, usage=(7, 3)):
        value = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        if usage is not None:
            value["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
        self.send(value)

    def refuse(self, status, message="no", headers=()):
        self.send({"error": {"message": message, "type": "test"}}, status, headers)

    def be_silent(self):
        self.server.ended.wait(30)
        self.close_connection = True

    def trickle(self, content):
        """One byte every 20 ms."""
        for n in range(len(content)):
            if self.server.ended.wait(0.02):
                return
            self.wfile.write(content[n : n + 1])
            self.wfile.flush()

    def log_message(self, *unused):
        pass


class ChatServer(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, script, port=0):
        super().__init__(("127.0.0.1", port), Exchange)
        self.script, self.requests, self.under_way, self.most_under_way = script, [], 0, 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextlib.contextmanager
def serving(script, wrap=None):
    """A server that calls `script(exchange)` for each request, in a thread of its own; `wrap` makes its socket another
    (TLS).
    """
    server = ChatServer(script)
    if wrap is not None:
        server.socket = wrap(server.socket)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def in_turn(*steps):
    """A script: the n-th request gets the n-th of `steps`, further ones the last."""
    return lambda exchange: steps[min(exchange.number, len(steps) - 1)](exchange)


def right(exchange):
    exchange.answer("yes")
