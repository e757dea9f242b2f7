"""Where the features of a run are while it trains: in memory, in files on disk, or nowhere, extracted with each batch.

`add` makes rows of sources, all of them in each process, of which each decodes a share. `read` gives the features of
some rows. Where features are not in memory, `loaded` gives what is read of batches of rows on the host, and `program`
what the devices make of it; the batches are gone through more than once. Reading is local and pure: a process reads the
rows that it asks for, and no other.
"""

import functools
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from pushpull_jax.batching import BATCH_SIZE, padded
from pushpull_jax.config import Config
from pushpull_jax.data.images import read_image, resize_image
from pushpull_jax.data.pipeline import check_readable, cores, read_in_order
from pushpull_jax.errors import InputError
from pushpull_jax.extraction import Extractor, Source, compiled_stream, features_of, noise_of
from pushpull_jax.feature_cache import FeatureCache
from pushpull_jax.features import FeatureSpec, Standardisation
from pushpull_jax.hosts import agreed, exchange
from pushpull_jax.mesh import replicate
from pushpull_jax.resources import free_host_memory, free_memory
from pushpull_jax.shares import gathered, shared_out
from pushpull_jax.user_cache import cache_folder
from pushpull_jax.workdir import local_folder

# Of the free memory, where the config names no budget: features in memory are there three times for a while, as they
# were extracted, standardised, and on the device, which on CPU is the same memory.
SHARE = 0.25

Progress = Callable[[int], None]
# From the pixels [S,S] that noise changed to the mask [...] that is kept.
Reduce = Callable[[np.ndarray], np.ndarray]
Added = tuple[np.ndarray, np.ndarray | None]


class Store(Protocol):
    """What `Resident`, `OnDisk` and `Streamed` have in common."""

    def __len__(self) -> int:
        """Rows so far."""

    def add(
        self, sources: Sequence[Source], dropped: dict[str, str], progress: Progress, reduce: Reduce | None = None
    ) -> Added:
        """Make rows of the sources that can be read.

        Args:
            sources: all of them with noise, or none; the same in all processes.
            dropped: see `image_batches`; receives what any process could not read.
            progress: told how many sources this process has done.
            reduce: applied to the pixels that noise changed; none where there is no noise.

        Returns:
            Positions [n] of the sources that have the next n rows now, ascending, and their reduced masks [n,...].
        """

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Features of some rows in batches [b,h,w,C] of BATCH_SIZE, the last one of what remains."""


class Resident:
    """Features on the host, [N,h,w,C]."""

    def __init__(self, extractor: Extractor):
        self.extractor = extractor
        self._parts: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def features(self) -> np.ndarray:
        """All features so far, [N,h,w,C] float32."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate(self._parts or [np.zeros((0, *self.extractor.shape), np.float32)])]
        return self._parts[0]

    def append(self, features: np.ndarray) -> np.ndarray:
        """Keep features [n,h,w,C]; their rows, [n] int32."""
        first = len(self)
        self._parts.append(features)
        return np.arange(first, first + len(features), dtype=np.int32)

    def add(
        self, sources: Sequence[Source], dropped: dict[str, str], progress: Progress, reduce: Reduce | None = None
    ) -> Added:
        work = functools.partial(self._extracted, progress, reduce)
        features, masks = shared_out(work, sources, dropped)
        self.append(gathered(features))
        return _readable(sources, dropped), None if masks is None else gathered(masks)

    def _extracted(
        self, progress: Progress, reduce: Reduce | None, sources: Sequence[Source], dropped: dict[str, str]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Features [n,h,w,C] of sources, and their reduced masks."""
        parts, reduced = [np.zeros((0, *self.extractor.shape), np.float32)], []
        for positions, features, masks in self.extractor.extracted(sources, dropped):
            parts.append(features)
            reduced += [] if reduce is None else map(reduce, masks)
            progress(len(positions))
        return np.concatenate(parts), _stacked(reduced, reduce, self.extractor)

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), BATCH_SIZE):
            yield self.features[rows[start : start + BATCH_SIZE]]


class OnDisk:
    """Features in the files of a `FeatureCache`."""

    def __init__(self, extractor: Extractor, folder: Path):
        self.extractor, self.cache = extractor, FeatureCache(folder, extractor)
        self._paths: list[Path] = []

    def __len__(self) -> int:
        return len(self._paths)

    def add(
        self, sources: Sequence[Source], dropped: dict[str, str], progress: Progress, reduce: Reduce | None = None
    ) -> Added:
        work = functools.partial(self._completed, progress, reduce)
        whole = shared_out(work, sources, dropped)
        # What the others have written is found now, unless their folder is another, as in a home that is not shared.
        others = [source for source in sources if source not in whole and source.record.key not in dropped]
        with agreed():
            whole |= work(others, dropped) if others else {}
        positions = [i for i, source in enumerate(sources) if source in whole]
        self._paths += [whole[sources[i]][0] for i in positions]
        masks = None if reduce is None else np.stack([whole[sources[i]][1] for i in positions])
        return np.asarray(positions, np.int32), masks

    def _completed(
        self, progress: Progress, reduce: Reduce | None, sources: Sequence[Source], dropped: dict[str, str]
    ) -> dict[Source, tuple[Path, np.ndarray | None]]:
        """The file of each source that can be read, which is whole now, and its reduced mask."""
        with ThreadPoolExecutor(cores()) as pool:
            found = dict(zip(sources, pool.map(functools.partial(self._found, reduce), sources), strict=True))
        whole = {source: file for source, file in found.items() if file is not None}
        missing = [source for source, file in found.items() if file is None]
        progress(len(whole))
        self._check_space(len(missing))
        for positions, features, masks in self.extractor.extracted(missing, dropped):
            for i, place in enumerate(positions):
                path, mask = self.cache.path(missing[place]), None if masks is None else masks[i]
                self.cache.write(path, features[i], mask)
                whole[missing[place]] = path, None if reduce is None else reduce(mask)
            progress(len(positions))
        return whole

    def _found(self, reduce: Reduce | None, source: Source) -> tuple[Path, np.ndarray | None] | None:
        """The file of a source and its reduced mask, if it is there and whole."""
        try:
            path = self.cache.path(source)
        except InputError:  # its image cannot be read, which the extraction will say, or drop
            return None
        is_whole, mask = self.cache.check(path, size=self.extractor.data.image_size)
        return (path, None if reduce is None else reduce(mask)) if is_whole else None

    def _check_space(self, missing: int) -> None:
        need, free = 4 * missing * int(np.prod(self.extractor.shape)), shutil.disk_usage(self.cache.folder).free
        if need > free:
            raise InputError(
                f"features.cache {self.cache.folder.parent}: features of {missing} images need {need / 2**30:.1f} GB, "
                f"and {free / 2**30:.1f} GB are free there"
            )

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        for (features,) in self.loaded(_in_batches(rows), batch_size=BATCH_SIZE, prefetch=1):
            yield features

    def loaded(self, batches: Iterable[np.ndarray], *, batch_size: int, prefetch: int) -> Iterator[tuple[np.ndarray]]:
        """Features [b,h,w,C] of batches of rows, some of them ahead."""

        def load(row: int) -> np.ndarray:
            return self.cache.features(self._paths[row])

        rows, shape = itertools.chain.from_iterable(batches), self.extractor.shape
        for features in read_in_order(load, rows, shape=shape, batch_size=batch_size, prefetch=prefetch):
            yield (features,)

    def program(self, mesh: Mesh, standardisation: Standardisation) -> Callable[..., jax.Array]:
        """Features [B,h,w,C] on a mesh -> standardised."""
        return functools.partial(_compiled_standardisation, replicate(standardisation, mesh))


@jax.jit
def _compiled_standardisation(standardisation: Standardisation, features: jax.Array) -> jax.Array:
    return standardisation(features)


class Streamed:
    """No features, but what they are extracted from whenever they are read."""

    def __init__(self, extractor: Extractor):
        self.extractor = extractor
        self._sources: list[Source] = []

    def __len__(self) -> int:
        return len(self._sources)

    def add(
        self, sources: Sequence[Source], dropped: dict[str, str], progress: Progress, reduce: Reduce | None = None
    ) -> Added:
        work = functools.partial(self._checked, progress, reduce)
        masks = shared_out(work, sources, dropped)
        positions = _readable(sources, dropped)
        self._sources += [sources[i] for i in positions]
        return positions, None if masks is None else gathered(masks)

    def _checked(
        self, progress: Progress, reduce: Reduce | None, sources: Sequence[Source], dropped: dict[str, str]
    ) -> np.ndarray | None:
        """The reduced masks of sources, which are all decoded."""
        if reduce is None:
            policy, records = self.extractor.data.on_unreadable, [source.record for source in sources]
            check_readable(records, on_unreadable=policy, dropped=dropped, progress=lambda done, of: progress(1))
            return None
        reduced = []
        for positions, masks in self.extractor.masks(sources, dropped):
            reduced += map(reduce, masks)
            progress(len(positions))
        return _stacked(reduced, reduce, self.extractor)

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        program = functools.partial(_compiled_features(self.extractor.spec), self.extractor.parameters)
        for loaded in self.loaded(_in_batches(rows), batch_size=BATCH_SIZE, prefetch=1):
            yield padded(program, *loaded, size=BATCH_SIZE)

    def loaded(
        self, batches: Iterable[np.ndarray], *, batch_size: int, prefetch: int
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Images [b,S,S,3] of batches of rows and, where there is any, noise [b,4], some of them ahead."""
        data, noise = self.extractor.data, noise_of(self._sources)
        rows, size = itertools.chain.from_iterable(batches), data.image_size

        def load(row: int) -> np.ndarray:
            return resize_image(read_image(self._sources[row].record), size=size, mode=data.resize)

        read = read_in_order(load, rows, shape=(size, size, 3), batch_size=batch_size, prefetch=prefetch)
        for own, images in zip(batches, read, strict=True):
            yield (images,) if noise is None else (images, noise[own])

    def program(self, mesh: Mesh, standardisation: Standardisation) -> Callable[..., jax.Array]:
        """Images, and noise, on a mesh -> standardised features [B,h,w,C]; see `compiled_stream`."""
        program = compiled_stream(self.extractor.spec, mesh)
        return functools.partial(program, *replicate((self.extractor.parameters, standardisation), mesh))


@functools.cache
def _compiled_features(spec: FeatureSpec) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(features_of, spec))


def _readable(sources: Sequence[Source], dropped: dict[str, str]) -> np.ndarray:
    """Positions of the sources that are not dropped."""
    return np.asarray([i for i, source in enumerate(sources) if source.record.key not in dropped], np.int32)


def _stacked(reduced: list[np.ndarray], reduce: Reduce | None, extractor: Extractor) -> np.ndarray | None:
    """Reduced masks [n,...], which may be none of a small share; None where there is no noise."""
    if reduce is None:
        return None
    empty = reduce(np.zeros((extractor.data.image_size,) * 2, bool))[None][:0]
    return np.concatenate([empty, *(mask[None] for mask in reduced)])


def _in_batches(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]


def choose_store(config: Config, images: int, extractor: Extractor) -> tuple[Resident | OnDisk | Streamed, str]:
    """Where features of some images are kept, and why, for the log.

    Args:
        config: the run; see `config.Features.keep`.
        images: how many features are needed of.
        extractor: of the run.
    """
    features, each = config.features, 4 * int(np.prod(extractor.shape))
    budget, whose = features.memory_gb * 2**30, "features.memory_gb"
    if not budget:
        free = min(free_host_memory(), *(free_memory(device)[0] for device in jax.local_devices()))
        # That of the process that has least: all must do the same.
        budget, whose = SHARE * min(exchange(free)), f"{SHARE:.0%} of the free memory"
    keep = features.keep
    if keep == "auto":
        keep = "memory" if images * each <= budget else "stream"
    need = f"features of {images} images, {each / 2**20:.3g} MB each, need {images * each / 2**30:.3g} GB"
    said = f"{need} of {budget / 2**30:.3g} GB ({whose}), features.keep is {features.keep}: "
    if keep == "memory":
        return Resident(extractor), said + "they are kept in memory"
    if keep == "disk":
        folder = local_folder(features.cache, name="features.cache") if features.cache else cache_folder("features")
        return OnDisk(extractor, folder), said + f"they are kept in files in {folder}"
    return Streamed(extractor), said + "they are extracted with each batch"
