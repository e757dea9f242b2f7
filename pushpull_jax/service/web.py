"""The routes of the service: `/predict`, `/health`, `/metrics`, `/openapi.json` and a page that uses them.

What a client can make the service hold is bounded everywhere, and beyond it the answer is 503 at once: bytes of bodies,
images that wait, the size of an image, which its header tells before it is decoded. Images are decoded, resized and
drawn in threads; `microbatches` computes the scores.
"""

import asyncio
import base64
import hmac
import io
import logging
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from pushpull_jax import heatmap
from pushpull_jax.data.images import decode_image, image_size, resize_image
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError
from pushpull_jax.service.measures import Measures
from pushpull_jax.service.microbatches import MicroBatches

# Longer side of a heat map, in pixels: what a screen shows; drawing it takes a tenth of a second.
_SHOWN_SIDE = 1024
# Longer side of an image: `resize_weights` needs memory in proportion to it, whatever the other side is.
_MAX_SIDE = 2**14


@dataclass(frozen=True)
class Limits:
    """What clients can make the service hold.

    Attributes:
        body: bytes of one request.
        bodies: bytes of all requests that are being read or wait to be decoded.
        pixels: of one image.
        waiting: images that are decoded, computed and drawn at a time.
        arrival: seconds for a request to arrive, and for an answer to be read.
        answer: seconds for an image to be decoded, computed and drawn.
    """

    body: int = 32 * 2**20
    bodies: int = 256 * 2**20
    pixels: int = 2**24
    waiting: int = 64
    arrival: float = 8.0
    answer: float = 20.0


@dataclass(frozen=True)
class _Decoded:
    """An image at the size of the run, and at that of its heat map if one is wanted."""

    resized: np.ndarray  # [S,S,3] float32 in 0..255
    size: tuple[int, int]  # native H and W
    shown: np.ndarray | None  # [H,W,3] uint8


def build_app(detector: Detector, *, token: str | None, limits: Limits) -> Starlette:
    """The service as an ASGI application; it compiles in the background once it has started.

    Args:
        detector: whose scores are served.
        token: that `/predict` and `/metrics` ask for; None asks for none.
        limits: beyond which clients are refused.
    """
    service = _Service(detector, token, limits)
    routes = [
        Route("/", service.page),
        Route("/predict", service.predict, methods=["POST"]),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/openapi.json", service.openapi),
    ]
    refusals = {HTTPException: _refused, ClientDisconnect: _gone}
    return Starlette(routes=routes, exception_handlers=refusals, lifespan=service.lifespan)


class _Service:
    """The state that the routes share; all of it belongs to the event loop."""

    def __init__(self, detector: Detector, token: str | None, limits: Limits) -> None:
        self._detector = detector
        self._token = token
        self._limits = limits
        self._measures = Measures(waiting=lambda: self._waiting)
        self._batches = MicroBatches(detector, on_batch=self._measures.batch)
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="images")
        self._status = "warming"  # then "ready", or "failed"
        self._waiting = 0
        self._held = 0

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Warm, then compute, while the service runs."""
        computing = asyncio.create_task(self._compute())
        yield
        computing.cancel()

    async def _compute(self) -> None:
        try:
            await self._batches.warm()
            side = self._detector.network.image_size
            self._draw(np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.float32))  # imports scipy
            self._status = "ready"
            await self._batches.run()
        except Exception:
            self._status = "failed"
            logging.getLogger(__name__).exception("the detector cannot be run")

    async def page(self, _: Request) -> Response:
        return HTMLResponse(_template("service.html").replace("$heat_scale", heatmap.css_gradient()))

    async def openapi(self, _: Request) -> Response:
        return Response(_template("openapi.json"), media_type="application/json")

    async def health(self, _: Request) -> Response:
        """200 once everything is compiled."""
        return JSONResponse({"status": self._status}, 200 if self._status == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        self._check_token(request)
        return Response(self._measures.exposition(), media_type=self._measures.media_type)

    async def predict(self, request: Request) -> Response:
        """Score one image, and draw its heat map on request."""
        began, status = time.perf_counter(), 500
        try:
            answer = await self._predict(request)
            status = 200
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self._measures.answered(status, time.perf_counter() - began)
        return JSONResponse(answer)

    async def _predict(self, request: Request) -> dict:
        self._check_token(request)
        wants_heatmap = _flag(request, "heatmap")
        if self._status != "ready":
            raise _busy(f"the detector is {self._status}")
        data = await self._read(request)
        if self._waiting >= self._limits.waiting:
            raise _busy(f"{self._waiting} images wait already")
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.answer):
                return await self._answer(data, wants_heatmap)
        except TimeoutError:
            raise _busy(f"the image was not computed in {self._limits.answer:g} s") from None
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            self._waiting -= 1

    async def _answer(self, data: bytes, wants_heatmap: bool) -> dict:
        loop = asyncio.get_running_loop()
        self._held += len(data)
        try:
            decoded = await loop.run_in_executor(self._threads, self._decode, data, wants_heatmap)
        finally:
            self._held -= len(data)
        score, score_map = await self._batches.detect(decoded.resized)
        threshold = self._detector.threshold
        answer = {
            "score": score,
            "threshold": threshold,
            "verdict": "anomalous" if score > threshold else "normal",
            "height": decoded.size[0],
            "width": decoded.size[1],
        }
        if decoded.shown is not None:
            picture = await loop.run_in_executor(self._threads, self._draw, decoded.shown, score_map)
            answer["heatmap"] = base64.b64encode(picture).decode()
        return answer

    def _decode(self, data: bytes, wants_heatmap: bool) -> _Decoded:
        height, width = image_size(data, name="file")
        if height * width > self._limits.pixels or max(height, width) > _MAX_SIDE:
            most = f"{self._limits.pixels} pixels and {_MAX_SIDE} a side"
            raise InputError(f"file: expected at most {most}, got {width}x{height} (width x height)")
        pixels = decode_image(data, name="file")
        network = self._detector.network
        resized = resize_image(pixels, size=network.image_size, mode=network.resize)
        return _Decoded(resized, pixels.shape[:2], _shown(pixels) if wants_heatmap else None)

    def _draw(self, shown: np.ndarray, score_map: np.ndarray) -> bytes:
        score_map = self._detector.to_native(score_map, shown.shape[:2])
        encoded = io.BytesIO()
        picture = heatmap.overlay(shown, score_map, threshold=self._detector.map_threshold)
        Image.fromarray(picture).save(encoded, "PNG", compress_level=1)
        return encoded.getvalue()

    async def _read(self, request: Request) -> bytes:
        """The file of a request, read within the limits."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise HTTPException(415, "expected multipart/form-data with an image in the field `file`")
        if int(request.headers.get("content-length", 0)) > self._limits.body:
            raise self._too_large()
        if self._waiting >= self._limits.waiting:
            raise _busy(f"{self._waiting} images wait already")
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
                raise _busy("too many requests are being read")
            return message

        try:
            async with Request(request.scope, receive).form(max_files=1, max_fields=4) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise HTTPException(400, "expected an image in the field `file`")
                return await file.read()
        finally:
            self._held -= own

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"expected a body of at most {self._limits.body} bytes")

    def _check_token(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise HTTPException(401, "expected the header Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})


def _shown(pixels: np.ndarray) -> np.ndarray:
    """An image [H,W,3] uint8, reduced to the side of a heat map if it is larger."""
    height, width = pixels.shape[:2]
    factor = _SHOWN_SIDE / max(height, width)
    if factor >= 1:
        return pixels
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise HTTPException(400, f"{name}: expected true or false, got {value!r}")
    return value == "true"


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"busy: {why}", {"retry-after": "1"})


async def _refused(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


async def _gone(*_: object) -> Response:
    """To a client that has left, for the framework's sake; nobody reads it."""
    return Response(status_code=400)


def _template(name: str) -> str:
    return resources.files("pushpull_jax").joinpath(f"templates/{name}").read_text("utf-8")
