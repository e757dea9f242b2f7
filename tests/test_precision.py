"""The config section `compute`: each value reaches the compiled programs, and bfloat16 stays inside the networks.

Programs are looked at as jaxprs: what a product is of, and in which precision, is what XLA is told.
"""

import dataclasses
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import pushpull_jax
from pushpull_jax import workdir as files
from pushpull_jax.ablation import COMPILED, READ, _check_startable, _grouped, _plain
from pushpull_jax.backbones import BACKBONES, EFFICIENTNET_LITE0
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import (
    Ablation,
    Checkpoint,
    Compute,
    Config,
    Data,
    Features,
    Log,
    Reconstructor,
    Scoring,
    Training,
    check,
    from_dict,
    runs_of,
    to_dict,
)
from pushpull_jax.data.demo import write_demo
from pushpull_jax.detector import build_network, detect, initial_state
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import evaluate
from pushpull_jax.fit import build_program
from pushpull_jax.models.efficientnet import EfficientNet
from pushpull_jax.models.resnet import ResNet
from pushpull_jax.models.vit import VisionTransformer
from pushpull_jax.objectives import squared
from pushpull_jax.start import read_start
from pushpull_jax.steps import init_state, make_step, training_apply
from pushpull_jax.training import train

HIGHEST = jax.lax.Precision.HIGHEST
SIZE = 64
CONFIG = Config(
    data=Data(category="flange", image_size=SIZE),
    features=Features(stages=(1, 2), grid=8, standardise=True),
    reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=1, decoder_layers=0, fold=4, query=False),
    training=Training(steps=4, batch_size=4, learning_rate=1e-3),
    scoring=Scoring(held_out=0.25, smoothing=2.0, map="whitened", blocks=(1,)),
    compute=Compute(depthwise="conv"),  # is traced and compiled more quickly
    log=Log(every=2),
    checkpoint=Checkpoint(every=2),
)


def computing(config=CONFIG, **changes):
    return replace(config, compute=replace(config.compute, **changes))


def abstract_detector(config):
    """Network and shapes of its parameters, nothing computed."""
    network = build_network(config)
    channels = jax.ShapeDtypeStruct((sum(network.features.widths),), jnp.float32)
    usual = {
        name: {
            "mean": jax.ShapeDtypeStruct((part.shape[-1],), jnp.float32),
            "matrix": jax.ShapeDtypeStruct((part.shape[-1],) * 2, jnp.float32),
        }
        for name, part in jax.eval_shape(
            network.measured, jax.ShapeDtypeStruct((1, 8, 8, *channels.shape), jnp.float32)
        ).items()
    }
    return network, {
        "backbone": network.features.backbone.abstract_parameters(),
        "standardisation": {"shift": channels, "scale": channels},
        "reconstructor": jax.eval_shape(lambda: initial_state(config, network)).parameters,
        "residuals": usual,
    }


def detection(config):
    """The jaxpr of `detect`."""
    network, parameters = abstract_detector(config)
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)
    return jax.make_jaxpr(lambda p, x: detect(network, p, x))(parameters, images)


def training_step(config):
    """The jaxpr of a step as the training program has it, gradient and optimiser included."""
    network = build_network(config)
    program = build_program(config, network, squared)
    state = jax.eval_shape(lambda: initial_state(config, network))
    examples = {"features": jax.ShapeDtypeStruct((6, 8, 8, sum(network.features.widths)), jnp.float32)}
    indices = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jax.make_jaxpr(program.chunk)(state, examples, indices, jax.random.key(0))


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(closed):
    """Of every product: the dtypes of its operands, and the precision it asks for (None: none is named)."""
    found = []
    for equation in equations(closed.jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            precision = equation.params["precision"]
            dtypes = tuple(var.aval.dtype.name for var in equation.invars)
            found.append((dtypes, precision[0] if precision else None))
    return found


def convolutions(closed):
    """Whether there are grouped convolutions, and a choice of the platform."""
    names = {e.primitive.name for e in equations(closed.jaxpr)}
    groups = [e.params["feature_group_count"] for e in equations(closed.jaxpr) if "feature_group_count" in e.params]
    return any(count > 1 for count in groups), "platform_index" in names


@pytest.mark.parametrize(
    ("program", "name"),
    [(detection, "default"), (detection, "high"), (detection, "highest"), (training_step, "high")],
)
def test_precision_is_that_of_every_product_of_the_networks(program, name):
    precisions = [of for _, of in products(program(computing(matmul_precision=name)))]
    wanted = jax.lax.Precision(name)
    # Besides the networks there are whitening and resampling, in float32 by name.
    assert set(precisions) <= {wanted, HIGHEST}
    assert precisions.count(wanted) >= 10


def test_a_precision_of_the_caller_holds_where_none_is_set():
    network, parameters = abstract_detector(CONFIG)
    backbone = replace(network.features.backbone, matmul_precision=None)
    network = replace(network, features=network.features._replace(backbone=backbone), matmul_precision=None)
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)
    with jax.default_matmul_precision("high"):
        closed = jax.make_jaxpr(lambda p, x: detect(network, p, x))(parameters, images)
    assert {of for _, of in products(closed)} == {jax.lax.Precision.HIGH, HIGHEST}


@pytest.mark.parametrize("kind", ["transformer", pytest.param("convolutional", marks=pytest.mark.slow)])
def test_bfloat16_is_inside_the_networks_and_nowhere_else(kind):
    config = replace(CONFIG, reconstructor=replace(CONFIG.reconstructor, kind=kind))
    half = computing(config, dtype="bfloat16")
    for program in (detection, training_step):
        inside = [dtypes for dtypes, precision in products(program(half)) if precision != HIGHEST]
        assert len(inside) >= 10
        # The last layer's product is float32, and so is its gradient, one factor of which is the loss's.
        exact = [dtypes for dtypes in inside if dtypes != ("bfloat16", "bfloat16")]
        assert len(exact) <= (2 if program is training_step else 0) * (1 if kind == "transformer" else 12)
        assert {dtypes for dtypes, precision in products(program(half)) if precision == HIGHEST} <= {("float32",) * 2}
        assert {dtypes for dtypes, _ in products(program(config))} == {("float32",) * 2}
        assert {var.aval.dtype.name for var in program(half).jaxpr.outvars} <= {"float32", "int32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_detector(half)[1])} == {"float32"}


def test_each_lowering_is_what_is_compiled():
    found = {name: convolutions(detection(computing(depthwise=name))) for name in ("auto", "conv", "shift")}
    assert found == {"auto": (True, True), "conv": (True, False), "shift": (False, False)}


NETWORKS = {
    "efficientnet": EfficientNet(width=0.05, depth=0.1, lite=False, padding="symmetric", depthwise="conv"),
    "resnet": ResNet(repeats=(1, 1, 1, 1), bottleneck=True),
    "vit": VisionTransformer(width=16, heads=2, depth=2, grid=(2, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_in_bfloat16(name):
    """And an image is normalised before it is rounded: in bfloat16 grey levels above 128 would be whole numbers."""
    backbone = dataclasses.replace(EFFICIENTNET_LITE0, network=NETWORKS[name])
    half = backbone.computing_in("bfloat16", matmul_precision="high", depthwise="conv")
    like = jax.eval_shape(half.network.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    images = jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.float32)
    closed = jax.make_jaxpr(lambda p, x: half.stage_ends(p, x, (1, 2)))(like, images)
    assert {of for of in products(closed)} == {(("bfloat16",) * 2, jax.lax.Precision.HIGH)}
    assert {aval.dtype.name for aval in closed.out_avals} == {"bfloat16"}
    first = next(e for e in equations(closed.jaxpr) if e.primitive.name == "convert_element_type")
    assert "div" in [e.primitive.name for e in equations(closed.jaxpr)][: list(equations(closed.jaxpr)).index(first)]


def test_pixels_are_not_rounded():
    backbone = BACKBONES["pixels"].computing_in("bfloat16", matmul_precision="default", depthwise="auto")
    end = jax.eval_shape(lambda x: backbone.stage_ends({}, x, (1,))[0], jnp.zeros((1, 4, 4, 3)))
    assert end.dtype == jnp.float32


def test_defaults_are_those_of_a_backbone_by_its_name():
    """So that its shapes are not traced twice, and scores are those of the same program."""
    backbone = EFFICIENTNET_LITE0.computing_in(**dataclasses.asdict(Compute()))
    assert backbone.network == EFFICIENTNET_LITE0.network and hash(backbone.network) == hash(EFFICIENTNET_LITE0.network)


def test_a_short_training_in_bfloat16_follows_that_in_float32():
    """Parameters, optimiser, loss and its gradient's norm stay float32; the loss departs by what bfloat16 rounds."""
    features = np.random.default_rng(0).normal(size=(4, 8, 8, 6)).astype(np.float32)
    batch, optimizer, key = {"features": jnp.asarray(features)}, optax.sgd(0.5), jax.random.key(0)
    first = init_state(key, build_network(CONFIG).reconstructor, optimizer, (8, 8, 6))
    told = {}
    for dtype in ("float32", "bfloat16"):
        network = build_network(computing(dtype=dtype))
        step = jax.jit(make_step(squared, training_apply(network.reconstructor), optimizer))
        state, losses = first, []
        for _ in range(20):
            state, metrics = step(state, batch, key)
            losses.append(metrics["loss"])
        assert {leaf.dtype.name for leaf in jax.tree.leaves((state, metrics))} == {"float32", "int32"}
        told[dtype] = np.asarray(losses)
    assert told["float32"][-1] < 0.9 * told["float32"][0]
    # bfloat16 has 8 bits, 2^-9 a rounding; dropout is the same in both.
    assert 0 < np.abs(told["bfloat16"] / told["float32"] - 1).max() < 0.02


# Whole programs.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_demo(root, train=8, good=2, per_defect=1, size=SIZE)
    config = replace(computing(dtype="bfloat16"), data=replace(CONFIG.data, root=str(root)))
    # Little to compile.
    return replace(config, features=Features(stages=(1,), grid=8), scoring=Scoring(held_out=0.25))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    train(config, workdir)
    return workdir


def test_a_run_in_bfloat16_says_so_and_computes_so_ever_after(run, config):
    told = json.loads((run / "config.json").read_text())
    expected = {"dtype": "bfloat16", "matmul_precision": "default", "depthwise": "conv"}
    assert told["config"]["compute"] == expected
    assert {name: told["computed_on"][name] for name in expected} == expected
    detector = pushpull_jax.load(run)
    assert detector.network.features.backbone.network.dtype == jnp.bfloat16
    assert detector.network.reconstructor.dtype == jnp.bfloat16
    with Checkpoints(run / "checkpoints", create=False) as checkpoints:
        state = checkpoints.restore(initial_state(config, detector.network))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    before = (run / "predictions.csv").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert all(np.isfinite(metrics[name]) for name in ("image_auroc", "pixel_auroc", "aupro"))
    evaluate(run)
    assert (run / "predictions.csv").read_text() == before


@pytest.mark.parametrize(
    ("field", "other"), [("dtype", "float32"), ("matmul_precision", "highest"), ("depthwise", "shift")]
)
def test_a_resumed_run_computes_as_it_began(run, config, field, other):
    changed = computing(config, **{field: other})
    if field == "depthwise":  # its results are the same but for rounding
        assert files.check_startable(run, changed)
    else:
        message = rf"a run of another config: compute\.{field} = .* there, '{other}' here"
        with pytest.raises(InputError, match=message):
            train(changed, run)


def test_a_run_starts_from_one_that_computes_alike(run, config):
    started = replace(config, training=replace(config.training, start=str(run)))
    assert read_start(computing(started, depthwise="auto"), None).backbone.network.dtype == jnp.bfloat16
    with pytest.raises(InputError, match=r"same network and data only: compute\.dtype = 'bfloat16' there, 'float32'"):
        read_start(computing(started, dtype="float32"), None)


# Configs.


@pytest.mark.parametrize("name", ["dtype", "matmul_precision", "depthwise"])
def test_a_wrong_value_is_one_message(name):
    with pytest.raises(InputError, match=rf"here: compute\.{name} must be Literal\[.*\], got 'float16' \(str\)"):
        check(computing(**{name: "float16"}), source="here")


def test_a_config_without_the_section_is_in_float32():
    values = to_dict(CONFIG)
    del values["compute"]
    assert from_dict(values, source="old").compute == Compute("float32", "default", "auto")


@pytest.mark.parametrize("name", ["compute.dtype", "compute.matmul_precision", "compute.depthwise"])
def test_what_computes_otherwise_is_a_program_and_features_of_its_own(name):
    values = {"compute.dtype": "bfloat16", "compute.matmul_precision": "high", "compute.depthwise": "shift"}
    config = replace(CONFIG, compute=Compute())
    runs = runs_of(Ablation(config, {name: (getattr(Compute(), name[8:]), values[name]), "seed": (0, 1)}), source="")
    for fields in (COMPILED, READ):
        assert _grouped(runs, fields) == [[0, 1], [2, 3]]


def test_a_grid_without_the_section_goes_on(tmp_path):
    grid = Ablation(replace(CONFIG, compute=Compute()), {"seed": (0, 1)})
    there = _plain(grid)
    del there["config"]["compute"]
    (tmp_path / "ablation.json").write_text(json.dumps(there))
    assert _check_startable(tmp_path, grid)
    with pytest.raises(InputError, match="another config"):
        _check_startable(tmp_path, replace(grid, config=computing(dtype="bfloat16")))
