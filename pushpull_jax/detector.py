"""The one way from images to scores and maps; every program and every artefact calls `detect`.

Parameters (backbone, standardisation, reconstructor, levels, threshold) are one tree. Images are [B,S,S,3] in 0..255 at
the run's size S inside `detect`, and uint8 [B,H,W,3] of any size for a `Detector`. Scores and maps are in the units of
the score map, so one threshold serves both.
"""

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from pushpull_jax import scoring
from pushpull_jax import workdir as files
from pushpull_jax.backbones import Backbone, find_backbone
from pushpull_jax.batching import in_batches
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Config
from pushpull_jax.data.images import Resize, letterbox_box, resize_image
from pushpull_jax.errors import InputError
from pushpull_jax.features import FeatureSpec, Standardisation, extract
from pushpull_jax.models.convolutional import ConvolutionalReconstructor
from pushpull_jax.models.nearest import NearestNeighbour
from pushpull_jax.models.reconstructor import Reconstructor
from pushpull_jax.steps import State, init_state, make_optimizer
from pushpull_jax.weights import load_parameters

# Side of the image, in pixels, for which a config gives smoothing and window: the paper's.
REFERENCE_SIZE = 256
# Images that are scored at a time by a `Detector`; fewer are padded, so that one program serves any number.
BATCH_SIZE = 8


@dataclass(frozen=True)
class Network:
    """All of a detector that is not a number: hashable, a static argument of `detect`.

    Attributes:
        features: what is extracted.
        reconstructor: linen module, [B,h,w,C] -> [B,h,w,C].
        image_size: S.
        resize: how an image is brought to S.
        groups: channels of each group whose score maps are averaged, each in units of its level: (C,) for the paper's
            score map, the widths of the stages to give each of them the same say.
        smoothing: deviation of the Gaussian over the map, in pixels of an image of 256.
        window: side of the window of the image score, in pixels of an image of 256.
    """

    features: FeatureSpec
    reconstructor: nn.Module
    image_size: int
    resize: Resize
    groups: tuple[int, ...]
    smoothing: float
    window: int

    @property
    def scale(self) -> float:
        return self.image_size / REFERENCE_SIZE


def detect(network: Network, parameters: dict[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores [B] and maps [B,S,S], float32, of images [B,S,S,3] in 0..255; a pure function of parameters and images."""
    features = extract(network.features, parameters["backbone"], images)
    return detect_features(network, parameters, Standardisation(**parameters["standardisation"])(features))


def detect_features(network: Network, parameters: dict[str, Any], features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second half of `detect`, from standardised features [B,h,w,C]."""
    groups = group_maps(network, parameters, features) / parameters["levels"][None, :, None, None]
    maps = scoring.upsample(groups.mean(-3), network.image_size)
    maps = scoring.smooth(maps, sigma=network.smoothing * network.scale)
    return scoring.image_score(maps, window=max(1, round(network.window * network.scale))), maps


def group_maps(network: Network, parameters: dict[str, Any], features: jax.Array) -> jax.Array:
    """Score maps [B,G,h,w] of the network's groups, from standardised features [B,h,w,C]."""
    reconstruction = network.reconstructor.apply({"params": parameters["reconstructor"]}, features)
    return scoring.group_score_maps(features, reconstruction, widths=network.groups)


@functools.cache
def _compiled(network: Network):
    return jax.jit(functools.partial(detect, network))


@dataclass(frozen=True)
class Detector:
    """A trained detector: `scores, maps = detector(images)`.

    Attributes:
        network: what is computed.
        parameters: the tree: "backbone", "standardisation", "reconstructor", "levels" [G], "threshold".
    """

    network: Network
    parameters: dict[str, Any]

    @property
    def threshold(self) -> float:
        """An image whose score is above it is anomalous."""
        return float(self.parameters["threshold"])

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and maps of images of one size.

        Args:
            images: [B,H,W,3] uint8, RGB; H and W are free.

        Returns:
            Scores [B] float32, and maps [B,H,W] float32 at the size of the images.

        Raises:
            ValueError: images have another shape or dtype.
        """
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [B,H,W,3], got {images.dtype} {list(images.shape)}")
        size, mode = self.network.image_size, self.network.resize
        resized = [resize_image(image, size=size, mode=mode) for image in images]
        scores, maps = self.detect_resized(np.stack(resized) if resized else np.zeros((0, size, size, 3), np.float32))
        native = [self.to_native(score_map, images.shape[1:3]) for score_map in maps]
        return scores, np.stack(native) if native else np.zeros(images.shape[:3], np.float32)

    def detect_resized(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores [B] and maps [B,S,S] of images [B,S,S,3] in 0..255 that already have the run's size."""
        if not len(images):
            return np.zeros(0, np.float32), np.zeros(images.shape[:3], np.float32)
        program = functools.partial(_compiled(self.network), self.parameters)
        return in_batches(program, images, size=BATCH_SIZE)

    def to_native(self, score_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """A map [S,S] at the native size (H, W) of its image, as `scoring.upsample` does, the letterbox undone.

        On the host: a program would be compiled for every size that a folder of photographs holds.
        """
        if self.network.resize == "letterbox":
            top, left, height, width = letterbox_box(*size, self.network.image_size)
            score_map = score_map[top : top + height, left : left + width]
        if score_map.shape == tuple(size):
            return score_map
        rows, columns = (
            scoring.interpolation_matrix(n_in, n_out) for n_in, n_out in zip(score_map.shape, size, strict=True)
        )
        return rows @ score_map @ columns.T


def build_network(
    config: Config, *, backbone: Backbone | None = None, reconstructor: nn.Module | None = None
) -> Network:
    """The network that a config describes.

    Args:
        config: the run.
        backbone: the one that was loaded, whose preprocessing may depend on the weights; by default that of the name.
        reconstructor: replaces the config's by any linen module.

    Raises:
        InputError: there is no such backbone, or it has no such stages or another image size.
    """
    features, scores, size = config.features, config.scoring, config.data.image_size
    backbone = backbone or find_backbone(features.backbone)
    backbone.check_stages(features.stages)
    backbone.check_image_size(size, size)
    spec = FeatureSpec(backbone, features.stages, features.grid, features.resample)
    return Network(
        features=spec,
        reconstructor=reconstructor or build_reconstructor(config),
        image_size=config.data.image_size,
        resize=config.data.resize,
        groups=spec.widths if scores.balance_stages else (sum(spec.widths),),
        smoothing=scores.smoothing,
        window=scores.window,
    )


def build_reconstructor(config: Config) -> nn.Module:
    """The reconstructor that a config describes."""
    settings = config.reconstructor
    if settings.kind == "nearest":
        return NearestNeighbour(size=settings.cells)
    if settings.kind == "convolutional":
        return ConvolutionalReconstructor(width=settings.width)
    return Reconstructor(
        width=settings.width,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        heads=settings.heads,
        hidden=settings.hidden,
        dropout=settings.dropout,
        fold=settings.fold,
        positions=settings.positions,
        attention=settings.attention,
        query=settings.query,
    )


def build_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser that a config describes, and its learning rate by step."""
    settings = config.training
    return make_optimizer(
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        steps=settings.steps,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def initial_state(config: Config, network: Network) -> State:
    """The state before the first step."""
    shape = (network.features.grid, network.features.grid, sum(network.features.widths))
    return init_state(jax.random.key(config.seed), network.reconstructor, build_optimizer(config)[0], shape)


def _read_threshold(path: Path, groups: int) -> dict[str, np.ndarray]:
    """The threshold and the levels of a run."""
    values = files.read_json(path)
    values = values if isinstance(values, dict) else {}
    threshold, levels = values.get("threshold"), values.get("levels")
    if not isinstance(threshold, float) or not np.isfinite(threshold):
        raise InputError(f"{path}: expected an object with a finite number `threshold`, got {threshold!r}")
    if not isinstance(levels, list) or len(levels) != groups or not all(isinstance(x, float) and x > 0 for x in levels):
        raise InputError(f"{path}: expected {groups} positive numbers `levels`, got {levels!r}")
    return {"threshold": np.float32(threshold), "levels": np.float32(levels)}


def load(workdir: str | os.PathLike, *, reconstructor: nn.Module | None = None) -> Detector:
    """The detector of a finished run: `scores, maps = load("runs/bottle")(images)`.

    Args:
        workdir: folder of the run.
        reconstructor: the module that the run was trained with, where it is not the config's.

    Raises:
        InputError: the folder is not a run, the run is not finished, or one of its files is damaged.
    """
    folder = Path(workdir)
    config, network = read_network(folder, reconstructor=reconstructor)
    if not (folder / files.THRESHOLD).is_file():
        raise InputError(f"workdir {folder}: the run is not finished; the command that started it goes on with it")
    fitted = _read_threshold(folder / files.THRESHOLD, len(network.groups))
    trained = {"reconstructor": restore_parameters(folder, config, network)}
    return Detector(network, jax.device_put(load_frozen(folder, network) | fitted | trained))


def describe_backbone(backbone: Backbone) -> dict[str, Any]:
    """What config.json tells of the backbone that was loaded; `read_network` reads it."""
    names = ("name", "source", "licence", "sha256", "mean", "deviation")
    return {name: getattr(backbone, name) for name in names}


def read_network(folder: Path, *, reconstructor: nn.Module | None = None) -> tuple[Config, Network]:
    """Config and network of a run, with the preprocessing of the weights that it was trained on."""
    config, run = files.read_config(folder)
    there = run["backbone"]
    read = {name: tuple(there[name]) for name in ("mean", "deviation")} | {
        name: there[name] for name in ("source", "sha256")
    }
    backbone = replace(find_backbone(config.features.backbone), **read)
    return config, build_network(config, backbone=backbone, reconstructor=reconstructor)


def load_frozen(folder: Path, network: Network) -> dict[str, Any]:
    """The backbone and standardisation of a run."""
    channels = jax.ShapeDtypeStruct((sum(network.features.widths),), np.float32)
    like = {
        "backbone": network.features.backbone.abstract_parameters(),
        "standardisation": Standardisation(channels, channels)._asdict(),
    }
    return load_parameters(folder / files.BACKBONE, like=like)


def restore_parameters(folder: Path, config: Config, network: Network) -> Any:
    """The parameters of a run's reconstructor, from its newest checkpoint."""
    with Checkpoints(folder / files.CHECKPOINTS, create=False) as checkpoints:
        return checkpoints.restore(jax.eval_shape(lambda: initial_state(config, network))).parameters
