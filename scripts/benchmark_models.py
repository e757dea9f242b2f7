"""Rows of scripts/benchmark.py on models: trunk, training step, reconstructor, and one photograph from end to end.

The peer is PyTorch, from copies of our parameters: eager in channels_last, or compiled, whichever is faster. Images are
[B,S,S,3] in 0..255, features [B,h,w,C], all float32. On a GPU both sides multiply in TF32, but where they are compared.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_harness import Contest, Row, Settings, assert_equal, cost, torch_or_none

from pushpull_jax.backbones import Backbone, find_backbone
from pushpull_jax.config import Config, Data, Features, Scoring, load_config
from pushpull_jax.data.images import resize_image
from pushpull_jax.detector import Network, build_network, detect
from pushpull_jax.models.reconstructor import Reconstructor
from pushpull_jax.objectives import squared
from pushpull_jax.steps import State, init_state, make_chunk, make_optimizer, make_step, training_apply
from pushpull_jax.weights import load_backbone

# The reconstructor's features in the paper: EfficientNet-B4's five stage ends on a grid of 16x16, 16 images a step.
CHANNELS, GRID, BATCH = 720, 16, 16
# configs/adtr.py
OPTIMISER = {"learning_rate": 1e-4, "weight_decay": 1e-4, "clip_norm": 0.1}
STEPS = 2  # in one compiled scan, as training runs them


def torch_for(settings: Settings) -> tuple[Any, Any, str]:
    """PyTorch, its device, and why there is none: it must compute where jax does."""
    torch = torch_or_none(settings)
    if torch is None:
        return None, None, "PyTorch is not installed"
    if jax.default_backend() == "cpu":
        return torch, torch.device("cpu"), ""
    if not torch.cuda.is_available():
        return None, None, f"PyTorch has no device like jax's {jax.default_backend()}"
    return torch, torch.device("cuda"), ""


@contextlib.contextmanager
def float32_products(torch: Any) -> Iterator[None]:
    """Matrix products in full float32 on a GPU too, to compare results; after it in TF32 there, on both sides."""
    if jax.default_backend() == "cpu":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.default_matmul_precision("float32"):
            yield
    finally:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def both_ways(torch: Any, model: Any, run: Callable[[Any], Callable]) -> dict[str, Callable]:
    """What `run` makes of a model, as it is and compiled; each call waits for its device."""

    def waiting(call: Callable) -> Callable:
        def wait():
            result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

        return wait

    return {"torch eager": waiting(run(model)), "torch.compile": waiting(run(torch.compile(model)))}


def inference(torch: Any, *inputs: Any) -> Callable[[Any], Callable]:
    """For `both_ways`: a call of a model without gradients."""

    def run(model: Any) -> Callable:
        def call():
            with torch.inference_mode():
                return model(*inputs)

        return call

    return run


def without_loops(backbone: Backbone) -> Backbone:
    """The backbone as XLA counts it best: plain convolutions."""
    return dataclasses.replace(backbone, network=dataclasses.replace(backbone.network, depthwise="conv"))


def backbone_with_weights(name: str) -> tuple[Backbone, Any]:
    """A backbone with its weights where a package brings them, otherwise with random ones, which take the same time."""
    if name == "efficientnet_lite0":
        return load_backbone(name)
    backbone = find_backbone(name)
    image = jnp.zeros((1, 64, 64, 3))
    return backbone, jax.device_get(jax.jit(backbone.network.init)(jax.random.key(0), image)["params"])


def trunk(settings: Settings, *, name: str, batch: int) -> Contest:
    """Stage ends of normalised images that are on the device already."""
    backbone, parameters = backbone_with_weights(name)
    side = 64 if settings.quick else 256
    images = np.random.default_rng(0).standard_normal((batch, side, side, 3), np.float32)

    def apply(network: Any, parameters: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        return network.apply({"params": parameters}, images)

    on_device, program = jax.device_put((parameters, images)), jax.jit(functools.partial(apply, backbone.network))
    plain = functools.partial(apply, without_loops(backbone).network)
    flops, _ = cost(plain, parameters, images[:1])
    _, moved = cost(plain, parameters, images)
    peers = {}
    torch, device, lacking = torch_for(settings)
    if torch:
        from peer_trunk import torch_trunk

        model = torch_trunk(backbone.network, parameters).to(device)
        inputs = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # channels_last without a copy
        with float32_products(torch), torch.inference_mode():
            ends = zip(program(*on_device), model(inputs), strict=True)
            for i, (ours, theirs) in enumerate(ends, start=1):
                assert_equal(f"{name}, stage {i}", ours, theirs.permute(0, 2, 3, 1).cpu())
        peers = both_ways(torch, model, inference(torch, inputs))
    return Contest(lambda: program(*on_device), peers, "images/s", batch, flops * batch, moved, lacking)


def reconstructor_of(settings: Settings, *, dropout: float) -> tuple[Reconstructor, tuple[int, int, int, int]]:
    """The paper's reconstructor, and the shape of its features."""
    if settings.quick:
        return Reconstructor(width=16, encoder_layers=1, decoder_layers=1, hidden=16, dropout=dropout), (2, 4, 4, 24)
    return Reconstructor(dropout=dropout), (BATCH, GRID, GRID, CHANNELS)


def random_features(shape: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *shape[1:]), np.float32)


def optimiser_of():
    return make_optimizer(schedule="constant", warmup_steps=0, steps=1000, **OPTIMISER)[0]


def assert_same_losses(settings: Settings, torch: Any, device: Any, steps: int = 5) -> None:
    """Five steps without dropout from the same weights, each on other features, have the same losses."""
    from peer_reconstructor import torch_reconstructor, torch_train_step

    module, shape = reconstructor_of(settings, dropout=0.0)
    optimiser = optimiser_of()
    state = init_state(jax.random.key(0), module, optimiser, shape[1:])
    model = torch_reconstructor(module, jax.device_get(state.parameters)).to(device)
    examples = random_features(shape, steps * shape[0])
    with float32_products(torch):
        step = torch_train_step(model, **OPTIMISER)
        theirs = [float(step(torch.from_numpy(part).to(device))) for part in np.split(examples, steps)]
        chunk = make_chunk(make_step(squared, training_apply(module), optimiser))
        indices = np.arange(len(examples), dtype=np.int32).reshape(steps, -1)
        ours = chunk(state, {"features": jnp.asarray(examples)}, indices, jax.random.key(0))[1]["loss"]
    assert_equal("losses of five steps", ours, theirs)


def training_step(settings: Settings) -> Contest:
    """A step with dropout, gradient, clipping and AdamW; features stay on the device."""
    module, shape = reconstructor_of(settings, dropout=0.1)
    optimiser, key = optimiser_of(), jax.random.key(0)
    state = init_state(key, module, optimiser, shape[1:])
    features = random_features(shape, shape[0])
    torch, device, lacking = torch_for(settings)
    peers = {}
    if torch:
        from peer_reconstructor import torch_reconstructor, torch_train_step

        assert_same_losses(settings, torch, device)
        inputs = torch.from_numpy(features).to(device)

        def run(model: Any) -> Callable:
            step = torch_train_step(model, **OPTIMISER)
            return lambda: [step(inputs) for _ in range(STEPS)]

        model = torch_reconstructor(module, jax.device_get(state.parameters)).to(device)
        peers = both_ways(torch, model, run)
    step = make_step(squared, training_apply(module), optimiser)
    chunk, examples = make_chunk(step), jax.device_put({"features": features})
    flops, moved = cost(step, state, examples, key)
    indices = jnp.tile(jnp.arange(shape[0], dtype=jnp.int32), (STEPS, 1))
    states: list[State] = [state]

    def ours():
        states[0], metrics = chunk(states[0], examples, indices, key)
        return metrics

    return Contest(ours, peers, "s", STEPS, STEPS * flops, STEPS * moved, lacking)


def reconstructor_forward(settings: Settings) -> Contest:
    """The reconstruction of a batch of features, without dropout."""
    module, shape = reconstructor_of(settings, dropout=0.1)
    parameters = jax.device_get(init_state(jax.random.key(0), module, optimiser_of(), shape[1:]).parameters)
    features = random_features(shape, shape[0])

    def apply(parameters: Any, features: jax.Array) -> jax.Array:
        return module.apply({"params": parameters}, features)

    on_device, program = jax.device_put((parameters, features)), jax.jit(apply)
    peers = {}
    torch, device, lacking = torch_for(settings)
    if torch:
        from peer_reconstructor import torch_reconstructor

        model = torch_reconstructor(module, parameters).eval().to(device)
        inputs = torch.from_numpy(features).to(device)
        with float32_products(torch), torch.inference_mode():
            assert_equal("reconstruction", program(*on_device), model(inputs).cpu())
        peers = both_ways(torch, model, inference(torch, inputs))
    return Contest(lambda: program(*on_device), peers, "s", 1.0, *cost(apply, parameters, features), lacking)


def paper_network(settings: Settings, name: str) -> tuple[Network, dict[str, Any]]:
    """A detector of the paper's kind, its map smoothed, with an untrained reconstructor."""
    backbone, parameters = backbone_with_weights(name)
    adtr = load_config("adtr")
    config = Config(
        data=Data(image_size=64 if settings.quick else 256),
        features=Features(backbone=name, stages=(1, 2, 3, 4, 5), grid=4 if settings.quick else GRID),
        reconstructor=adtr.reconstructor,
        scoring=Scoring(map="norm", smoothing=3.0),
    )
    network = build_network(config, backbone=backbone)
    # The precision of products is `float32_products`'s.
    features = network.features._replace(backbone=backbone)
    network = dataclasses.replace(network, features=features, matmul_precision=None)
    channels = sum(network.features.widths)
    shape = (config.features.grid, config.features.grid, channels)
    state = init_state(jax.random.key(0), network.reconstructor, optimiser_of(), shape)
    standardisation = {"shift": np.zeros(channels, np.float32), "scale": np.ones(channels, np.float32)}
    tree = {"backbone": parameters, "standardisation": standardisation, "residuals": {}}
    return network, tree | {"reconstructor": jax.device_get(state.parameters)}


def latency(settings: Settings, *, name: str) -> Contest:
    """Score and map of one photograph on the host, resized there as ours are; a program compiled ahead of time."""
    network, parameters = paper_network(settings, name)
    side, size = (90, 64) if settings.quick else (900, 256)
    photograph = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    resized = np.zeros((1, size, size, 3), np.float32)
    on_device = jax.device_put(parameters)

    def compiled() -> Callable:
        program = jax.jit(functools.partial(detect, network)).lower(on_device, resized).compile()
        return lambda: jax.device_get(program(on_device, resize_image(photograph, size=size)[None]))

    plain = network.features._replace(backbone=without_loops(network.features.backbone))
    spent = cost(functools.partial(detect, dataclasses.replace(network, features=plain)), parameters, resized)
    peers = {}
    torch, device, lacking = torch_for(settings)
    if torch:
        from peer_detector import torch_detector

        model = torch_detector(network, parameters).to(device)
        with float32_products(torch), torch.inference_mode():
            theirs = model(torch.from_numpy(photograph))
            for what, ours, peers_ in zip(("score", "map"), compiled()(), theirs, strict=True):
                assert_equal(f"latency, {what}", ours, peers_)

        def run(model: Any) -> Callable:
            call = inference(torch, torch.from_numpy(photograph))(model)
            return lambda: [part.numpy() for part in call()]

        peers = both_ways(torch, model, run)
    return Contest(compiled(), peers, "s", 1.0, *spent, lacking)


ROWS = (
    *(
        Row(
            f"trunk-{short}-{batch}",
            f"trunk {name}, 256 px, batch {batch}",
            functools.partial(trunk, name=name, batch=batch),
        )
        for short, name in (("lite0", "efficientnet_lite0"), ("b4", "tf_efficientnet_b4"))
        for batch in (8, 1)
    ),
    Row("step", "training step, C 720, T 256, batch 16", training_step),
    Row("forward", "reconstructor forward, C 720, T 256, batch 16", reconstructor_forward),
    *(
        Row(f"latency-{short}", f"one photograph of 900 px to its map, {name}", functools.partial(latency, name=name))
        for short, name in (("lite0", "efficientnet_lite0"), ("b4", "tf_efficientnet_b4"))
    ),
)  # fmt: skip
