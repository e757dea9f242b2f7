"""Training on whatever labels exist, end to end on a small drawn data set: who is where, and what is written down."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import pushpull_jax
from pushpull_jax import examples as examples_module
from pushpull_jax import extraction, losses
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Checkpoint, Config, Data, Features, Log, Reconstructor, Scoring, Supervision, Training
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import build_network, initial_state
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import evaluate
from pushpull_jax.examples import prepare, read_run
from pushpull_jax.feature_bank import FeatureBank
from pushpull_jax.features import extract
from pushpull_jax.losses import IMAGE_LABEL, MASK, UNLABELLED
from pushpull_jax.models.convolutional import ConvolutionalReconstructor
from pushpull_jax.models.nearest import NearestNeighbour
from pushpull_jax.objectives import push_pull
from pushpull_jax.steps import init_state, make_step, training_apply
from pushpull_jax.training import train
from pushpull_jax.weights import load_backbone

SIZE, GRID = 64, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=10, good=2, per_defect=2, size=SIZE)  # five types of defects
    return folder


@pytest.fixture(scope="module")
def irrelevant(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("irrelevant")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def normal_only(root) -> Config:
    return Config(
        data=Data(root=str(root), category="flange", image_size=SIZE),
        features=Features(stages=(2, 3), grid=GRID, standardise=True),
        reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=1, decoder_layers=1, fold=2),
        training=Training(steps=4, batch_size=6, learning_rate=1e-3),
        supervision=Supervision(shots=4, labels=("unused",)),
        scoring=Scoring(held_out=0.2, map="whitened", blocks=(1, 4)),
        log=Log(every=2),
        checkpoint=Checkpoint(every=2),
    )


@pytest.fixture(scope="module")
def everything(normal_only, irrelevant) -> Config:
    """Every kind of label at once."""
    return replace(
        normal_only,
        training=replace(normal_only.training, loss="push_pull"),
        supervision=Supervision(
            shots=4, labels=("mask", "image", "unlabelled"), confetti_copies=2, irrelevant=str(irrelevant),
            irrelevant_count=3, share=0.5, k=5, alpha=0.1,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def prepared(everything):
    backbone, parameters = load_backbone("efficientnet_lite0")
    network = build_network(everything, backbone=backbone)
    bank = FeatureBank(network.features, parameters, everything.data)
    return bank, prepare(everything, bank, read_run(everything))


@pytest.fixture(scope="module")
def normal_run(normal_only, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "normal"
    train(normal_only, workdir)
    return workdir


@pytest.fixture(scope="module")
def started(everything, normal_run) -> Config:
    """Every kind of label, from the normal-only run on."""
    return replace(everything, training=replace(everything.training, start=str(normal_run)))


@pytest.fixture(scope="module")
def labelled_run(started, tmp_path_factory) -> Path:
    workdir, traced = tmp_path_factory.mktemp("runs") / "labelled", []
    original = losses.push_pull_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "push_pull_loss", lambda *a, **b: traced.append(1) or original(*a, **b))
        train(started, workdir)
    assert len(traced) == 1  # one program for every mix
    return workdir


def parameters_of(workdir: Path, config: Config) -> dict:
    with Checkpoints(workdir / "checkpoints", create=False) as checkpoints:
        return checkpoints.restore(initial_state(config, build_network(config))).parameters


def written(workdir: Path) -> dict:
    return json.loads((workdir / "config.json").read_text())["data"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def shots_with(label: str, config: Config) -> list[int]:
    """Positions among all examples of the shots that were dealt a kind of label."""
    return [8 + i for i, (_, dealt) in enumerate(read_run(config).labelled) if dealt == label]


def test_examples_come_source_by_source_with_their_kinds(prepared, everything):
    bank, data = prepared
    dealt = [
        {"mask": MASK, "image": IMAGE_LABEL, "unlabelled": UNLABELLED}[k] for _, k in read_run(everything).labelled
    ]
    assert sorted(dealt) == [UNLABELLED, IMAGE_LABEL, MASK, MASK]
    # 8 of 10 normal images (2 held out), 4 shots of which one in three is unlabelled, 2 x 8 noisy copies, 3 irrelevant.
    kinds = [MASK] * 8 + dealt + [MASK] * 16 + [IMAGE_LABEL] * 3
    assert data.examples["kind"].tolist() == kinds
    assert data.examples["label"].tolist() == [0] * 8 + [1] * 23
    assert data.batch(bank)["features"].shape == (31, GRID, GRID, 64) and data.normal.shape[0] == 8
    has_mask = data.examples["mask"].any((1, 2))
    assert has_mask.tolist() == [False] * 8 + [kind == MASK for kind in dealt] + [True] * 16 + [False] * 3
    # Three of six places, one for each source of anomalies.
    assert [pool.places for pool in data.pools] == [3, 1, 1, 1]
    assert np.concatenate([pool.examples for pool in data.pools]).tolist() == list(range(31))


def test_a_shot_has_its_own_features_and_its_mask_by_the_any_rule(prepared, everything, root):
    bank, data = prepared
    shot = shots_with("mask", everything)[0]
    record, _ = read_run(everything).labelled[shot - 8]
    image = pixels(root / record.key).astype(np.float32)[None]
    features = data.standardisation(extract(bank.spec, bank.parameters, image))
    np.testing.assert_allclose(data.batch(bank)["features"][shot], features[0], atol=1e-4)
    mask = pixels(Path(record.mask)) > 0
    cells = mask.reshape(GRID, SIZE // GRID, GRID, SIZE // GRID).any((1, 3))
    np.testing.assert_array_equal(data.examples["mask"][shot], cells)


def test_confetti_copies_are_of_their_images_and_differ(prepared):
    bank, data = prepared
    features = data.batch(bank)["features"]
    normal, copies = features[:8], features[12:28].reshape(2, 8, GRID, GRID, -1)
    masks = data.examples["mask"][12:28].reshape(2, 8, GRID, GRID)
    assert not np.array_equal(masks[0], masks[1])
    for copy, mask in zip(copies, masks, strict=True):
        distance = np.linalg.norm(copy[:, None] - normal[None], axis=-1)  # [copy, image, h, w]
        nearest = distance.mean((2, 3)).argmin(1)
        assert (nearest == np.arange(8)).mean() >= 0.75
        own = np.linalg.norm(copy - normal, axis=-1)
        assert own[mask > 0].mean() > 2 * own[mask == 0].mean()


def test_the_test_set_is_the_same_whatever_is_known_of_the_shots(normal_only, everything):
    unused, used = read_run(normal_only), read_run(everything)
    assert unused.test == used.test and unused.out_of_test == used.out_of_test
    assert len(used.test) == 2 + 10 - 4 and len(used.out_of_test) == 4
    assert unused.labelled == ()
    assert not {record.key for record in used.test} & set(used.out_of_test)


def test_a_run_on_every_kind_of_label(labelled_run, root):
    data, metrics = written(labelled_run), json.loads((labelled_run / "metrics.json").read_text())
    assert sorted(data["labelled"].values()) == ["image", "mask", "mask", "unlabelled"]
    assert sorted(data["labelled"]) == data["out_of_test"]
    assert (data["train"], data["confetti"], data["irrelevant"], data["test"]) == (8, 16, 3, 8)
    predicted = (labelled_run / "predictions.csv").read_text()
    assert not any(key in predicted for key in data["out_of_test"])
    assert (metrics["images"], metrics["anomalous"]) == (8, 6)
    again = evaluate(labelled_run, root=root)
    assert again["image_auroc"] == metrics["image_auroc"] and again["images"] == 8


def test_a_run_that_starts_from_another(labelled_run, normal_run, started, normal_only):
    assert len(written(labelled_run)["start"]["sha256"]) == 64
    before, after = parameters_of(normal_run, normal_only), parameters_of(labelled_run, started)
    fresh = initial_state(started, build_network(started)).parameters
    distance = [
        sum(float(np.sum((a - b) ** 2)) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(of), strict=True))
        for of in (before, fresh)
    ]
    assert 0 < distance[0] < distance[1]
    ours, theirs = (pushpull_jax.load(folder).parameters["standardisation"] for folder in (labelled_run, normal_run))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_with_labels_resumes_to_the_same_numbers(labelled_run, started, tmp_path, stopped_at):
    with stopped_at(2):
        train(started, tmp_path / "stopped")
    train(started, tmp_path / "stopped")
    both = [parameters_of(folder, started) for folder in (labelled_run, tmp_path / "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_a_start_that_is_not_finished_is_refused(normal_run, everything, tmp_path):
    shutil.copytree(normal_run, tmp_path / "half")
    (tmp_path / "half/threshold.json").unlink()
    config = replace(everything, training=replace(everything.training, start=str(tmp_path / "half")))
    with pytest.raises(InputError, match="not finished"):
        train(config, tmp_path / "run")


def test_a_start_that_learned_from_the_test_images_is_refused(labelled_run, everything, tmp_path):
    without = replace(everything.supervision, shots=0)
    training = replace(everything.training, start=str(labelled_run))
    with pytest.raises(InputError, match="test images here"):
        train(replace(everything, supervision=without, training=training), tmp_path / "run")


def test_the_push_moves_anomalous_cells_away(prepared, everything):
    bank, data = prepared
    network = build_network(everything)
    shots = {name: leaf[shots_with("mask", everything)] for name, leaf in data.batch(bank).items()}
    optimizer = optax.adam(3e-3)
    apart = []
    for alpha in (0.0, 1.0):
        state = init_state(jax.random.key(0), network.reconstructor, optimizer, shots["features"].shape[1:])
        loss = functools.partial(push_pull, k=5, alpha=alpha)
        step = jax.jit(make_step(loss, training_apply(network.reconstructor), optimizer))
        for _ in range(30):
            state, _ = step(state, shots, jax.random.key(0))
        reconstruction = network.reconstructor.apply({"params": state.parameters}, shots["features"])
        phi = losses.pseudo_huber_map(shots["features"], reconstruction)
        apart.append(float(phi[shots["mask"] > 0].mean() / phi[shots["mask"] == 0].mean()))
    assert apart[1] > 1.1 * apart[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "convolutional"}, ConvolutionalReconstructor(width=16)),
        ({"kind": "nearest", "cells": 50}, NearestNeighbour(size=50)),
        ({"attention": False}, {"attention": False, "query": True}),
        ({"query": False}, {"attention": True, "query": False}),
    ],
)
def test_other_reconstructors_are_one_field_away(normal_only, changes, expected):
    built = build_network(
        replace(normal_only, reconstructor=replace(normal_only.reconstructor, **changes))
    ).reconstructor
    if isinstance(expected, dict):
        assert {name: getattr(built, name) for name in expected} == expected and built.width == 16
    else:
        assert built == expected


def test_a_start_on_other_held_out_images_is_refused(normal_run, everything, tmp_path):
    config = replace(everything, training=replace(everything.training, start=str(normal_run)), seed=1)
    with pytest.raises(InputError, match="held out other normal images"):
        train(config, tmp_path / "run")
    other = replace(config, seed=0, features=replace(config.features, stages=(3, 4)))
    with pytest.raises(InputError, match="features.stages = .2, 3. there, .3, 4. here"):
        train(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_hard_setting_tests_on_what_was_not_seen(everything, tmp_path):
    supervision = replace(everything.supervision, shots=1, labels=("mask",), setting="hard", seen="dent")
    records = read_run(replace(everything, supervision=supervision))
    assert [record.defect_type for record, _ in records.labelled] == ["dent"]
    assert len(records.out_of_test) == 2 and "dent" not in {record.defect_type for record in records.test}


def test_an_empty_mask_of_an_anomalous_image_is_named(everything, root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    record = next(record for record, label in read_run(everything).labelled if label == "mask")
    mask = tmp_path / "data" / Path(record.mask).relative_to(root)
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(mask)
    config = replace(everything, data=replace(everything.data, root=str(tmp_path / "data")))
    with pytest.raises(InputError, match=rf"{mask.name} marks no pixel"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_many_shots_say_how_many_there_are(everything, tmp_path):
    config = replace(everything, supervision=replace(everything.supervision, shots=11))
    with pytest.raises(InputError, match="category flange has 10 anomalous test images"):
        train(config, tmp_path / "run")


def test_images_of_the_data_are_not_irrelevant(everything, root, tmp_path):
    config = replace(everything, supervision=replace(everything.supervision, irrelevant=str(root), irrelevant_count=30))
    with pytest.raises(InputError, match="images of the data themselves"):
        train(config, tmp_path / "run")


def test_a_start_of_a_start_is_remembered(labelled_run, started, everything, tmp_path):
    """What the first run learned from is not a test image of the third, though the second was shown nothing of it."""
    from pushpull_jax import training as training_module

    between = replace(everything, supervision=replace(everything.supervision, labels=("unused",)))
    between = replace(between, training=replace(between.training, start=str(labelled_run), steps=2))
    train(between, tmp_path / "between")
    assert written(tmp_path / "between")["labelled"] == {}
    third = replace(between, supervision=replace(between.supervision, shots=0))
    third = replace(third, training=replace(third.training, start=str(tmp_path / "between")))
    with pytest.raises(InputError, match="test images here"):
        training_module.train(third, tmp_path / "third")


def test_too_many_stored_cells_are_said_before_anything_is_written(normal_only, tmp_path):
    config = replace(
        normal_only,
        reconstructor=Reconstructor(kind="nearest", cells=8 * GRID**2 + 1),
        training=replace(normal_only.training, steps=0),
    )
    with pytest.raises(InputError, match="8 training images have 512 cells"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_sources_than_places_in_a_batch(everything, tmp_path):
    config = replace(everything, supervision=replace(everything.supervision, share=0.3))  # 2 places, 3 sources
    with pytest.raises(InputError, match=r"supervision\.share: 2 of 6 places"):
        train(config, tmp_path / "run")


def test_the_nearest_neighbour_is_a_run_like_any_other(normal_only, tmp_path):
    reconstructor = Reconstructor(kind="nearest", cells=200)
    config = replace(normal_only, reconstructor=reconstructor, training=replace(normal_only.training, steps=0))
    metrics = train(config, tmp_path / "run")
    assert metrics["images"] == 8 and (tmp_path / "run/report.html").is_file()
    detector = pushpull_jax.load(tmp_path / "run")
    # Its memory is of training cells: the image that gave some of them has cells at distance 0.
    assert np.isfinite(detector.parameters["reconstructor"]["cells"]).all()
    assert train(config, tmp_path / "run") == metrics  # finished


def test_one_model_for_all_categories(normal_only, root, tmp_path):
    shutil.copytree(root / "flange", tmp_path / "data/one")
    shutil.copytree(root / "flange", tmp_path / "data/two")
    data = replace(normal_only.data, root=str(tmp_path / "data"), category="all")
    metrics = train(replace(normal_only, data=data), tmp_path / "run")
    assert sorted(metrics["categories"]) == ["one", "two"]
    assert metrics["images"] == 16 == sum(part["images"] for part in metrics["categories"].values())
    for name in ("image_auroc", "aupro"):
        parts = [part[name] for part in metrics["categories"].values()]
        assert metrics[name] == pytest.approx(np.mean(parts))
    assert written(tmp_path / "run")["train"] == 16


def test_one_class_of_a_folder_of_classes(tmp_path, normal_only):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name, level in (("cat", 60), ("ship", 190)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                image = np.clip(rng.normal(level, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / "data" / split / name / f"{i}.png")
    config = replace(
        normal_only,
        data=Data(source="classes", root=str(tmp_path / "data"), category="cat", image_size=32),
        supervision=Supervision(),
    )
    metrics = train(config, tmp_path / "run")
    assert (metrics["normal"], metrics["anomalous"], metrics["image_auroc"]) == (3, 3, 1.0)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["aupro"] is None  # there is no mask


def test_a_backbones_preprocessing_is_that_of_its_weights(normal_only, tmp_path, monkeypatch):
    """Weights may come with a normalisation of their own: it is used, written down, and read again."""
    from pushpull_jax import training as training_module

    def with_another_mean(name, *, weights=None):
        backbone, parameters = load_backbone(name, weights=weights)
        return replace(backbone, mean=(90.0, 100.0, 110.0)), parameters

    monkeypatch.setattr(training_module, "load_backbone", with_another_mean)
    train(normal_only, tmp_path / "run")
    assert pushpull_jax.load(tmp_path / "run").network.features.backbone.mean == (90.0, 100.0, 110.0)


def test_confetti_is_a_function_of_seed_copy_and_image(everything, prepared, monkeypatch):
    bank, data = prepared
    monkeypatch.setattr(extraction, "BATCH_SIZE", 3)  # other batches
    records = [r for r in read_run(everything).normal if r.key not in data.summary["held_out"]]
    again = examples_module._confetti_examples(everything, bank, records)
    np.testing.assert_array_equal(again["mask"], data.examples["mask"][12:28])
