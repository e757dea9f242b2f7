"""A trace of what the devices and the host do in a few steps of a training, by JAX's own profiler.

It lies in a folder that TensorBoard, XProf and Perfetto read, one subfolder of plugins/profile for each time.
"""

from pathlib import Path
from typing import Any

import jax

from pushpull_jax.progress import say


class Profile:
    """Traces whole chunks of steps, from the second one of this process on: the first is compiled. A context manager.

    Attributes:
        folder: that is written to.
        left: steps to trace yet; chunks are traced until there are none.
    """

    def __init__(self, folder: Path, *, steps: int):
        self.folder, self.left, self._is_on = folder, steps, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._is_on:
            self._stop()
        elif self.left > 0 and raised[0] is None:
            say("log.profile: there was no chunk of steps after the first, which is compiled, so nothing was traced")

    def chunk_done(self, steps: int, *, is_last: bool) -> None:
        """Begin or end where it is time to; asked between two chunks.

        Args:
            steps: of the chunk that is done.
            is_last: whether it was the last one.
        """
        if self._is_on:
            self.left -= steps
            if self.left <= 0:
                self._stop()
        elif self.left > 0 and not is_last:
            jax.profiler.start_trace(self.folder)
            self._is_on = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._is_on = False
        say(f"profile: {self.folder}")
