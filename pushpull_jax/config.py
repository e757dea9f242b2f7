"""What a run is made of, as frozen dataclasses with checked types; imports nothing of ours but the error.

A config file is Python: it builds one `Config` under the name `config`. `to_dict` turns any config into plain JSON and
`from_dict` back, so that a run's folder tells everything. Field docstrings are the command line's help.
"""

import ast
import dataclasses
import difflib
import itertools
import math
import re
import runpy
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pushpull_jax.errors import InputError

Source = Literal[
    "mvtec_ad", "mvtec_loco", "btad", "kolektor_sdd", "good_bad", "manifest", "classes", "cifar10", "tfds_mvtec_ad",
    "visa", "visa_2cls_fewshot", "visa_2cls_highshot",
]  # fmt: skip
# Sources that are nothing but files of the user's: they need a root, and hold no prepared data.
FILE_SOURCES = ("mvtec_ad", "mvtec_loco", "btad", "kolektor_sdd", "good_bad", "manifest", "classes")


@dataclass(frozen=True)
class Data:
    """Which images, and how they become one size."""

    source: Source = "mvtec_ad"
    """What root holds: folders in the MVTec-AD layout, ROOT/CATEGORY/{train/good, test/good, test/DEFECT,
    ground_truth/DEFECT}; those of MVTec LOCO, BTAD or KolektorSDD; good_bad, ROOT/CATEGORY/{good, bad, masks}; classes,
    ROOT/{train,test}/CLASS, one of them normal; a manifest, root being a CSV or JSON-lines table; or, through
    tensorflow-datasets, CIFAR-10, MVTec-AD, or VisA in one of its three official splits, where root is the folder of
    prepared data (docs/data.md). `pushpull inspect ROOT` tells which it is."""
    root: str = ""
    """Folder of the data, or the manifest; see source. Empty, through tensorflow-datasets: where that keeps its own."""
    category: str = ""
    """Category to train on, or the normal class; "all": one model for all categories."""
    image_size: int = 256
    """Side in pixels of the square that images are resized to."""
    resize: Literal["stretch", "letterbox"] = "stretch"
    """How an image that is not square is fitted: stretched, or scaled whole and padded."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """A file that cannot be decoded stops the run before it trains, or is left out and named."""


@dataclass(frozen=True)
class Features:
    """The frozen backbone's features on the grid that is reconstructed."""

    backbone: str = "efficientnet_lite0"
    """Name of the backbone (docs/backbones.md)."""
    weights: str = ""
    """File of its weights, or "keras"; empty: the backbone's own source, a package or the Hugging Face hub."""
    stages: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Stage ends that are concatenated, at strides 2, 4, 8, 16, 32; of a vision transformer, its blocks."""
    stage_weights: tuple[float, ...] = ()
    """Share of each stage in the mean square of the features, whatever its channels; empty: each channel weighs 1.
    Only with standardise."""
    grid: int = 16
    """Cells a side of the square feature grid."""
    resample: Literal["bilinear", "area"] = "bilinear"
    """From a stage's own size to the grid: bilinear with aligned corners, no antialias (UniAD), or the mean over the
    cell (bilinear between pixel centres where the stage is coarser than the grid)."""
    standardise: bool = False
    """Subtract mean and divide by standard deviation of the training images, a channel at a time."""
    keep: Literal["auto", "memory", "disk", "stream"] = "auto"
    """Where features are while it trains: in memory; in files on disk, which later runs find; or nowhere, and each
    batch is decoded and extracted when its turn comes. auto: in memory where they fit memory_gb, otherwise nowhere. The
    numbers are the same, up to rounding."""
    memory_gb: float = 0.0
    """Budget in GB (2**30 bytes) of features in memory, which at times are there three times over; 0: a quarter of the
    free memory of the machine, or of a device where that has less."""
    cache: str = ""
    """Folder of the files; empty: pushpull_jax/features in the user's cache folder."""
    prefetch: int = 2
    """Batches that are made ready while a step runs, where features are not in memory."""


@dataclass(frozen=True)
class Reconstructor:
    """ADTR's transformer, whose defaults are the paper's, or what it is compared with."""

    kind: Literal["transformer", "convolutional", "nearest"] = "transformer"
    """The transformer, convolutions in its place, or the nearest of some stored training cells (training.steps 0)."""
    attention: bool = True
    """Of the transformer; without, a token sees nothing but itself."""
    query: bool = True
    """Of the transformer; without, the decoder starts from the encoder's output."""
    cells: int = 6000
    """Training cells that the nearest neighbour is sought among."""
    width: int = 256
    """Width of a token, divisible by heads."""
    encoder_layers: int = 4
    """Layers of the encoder."""
    decoder_layers: int = 4
    """Layers of the decoder, whose input is a learned query."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 1024
    """Width inside the feed-forward networks."""
    dropout: float = 0.1
    """Rate of dropout, after attention weights and in every residual branch."""
    fold: int = 1
    """Cells a side that share one token; divides the grid."""
    positions: Literal["factorised", "per_token"] = "factorised"
    """Learned position embedding: a row's and a column's half, or one for each token."""


@dataclass(frozen=True)
class Training:
    """The optimisation."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 16
    """Images a step."""
    loss: Literal["squared", "push_pull"] = "squared"
    """Eq. 1 on normal images alone, or the push-pull losses of eq. 6 to 9, each example's by its kind of label."""
    start: str = ""
    """Folder of a finished run to start from, with its weights and standardisation; empty: start anew."""
    jitter: float = 0.0
    """Deviation of the Gaussian noise added to the input features, in units of their root mean square a cell."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """Constant, cosine to 0, or times 0.1 at four fifths of the steps (ADTR); each after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled down."""


@dataclass(frozen=True)
class Supervision:
    """Anomalies that are trained on, real and synthetic, and what is known of them; with training.loss push_pull."""

    shots: int = 0
    """Anomalous test images of each category that move into training and out of the test set, drawn by the seed."""
    setting: Literal["general", "hard"] = "general"
    """Shots of all types of defects, as evenly as they go; or of one type, which is then in training only."""
    seen: str = ""
    """The type of the hard setting; empty: drawn by the seed."""
    labels: tuple[Literal["mask", "image", "unlabelled", "unused"], ...] = ("mask",)
    """What is known of labelled images, dealt out in turn: the mask (eq. 7), the label of the image (eq. 9), nothing
    (pulled as normal, as often as the others: what is wrong with it is learned as right), or left out of training and
    test alike."""
    confetti_copies: int = 0
    """Copies of each training image with confetti noise, and their masks."""
    irrelevant: str = ""
    """Images that have nothing to do with the data, as anomalies by image: a folder, or "cifar100"."""
    irrelevant_count: int = 0
    """How many of them, drawn by the seed; 0: as many as normal images."""
    share: float = 0.5
    """Share of a batch that is drawn from the anomalies, in equal parts from each of the sources above."""
    normals: Literal["mask", "image"] = "mask"
    """Normal images are pulled in all cells (eq. 7), or in the k cells that are worst (eq. 9)."""
    mask_rule: Literal["any", "fraction"] = "any"
    """A cell is anomalous if any pixel of it is, or in proportion to its anomalous area."""
    by_stage: bool = False
    """Eq. 6 for each stage by itself, in units of its mean |d| on normal images before the first step, and the mean of
    the stages' losses; otherwise the paper's, over all channels at once, most of which are the last stage's."""
    alpha: float = 0.003
    """Weight of the push terms."""
    k: int = 20
    """Cells in the score of an image, eq. 8."""


@dataclass(frozen=True)
class Scoring:
    """From the score map to the verdict."""

    map: Literal["norm", "whitened"] = "norm"
    """The score of a cell: the norm of its residual (the paper); or the geometric mean over stages of the norm of the
    stage's residual, whitened by what is usual on the normal training images."""
    map_weights: tuple[float, ...] = ()
    """Exponent of each stage in the whitened map; empty: all the same."""
    blocks: tuple[int, ...] = ()
    """Factors of an image's score besides the map's peak: for each number n the largest Mahalanobis norm of the mean
    residual of one of n x n parts of the image, which tells of what is missing or in another place. 1 is the whole
    image; empty: the paper's score, the map's peak alone."""
    smoothing: float = 0.0
    """Deviation in pixels, for an image of 256, of the Gaussian over the upsampled map; scaled with the image."""
    window: int = 16
    """Side in pixels, for an image of 256, of the window whose largest mean is the image's score; scaled likewise."""
    false_positive_rate: float = 0.05
    """Share of normal images that may be called anomalous; the threshold is the conformal quantile for it."""
    held_out: float = 0.1
    """Share of the normal training images that is kept from training and fits the threshold."""
    folds: int = 0
    """Where normal images are few: 2 or more folds that each fit the threshold once, for as many more trainings, and
    none is kept from training (cross-fitting). 0: hold out."""


@dataclass(frozen=True)
class Compute:
    """What the networks compute in; losses, statistics, scores and metrics are float32 always."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Inside backbone and reconstructor; parameters and their optimiser stay float32. bfloat16 is for GPU and TPU."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Of float32 products in the networks, as jax.default_matmul_precision has it: a GPU's default is TF32, a TPU's
    bfloat16; on CPU all are the same."""
    depthwise: Literal["auto", "conv", "shift"] = "auto"
    """Depthwise convolutions of EfficientNets: XLA's own, sums of shifts (fast on CPU), or by the platform. They agree
    to rounding, so that a resumed run may change it."""


@dataclass(frozen=True)
class Log:
    """What is written while it trains."""

    every: int = 10
    """Steps between lines of metrics.jsonl; divides the steps between checkpoints."""
    profile: int = 0
    """Steps of a training that JAX's profiler traces into the run's folder, after compilation; 0: none."""
    tensorboard: bool = False
    """Write the training's scalars, the final metrics and pictures of test images for TensorBoard too."""


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    minutes: float = 0.0
    """A checkpoint is saved at the next logging step too when so many minutes have passed without one; 0: never."""
    keep: int = 2
    """Checkpoints that are kept, the newest."""


@dataclass(frozen=True)
class Mesh:
    """The devices that it runs on."""

    data: int = 1
    """Devices that share each batch of a training; -1: all."""
    grid: int = -1
    """Devices that share the members of an ablation; -1: all, on CPU the most that divide them and fit its memory."""


@dataclass(frozen=True)
class Hosts:
    """The processes that train together, each with devices of its own (docs/hosts.md)."""

    coordinator: str = ""
    """HOST:PORT of process 0, where they meet; empty: found from the environment (TPU pod, SLURM, Kubernetes)."""
    processes: int = 0
    """How many there are; 0: as the environment tells, 1 where it tells nothing."""
    process: int = -1
    """Which one this is, from 0 up; with coordinator."""
    heartbeat_timeout_seconds: int = 100
    """A process that was not heard of for so long has died, and the others end."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: Data = field(default_factory=Data)
    features: Features = field(default_factory=Features)
    reconstructor: Reconstructor = field(default_factory=Reconstructor)
    training: Training = field(default_factory=Training)
    supervision: Supervision = field(default_factory=Supervision)
    scoring: Scoring = field(default_factory=Scoring)
    compute: Compute = field(default_factory=Compute)
    log: Log = field(default_factory=Log)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    mesh: Mesh = field(default_factory=Mesh)
    hosts: Hosts = field(default_factory=Hosts)
    seed: int = 0
    """Seed of everything random: initial weights, order, dropout, jitter, held-out images, folds, shots, confetti,
    irrelevant images, stored cells."""


@dataclass(frozen=True)
class Ablation:
    """A grid of runs: one for each combination of the values of the fields that vary."""

    config: Config
    """What they have in common. In training.start "{category}" and "{seed}" stand for those of each run."""
    vary: dict[str, tuple[Any, ...]]
    """Values of fields, by their dotted names ("supervision.alpha")."""


# Fields that do not change the numbers but for rounding: a resumed run may change them.
HOW_IT_RUNS = (
    "log.", "checkpoint.", "mesh.", "hosts.", "data.root", "compute.depthwise", "features.keep", "features.memory_gb",
    "features.cache", "features.prefetch",
)  # fmt: skip


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts and lists, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], *, source: str, cls: type = Config, prefix: str = "") -> Any:
    """Rebuild a config from `to_dict`'s output; an unknown field is an InputError that names `source`. See `check`."""
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected an object for {prefix or 'the config'}, got {values!r}")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise InputError(f"{source}: unknown field {prefix}{name}{nearest(name, hints)}")
    fields = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            fields[name] = from_dict(value, source=source, cls=kind, prefix=f"{prefix}{name}.")
        else:
            fields[name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name."""
    flat = {}
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        flat |= flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return flat


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known name, or nothing where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: from the repository, or from an installed wheel."""
    package = Path(__file__).parent
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def shipped_ablations() -> dict[str, Path]:
    """The ablations that come with the package, by name."""
    folder = next(iter(shipped_configs().values())).parent / "ablations"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def load_config(name: str) -> Config:
    """The config of a Python file, or a shipped one by its name ("quick"); checked.

    Raises:
        InputError: no such file or name, the file does not build a `Config` named `config`, or a field is wrong.
    """
    path = _find(name, shipped_configs(), "config")
    config = _built(path, "config", Config)
    check(config, source=f"config file {path}")
    return config


def load_ablation(name: str) -> Ablation:
    """The ablation of a Python file, or a shipped one by its name; a config is one in which nothing varies yet.

    Its runs are checked by `runs_of`.

    Raises:
        InputError: no such file or name, or the file builds neither an `Ablation` named `ablation` nor a `Config`.
    """
    shipped = shipped_ablations()
    path = _find(name, shipped_configs() | shipped, "ablation")
    if path not in shipped.values() and "config" in (built := _run(path)) and "ablation" not in built:
        return Ablation(_built(path, "config", Config), {})
    return _built(path, "ablation", Ablation)


def runs_of(ablation: Ablation, *, source: str) -> tuple[Config, ...]:
    """The runs of a grid, the last field varying fastest; each is checked.

    Raises:
        InputError: names `source` and the field that does not exist, has no values or one twice, or a wrong one.
    """
    known = flatten(ablation.config)
    for name, values in ablation.vary.items():
        if name not in known:
            raise InputError(f"{source}: no field {name!r} to vary{nearest(name, known)}")
        if not isinstance(values, tuple | list) or not values or any(values.count(value) > 1 for value in values):
            raise InputError(f"{source}: {name} must vary over one value or more, each once, got {values!r}")
    runs = []
    for values in itertools.product(*ablation.vary.values()):
        run = ablation.config
        for name, value in zip(ablation.vary, values, strict=True):
            run = with_field(run, name, value)
        start = run.training.start.replace("{category}", run.data.category).replace("{seed}", str(run.seed))
        run = with_field(run, "training.start", start)
        check(run, source=source)
        runs.append(run)
    return tuple(runs)


def varied(given: typing.Iterable[str], config: Config) -> dict[str, tuple[Any, ...]]:
    """The values of fields as a command line has them, FIELD=A,B,C.

    Raises:
        InputError: it is not of this form, or there is no such field.
    """
    known, vary = flatten(config), {}
    for text in given:
        name, _, values = text.partition("=")
        if name not in known:
            raise InputError(f"command line: no field {name!r} to vary{nearest(name, known)}")
        try:
            vary[name] = tuple(ast.literal_eval(f"({values},)"))
        except (ValueError, SyntaxError):  # words need no quotes
            words = {"true": True, "false": False} if isinstance(known[name], bool) else {}
            vary[name] = tuple(words.get(value, value) for value in values.split(","))
    return vary


def with_field(config: Any, name: str, value: Any) -> Any:
    """A config with another value of one field, by its dotted name."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: with_field(getattr(config, first), rest, value) if rest else value})


def _find(name: str, shipped: dict[str, Path], what: str) -> Path:
    """The file that a name or a path means."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path
    is_name = path.suffix in ("", ".py") and path.parent in (Path("."), Path("configs"), Path("configs/ablations"))
    if path.stem not in shipped or not is_name:
        hint = nearest(path.stem, shipped)
        raise InputError(f"no {what} file {name}{hint} (shipped {what}s: {', '.join(shipped)})")
    return shipped[path.stem]


def _run(path: Path) -> dict[str, Any]:
    """The names that a Python file leaves behind."""
    try:
        # Not an import: that would leave a __pycache__, and read from it a file that was changed within a second.
        return runpy.run_path(str(path))
    except Exception as error:
        raise InputError(f"config file {path}: {type(error).__name__}: {_with_hint(str(error))}") from error


def _built(path: Path, name: str, kind: type) -> Any:
    """What a Python file builds under a name."""
    value = _run(path).get(name)
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise InputError(
            f"{name} file {path}: expected {article} {kind.__name__} named `{name}`, got {type(value).__name__}"
        )
    return value


def _with_hint(message: str) -> str:
    """Python's own message of a misspelt keyword, with the nearest field of that class."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    if not found:
        return message
    cls = globals().get(found[1])
    known = [item.name for item in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    return f"{found[1]} has no field {found[2]}{nearest(found[2], known)}"


def check(config: Config, *, source: str) -> None:
    """Check types and ranges of every field.

    Raises:
        InputError: names `source`, the field, what was expected and what came.
    """
    _check_types(config, source, "")
    training, is_nearest = config.training, config.reconstructor.kind == "nearest"
    rules = (
        ("data.image_size", 32 <= config.data.image_size, "at least 32"),
        ("features.stages", _are_stages(config.features.stages), "distinct numbers from 1 up, ascending"),
        ("features.stage_weights", _are_weights(config.features), "one positive weight a stage, with standardise"),
        ("features.grid", config.features.grid >= 1, "at least 1"),
        ("reconstructor.fold", _divides(config.reconstructor.fold, config.features.grid), "a divisor of the grid"),
        ("reconstructor.heads", _divides(config.reconstructor.heads, config.reconstructor.width), "a divisor of width"),
        ("reconstructor.width", _is_width(config.reconstructor), "even, where positions are factorised"),
        ("reconstructor.dropout", 0 <= config.reconstructor.dropout < 1, "in [0, 1)"),
        ("training.jitter", 0 <= config.training.jitter, "0 or more"),
        ("training.weight_decay", 0 <= config.training.weight_decay, "0 or more"),
        (
            "training.loss",
            not is_supervised(config) or training.loss == "push_pull",
            "push_pull, to learn from anomalies",
        ),
        (
            "training.steps",
            (training.steps > 0) != is_nearest,
            "0 for the nearest neighbour" if is_nearest else "positive",
        ),
        (
            "training.start",
            not (training.start and is_nearest),
            "empty for the nearest neighbour, which is not trained",
        ),
        (
            "scoring.folds",
            not (config.scoring.folds and config.supervision.confetti_copies),
            "0 with confetti copies, which show every image",
        ),
        (
            "supervision.setting",
            config.supervision.setting == "general" or config.supervision.shots > 0,
            "general without shots",
        ),
        (
            "supervision.seen",
            not config.supervision.seen or config.supervision.setting == "hard",
            "empty but in the hard setting",
        ),
        (
            "scoring.folds",
            config.scoring.folds == 0 or not training.start,
            "0, for the run it starts from saw them all",
        ),
        ("supervision.labels", bool(config.supervision.labels), "one kind of label or more"),
        ("supervision.share", 0 < config.supervision.share < 1, "between 0 and 1"),
        ("supervision.k", _is_k(config), "from 1 to the cells of the grid"),
        ("supervision.alpha", 0 <= config.supervision.alpha, "0 or more"),
        (
            "scoring.map_weights",
            _are_map_weights(config),
            "one weight of 0 or more a stage, not all 0, with map whitened",
        ),
        (
            "scoring.blocks",
            all(b > 0 and _divides(b, config.features.grid) for b in config.scoring.blocks),
            "divisors of the grid",
        ),
        ("scoring.smoothing", 0 <= config.scoring.smoothing, "0 or more"),
        ("scoring.window", config.scoring.window <= 256, "at most 256, the whole image"),
        ("scoring.false_positive_rate", 0 < config.scoring.false_positive_rate < 1, "between 0 and 1"),
        ("scoring.held_out", 0 < config.scoring.held_out < 1, "between 0 and 1"),
        ("scoring.folds", config.scoring.folds == 0 or config.scoring.folds >= 2, "0, or 2 and more"),
        ("checkpoint.every", _divides(config.log.every, config.checkpoint.every), "a multiple of log.every"),
        ("mesh.data", config.mesh.data == -1 or config.mesh.data >= 1, "at least 1, or -1"),
        ("mesh.grid", config.mesh.grid == -1 or config.mesh.grid >= 1, "at least 1, or -1"),
        ("hosts.coordinator", _is_address(config.hosts), "HOST:PORT where hosts.processes is 2 or more, else empty"),
        ("hosts.process", _is_process(config.hosts), "from 0 to hosts.processes - 1, with hosts.coordinator"),
        ("seed", config.seed < 2**32, "below 2**32, a key's 32 bits"),
        *((name, flatten(config)[name] > 0, "positive") for name in _POSITIVE),
        *((name, flatten(config)[name] >= 0, "0 or more") for name in _NOT_NEGATIVE),
    )
    for name, holds, expected in rules:
        if not holds:
            raise InputError(f"{source}: {name} must be {expected}, got {flatten(config)[name]!r}")


_POSITIVE = (
    "reconstructor.width", "reconstructor.heads", "reconstructor.hidden", "reconstructor.fold", "reconstructor.cells",
    "training.batch_size", "training.learning_rate", "training.clip_norm", "scoring.window", "log.every",
    "checkpoint.every", "checkpoint.keep", "hosts.heartbeat_timeout_seconds",
)  # fmt: skip
_NOT_NEGATIVE = (
    "reconstructor.encoder_layers", "reconstructor.decoder_layers", "training.steps", "training.warmup_steps",
    "supervision.shots", "supervision.confetti_copies", "supervision.irrelevant_count", "features.memory_gb",
    "features.prefetch", "hosts.processes", "log.profile", "checkpoint.minutes", "seed",
)  # fmt: skip


def is_supervised(config: Config) -> bool:
    """Whether anomalies are trained on."""
    supervision = config.supervision
    shots = supervision.shots and set(supervision.labels) & {"mask", "image"}
    return bool(shots or supervision.confetti_copies or supervision.irrelevant)


def _are_stages(stages: tuple[int, ...]) -> bool:
    return bool(stages) and list(stages) == sorted(set(stages)) and stages[0] >= 1


def _are_map_weights(config: Config) -> bool:
    weights, scoring = config.scoring.map_weights, config.scoring
    fits = len(weights) == len(config.features.stages) and min(weights, default=0) >= 0 and sum(weights) > 0
    return not weights or (scoring.map == "whitened" and fits)


def _is_address(hosts: Hosts) -> bool:
    return bool(re.fullmatch(r"\S+:\d+", hosts.coordinator)) if hosts.processes > 1 else not hosts.coordinator


def _is_process(hosts: Hosts) -> bool:
    return 0 <= hosts.process < hosts.processes if hosts.coordinator else hosts.process == -1


def _is_k(config: Config) -> bool:
    return 1 <= config.supervision.k <= config.features.grid**2 or config.training.loss != "push_pull"


def _divides(divisor: int, number: int) -> bool:
    """Whether it does; a divisor of 0 is left to the rule that it must be positive."""
    return number % (divisor or 1) == 0


def _is_width(reconstructor: Reconstructor) -> bool:
    return reconstructor.positions != "factorised" or reconstructor.width % 2 == 0


def _are_weights(features: Features) -> bool:
    weights = features.stage_weights
    return not weights or (features.standardise and len(weights) == len(features.stages) and min(weights) > 0)


def _check_types(config: Any, source: str, prefix: str) -> None:
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind) and isinstance(value, kind):
            _check_types(value, source, f"{prefix}{name}.")
        elif not _is_a(value, kind):
            shown = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
            shown = shown.replace("typing.", "")
            raise InputError(f"{source}: {prefix}{name} must be {shown}, got {value!r} ({type(value).__name__})")


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value has the annotated type; an int passes for a float, a bool for neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_a(item, arguments[0]) for item in value)
    if origin in (types.UnionType, typing.Union):
        return any(_is_a(value, argument) for argument in arguments)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
