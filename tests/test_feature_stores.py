"""Features in memory, on disk and nowhere: the same numbers, and a cache that never meets what it was not made from."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pushpull_jax import extraction, feature_cache, feature_stores, streaming, training
from pushpull_jax.ablation import ablate
from pushpull_jax.config import (
    Ablation,
    Checkpoint,
    Config,
    Data,
    Features,
    Log,
    Mesh,
    Scoring,
    Supervision,
    Training,
    with_field,
)
from pushpull_jax.data.demo import write_demo
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.sources import read_records
from pushpull_jax.detector import build_network
from pushpull_jax.errors import InputError
from pushpull_jax.feature_bank import FeatureBank
from pushpull_jax.feature_cache import extraction_digest
from pushpull_jax.feature_stores import OnDisk, Resident, Streamed, choose_store
from pushpull_jax.training import train
from pushpull_jax.weights import load_backbone

SIZE, GRID = 64, 8


class Bottleneck(nn.Module):
    """A reconstructor that is quickly compiled."""

    @nn.compact
    def __call__(self, features, *, train=False):
        hidden = nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(8)(features)))
        return nn.Dense(features.shape[-1])(hidden)


def loss(batch, reconstruction):
    """One that all leaves of a batch tell in."""
    distance = jnp.abs(batch["features"] - reconstruction).mean(-1)
    return (distance * (1 + batch["mask"])).mean((1, 2)) * (1 + batch["label"]) + batch["kind"]


def run(config: Config, workdir: Path, loss_fn=loss) -> None:
    train(config, workdir, loss_fn=loss_fn, reconstructor=Bottleneck())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=11, good=2, per_defect=1, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def config(root) -> Config:
    """Every source of examples; batches of 6, in which three are anomalous."""
    return Config(
        data=Data(root=str(root), category="flange", image_size=SIZE),
        features=Features(backbone="pixels", stages=(2, 3), grid=GRID, standardise=True),
        training=Training(steps=20, batch_size=6, learning_rate=1e-3, jitter=0.1, loss="push_pull"),
        supervision=Supervision(shots=2, confetti_copies=2),
        scoring=Scoring(held_out=0.2, blocks=(1,)),
        log=Log(every=5),
        checkpoint=Checkpoint(every=10),
    )


def kept(config: Config, keep: str, **others) -> Config:
    return replace(config, features=replace(config.features, keep=keep, **others))


def bank_of(config: Config, store=Resident) -> FeatureBank:
    backbone, parameters = load_backbone(config.features.backbone)
    return FeatureBank(build_network(config, backbone=backbone).features, parameters, config.data, store=store)


def normal_records(config: Config) -> list[Record]:
    records = read_records(config.data.source, config.data.root, config.data.category)
    return [record for record in records if record.split == "train"]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images that are decoded to be extracted from."""
    names, original = [], extraction.image_batches

    def watched(records, **options):
        for batch in original(records, **options):
            names.extend(Path(records[i].image).name for i in batch["index"])
            yield batch

    monkeypatch.setattr(extraction, "image_batches", watched)
    return names


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def resident(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "memory"
    run(kept(config, "memory"), workdir)
    return workdir


@pytest.mark.parametrize(
    ("keep", "mesh", "prefetch"),
    [("stream", 1, 2), ("disk", 1, 0), pytest.param("stream", 4, 0, marks=pytest.mark.slow)],
    ids=["stream", "disk", "four"],
)
def test_a_run_is_the_same_wherever_its_features_are(keep, mesh, prefetch, config, resident, tmp_path, capsys):
    """On four devices batches of 6 are filled up to 8."""
    elsewhere = kept(config, keep, prefetch=prefetch, cache=str(tmp_path / "cache"))
    run(replace(elsewhere, mesh=Mesh(data=mesh)), tmp_path / "run")
    said = {"stream": "they are extracted with each batch", "disk": f"they are kept in files in {tmp_path / 'cache'}"}
    # 11 normal images, as many copies twice over, and two shots; 8 x 8 cells of 48 + 192 channels of 4 bytes.
    assert "features of 35 images, 0.0586 MB each" in (err := capsys.readouterr().err) and said[keep] in err
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(resident), rtol=1e-5)
    thresholds = [json.loads((folder / "threshold.json").read_text()) for folder in (resident, tmp_path / "run")]
    assert thresholds[1]["threshold"] == pytest.approx(thresholds[0]["threshold"], rel=1e-3)


def test_a_run_goes_on_with_its_features_elsewhere(config, resident, tmp_path, stopped_at):
    with stopped_at(10):
        run(kept(config, "stream"), tmp_path / "run")
    run(kept(config, "memory"), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(resident), rtol=1e-5)


def test_streaming_reads_the_device_once_a_chunk_and_is_traced_once(config, tmp_path, monkeypatch):
    reads, traces, original, build = [], [], jax.device_get, training.build_program

    def traced(batch, reconstruction):
        traces.append(1)
        return loss(batch, reconstruction)

    def watched(*arguments):
        program = build(*arguments)

        def step(*inputs):
            reads.append("step ")
            return program.streamed_step(*inputs)

        return program._replace(streamed_step=step)

    monkeypatch.setattr(training, "build_program", watched)
    monkeypatch.setattr(jax, "device_get", lambda tree: (reads.append("read "), original(tree))[1])
    config = replace(kept(config, "stream"), checkpoint=Checkpoint(every=20))
    run(config, tmp_path / "run", loss_fn=traced)
    loop = "".join(reads[reads.index("step ") : len(reads) - reads[::-1].index("step ") + 1])
    assert loop == ("step " * 5 + "read ") * 4 and len(traces) == 1


def test_batches_are_made_ready_ahead_and_no_further():
    taken = []
    given = streaming._ahead((taken.append(i) or i for i in range(6)), 2)
    assert next(given) == 0 and taken == [0, 1, 2]
    assert next(given) == 1 and taken == [0, 1, 2, 3]
    assert list(given) == [2, 3, 4, 5]


def test_rows_of_all_stores_agree_with_noise_and_without(config, tmp_path):
    """Rows out of order, one twice; those of a store on disk that finds everything there, too."""
    records, banks = normal_records(config), []
    on_disk = functools.partial(OnDisk, folder=tmp_path)
    for store in (Resident, on_disk, on_disk, Streamed):
        bank = bank_of(config, store)
        rows = bank.rows(records, what="features", dropped={})
        noisy, masks = bank.confetti_rows(records, seed=2**32 - 1, copies=2, reduce=lambda mask: mask)
        banks.append((np.concatenate(list(bank.read(np.concatenate([noisy, rows, rows[:1]])))), masks))
    for features, masks in banks[1:]:
        np.testing.assert_array_equal(masks, banks[0][1])
        np.testing.assert_allclose(features, banks[0][0], rtol=1e-5, atol=1e-5)
    assert banks[0][1].shape == (22, SIZE, SIZE) and banks[0][1].any((1, 2)).all()


@pytest.mark.parametrize("store", ["memory", "disk", "stream"])
def test_an_image_that_cannot_be_read_is_left_out_or_stops_the_run(store, config, root, tmp_path):
    shutil.copytree(root / "flange", tmp_path / "data" / "flange")
    config = replace(config, data=replace(config.data, root=str(tmp_path / "data"), on_unreadable="skip"))
    records = normal_records(config)
    Path(records[3].image).write_bytes(b"no image")
    make = {"memory": Resident, "disk": functools.partial(OnDisk, folder=tmp_path / "cache"), "stream": Streamed}[store]
    rows = bank_of(config, make).rows(records, what="features", dropped=(dropped := {}))
    assert list(dropped) == [records[3].key] and len(rows) == len(records) - 1
    stopping = replace(config, data=replace(config.data, on_unreadable="stop"))
    with pytest.raises(InputError, match=Path(records[3].image).name):
        bank_of(stopping, make).rows(records, what="features", dropped={})


def test_an_image_that_vanishes_while_it_streams_is_named(config, root, tmp_path):
    shutil.copytree(root / "flange", tmp_path / "data" / "flange")
    config = replace(config, data=replace(config.data, root=str(tmp_path / "data")))
    records = normal_records(config)
    bank = bank_of(config, Streamed)
    rows = bank.rows(records, what="features", dropped={})
    Path(records[3].image).unlink()
    with pytest.raises(InputError, match=Path(records[3].image).name):
        list(bank.read(rows))


# The files.


def test_only_what_changed_is_extracted_again(config, root, tmp_path, decoded):
    shutil.copytree(root / "flange", tmp_path / "data" / "flange")
    config = replace(config, data=replace(config.data, root=str(tmp_path / "data")))
    records, store = normal_records(config), functools.partial(OnDisk, folder=tmp_path / "cache")

    def features() -> np.ndarray:
        bank = bank_of(config, store)
        return np.concatenate(list(bank.read(bank.rows(records, what="features", dropped={}))))

    before = features()
    assert len(decoded) == 11
    np.testing.assert_array_equal(features(), before)
    assert len(decoded) == 11
    with Image.open(records[4].image) as image:
        pixels = np.array(image)
    pixels[10, 10] += 1  # one pixel, by one level
    Image.fromarray(pixels).save(records[4].image)
    changed = np.flatnonzero((features() != before).any((1, 2, 3)))
    assert decoded[11:] == [Path(records[4].image).name] and changed.tolist() == [4]
    (tmp_path / "data/flange/train/good/copy.png").write_bytes(Path(records[2].image).read_bytes())
    records = normal_records(config)
    assert len(features()) == 12 and len(decoded) == 12  # a copy is the same image


@pytest.mark.parametrize(
    "change",
    [
        {"data.resize": "letterbox"}, {"data.image_size": 96}, {"features.stages": (3,)}, {"features.grid": 4},
        {"features.resample": "area"}, {"compute.matmul_precision": "highest"},
    ],
)  # fmt: skip
def test_another_preprocessing_misses_the_cache(change, config):
    other = functools.reduce(lambda config, item: with_field(config, *item), change.items(), config)
    assert extraction_digest(bank_of(other).extractor) != extraction_digest(bank_of(config).extractor)
    same = with_field(config, "features.keep", "disk")
    assert extraction_digest(bank_of(same).extractor) == extraction_digest(bank_of(config).extractor)


def test_another_weight_code_or_backbone_convention_misses_the_cache(config, monkeypatch, tmp_path):
    extractor = bank_of(with_field(config, "features.backbone", "efficientnet_lite0")).extractor
    digests = [extraction_digest(extractor)]
    leaves, tree = jax.tree.flatten(extractor.parameters)
    leaf = leaves[5].copy()
    leaf.flat[0] = np.nextafter(leaf.flat[0], np.float32(9))  # the least that a weight can change
    parameters = jax.tree.unflatten(tree, [*leaves[:5], leaf, *leaves[6:]])
    digests.append(extraction_digest(replace(extractor, parameters=parameters)))
    backbone = replace(extractor.spec.backbone, mean=(127.0, 127.0, 126.0))
    digests.append(extraction_digest(replace(extractor, spec=extractor.spec._replace(backbone=backbone))))
    backbone = extractor.spec.backbone.computing_in("bfloat16", matmul_precision="default", depthwise="auto")
    digests.append(extraction_digest(replace(extractor, spec=extractor.spec._replace(backbone=backbone))))
    monkeypatch.setattr(feature_cache, "_CODE", feature_cache._CODE[1:])
    digests.append(extraction_digest(extractor))
    assert len(set(digests)) == 5


def test_a_killed_extraction_goes_on(config, tmp_path, decoded, monkeypatch):
    """The process dies while it writes the seventh file."""
    records, store = normal_records(config), functools.partial(OnDisk, folder=tmp_path)
    write, written = feature_cache.write_bytes, []

    def dies(path, content):
        if len(written) == 6:
            path.with_name(".half.part").write_bytes(content[:100])
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_cache, "write_bytes", dies)
        bank_of(config, store).rows(records, what="features", dropped={})
    decoded.clear()
    bank, whole = bank_of(config, store), bank_of(config)
    features, expected = (
        np.concatenate(list(some.read(some.rows(records, what="features", dropped={})))) for some in (bank, whole)
    )
    assert sorted(decoded[:5]) == sorted(Path(record.image).name for record in records[6:])
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize("fault", ["flipped", "cut", "empty"])
def test_a_damaged_file_is_extracted_again(fault, config, tmp_path, decoded):
    records, store = normal_records(config), functools.partial(OnDisk, folder=tmp_path)
    rows = bank_of(config, store).rows(records, what="features", dropped={})
    path = sorted(tmp_path.rglob("*.npz"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[fault])
    decoded.clear()
    bank = bank_of(config, store)
    rows = bank.rows(records, what="features", dropped={})
    assert len(decoded) == 1 and np.isfinite(np.concatenate(list(bank.read(rows)))).all()


def test_files_that_do_not_fit_the_disk_are_said_before_they_are_written(config, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_stores.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    bank = bank_of(config, functools.partial(OnDisk, folder=tmp_path))
    with pytest.raises(InputError, match=r"features.cache .*: features of 11 images need .* are free there"):
        bank.rows(normal_records(config), what="features", dropped={})


# The choice.


def test_features_are_streamed_where_they_do_not_fit_the_budget(config, monkeypatch):
    extractor = bank_of(config).extractor  # 8 x 8 x 240 x 4 bytes an image
    budget = 100 * 61440 / 2**30
    fits, why = choose_store(with_field(config, "features.memory_gb", budget), 100, extractor)
    assert isinstance(fits, Resident) and "100 images, 0.0586 MB each, need 0.00572 GB of 0.00572 GB" in why
    too_many, why = choose_store(with_field(config, "features.memory_gb", budget), 101, extractor)
    assert isinstance(too_many, Streamed) and "(features.memory_gb), features.keep is auto: they are extracted" in why
    monkeypatch.setattr(feature_stores, "free_host_memory", lambda: 4 * 100 * 61440)
    chosen = [choose_store(config, count, extractor) for count in (100, 101)]
    assert [type(store) for store, _ in chosen] == [Resident, Streamed] and "25% of the free memory" in chosen[0][1]


def test_an_ablation_keeps_features_in_memory(config, tmp_path):
    with pytest.raises(InputError, match="features.keep: an ablation keeps features in memory, not stream"):
        ablate(Ablation(config, {"seed": (0, 1), "features.keep": ("memory", "stream")}), tmp_path / "grid")
    assert not (tmp_path / "grid").exists()
