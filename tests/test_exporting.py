"""The export program on a tiny run: one folder, whole or not at all, that runs without this package."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import pushpull_jax
from pushpull_jax import cli, exporting
from pushpull_jax.artefact import export_detector, read_artefact
from pushpull_jax.config import Config, Data, Features, Reconstructor, Scoring, Training, load_config
from pushpull_jax.data.demo import write_demo
from pushpull_jax.data.images import decode_image, resize_image
from pushpull_jax.errors import InputError
from pushpull_jax.export_verification import Agreement, compare, find_samples
from pushpull_jax.exporting import export
from pushpull_jax.training import train
from pushpull_jax.weights import load_parameters, save_parameters

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64
# Run by the Python of the ONNX environment, which has none of this package's data.
RUN_ONNX = """
import numpy, onnxruntime, sys
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
batches = numpy.load(sys.argv[2])
for name, images in batches.items():
    scores, maps = session.run(["scores", "maps"], {"images": images})
    numpy.savez(f"{name}.npz", scores=scores, maps=maps)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=6, good=1, per_defect=1, size=SIZE)
    (folder / "flange/train/good/broken.png").write_bytes(b"left out, for a reason that names it by its whole path")
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> Path:
    """The network that is traced and compiled fastest, with all that a score can have, on letterboxes."""
    config = Config(
        data=Data(root=str(root), category="flange", image_size=SIZE, resize="letterbox", on_unreadable="skip"),
        features=Features(backbone="pixels", stages=(3,), grid=8, standardise=True),
        reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=1, decoder_layers=0, fold=2),
        training=Training(steps=1, batch_size=2),
        scoring=Scoring(held_out=0.4, smoothing=2.0, map="whitened", blocks=(1,)),
    )
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def images(tmp_path_factory, root) -> Path:
    """Real files, wide and square: three of one size are a batch, the fourth is one."""
    folder = tmp_path_factory.mktemp("images")
    paths = sorted((root / "flange/test").rglob("*.png"))[:4]
    for i, (path, size) in enumerate(zip(paths, [(90, 50)] * 3 + [(SIZE, SIZE)], strict=True)):
        with Image.open(path) as image:
            image.resize(size).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def exported(run, images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "new" / "flange"
    agreements = export(run, folder, verify=images)
    # An artefact computes what the detector does, so that nothing but rounding is left of the tolerance of 1e-4.
    assert [agreement.name for agreement in agreements] == ["detector.jaxexport", "weights.safetensors"]
    assert all(agreement.images == 4 and agreement.within(1e-5) for agreement in agreements)
    return folder


def command(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `pushpull export ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["pushpull", "export", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_folder_is_whole_and_names_no_folder_of_this_machine(exported, run, root):
    assert {path.name for path in exported.iterdir()} == {
        "detector.jaxexport", "weights.safetensors", "config.json", "metrics.json", "README.md", "example.py",
    }  # fmt: skip
    assert [path.name for path in exported.parent.iterdir()] == ["flange"]
    places = root, run, Path(__file__).parents[1], Path(jax.__file__).parents[1]
    for path in exported.iterdir():
        assert not any(str(place).encode() in path.read_bytes() for place in places), path.name


def test_artefact_is_for_three_platforms_and_any_size(exported):
    artefact = jax.export.deserialize(bytearray((exported / "detector.jaxexport").read_bytes()))
    assert artefact.platforms == ("cpu", "cuda", "tpu")
    assert str(artefact.in_avals[0]) == "uint8[b,h,w,3]"
    assert [str(aval) for aval in artefact.out_avals] == ["float32[b]", "float32[b,h,w]"]


def test_example_runs_where_the_package_is_not(exported, run, images):
    # A name whose module is None cannot be imported.
    absent = "pushpull_jax", "flax", "optax", "orbax", "tensorflow", "safetensors"
    hide = f"sys.modules.update(dict.fromkeys({absent}))"
    code = f"import runpy, sys; {hide}; runpy.run_path('example.py', None, '__main__')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, images / "0.png"], cwd=exported, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    detector = pushpull_jax.load(run)
    scores, _ = detector(decode_image(images / "0.png")[None])
    verdict = "anomalous" if scores[0] > detector.threshold else "normal"
    name, told = done.stdout.strip().split(": ")
    assert name == str(images / "0.png") and told.startswith(f"{verdict}, score ")
    assert float(told.split("score ")[1].split(",")[0]) == pytest.approx(scores[0], rel=1e-4)


def test_weights_are_those_of_the_detector(exported, run):
    parameters = pushpull_jax.load(run).parameters
    jax.tree.map(
        np.testing.assert_array_equal, load_parameters(exported / "weights.safetensors", like=parameters), parameters
    )


def test_card_tells_what_the_run_tells(exported, run):
    card = (exported / "README.md").read_text()
    metrics, threshold = (json.loads((run / name).read_text()) for name in ("metrics.json", "threshold.json"))
    assert f"| image AUROC | {100 * metrics['image_auroc']:.2f} |" in card
    assert f"**{threshold['threshold']:.6g}**" in card and threshold["note"] in card
    versions = json.loads((exported / "config.json").read_text())["exported"]["versions"]
    for told in (
        "CC BY-NC-SA 4.0",
        "compute in float32",
        "6 months newer",
        "3 weeks older",
        f"jax\n  {versions['jax']}",
    ):
        assert told in card
    assert "4 images, scores differ by" in card


def test_existing_output_is_refused(exported, run, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in exported.iterdir()}
    code, _, error = command(monkeypatch, capsys, run, "--output", exported)
    assert code == 1 and "exists" in error
    (tmp_path / "other").mkdir()
    code, _, error = command(monkeypatch, capsys, run, "--output", tmp_path / "other", "--verify", tmp_path)
    assert code == 1 and "exists" in error
    assert {path: path.read_bytes() for path in exported.iterdir()} == before


def test_verification_of_an_export_finds_other_weights(exported, run, images, tmp_path, monkeypatch, capsys):
    shutil.copytree(exported, tmp_path / "copy")
    parameters = pushpull_jax.load(run).parameters
    parameters["standardisation"]["scale"] = parameters["standardisation"]["scale"] * 1.01
    save_parameters(tmp_path / "copy/weights.safetensors", parameters, metadata={})
    arguments = run, "--output", tmp_path / "copy", "--verify", images
    code, out, error = command(monkeypatch, capsys, *arguments)
    assert code == 1 and "weights.safetensors: more than the tolerance of 1.0e-04" in error
    assert "detector.jaxexport: 4 images, scores differ by" in out
    assert command(monkeypatch, capsys, *arguments, "--tolerance", "1")[0] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_what_fails_on_the_way_leaves_nothing(error, run, tmp_path, monkeypatch):
    def fail(detector):
        raise error

    monkeypatch.setattr(exporting, "export_detector", fail)
    with pytest.raises(error):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_verification_needs_images(run, tmp_path):
    with pytest.raises(InputError, match="there are no images"):
        export(run, tmp_path / "out", verify=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        export(run, tmp_path / "out", verify=tmp_path / "none")


def test_a_reconstructor_that_asks_for_the_batch_size_is_refused(run):
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, features, *, train=False):
            return features if features.shape[0] > 4 else 0 * features

    detector = pushpull_jax.load(run)
    odd = dataclasses.replace(detector, network=dataclasses.replace(detector.network, reconstructor=Odd()))
    with pytest.raises(InputError, match="cannot be exported for any number of images"):
        export_detector(odd)


class Reference:
    """Scores 2 and 4, and maps of the same value; differs by what it is told."""

    def __init__(self, score=0.0, map=0.0):
        self.score, self.map = score, map

    def __call__(self, images):
        scores = np.array([2.0, 4.0, 4.0], np.float32)[: len(images)]
        maps = np.broadcast_to(scores[:, None, None], (len(images), 2, 2)).copy()
        maps[0, 0, 0] += self.map
        scores[0] += self.score
        return scores, maps


@pytest.mark.parametrize(
    ("score", "map", "expected"), [(0.5, -1.0, (0.25, 0.5)), (0.0, 0.0, (0.0, 0.0)), (np.nan, 0.0, (np.nan, 0.0))]
)
def test_differences_are_relative(score, map, expected, images):
    (agreement,) = compare(Reference(), {"it": Reference(score, map)}, find_samples(images))
    np.testing.assert_allclose(agreement[2:], expected)


@pytest.mark.parametrize(("score", "map"), [(2e-4, 0.0), (0.0, 2e-4), (float("nan"), 0.0)])
def test_a_difference_above_the_tolerance_fails(score, map):
    assert not Agreement("it", 1, score, map).within(1e-4)
    assert Agreement("it", 1, 1e-4, 0.0).within(1e-4)


@pytest.mark.slow
def test_saved_model_agrees(run, images, tmp_path):
    agreements = export(run, tmp_path / "out", verify=images, saved_model=True)
    assert agreements[-1].name == "saved_model" and agreements[-1].within(1e-5)
    assert "saved_model" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
def test_onnx_agrees(run, images, tmp_path, monkeypatch):
    """By the commands of the guide, in the environment that they make; depthwise convolutions are in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    probe = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "probe", "tqdm"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no package index can be reached, and the environment of ONNX is made from one")
    config = pushpull_jax.workdir.read_config(run)[0]
    features = dataclasses.replace(config.features, backbone="efficientnet_lite0", stages=(2, 3))
    train(dataclasses.replace(config, features=features), tmp_path / "lite0")
    export(tmp_path / "lite0", tmp_path / "bottle_detector")
    for source, name in [(images, "photographs"), *((path, path.name) for path in ROOT.iterdir())]:
        (tmp_path / name).symlink_to(source)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), re.DOTALL)
    (commands,) = [block for block in blocks if "export_onnx.py" in block]
    done = subprocess.run(["bash", "-euxc", commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "detector.onnx: 4 images, scores differ by" in done.stdout and "(tolerance 1.0e-04)" in done.stdout

    # What onnxruntime gives, beside the training code here.
    detector = pushpull_jax.load(tmp_path / "lite0")
    paths = find_samples(images)
    batches = {
        "wide": np.stack([decode_image(path) for path in paths[:3]]),
        "square": decode_image(paths[3])[None],
    }
    np.savez("batches.npz", **batches)
    subprocess.run(
        [".venv-onnx/bin/python", "-c", RUN_ONNX, "bottle_detector/detector.onnx", "batches.npz"], check=True
    )
    for name, batch in batches.items():
        scores, maps = detector(batch)
        found = np.load(f"{name}.npz")
        np.testing.assert_allclose(found["scores"], scores, rtol=1e-4)
        np.testing.assert_allclose(found["maps"], maps, atol=1e-4 * maps.max())


@pytest.mark.slow
def test_lite0_agrees_on_all_of_bottle(shared_data, tmp_path):
    config = load_config("quick")
    config = dataclasses.replace(
        config,
        data=Data(root=str(shared_data / "mvtec_ad_256"), category="bottle"),
        training=dataclasses.replace(config.training, steps=20),
    )
    train(config, tmp_path / "run")
    detector = pushpull_jax.load(tmp_path / "run")
    artefact = read_artefact(export_detector(detector))
    paths = find_samples(shared_data / "mvtec_ad_256/bottle/test")
    assert len(paths) == 83
    large = [decode_image(path) for path in find_samples(shared_data / "mvtec_ad_native/bottle")]
    native = np.stack((large * 2)[:16])
    resized = np.rint([resize_image(image, size=256) for image in native]).astype(np.uint8)
    for images in (np.stack([decode_image(path) for path in paths]), native, resized):
        scores, maps = detector(images)
        for size in (1, 3, 16):
            for start in range(0, len(images), size):
                first = min(start, len(images) - size)  # the last batch is as large as the others
                part = slice(first, first + size)
                found, found_maps = artefact(images[part])
                np.testing.assert_allclose(found, scores[part], rtol=1e-4)
                np.testing.assert_allclose(found_maps, maps[part], atol=1e-4 * maps[part].max())
