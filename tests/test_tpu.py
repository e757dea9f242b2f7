"""A training step and the detector, compiled for a slice of eight TPUs on a machine that has none.

PyPI's libtpu compiles for a described topology. Nothing is run: what is looked at is the compiled program, its memory
and what the devices tell each other. The figures are printed; docs/experiments.md has them.
"""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pushpull_jax.config import Compute, Config, load_config
from pushpull_jax.detector import Network, build_network, build_optimizer, detect, initial_state
from pushpull_jax.mesh import AXES
from pushpull_jax.objectives import squared
from pushpull_jax.steps import make_chunk, make_step, training_apply

pytestmark = pytest.mark.slow

DEVICES, HBM = 8, 16 * 2**30  # a v5e has 16 GB (cloud.google.com/tpu/docs/v5e)
EXAMPLES, BATCH = 512, 64
PROGRAMS = [("quick", "float32"), ("quick", "bfloat16"), ("adtr", "float32")]
COLLECTIVE = r" = (.+?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("


@pytest.fixture(scope="module")
def mesh():
    """Eight devices of a v5e slice, 2x4, none of which is there."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        # libtpu asks the cloud for these otherwise, and complains that there is none.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it would lock the TPU that is not there
        slice_ = topologies.get_topology_desc("v5e:2x4", "tpu")
        yield topologies.make_mesh(slice_, (1, DEVICES), AXES)


def placed(tree: Any, mesh, *axes: str) -> Any:
    """Shapes and dtypes of a tree, as arrays on the mesh would have them."""
    sharding = NamedSharding(mesh, P(*axes))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def size(shapes: str) -> int:
    """Bytes of arrays as HLO writes them."""
    width = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(width[kind] * math.prod(map(int, filter(None, dimensions.split(",")))) for kind, dimensions in found)


def collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    """How many of each kind a program has, and the bytes of their results."""
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in re.findall(COLLECTIVE, compiled.as_text()):
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + size(shapes)
    return found


def memory(compiled: Any) -> tuple[int, int]:
    """Bytes that a program takes on a device: its arguments, and what it needs besides."""
    needed = compiled.memory_analysis()
    more = needed.temp_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
    return needed.argument_size_in_bytes, more


def compiled_step(config: Config, mesh) -> Any:
    """A chunk of ten steps on features that every device has, its batches spread."""
    network = build_network(config)
    step = make_step(squared, training_apply(network.reconstructor), build_optimizer(config)[0])
    grid, channels = network.features.grid, sum(network.features.widths)
    state = jax.eval_shape(lambda: initial_state(config, network))
    examples = {"features": jax.ShapeDtypeStruct((EXAMPLES, grid, grid, channels), np.float32)}
    rest = (examples, jax.ShapeDtypeStruct((10, BATCH), np.int32), jax.eval_shape(lambda: jax.random.key(0)))
    return make_chunk(step, mesh=mesh).lower(*placed((state, *rest), mesh)).compile()


def shapes_of_detector(config: Config, network: Network) -> dict[str, Any]:
    """Shapes of the parameters of a detector."""
    grid, channels = network.features.grid, sum(network.features.widths)
    features = jax.ShapeDtypeStruct((1, grid, grid, channels), np.float32)
    vector, square = (lambda n: jax.ShapeDtypeStruct((n,), np.float32)), lambda n: jax.ShapeDtypeStruct((n, n), "f4")
    widths = {name: part.shape[-1] for name, part in jax.eval_shape(network.measured, features).items()}
    return {
        "backbone": network.features.backbone.abstract_parameters(),
        "standardisation": {"shift": vector(channels), "scale": vector(channels)},
        "reconstructor": jax.eval_shape(lambda: initial_state(config, network)).parameters,
        "residuals": {name: {"mean": vector(n), "matrix": square(n)} for name, n in widths.items()},
    }


@pytest.mark.parametrize(("name", "dtype"), PROGRAMS)
def test_a_training_step_sums_gradients_and_sends_nothing_else(mesh, name, dtype, capsys):
    config = replace(load_config(name), compute=Compute(dtype=dtype))
    compiled = compiled_step(config, mesh)
    found, (arguments, more) = collectives(compiled), memory(compiled)
    with capsys.disabled():
        print(f"\n{name}, {dtype}: step on {DEVICES} v5e, batch {BATCH}: arguments {arguments / 2**20:.0f} MB, "
              f"besides {more / 2**20:.0f} MB, {found}")  # fmt: skip
    parameters = jax.eval_shape(lambda: initial_state(config, build_network(config))).parameters
    # XLA sums over the devices in the dtype of the products that gradients come from.
    gradients = {"float32": 4, "bfloat16": 2}[dtype] * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert set(found) == {"all-reduce"}
    # Where the decoder's first attention is computed once a batch, XLA sums in front of it, where there is less to sum.
    assert 0.97 * gradients <= found["all-reduce"][1] <= 1.01 * gradients
    assert arguments + more < HBM


@pytest.mark.parametrize(("name", "dtype"), PROGRAMS)
def test_the_detector_sends_nothing_and_convolves_as_a_tpu_does(mesh, name, dtype, capsys):
    config = replace(load_config(name), compute=Compute(dtype=dtype))
    network = build_network(config)
    parameters = placed(shapes_of_detector(config, network), mesh)
    images = placed(jax.ShapeDtypeStruct((BATCH, network.image_size, network.image_size, 3), np.float32), mesh, "data")
    lowered = jax.jit(detect, static_argnums=0).lower(network, parameters, images)
    text = lowered.as_text()
    # On CPU depthwise convolutions are sums of shifts, over parts of the batch: here they are neither.
    groups = [int(count) for count in re.findall(r"feature_group_count = (\d+)", text)]
    assert sum(count > 1 for count in groups) >= 16 and "stablehlo.while" not in text
    compiled = lowered.compile()
    found, (arguments, more) = collectives(compiled), memory(compiled)
    with capsys.disabled():
        print(f"\n{name}, {dtype}: detector on {DEVICES} v5e, batch {BATCH}: arguments {arguments / 2**20:.0f} MB, "
              f"besides {more / 2**20:.0f} MB, {found}")  # fmt: skip
    assert not found
    assert arguments + more < HBM
