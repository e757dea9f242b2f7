"""Requests that wait at the same time, computed together: one thread runs the detector on up to eight of them.

Images are [S,S,3] float32 in 0..255, already of the run's size S. While a batch is computed the next one gathers, so
that nobody waits for company and a busy service still computes large batches. A batch is padded to the next of a few
sizes, and these are all that is ever compiled.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pushpull_jax.detector import Detector

SIZES = (1, 2, 4, 8)

_Result = tuple[float, np.ndarray]


class MicroBatches:
    """Scores and maps of single images, `score, score_map = await batches.detect(image)`, while `run` runs.

    Args:
        detector: what computes them.
        on_batch: called with the number of images of each batch.
    """

    def __init__(self, detector: Detector, *, on_batch: Callable[[int], None] = lambda _: None) -> None:
        self._detector = detector
        self._on_batch = on_batch
        self._waiting: deque[tuple[np.ndarray, asyncio.Future[_Result]]] = deque()
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="detector")

    async def warm(self) -> None:
        """Compile the program of every size."""
        side = self._detector.network.image_size
        for size in SIZES:
            await self._compute(np.zeros((size, side, side, 3), np.float32))

    async def detect(self, image: np.ndarray) -> _Result:
        """Score and map [S,S] of one image; the caller bounds how many wait."""
        future: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((image, future))
        self._came.set()
        return await future

    async def run(self) -> None:
        """Compute what waits, batch by batch, until it is cancelled."""
        while True:
            await self._came.wait()
            self._came.clear()
            while batch := self._next():
                await self._answer(batch)

    def _next(self) -> list[tuple[np.ndarray, asyncio.Future[_Result]]]:
        """The longest waiting, as many as fit; who has gone meanwhile is left out."""
        batch = []
        while self._waiting and len(batch) < SIZES[-1]:
            image, future = self._waiting.popleft()
            if not future.done():
                batch.append((image, future))
        return batch

    async def _answer(self, batch: list[tuple[np.ndarray, asyncio.Future[_Result]]]) -> None:
        images, futures = zip(*batch, strict=True)
        self._on_batch(len(images))
        try:
            results = list(zip(*await self._compute(np.stack(images)), strict=True))
        except Exception as error:  # of this batch alone: each request tells its client, and the next batch is computed
            results = [error] * len(futures)
        for future, result in zip(futures, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result((float(result[0]), result[1]))

    async def _compute(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = next(size for size in SIZES if size >= len(images))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._detector.detect_resized(images, size=size))
