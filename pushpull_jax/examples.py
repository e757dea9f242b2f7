"""What a run trains on: its images with the mask, label and kind of label of each.

Normal images come first, then the anomalies, source by source: labelled ones of the data, copies of the normal images
with confetti noise, images that have nothing to do with the data. Features are rows of a bank, masks [N,h,w] on the
grid.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pushpull_jax.config import FILE_SOURCES, Config
from pushpull_jax.data.images import mask_to_grid, read_image, read_mask
from pushpull_jax.data.manifest import Record, fingerprint, hold_out, listed, measurable
from pushpull_jax.data.pipeline import check_readable
from pushpull_jax.data.sources import is_extracted_visa, read_irrelevant, read_records
from pushpull_jax.data.supervision import Label, deal_labels, draw_shots
from pushpull_jax.errors import InputError
from pushpull_jax.feature_bank import FeatureBank, FeatureRows
from pushpull_jax.features import Standardisation, channel_moments, fit_standardisation, joined_moments, raw
from pushpull_jax.losses import IMAGE_LABEL, MASK, UNLABELLED
from pushpull_jax.progress import progress_bar, say
from pushpull_jax.shares import gathered, share, shared_out
from pushpull_jax.steps import Batch, Pool

_KINDS: dict[Label, int] = {"mask": MASK, "image": IMAGE_LABEL, "unlabelled": UNLABELLED}


class RunRecords(NamedTuple):
    """The records of a run by what they are for."""

    normal: tuple[Record, ...]  # to train on, or to hold out for the threshold
    labelled: tuple[tuple[Record, Label], ...]
    irrelevant: tuple[Record, ...]
    test: tuple[Record, ...]
    out_of_test: tuple[str, ...]  # keys of the test images that were drawn, or withheld by the hard setting

    @property
    def all(self) -> tuple[Record, ...]:
        """Every record that is read, for the fingerprint."""
        return (*self.normal, *(record for record, _ in self.labelled), *self.irrelevant, *self.test)


class TrainingData(NamedTuple):
    """What a run trains on, as rows of a feature bank, and everything frozen that belongs to them."""

    examples: dict[str, np.ndarray]  # "row" [N], "mask" [N,h,w], "label" [N], "kind" [N]: see `losses.push_pull_loss`
    pools: tuple[Pool, ...]  # the first one is of all normal images
    held: np.ndarray  # rows [n], kept for the threshold
    threshold_keys: tuple[str, ...]  # whose scores fit the threshold: the held-out images, all where cross-fitted
    standardisation: Standardisation
    summary: dict[str, Any]  # for config.json

    @property
    def normal(self) -> np.ndarray:
        """Rows of the normal images that are trained on."""
        return self.examples["row"][: len(self.pools[0].examples)]

    def batch(self, bank: FeatureBank) -> Batch:
        """All examples with standardised "features" [N,h,w,C] for their rows."""
        others = {name: leaf for name, leaf in self.examples.items() if name != "row"}
        return {"features": np.asarray(self.standardisation(bank.features[self.examples["row"]]))} | others

    def features(self, bank: FeatureBank, rows: np.ndarray) -> FeatureRows:
        """Standardised features of some rows."""
        return FeatureRows(bank, rows, self.standardisation)


def read_run(config: Config) -> RunRecords:
    """The records of a run: labelled anomalies drawn, irrelevant ones chosen, nothing decoded.

    Raises:
        InputError: the data cannot be read, or cannot give the labels that are asked for.
    """
    supervision, is_push_pull = config.supervision, config.training.loss == "push_pull"
    records = read_records(config.data.source, config.data.root, config.data.category)
    normal = tuple(record for record in records if record.split == "train" and record.label == 0)
    test = measurable(records)
    drawn = draw_shots(
        test, shots=supervision.shots, setting=supervision.setting, seen=supervision.seen, seed=config.seed
    )
    given = tuple(record for record in records if record.split == "train" and record.label != 0)
    if given and not is_push_pull:
        anomalous = sum(record.label == 1 for record in given)
        shown = f"{anomalous} labelled anomalies and {len(given) - anomalous} unlabelled images"
        say(f"{shown} of the training split are not used: training.loss is squared")
    irrelevant: tuple[Record, ...] = ()
    if supervision.irrelevant:
        count = supervision.irrelevant_count or len(normal)
        # A folder of prepared data holds CIFAR-100 too; any other root holds nothing of it.
        is_plain = config.data.source in FILE_SOURCES or is_extracted_visa(config.data.root)
        prepared = "" if is_plain else config.data.root
        irrelevant = read_irrelevant(supervision.irrelevant, count=count, seed=config.seed, root=prepared)
        own = {os.path.realpath(record.image) for record in records if isinstance(record.image, str)}
        clash = [r.key for r in irrelevant if isinstance(r.image, str) and os.path.realpath(r.image) in own]
        if clash:
            raise InputError(f"supervision.irrelevant: these are images of the data themselves: {listed(clash)}")
    labelled = deal_labels((*(given if is_push_pull else ()), *drawn.shots), supervision.labels)
    return RunRecords(
        normal=normal,
        labelled=labelled,
        irrelevant=irrelevant,
        test=drawn.test,
        out_of_test=tuple(sorted(record.key for record in (*drawn.shots, *drawn.withheld))),
    )


def prepare(
    config: Config, bank: FeatureBank, records: RunRecords, *, standardisation: Standardisation | None = None
) -> TrainingData:
    """Check every file of the data, extract features and fit their standardisation.

    Args:
        config: the run.
        bank: where the features are kept.
        records: of `read_run`.
        standardisation: that of a run to go on with or to start from; by default it is fitted to the normal images.

    Raises:
        InputError: see `image_batches`; a labelled image has an empty mask; or fewer than two normal images are left.
    """
    policy, dropped = config.data.on_unreadable, {}
    given = (records.labelled, config.supervision.confetti_copies, records.irrelevant)
    places = _places(config, sum(map(bool, given)))
    _check_counts(config, records.normal)
    checked = [*records.test, *(record for record, _ in records.labelled)]
    with progress_bar(desc="checking test images", total=len(checked), unit="image") as bar:
        check = functools.partial(check_readable, on_unreadable=policy, progress=lambda *_: bar.update())
        shared_out(lambda some, unreadable: check(some, dropped=unreadable), checked, dropped)
    records = records._replace(labelled=tuple(pair for pair in records.labelled if pair[0].key not in dropped))
    rows = bank.rows(records.normal, what="features", dropped=dropped)
    normal = [record for record in records.normal if record.key not in dropped]
    _check_counts(config, normal)  # some may have been left out
    fit, held = _hold_out(config, normal)
    row_of = dict(zip(normal, rows, strict=True))
    fit_rows, held_rows = (np.asarray([row_of[record] for record in part], np.int32) for part in (fit, held))

    sources = [_examples(config, fit_rows, mask=None, label=0, kind=_KINDS[config.supervision.normals])]
    if records.labelled:
        sources.append(_labelled_examples(config, bank, records.labelled))
    if config.supervision.confetti_copies:
        sources.append(_confetti_examples(config, bank, fit))
    if records.irrelevant:
        rows = bank.rows(records.irrelevant, what="irrelevant images", dropped=dropped)
        sources.append(_examples(config, rows, mask=None, label=1, kind=IMAGE_LABEL))
    for key, reason in dropped.items():
        say(f"left out {key}: {reason}")
    if unlabelled := sum(label == "unlabelled" for _, label in records.labelled):
        say(
            f"{unlabelled} unlabelled images are trained on as normal ones: what is wrong with them is learned as right"
        )
    return TrainingData(
        examples={name: np.concatenate([source[name] for source in sources]) for name in sources[0]},
        pools=_pools(places, [len(source["kind"]) for source in sources]),
        held=held_rows,
        threshold_keys=tuple(record.key for record in held or fit),
        standardisation=standardisation or _standardisation(config, bank, fit_rows),
        summary={
            "fingerprint": fingerprint([record for record in records.all if record.key not in dropped]),
            "train": len(fit),
            "trained": [record.key for record in fit],
            "held_out": [record.key for record in held],
            "test": sum(record.key not in dropped for record in records.test),
            "labelled": {record.key: label for record, label in records.labelled if record.key not in dropped},
            "out_of_test": list(records.out_of_test),
            "irrelevant": sum(record.key not in dropped for record in records.irrelevant),
            "confetti": config.supervision.confetti_copies * len(fit),
            "left_out": dropped,
        },
    )


def _hold_out(config: Config, normal: Sequence[Record]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The normal images that are trained on, and those held out for the threshold: none where it is cross-fitted."""
    if config.scoring.folds:
        return tuple(normal), ()
    return hold_out(normal, fraction=config.scoring.held_out, seed=config.seed)


def _standardisation(config: Config, bank: FeatureBank, rows: np.ndarray) -> Standardisation:
    widths = bank.spec.widths
    if not config.features.standardise:
        return raw(sum(widths))
    own = channel_moments(bank.read(share(rows)), sum(widths))
    moments = joined_moments(gathered(own[None]), sum(widths))
    fitted, constant = fit_standardisation(moments, widths, stage_weights=config.features.stage_weights)
    if constant:
        say(f"channels {constant} of the features are constant over the training images; they are only shifted")
    return fitted


def _examples(
    config: Config, rows: np.ndarray, *, mask: np.ndarray | None, label: Any, kind: Any
) -> dict[str, np.ndarray]:
    """Examples of one source; one label and kind for all, or one each; no mask is an empty one."""
    count, grid = len(rows), config.features.grid
    return {
        "row": rows,
        "mask": np.zeros((count, grid, grid), np.float32) if mask is None else mask.astype(np.float32),
        "label": np.broadcast_to(np.asarray(label, np.float32), count),
        "kind": np.broadcast_to(np.asarray(kind, np.int32), count),
    }


def _labelled_examples(
    config: Config, bank: FeatureBank, labelled: Sequence[tuple[Record, Label]]
) -> dict[str, np.ndarray]:
    """Labelled images that can be read, each with what is to be known of it."""
    records = [record for record, _ in labelled]
    return _examples(
        config,
        bank.rows(records, what="labelled anomalies", dropped={}),
        mask=np.stack([_grid_mask(config, record, label) for record, label in labelled]),
        label=[record.label or 0 for record in records],
        kind=[_KINDS[label] for _, label in labelled],
    )


def _grid_mask(config: Config, record: Record, label: Label) -> np.ndarray:
    """The mask of a labelled image on the grid, [h,w]; empty where its mask is not to be known."""
    grid = (config.features.grid,) * 2
    if label != "mask":
        return np.zeros(grid, np.float32)
    mask = read_mask(record, size=read_image(record).shape[:2])
    data, rule = config.data, config.supervision.mask_rule
    return mask_to_grid(mask, grid=grid, rule=rule, size=data.image_size, mode=data.resize)


def _confetti_examples(config: Config, bank: FeatureBank, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Copies of training images with confetti noise."""
    grid, rule = (config.features.grid,) * 2, config.supervision.mask_rule
    reduce = functools.partial(mask_to_grid, grid=grid, rule=rule)
    copies = config.supervision.confetti_copies
    rows, masks = bank.confetti_rows(records, seed=config.seed, copies=copies, reduce=reduce)
    return _examples(config, rows, mask=masks, label=1, kind=MASK)


def _places(config: Config, sources: int) -> list[int]:
    """Places in a batch of the normal images, and of each source of anomalies, as equal as they go.

    Raises:
        InputError: there are fewer places than sources.
    """
    size = config.training.batch_size
    if not sources:
        return [size]
    anomalous = round(config.supervision.share * size)
    if not sources <= anomalous < size:
        raise InputError(
            f"supervision.share: {anomalous} of {size} places in a batch (training.batch_size) for {sources} "
            "sources of anomalies; each needs one, and so do the normal images"
        )
    return [size - anomalous, *np.diff(np.round(np.linspace(0, anomalous, sources + 1)).astype(int)).tolist()]


def _check_counts(config: Config, normal: Sequence[Record]) -> None:
    """Raise where there are too few normal images for what is asked, before any is decoded."""
    folds, count = config.scoring.folds, len(normal)
    if count < 2:
        raise InputError(f"{config.data.root}: {count} normal training images; at least 2 are needed, one held out")
    if folds > count:
        raise InputError(f"scoring.folds: {folds} folds of {count} normal training images")
    fitted = count - -(-count // folds) if folds else len(_hold_out(config, normal)[0])
    cells = fitted * config.features.grid**2
    if config.reconstructor.kind == "nearest" and config.reconstructor.cells > cells:
        raise InputError(
            f"reconstructor.cells: {config.reconstructor.cells} are to be stored, but {fitted} training images have "
            f"{cells} cells on a grid of {config.features.grid}"
        )


def _pools(places: Sequence[int], counts: Sequence[int]) -> tuple[Pool, ...]:
    """The pools of a batch: the normal images, then each source of anomalies.

    Raises:
        InputError: no image of a source could be read.
    """
    if not all(counts):
        raise InputError("no image of one of the sources of anomalies could be read")
    edges = np.cumsum((0, *counts))
    return tuple(Pool(np.arange(start, end), n) for start, end, n in zip(edges[:-1], edges[1:], places, strict=True))
