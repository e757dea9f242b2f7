"""The one way from images to scores and maps; every program and every artefact calls `detect`.

Parameters (backbone, standardisation, reconstructor, residuals, thresholds) are one tree. Images are [B,S,S,3] in
0..255 at the run's size S inside `detect`, and uint8 [B,H,W,3] of any size for a `Detector`. Scores and maps have a
threshold each, fitted on the same images.
"""

import functools
import hashlib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from pushpull_jax import scoring
from pushpull_jax import workdir as files
from pushpull_jax.backbones import Backbone, find_backbone
from pushpull_jax.batching import BATCH_SIZE, in_batches
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Config
from pushpull_jax.data.images import Resize, letterbox_box, resize_image
from pushpull_jax.errors import InputError
from pushpull_jax.features import FeatureSpec, Standardisation, extract
from pushpull_jax.models.convolutional import ConvolutionalReconstructor
from pushpull_jax.models.nearest import NearestNeighbour
from pushpull_jax.models.reconstructor import Reconstructor
from pushpull_jax.precision import DTYPES, MatmulPrecision, matmul_precision
from pushpull_jax.shapes import split_channels
from pushpull_jax.steps import State, init_state, make_optimizer
from pushpull_jax.weights import described, load_parameters
from pushpull_jax.whitening import Whitening, block_means, largest_block_distance, whitened_score_map

# Side of the image, in pixels, for which a config gives smoothing and window: the paper's.
REFERENCE_SIZE = 256


@dataclass(frozen=True)
class Network:
    """All of a detector that is not a number: hashable, a static argument of `detect`.

    Attributes:
        features: what is extracted.
        reconstructor: linen module, [B,h,w,C] -> [B,h,w,C].
        image_size: S.
        resize: how an image is brought to S.
        map_weights: exponents of the stages in the whitened score map; empty for the paper's, the norm.
        blocks: parts of the image a side, for each factor of its score besides the peak of the map.
        smoothing: deviation of the Gaussian over the map, in pixels of an image of 256.
        window: side of the window of the image score, in pixels of an image of 256.
        matmul_precision: of products in the reconstructor; None: that of the caller.
    """

    features: FeatureSpec
    reconstructor: nn.Module
    image_size: int
    resize: Resize
    map_weights: tuple[float, ...]
    blocks: tuple[int, ...]
    smoothing: float
    window: int
    matmul_precision: MatmulPrecision | None = None

    @property
    def scale(self) -> float:
        return self.image_size / REFERENCE_SIZE

    @property
    def map_names(self) -> tuple[str, ...]:
        """What the whitened map's stages are called among the "residuals"; none for the paper's map."""
        return tuple(f"stage_{stage}" for stage in self.features.stages) if self.map_weights else ()

    @property
    def block_names(self) -> tuple[str, ...]:
        """What the image score's blocks are called there."""
        return tuple(f"blocks_{blocks}" for blocks in self.blocks)

    def reconstruct(self, parameters: Any, features: jax.Array) -> jax.Array:
        """The reconstruction of features [B,h,w,C] by parameters of the reconstructor, of the same shape, float32."""
        with matmul_precision(self.matmul_precision):
            return self.reconstructor.apply({"params": parameters}, features)

    def measured(self, residuals: jax.Array) -> dict[str, jax.Array]:
        """What of residuals [B,h,w,C] the score is in units of, by name: [B,i,j,c], of channels or of blocks."""
        stages = split_channels(residuals, self.features.widths)
        parts = dict(zip(self.map_names, stages, strict=True)) if self.map_names else {}
        means = (block_means(residuals, blocks) for blocks in self.blocks)
        return parts | dict(zip(self.block_names, means, strict=True))


def detect(network: Network, parameters: dict[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Scores [B] and maps [B,S,S], float32, of images [B,S,S,3] in 0..255; a pure function of parameters and images."""
    features = extract(network.features, parameters["backbone"], images)
    return detect_features(network, parameters, Standardisation(**parameters["standardisation"])(features))


def detect_features(network: Network, parameters: dict[str, Any], features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The second half of `detect`, from standardised features [B,h,w,C]."""
    reconstruction = network.reconstruct(parameters["reconstructor"], features)
    usual = parameters["residuals"]
    if network.map_weights:
        stages = tuple(Whitening(**usual[name]) for name in network.map_names)
        maps = whitened_score_map(features, reconstruction, stages, weights=network.map_weights)
    else:
        maps = scoring.score_map(features, reconstruction)
    maps = scoring.smooth(scoring.upsample(maps, network.image_size), sigma=network.smoothing * network.scale)
    scores = peaks(network, maps)
    for name, blocks in zip(network.block_names, network.blocks, strict=True):
        scores = scores * largest_block_distance(features, reconstruction, Whitening(**usual[name]), blocks=blocks)
    return scores, maps


def peaks(network: Network, maps: jax.Array) -> jax.Array:
    """The largest mean of a window over maps [B,S,S]: [B], the score of an image but for its blocks."""
    return scoring.image_score(maps, window=max(1, round(network.window * network.scale)))


@functools.cache
def _compiled(network: Network):
    return jax.jit(functools.partial(detect, network))


@dataclass(frozen=True)
class Detector:
    """A trained detector: `scores, maps = detector(images)`.

    Attributes:
        network: what is computed.
        parameters: the tree: "backbone", "standardisation", "reconstructor", "residuals" (what is usual of them, where
            the network asks), "threshold", "map_threshold".
    """

    network: Network
    parameters: dict[str, Any]

    @property
    def threshold(self) -> float:
        """An image whose score is above it is anomalous."""
        return float(self.parameters["threshold"])

    @property
    def map_threshold(self) -> float:
        """A window of the map whose mean is above it is anomalous; heat maps are coloured by it."""
        return float(self.parameters["map_threshold"])

    @property
    def digest(self) -> str:
        """SHA-256 of what the scores depend on, so without the thresholds, as 64 hexadecimal digits."""
        network, features = self.network, self.network.features
        rules = (features.backbone.name, *features[1:], network.image_size, network.resize, network.map_weights)
        rules += (network.blocks, network.smoothing, network.window)
        digest = hashlib.sha256(repr(rules).encode())
        weights = {name: tree for name, tree in self.parameters.items() if not name.endswith("threshold")}
        for path, leaf in jax.tree.leaves_with_path(weights):
            digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).data)
        return digest.hexdigest()

    def with_thresholds(self, threshold: float, map_threshold: float) -> "Detector":
        """The same detector with other thresholds."""
        given = {"threshold": np.float32(threshold), "map_threshold": np.float32(map_threshold)}
        return replace(self, parameters=self.parameters | given)

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

    def detect_resized(self, images: np.ndarray, *, size: int = BATCH_SIZE) -> tuple[np.ndarray, np.ndarray]:
        """Scores [B] and maps [B,S,S] of images [B,S,S,3] in 0..255 that already have the run's size.

        They are computed `size` at a time; a program is compiled for each `size`.
        """
        if not len(images):
            return np.zeros(0, np.float32), np.zeros(images.shape[:3], np.float32)
        program = functools.partial(_compiled(self.network), self.parameters)
        return in_batches(program, images, size=size)

    def peak(self, score_map: np.ndarray) -> float:
        """The largest mean of a window over a map [S,S], which the map's threshold is fitted to."""
        return float(peaks(self.network, score_map[None])[0])

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
        reconstructor: replaces the config's by any linen module, which computes in the dtype that it has.

    Raises:
        InputError: there is no such backbone, or it has no such stages or another image size.
    """
    features, scores, size = config.features, config.scoring, config.data.image_size
    backbone = (backbone or find_backbone(features.backbone)).computing_in(**asdict(config.compute))
    backbone.check_stages(features.stages)
    backbone.check_image_size(size, size)
    spec = FeatureSpec(backbone, features.stages, features.grid, features.resample)
    return Network(
        features=spec,
        reconstructor=reconstructor or build_reconstructor(config),
        image_size=config.data.image_size,
        resize=config.data.resize,
        map_weights=_map_weights(config),
        blocks=scores.blocks,
        smoothing=scores.smoothing,
        window=scores.window,
        matmul_precision=config.compute.matmul_precision,
    )


def _map_weights(config: Config) -> tuple[float, ...]:
    if config.scoring.map == "norm":
        return ()
    return config.scoring.map_weights or (1.0,) * len(config.features.stages)


def build_reconstructor(config: Config) -> nn.Module:
    """The reconstructor that a config describes."""
    settings = asdict(config.reconstructor)
    kind, cells, dtype = settings.pop("kind"), settings.pop("cells"), DTYPES[config.compute.dtype]
    if kind == "nearest":
        return NearestNeighbour(size=cells)
    if kind == "convolutional":
        return ConvolutionalReconstructor(width=settings["width"], dtype=dtype)
    return Reconstructor(**settings, dtype=dtype)


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


def initial_state(config: Config, network: Network, *, mesh: Mesh | None = None) -> State:
    """The state before the first step; see `init_state`."""
    shape = (network.features.grid, network.features.grid, sum(network.features.widths))
    key = jax.random.key(config.seed)
    return init_state(key, network.reconstructor, build_optimizer(config)[0], shape, mesh=mesh)


def _read_thresholds(path: Path) -> dict[str, np.ndarray]:
    """The thresholds of a run."""
    values = files.read_json(path)
    values = values if isinstance(values, dict) else {}
    for name in ("threshold", "map_threshold"):
        if not isinstance(values.get(name), float) or not np.isfinite(values[name]):
            raise InputError(f"{path}: expected an object with a finite number `{name}`, got {values.get(name)!r}")
    return {name: np.float32(values[name]) for name in ("threshold", "map_threshold")}


def load(workdir: str | os.PathLike, *, reconstructor: nn.Module | None = None) -> Detector:
    """The detector of a finished run: `scores, maps = load("runs/bottle")(images)`.

    Args:
        workdir: folder of the run.
        reconstructor: the module that the run was trained with, where it is not the config's.

    Raises:
        InputError: the folder is not a run, the run is not finished, or one of its files is damaged.
    """
    folder = files.run_folder(workdir)
    find_backbone(files.read_config(folder)[0].features.backbone)
    files.check_finished(folder)
    config, network = read_network(folder, reconstructor=reconstructor)
    tree = load_frozen(folder, network) | _read_thresholds(folder / files.THRESHOLD)
    tree |= {
        "reconstructor": restore_parameters(folder, config, network),
        "residuals": _load_residuals(folder, network),
    }
    return Detector(network, jax.device_put(tree))


def _load_residuals(folder: Path, network: Network) -> dict[str, Any]:
    """What is usual of the residuals, as `fit.with_residuals` found it; nothing where the network does not ask."""
    grid = network.features.grid
    residuals = jax.ShapeDtypeStruct((1, grid, grid, sum(network.features.widths)), np.float32)
    widths = {name: part.shape[-1] for name, part in jax.eval_shape(network.measured, residuals).items()}
    if not widths:
        return {}
    like = {
        name: {
            "mean": jax.ShapeDtypeStruct((width,), np.float32),
            "matrix": jax.ShapeDtypeStruct((width, width), np.float32),
        }
        for name, width in widths.items()
    }
    return load_parameters(folder / files.RESIDUALS, like=like)


def read_network(folder: Path, *, reconstructor: nn.Module | None = None) -> tuple[Config, Network]:
    """Config and network of a run, with the preprocessing of the weights that it was trained on."""
    config, run = files.read_config(folder)
    told = run.get("backbone")
    if not isinstance(told, dict):
        raise InputError(f"{folder / files.CONFIG}: expected an object `backbone`, which tells of its weights")
    backbone = described(find_backbone(config.features.backbone), told, source=str(folder / files.CONFIG))
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
    """The parameters of a finished run's reconstructor, of its last step: no others fit its thresholds."""
    like = jax.eval_shape(lambda: initial_state(config, network))
    with Checkpoints(folder / files.CHECKPOINTS, create=False) as checkpoints:
        return checkpoints.restore(like, step=config.training.steps).parameters
