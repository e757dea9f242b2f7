"""Batches that come to the devices step by step, where their features are not in memory: read from files or extracted.

While a step runs, the next batches are read and decoded in threads of tf.data, and their extraction is queued behind it
on the devices. All programs are started by one thread, in the order of the steps: so every process of several starts
them in the same order. A process reads the rows that its own devices hold, and no other.
"""

import collections
import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pushpull_jax.config import Config
from pushpull_jax.feature_stores import OnDisk, Streamed
from pushpull_jax.features import Standardisation
from pushpull_jax.fit import Advance, Program
from pushpull_jax.mesh import replicate
from pushpull_jax.steps import WEIGHT, Batch, Pool, State, mixed_batch_indices

Item = TypeVar("Item")
# Steps that may be queued on the devices beyond the one that runs: each holds its batch there.
QUEUED = 1


@dataclass(frozen=True)
class StreamedExamples:
    """Examples whose features are read when their batch has its turn.

    Attributes:
        config: the run.
        program: of `build_program`.
        store: where the features are.
        standardisation: of the run.
        examples: "row" of the store, "mask", "label" and "kind" of all examples.
    """

    config: Config
    program: Program
    store: OnDisk | Streamed
    standardisation: Standardisation
    examples: dict[str, np.ndarray]

    @contextlib.contextmanager
    def opened(self, pools: Sequence[Pool], first: int) -> Iterator[Advance]:
        """See `fit.Examples`."""
        key = replicate(jax.random.key(self.config.seed), self.program.mesh)
        batches = self.batches(pools, first)

        def advance(state: State, first: int, last: int) -> tuple[State, dict[str, Any]]:
            told: list[dict[str, jax.Array]] = []
            for batch in itertools.islice(batches, last - first):
                state, metrics = self.program.streamed_step(state, batch, key)
                told.append(metrics)
                # Not a read: it only keeps the host from running ahead, and batches from filling the device.
                jax.block_until_ready(told[-1 - QUEUED :][0])
            return state, {name: [metrics[name] for metrics in told] for name in told[0]}

        with contextlib.closing(batches):
            yield advance

    def batches(self, pools: Sequence[Pool], first: int) -> Iterator[Batch]:
        """The batches of steps from `first` on, spread over the devices, `features.prefetch` of them ready."""
        return _ahead(self._batches(pools, first), self.config.features.prefetch)

    def _batches(self, pools: Sequence[Pool], first: int) -> Iterator[Batch]:
        mesh, prefetch = self.program.mesh, self.config.features.prefetch
        sharding = NamedSharding(mesh, P("data"))
        size = self.config.training.batch_size + -self.config.training.batch_size % mesh.shape["data"]
        here = local_positions(sharding, size)
        draw = _Draw(self.config, pools, first, size, here)
        features_of = self.store.program(mesh, self.standardisation)
        weight = (here < self.config.training.batch_size).astype(np.float32)

        def spread(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(sharding, array, (size, *array.shape[1:]))

        rows = _Rows(draw, self.examples["row"])
        loaded = self.store.loaded(rows, batch_size=len(here), prefetch=prefetch)
        for chosen, arrays in zip(draw, loaded, strict=True):
            batch = {name: spread(leaf[chosen]) for name, leaf in self.examples.items() if name != "row"}
            if size > self.config.training.batch_size:
                batch[WEIGHT] = spread(weight)
            yield batch | {"features": features_of(*map(spread, arrays))}


@dataclass(frozen=True)
class _Draw:
    """The examples of each batch that this process holds, [b] of [B]; can be gone through any number of times."""

    config: Config
    pools: Sequence[Pool]
    first: int
    size: int
    here: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        for step in range(self.first, self.config.training.steps):
            chosen = mixed_batch_indices(self.config.seed, step, self.pools)
            # Filled up with example 0, as `make_chunk` does.
            yield np.pad(chosen, (0, self.size - len(chosen)))[self.here]


@dataclass(frozen=True)
class _Rows:
    """Rows of the store of drawn examples."""

    draw: _Draw
    row: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.row[chosen] for chosen in self.draw)


def local_positions(sharding: NamedSharding, size: int) -> np.ndarray:
    """Positions in an array of `size` examples that the devices of this process hold, ascending."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[of_device] for of_device in slices]))


def _ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, of which `count` more are taken before one is given."""
    waiting: collections.deque[Item] = collections.deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
