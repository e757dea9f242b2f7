"""The routes of the service: `/predict`, `/health`, `/metrics`, `/openapi.json` and a page that uses them.

Images are decoded, resized and drawn in threads, once the header has told that their size is within the limits;
`microbatches` computes the scores. Who comes when too many wait is answered 503 at once.
"""

import asyncio
import base64
import hmac
import io
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import resources

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from pushpull_jax import heatmap
from pushpull_jax.data.images import decode_image, image_size, resize_image
from pushpull_jax.detector import Detector
from pushpull_jax.errors import InputError
from pushpull_jax.service.limits import Limits, Uploads, busy
from pushpull_jax.service.measures import Measures
from pushpull_jax.service.microbatches import MicroBatches

# Longer side of a heat map, in pixels: what a screen shows; drawing it takes a tenth of a second.
_SHOWN_SIDE = 1024
# Longer side of an image: `resize_weights` needs memory in proportion to it, whatever the other side is.
_MAX_SIDE = 2**14


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
        self._threshold, self._map_threshold = detector.threshold, detector.map_threshold  # from the device, once
        self._token = token
        self._limits = limits
        self._uploads = Uploads(limits)
        self._measures = Measures(waiting=lambda: self._waiting)
        self._batches = MicroBatches(detector, on_batch=self._measures.batch)
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="images")
        self._checking = ThreadPoolExecutor(1, thread_name_prefix="headers")
        self._status = "warming"  # then "ready", or "failed"
        self._waiting = 0

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
        except ClientDisconnect:
            status = 408  # it has left, or its connection was closed for being slow
            raise
        finally:
            self._measures.answered(status, time.perf_counter() - began)
        return JSONResponse(answer)

    async def _predict(self, request: Request) -> dict:
        self._check_token(request)
        wants_heatmap = _flag(request, "heatmap")
        if self._status != "ready":
            raise busy(f"the detector is {self._status}")
        try:
            async with self._uploads.read(request) as data, asyncio.timeout(self._limits.answer):
                return await self._answer(data, wants_heatmap)
        except TimeoutError:
            raise busy(f"the image was not computed in {self._limits.answer:g} s") from None
        except InputError as error:
            raise HTTPException(422, str(error)) from error

    async def _answer(self, data: bytes, wants_heatmap: bool) -> dict:
        loop = asyncio.get_running_loop()
        # Not in the turn of images: what is none must not keep them waiting.
        await loop.run_in_executor(self._checking, self._check_size, data)
        with self._turn():
            decoded = await loop.run_in_executor(self._threads, self._decode, data, wants_heatmap)
            score, score_map = await self._batches.detect(decoded.resized)
            threshold = self._threshold
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

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One of the images that are decoded, computed and drawn; 503 where there are too many."""
        if self._waiting >= self._limits.waiting:
            raise busy(f"{self._waiting} images wait already")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _check_size(self, data: bytes) -> None:
        height, width = image_size(data, name="file")
        if height * width > self._limits.pixels or max(height, width) > _MAX_SIDE:
            most = f"{self._limits.pixels} pixels and {_MAX_SIDE} a side"
            raise InputError(f"file: expected at most {most}, got {width}x{height} (width x height)")

    def _decode(self, data: bytes, wants_heatmap: bool) -> _Decoded:
        pixels = decode_image(data, name="file")
        network = self._detector.network
        resized = resize_image(pixels, size=network.image_size, mode=network.resize)
        return _Decoded(resized, pixels.shape[:2], _shown(pixels) if wants_heatmap else None)

    def _draw(self, shown: np.ndarray, score_map: np.ndarray) -> bytes:
        score_map = self._detector.to_native(score_map, shown.shape[:2])
        encoded = io.BytesIO()
        picture = heatmap.overlay(shown, score_map, threshold=self._map_threshold)
        Image.fromarray(picture).save(encoded, "PNG", compress_level=1)
        return encoded.getvalue()

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


async def _refused(_: Request, error: HTTPException) -> Response:
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


async def _gone(*_: object) -> Response:
    """To a client that has left, for the framework's sake; nobody reads it."""
    return Response(status_code=400)


def _template(name: str) -> str:
    return resources.files("pushpull_jax").joinpath(f"templates/{name}").read_text("utf-8")
