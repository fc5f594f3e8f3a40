"""A proxy in front of an S3 server that fails as told, and counts what it is asked.

    with FaultProxy(server.endpoint) as proxy:                  # or the fixture `faults`
        proxy.add("slow_down", key=r"a/.*\\.png$", attempts=(1, 2))  # 503 at the first two tries of each key
        proxy.add("stall", key="^b$", method="GET", seconds=3)      # half of the body, then silence
        proxy.add("500", key=LISTING)                               # the first page of a list
        proxy.add("reset", key="^c$", attempts=ALWAYS)
        ...
        assert proxy.count("^b$") == 2

Requests are forwarded as they come, with their Host header, so that their signatures hold.
"""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

LISTING = "^$"
"""The key pattern of requests that concern the bucket itself."""

ALWAYS = range(1, 1 << 30)
"""All attempts."""

ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
BODIES = ("stall", "truncate", "wrong_body")
KINDS = (*ERRORS, *BODIES, "reset", "lost", "delay", "call")
_PIECE_BYTES = 1 << 18
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


class Seen(NamedTuple):
    """A request that came.

    Attributes:
        method: HTTP method.
        key: the key, decoded; empty for requests to the bucket itself.
        query: as sent.
        range: the Range header, "" where there is none.
        fault: the kind of fault that it met, "" for none.
    """

    method: str
    key: str
    query: str
    range: str
    fault: str


@dataclass
class Fault:
    """A rule; the attempts are counted by key, among the requests that the rule is about."""

    kind: str
    key: re.Pattern[str]
    method: str
    attempts: Collection[int]
    seconds: float
    call: Callable[[], object] | None
    keep_checksums: bool
    probability: float
    seed: int
    by_range: bool
    counts: Counter[str] = field(default_factory=Counter)

    def applies(self, method: str, key: str, range_header: str) -> bool:
        """Count a request and tell whether it is to fail."""
        if self.method not in ("*", method) or not self.key.search(key):
            return False
        counted = f"{key} {range_header}" if self.by_range else key
        self.counts[counted] += 1
        if self.probability < 1:
            # drawn by key and attempt, so that it does not depend on which thread comes first
            draw = random.Random(f"{self.seed} {self.kind} {method} {counted} {self.counts[counted]}")
            return draw.random() < self.probability
        return self.counts[counted] in self.attempts


class FaultProxy:
    """The proxy, running on a free port of loopback from its creation until `close`.

    Attributes:
        endpoint: its address, for AWS_ENDPOINT_URL.
        seen: the requests so far, in the order in which they came.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def add(
        self,
        kind: str,
        *,
        key: str = "",
        method: str = "*",
        attempts: Collection[int] = (1,),
        seconds: float = 0.0,
        call: Callable[[], object] | None = None,
        keep_checksums: bool = True,
        probability: float = 1.0,
        seed: int = 0,
        by_range: bool = False,
    ) -> None:
        """Add a rule; of several that apply to a request, the first added is followed.

        Args:
            kind: "500", "slow_down" (503), "expired" (credentials), "denied"; "reset" of the connection
                before the request was followed, or its answer "lost" after that; "delay" of the whole answer
                by `seconds`; of the body: "stall" (half of it, then silence for `seconds`), "truncate" (half
                of it, then the end), "wrong_body" (right length, a byte changed); "call" does nothing but
                what `call` does.
            key: pattern searched in the decoded key; `LISTING` for the bucket itself.
            method: "GET", "PUT", "HEAD", "DELETE", "POST", or "*" for all.
            attempts: which tries of each key fail, counted from 1 when the rule is added.
            seconds: length of a stall or a delay.
            call: what to do before, with any kind: delete an object, renew a file.
            keep_checksums: False takes the server's own checksum headers out of a changed body's answer.
            probability: below 1, this share of the requests fails, whatever `attempts` says.
            seed: of these draws.
            by_range: count the tries of each part of a key on their own, since they may come side by side.
        """
        assert kind in KINDS, f"{kind}: choose from {KINDS}"
        rule = Fault(
            kind,
            re.compile(key),
            method,
            attempts,
            seconds,
            call,
            keep_checksums,
            probability,
            seed,
            by_range,
        )
        with self._lock:
            self._faults.append(rule)

    def clear(self) -> None:
        """Forget all rules, and what was seen."""
        with self._lock:
            self._faults.clear()
            self.seen.clear()

    def count(self, key: str = "", method: str = "*") -> int:
        """Number of requests so far whose key matches the pattern."""
        with self._lock:
            return sum(
                method in ("*", item.method) and re.search(key, item.key) is not None for item in self.seen
            )

    def close(self) -> None:
        """Stop; whatever stalls or is delayed ends now."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def note(self, method: str, target: str, range_header: str) -> Fault | None:
        """Record a request; return the rule that it falls under."""
        parts = urlsplit(target)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        with self._lock:
            # every rule counts, also those behind the one that is followed
            matching = [fault for fault in self._faults if fault.applies(method, key, range_header)]
            fault = matching[0] if matching else None
            self.seen.append(Seen(method, key, parts.query, range_header, fault.kind if fault else ""))
        return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        self.upstream.connect()
        self.upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()  # else the client waits a second before it sends the body
        return proceed

    def forward(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = proxy.note(self.command, self.path, self.headers.get("Range", ""))
        kind = fault.kind if fault else ""
        if fault and fault.call:
            fault.call()
        if fault and kind == "delay":
            proxy.closing.wait(fault.seconds)
        elif kind == "reset":
            self._break()
            return
        elif kind in ERRORS:
            self._refuse(*ERRORS[kind])
            return
        self._answer(body, fault)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward  # noqa: N815 (the names that the base class looks for)

    def _break(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        data = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: bytes, fault: Fault | None) -> None:
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"connection", "expect"}:
                self.upstream.putheader(name, value)
        self.upstream.endheaders(body)
        answer = self.upstream.getresponse()
        if fault and fault.kind == "lost":
            answer.read()
            self._break()
            return
        hurt = fault if fault and fault.kind in BODIES else None
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            checksum = name.lower().startswith("x-amz-checksum-")
            if name.lower() not in _HOP_BY_HOP and not (hurt and not hurt.keep_checksums and checksum):
                self.send_header(name, value)
        if answer.length is None and self.command != "HEAD":  # of unknown length: passed on whole
            data = answer.read()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            return
        self.end_headers()
        self._pass_body(answer, hurt)

    def _pass_body(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        total, sent = answer.length or 0, 0
        half = total // 2
        while piece := answer.read(_PIECE_BYTES):
            start, sent = sent, sent + len(piece)
            if fault and fault.kind == "wrong_body" and start <= half < sent:
                changed = bytearray(piece)
                changed[half - start] ^= 0xFF
                piece = bytes(changed)
            elif fault and fault.kind in ("truncate", "stall") and sent > half:
                self.wfile.write(piece[: half - start])
                self.wfile.flush()
                if fault.kind == "stall":
                    self.server.proxy.closing.wait(fault.seconds)
                self.upstream.close()
                self.close_connection = True
                return
            self.wfile.write(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""
