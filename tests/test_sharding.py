"""One program on one device and on several: the same losses, gradients and weights, to the rounding of float32."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax import fit as fit_module
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Checkpoint, Config, Data, Features, Log, Mesh, Reconstructor, Scoring, Training
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import build_network, initial_state
from pushpull_jax.errors import InputError
from pushpull_jax.mesh import computed_on, device_mesh, divide_cpu, replicate, replicate_memory
from pushpull_jax.models.reconstructor import Reconstructor as Transformer
from pushpull_jax.objectives import squared
from pushpull_jax.steps import init_state, make_chunk, make_optimizer, make_step, training_apply
from pushpull_jax.training import train

MODEL = Transformer(width=16, encoder_layers=1, decoder_layers=1, heads=2, hidden=32, dropout=0.1)


def optimizer(learning_rate=1e-3):
    return make_optimizer(
        learning_rate=learning_rate, schedule="constant", warmup_steps=0, steps=50, weight_decay=1e-4, clip_norm=1.0
    )[0]


def trained(devices: int, *, batch: int, steps: int = 20):
    """Losses and last state of a training with dropout and jitter, its batches spread over some devices."""
    rng = np.random.default_rng(0)
    examples = {"features": np.float32(rng.standard_normal((30, 4, 4, 12)))}
    indices = np.stack([rng.permutation(30)[:batch] for _ in range(steps)]).astype(np.int32)
    mesh, tx = device_mesh(data=devices), optimizer()
    chunk = make_chunk(make_step(squared, training_apply(MODEL, jitter=0.3), tx), mesh=mesh)
    state = init_state(jax.random.key(1), MODEL, tx, (4, 4, 12), mesh=mesh)
    state, told = chunk(state, replicate(examples, mesh), indices, jax.random.key(2))
    return np.asarray(told["loss"]), state


@pytest.mark.parametrize(
    ("devices", "batch"),
    [(8, 11), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((8, 16), (3, 4), (5, 2)))],
)
def test_losses_do_not_depend_on_the_devices(devices, batch):
    """Batches of 4 on 3 devices, and others, are filled up, and what fills them has no weight."""
    one, several = trained(1, batch=batch), trained(devices, batch=batch)
    np.testing.assert_allclose(several[0], one[0], rtol=1e-5)
    assert len(jax.tree.leaves(several[1])[0].sharding.device_set) == devices


def test_a_batch_is_spread_and_its_gradients_are_summed_over_the_devices():
    tx, mesh = optimizer(), device_mesh(data=8)
    chunk = make_chunk(make_step(squared, training_apply(MODEL), tx), mesh=mesh)
    state = init_state(jax.random.key(1), MODEL, tx, (4, 4, 12), mesh=mesh)
    examples = replicate({"features": np.zeros((30, 4, 4, 12), np.float32)}, mesh)
    compiled = chunk.lower(state, examples, np.zeros((2, 16), np.int32), jax.random.key(0)).compile().as_text()
    assert "all-reduce" in compiled
    assert "f32[2,4,4,12]" in compiled  # two of sixteen examples a device


def test_gradients_of_the_first_step_do_not_depend_on_the_devices():
    """Of plain gradient descent the parameters after one step are those before it less the gradient."""
    import optax

    rng = np.random.default_rng(3)
    examples = {"features": np.float32(rng.standard_normal((16, 4, 4, 12)))}
    gradients = []
    for devices in (1, 8):
        mesh, tx = device_mesh(data=devices), optax.sgd(1.0)
        chunk = make_chunk(make_step(squared, training_apply(MODEL), tx), mesh=mesh)
        state = init_state(jax.random.key(1), MODEL, tx, (4, 4, 12), mesh=mesh)
        before = jax.device_get(state.parameters)
        state, _ = chunk(state, replicate(examples, mesh), np.arange(16, dtype=np.int32)[None], jax.random.key(2))
        gradients.append(jax.tree.map(np.subtract, before, jax.device_get(state.parameters)))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(np.abs(one).max(), 1e-2))


def test_a_step_that_is_not_finite_is_not_applied():
    tx = optimizer()
    step = jax.jit(make_step(squared, training_apply(MODEL), tx))
    state = init_state(jax.random.key(1), MODEL, tx, (4, 4, 12))
    new, told = step(state, {"features": jnp.full((2, 4, 4, 12), jnp.nan)}, jax.random.key(0))
    assert np.isnan(told["loss"])
    jax.tree.map(np.testing.assert_array_equal, new, state)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=10, good=2, per_defect=1, size=64)
    return Config(
        data=Data(root=str(folder), category="flange", image_size=64),
        features=Features(backbone="pixels", stages=(2, 3), grid=8, standardise=True),
        reconstructor=Reconstructor(width=16, encoder_layers=0, decoder_layers=1, heads=2, hidden=16),
        training=Training(steps=6, batch_size=6, learning_rate=3e-3),
        scoring=Scoring(held_out=0.2),
        log=Log(every=2),
        checkpoint=Checkpoint(every=2),
    )


def test_a_fresh_state_is_born_on_all_devices(config, monkeypatch):
    """None of it but its key goes from one device to another, and its bits are those of a state born on one."""
    network, mesh = build_network(config), device_mesh(data=8)

    def replicate_key(key, mesh):
        assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        with jax.transfer_guard_device_to_device("allow"):
            return replicate(key, mesh)

    monkeypatch.setattr("pushpull_jax.steps.replicate", replicate_key)
    one = initial_state(config, network)
    with jax.transfer_guard_device_to_device("disallow_explicit"):
        several = fit_module.first_state(config, network, None, None, mesh)
        with pytest.raises(jax.errors.JaxRuntimeError, match="device-to-device"):
            replicate(one, mesh)
    for born, expected in zip(*map(jax.tree.leaves, (several, one)), strict=True):
        assert born.sharding.is_fully_replicated and len(born.sharding.device_set) == 8
        np.testing.assert_array_equal(born, expected)


def test_a_run_on_all_devices_is_the_run_on_one(config, tmp_path):
    """And a run that began on one goes on on eight: how it runs may differ."""
    train(config, tmp_path / "one")
    several = replace(config, mesh=Mesh(data=-1))
    train(several, tmp_path / "eight")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "eight")]
    assert metrics[0]["image_auroc"] == pytest.approx(metrics[1]["image_auroc"], abs=1 / (5 * 2) + 1e-9)
    assert metrics[0]["pixel_auroc"] == pytest.approx(metrics[1]["pixel_auroc"], abs=1e-3)
    states = [restored(tmp_path / name, config) for name in ("one", "eight")]
    for (path, one), (_, other) in zip(*map(jax.tree.leaves_with_path, states), strict=True):
        name = jax.tree_util.keystr(path)
        # What a key's bias adds is equal for all keys: its gradient is rounding, of which Adam makes whole steps.
        is_rounding = name.endswith("['key']['bias']")
        atol = 2 * config.training.steps * config.training.learning_rate if is_rounding else 1e-4
        np.testing.assert_allclose(other, one, atol=atol, err_msg=name)
    train(several, tmp_path / "one")  # it is finished: nothing is trained again, and the config is accepted


def test_a_run_that_goes_on_elsewhere_says_that_its_bits_differ(config, tmp_path, stopped_at, capsys):
    with stopped_at(4):
        train(config, tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    assert told["computed_on"]["devices"] == 8 and told["computed_on"]["dtype"] == "float32"
    path.write_text(json.dumps(told | {"computed_on": told["computed_on"] | {"device": "TPU v9"}}))
    train(config, tmp_path)
    assert "begun elsewhere, so its bits will differ: device TPU v9 there, cpu here" in capsys.readouterr().err
    train(config, tmp_path)
    assert "bits will differ" not in capsys.readouterr().err  # it is finished


def restored(workdir: Path, config: Config):
    with Checkpoints(workdir / "checkpoints", create=False) as checkpoints:
        return checkpoints.restore(initial_state(config, build_network(config))).parameters


def test_the_loop_reads_the_device_once_a_chunk(config, tmp_path, monkeypatch):
    """Reads are counted at jax.device_get, which nothing else in the loop stands in for."""
    reads, original, build = [], jax.device_get, fit_module.build_program

    def guarded(*arguments):
        program = build(*arguments)

        def chunk(*inputs):
            state, told = program.chunk(*inputs)
            reads.append("chunk")
            return state, told

        return program._replace(chunk=chunk)

    monkeypatch.setattr("pushpull_jax.training.build_program", guarded)
    monkeypatch.setattr(jax, "device_get", lambda tree: (reads.append("read"), original(tree))[1])
    folder = tmp_path / "run"
    train(replace(config, checkpoint=Checkpoint(every=6)), folder)
    loop = reads[: len(reads) - reads[::-1].index("chunk") + 1]
    assert [read for read in loop if read == "chunk"] == ["chunk"] * 3
    assert "".join(loop)[-len("chunkread" * 3) :] == "chunkread" * 3


def test_nothing_is_transferred_unasked_in_the_loop(config, tmp_path, monkeypatch):
    """On eight devices, from the first chunk on; the guard does not see what comes from a CPU's devices."""
    chunks, guard, build, fit = [], contextlib.ExitStack(), fit_module.build_program, fit_module.fit

    def guarded(*arguments):
        program = build(*arguments)

        def chunk(*inputs):
            if not chunks:
                guard.enter_context(jax.transfer_guard("disallow"))
            chunks.append(1)
            return program.chunk(*inputs)

        return program._replace(chunk=chunk)

    def unguarded_after(*arguments, **options):
        with guard:
            return fit(*arguments, **options)

    monkeypatch.setattr("pushpull_jax.training.build_program", guarded)
    monkeypatch.setattr("pushpull_jax.training.fit", unguarded_after)
    train(replace(config, mesh=Mesh(data=-1)), tmp_path / "run")
    assert len(chunks) == 3


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [({"data": 9}, "there are 8 devices"), ({"grid": 3, "data": 3}, "there are 8"), ({"grid": -1, "data": -1}, "-1")],
)
def test_a_mesh_that_cannot_be_is_one_message(wanted, expected):
    with pytest.raises(InputError, match=expected):
        device_mesh(**wanted)


def test_devices_of_a_cpu_read_the_same_memory():
    array = np.arange(2.0**12)
    shared = replicate_memory(array, device_mesh(grid=8))
    assert len({shard.data.unsafe_buffer_pointer() for shard in shared.addressable_shards}) == 1
    np.testing.assert_array_equal(shared, array)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 3), ({"JAX_NUM_CPU_DEVICES": "2"}, 2), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4)],
)
def test_the_cpu_is_divided_where_nobody_has_said_how(environment, expected):
    code = "from pushpull_jax.mesh import divide_cpu; divide_cpu(3); import jax; print(jax.device_count())"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=os.environ | {"XLA_FLAGS": ""} | environment, check=True, stdout=subprocess.PIPE)
    assert int(done.stdout) == expected


def test_a_cpu_that_computes_is_not_divided(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    divide_cpu(3)
    assert jax.device_count() == 8


def test_bits_depend_on_options_of_xla_but_not_on_where_it_writes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/somewhere --xla_cpu_a=1")
    assert computed_on()["xla_flags"] == "--xla_cpu_a=1"


def test_a_mesh_takes_all_devices_that_are_left():
    assert dict(device_mesh(data=-1).shape) == {"grid": 1, "data": 8}
    assert dict(device_mesh(grid=-1, data=4).shape) == {"grid": 2, "data": 4}
