"""What the service tells of itself, in Prometheus' text format: requests, seconds, batches, compilations, memory."""

from collections.abc import Callable

import jax
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Measures:
    """Counters of one service.

    Args:
        waiting: tells how many images wait now.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, *, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        options = {"registry": self._registry}
        self._requests = Counter("pushpull_requests", "Answers of /predict by status.", ["status"], **options)
        self._seconds = Histogram(
            "pushpull_request_seconds", "From the header of a request for /predict to its answer, where that is 200.",
            buckets=_SECONDS, **options,
        )  # fmt: skip
        self._batches = Histogram("pushpull_batch_images", "Images computed together.", buckets=(1, 2, 4, 8), **options)
        self._compilations = Counter("pushpull_compilations", "Programs compiled; none once ready.", **options)
        Gauge("pushpull_waiting_images", "Images decoded, computed or drawn now.", **options).set_function(waiting)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer of /predict."""
        self._requests.labels(status).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def batch(self, images: int) -> None:
        """Count a batch."""
        self._batches.observe(images)

    def exposition(self) -> bytes:
        """Everything, as text."""
        return generate_latest(self._registry)

    def _compiled(self, event: str, _: float, **__: object) -> None:
        if event == _COMPILED:
            self._compilations.inc()
