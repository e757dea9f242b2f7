"""HTTP connections that cannot be held open: uvicorn's protocol with a deadline for each step, and a limit on number.

uvicorn waits for ever for the first byte, for the rest of a header or of a body, and for a client to read its answer.
Here a connection has at any time one deadline, in seconds: for a whole request to arrive, for its answer to be ready,
and for the next request to begin. Where there are too many connections, the one nearest to its deadline goes.
"""

import asyncio
import enum
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_TOO_SLOW = b'{"detail": "the request took too long to arrive"}'
_408 = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_TOO_SLOW), _TOO_SLOW)
)


class _Wait(enum.Enum):
    """What a connection waits for."""

    REQUEST = "the rest of a request"
    ANSWER = "our answer"
    NEXT = "the first byte of another request, and the last answer to be read"


class TimedConnection(H11Protocol):
    """One connection.

    Args:
        seconds: for a request to arrive, and for an answer to be read.
        answer_seconds: for an answer to be ready.
        most: connections at a time.
        **of_uvicorn: what uvicorn gives to its protocol.
    """

    def __init__(self, *, seconds: float, answer_seconds: float, most: int, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._seconds = {_Wait.REQUEST: seconds, _Wait.ANSWER: answer_seconds, _Wait.NEXT: seconds}
        self._most = most
        self._has_begun = False
        self._wait = _Wait.REQUEST
        self._deadline = self.loop.call_later(seconds, self._expire)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._most:
            slow = [one for one in self.connections if one._wait is not _Wait.ANSWER]
            first = min(slow, key=lambda one: one._deadline.when())
            first.transport.abort()
            self.connections.discard(first)  # at once, since more may come before it is told that it is lost

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._has_begun = True
        if self._wait is _Wait.NEXT:
            self._wait_for(_Wait.REQUEST)
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        if self.conn.their_state is not h11.SEND_BODY:  # a body that nobody reads keeps the deadline of its request
            self._wait_for(_Wait.NEXT)
        super().on_response_complete()
        self._follow()

    def send_400_response(self, msg: str) -> None:
        if self._has_answered():
            self.transport.abort()  # h11 would refuse another answer
        else:
            super().send_400_response(msg)

    def _follow(self) -> None:
        """Set the deadline of the step that has begun with what has arrived."""
        is_open = self.cycle is not None and not self.cycle.response_complete
        if is_open and not self.cycle.more_body:
            if self._wait is not _Wait.ANSWER:
                self._wait_for(_Wait.ANSWER)
        elif self._wait is _Wait.NEXT and (is_open or self.conn.trailing_data[0]):
            self._wait_for(_Wait.REQUEST)

    def _has_answered(self) -> bool:
        """Whether some of the answer to the present request has been sent."""
        return self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    def _wait_for(self, wait: _Wait) -> None:
        self._deadline.cancel()
        self._wait = wait
        self._deadline = self.loop.call_later(self._seconds[wait], self._expire)

    def _expire(self) -> None:
        if self._wait is _Wait.REQUEST and self._has_begun and not self._has_answered():
            self.transport.write(_408)
            self.transport.close()
        else:
            self.transport.abort()
