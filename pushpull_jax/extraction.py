"""From images to features: decoded, with confetti noise where a source asks for it, through the frozen backbone.

A source is what features are extracted from, an image record and its noise. Images are [n,S,S,3] in 0..255, features
[n,h,w,C] float32, not standardised. Noise is [n,4] uint32: the seed, copy and index that its key is folded from, and
whether there is any.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pushpull_jax.batching import BATCH_SIZE, padded
from pushpull_jax.confetti_noise import confetti
from pushpull_jax.config import Data
from pushpull_jax.conversion.tensors import Parameters
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import image_batches
from pushpull_jax.features import FeatureSpec, Standardisation, compiled_extract, extract


class Source(NamedTuple):
    """An image, and the seed, copy and index that its confetti noise is drawn from; none: the image as it is."""

    record: Record
    noise: tuple[int, int, int] | None = None


class Extracted(NamedTuple):
    """Features of some sources, and the pixels that noise has changed."""

    positions: np.ndarray  # [n] int32, of the sources
    features: np.ndarray  # [n,h,w,C]
    masks: np.ndarray | None  # [n,S,S] bool; None where there is no noise


def noise_of(sources: Sequence[Source]) -> np.ndarray | None:
    """The noise of sources, [n,4] uint32; None where none has any."""
    if all(source.noise is None for source in sources):
        return None
    return np.asarray([(*(source.noise or (0, 0, 0)), source.noise is not None) for source in sources], np.uint32)


@dataclass(frozen=True)
class Extractor:
    """What turns sources into features.

    Attributes:
        spec: what is extracted.
        parameters: of the backbone.
        data: how images are read and resized.
    """

    spec: FeatureSpec
    parameters: Parameters
    data: Data

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the features of an image, [h,w,C]."""
        return self.spec.grid, self.spec.grid, sum(self.spec.widths)

    def images(
        self, records: Sequence[Record], dropped: dict[str, str], *, with_masks: bool = False
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches of images, see `image_batches`."""
        return image_batches(
            records,
            image_size=self.data.image_size,
            batch_size=BATCH_SIZE,
            resize=self.data.resize,
            with_masks=with_masks,
            on_unreadable=self.data.on_unreadable,
            dropped=dropped,
        )

    def extracted(self, sources: Sequence[Source], dropped: dict[str, str]) -> Iterator[Extracted]:
        """Features of sources that can be read, batch by batch; all of them have noise, or none."""
        noise = noise_of(sources)
        clean = functools.partial(compiled_extract(self.spec), self.parameters)
        noisy = functools.partial(_compiled_noisy(self.spec), self.parameters)
        for batch in self.images([source.record for source in sources], dropped):
            if noise is None:
                yield Extracted(batch["index"], padded(clean, batch["image"], size=BATCH_SIZE), None)
            else:
                features, masks = padded(noisy, batch["image"], noise[batch["index"]], size=BATCH_SIZE)
                yield Extracted(batch["index"], features, masks)

    def masks(self, sources: Sequence[Source], dropped: dict[str, str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions [n] of sources that can be read, and the pixels [n,S,S] that their noise changes, by batches."""
        noise = noise_of(sources)
        for batch in self.images([source.record for source in sources], dropped):
            yield batch["index"], padded(_compiled_masks, batch["image"], noise[batch["index"]], size=BATCH_SIZE)


def features_of(
    spec: FeatureSpec, parameters: Parameters, images: jax.Array, noise: jax.Array | None = None
) -> jax.Array:
    """Features of images, some of which noise is added to: [n,S,S,3], [n,4] -> [n,h,w,C]."""
    if noise is not None:
        # A real branch, not a selection: most batches are of one kind, and noise takes time.
        images = jax.lax.cond(noise[:, 3].any(), _noised_where_asked, lambda images, noise: images, images, noise)
    return extract(spec, parameters, images)


def _noised_where_asked(images: jax.Array, noise: jax.Array) -> jax.Array:
    return jnp.where(noise[:, 3, None, None, None] > 0, _noised(images, noise)[0], images)


def _noised(images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images with confetti noise, and the pixels [n,S,S] that it changed."""

    def key(own: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(own[0]), own[1]), own[2])

    noisy, masks = jax.vmap(confetti)(jax.vmap(key)(noise), images / 255)
    return 255 * noisy, masks


@functools.cache
def _compiled_noisy(spec: FeatureSpec) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(parameters, images [n,S,S,3], noise [n,4]) -> features [n,h,w,C] and masks [n,S,S]."""

    @jax.jit
    def program(parameters: Parameters, images: jax.Array, noise: jax.Array):
        noisy, masks = _noised(images, noise)
        return extract(spec, parameters, noisy), masks

    return program


@jax.jit
def _compiled_masks(images: jax.Array, noise: jax.Array) -> jax.Array:
    return _noised(images, noise)[1]


@functools.cache
def compiled_stream(spec: FeatureSpec, mesh: Mesh) -> Callable[..., jax.Array]:
    """(parameters, standardisation, images [B,S,S,3], noise [B,4] or nothing) -> standardised features [B,h,w,C].

    Parameters are replicated, the others are spread over "data"; each device extracts from its own images, at most
    BATCH_SIZE at a time, and asks no other for anything.
    """

    def on_device(parameters: Parameters, *loaded: jax.Array) -> jax.Array:
        count = len(loaded[0])
        times = -(-count // BATCH_SIZE)
        size = -(-count // times)
        parts = tuple(
            jnp.pad(leaf, ((0, times * size - count), *((0, 0),) * (leaf.ndim - 1))).reshape(
                times, size, *leaf.shape[1:]
            )
            for leaf in loaded
        )
        features = jax.lax.map(lambda part: features_of(spec, parameters, *part), parts)
        return features.reshape(times * size, *features.shape[2:])[:count]

    @jax.jit
    def program(parameters: Parameters, standardisation: Standardisation, *loaded: jax.Array) -> jax.Array:
        specs = (P(), *(P("data"),) * len(loaded))
        spread = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
        return standardisation(spread(parameters, *loaded))

    return program
