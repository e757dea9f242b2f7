"""What clients can make the service hold, and uploads that are read within it.

A file is in the field `file` of multipart/form-data. Bytes are counted as they come, whatever a header promises; above
a mebibyte the framework keeps them in a temporary file until the request has arrived.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message


@dataclass(frozen=True)
class Limits:
    """What clients can make the service hold.

    Attributes:
        body: bytes of one request.
        bodies: bytes of all requests that are being read or answered.
        pixels: of one image.
        waiting: images that are decoded, computed and drawn at a time.
        arrival: seconds for a request to arrive, and for an answer to be read.
        answer: seconds for an image to be decoded, computed and drawn.
    """

    body: int = 32 * 2**20
    bodies: int = 256 * 2**20
    pixels: int = 2**24
    waiting: int = 64
    arrival: float = 7.0
    answer: float = 20.0


def busy(why: str) -> HTTPException:
    """The answer to a client that should try again."""
    return HTTPException(503, f"busy: {why}", {"retry-after": "1"})


class Uploads:
    """All files that are held at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The file of a request, which counts as held while the context lasts.

        Args:
            request: whose body has not been read.

        Raises:
            HTTPException: 400, 413 or 415 for what is not one file within the limit, 503 where too much is held.
        """
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "expected multipart/form-data with an image in the field `file`")
        if int(request.headers.get("content-length", 0)) > self._limits.body:
            raise self._too_large()
        own = 0

        async def receive() -> Message:
            nonlocal own
            message = await request.receive()
            came = len(message.get("body", b""))
            own += came
            self._held += came
            if own > self._limits.body:
                raise self._too_large()
            if self._held > self._limits.bodies:
                raise busy("too many requests are being read")
            return message

        try:
            yield await self._file(Request(request.scope, receive))
        finally:
            self._held -= own

    async def _file(self, request: Request) -> bytes:
        async with request.form(max_files=1, max_fields=4) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "expected an image in the field `file`")
            return await file.read()

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"expected a body of at most {self._limits.body} bytes")
