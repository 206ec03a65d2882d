"""The HTTP server: uvicorn, with the limits on time, headers and connections that it lacks."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prelm_jax.serving.protocol import Refusal

HEADER_SECONDS = 10.0  # From the connection, or from the first byte of a request, to the end of its headers.
REQUEST_SECONDS = 60.0  # To the end of its body.
HEADER_BYTES = 32 * 1024  # Of headers, and of the framing of a body in chunks beyond the size of the body itself.
MAX_CONNECTIONS = 1000
GRACE_SECONDS = 8  # For requests that were accepted before the server is stopped.


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol. A request that is too slow or too large gets an error and ends its connection."""

    header_seconds, request_seconds, header_bytes = HEADER_SECONDS, REQUEST_SECONDS, HEADER_BYTES
    max_connections = MAX_CONNECTIONS
    _timer: asyncio.TimerHandle | None = None
    _overhead = 0  # Bytes of headers and of the body's framing, minus bytes of the body.
    _in_headers = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        connection = transport.get_extra_info("socket")
        if connection.family != socket.AF_UNIX:  # Without it the body waits until the client acknowledges the headers.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.max_connections:
            self._refuse(Refusal(503, "too many connections", code="overloaded", retry_after=1))
            return
        self._arm(self.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers and self._timer is None:  # The first bytes of another request on this connection.
            self._arm(self.header_seconds)
        self._overhead += len(data)
        super().data_received(data)
        if self._overhead > self.header_bytes:
            message = f"the headers, or the framing of the body, have more than {self.header_bytes} bytes"
            self._refuse(Refusal(431, message, code="headers_too_large"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # Trailers are ignored: a proxy that checks headers has not seen them.
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._arm(self.request_seconds)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead -= 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        self._in_headers, self._overhead = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refusal(400, msg, code="bad_request"))

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        self._refuse(Refusal(408, "the request took too long to arrive", code="timeout"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answers with an error unless an answer has begun, and ends the connection."""
        self._disarm()
        if not self.transport.is_closing():
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                response = refusal.response()
                lines = [f"HTTP/1.1 {refusal.status} {refusal.code}", "connection: close"]
                lines += [f"{name}: {value}" for name, value in response.headers.items()]
                self.transport.write("\r\n".join([*lines, "", ""]).encode() + bytes(response.body))
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server. Calls `on_start` with its addresses once it listens, and `on_stop` before it stops."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[Sequence[str]], None], on_stop: Callable[[], None]):
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        names = [each.getsockname() for each in sockets or ()]
        self._on_start([name if isinstance(name, str) else f"http://{in_url(name[0])}:{name[1]}" for name in names])


def in_url(host: str) -> str:
    """A host as URLs and Host headers have it: an IPv6 address has brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def make_server(
    app: ASGIApp, on_start: Callable[[Sequence[str]], None], on_stop: Callable[[], None] = lambda: None
) -> Server:
    """A server for an application: `asyncio.run(make_server(app, on_start).serve([listener]))`."""
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    return Server(config, on_start, on_stop)
