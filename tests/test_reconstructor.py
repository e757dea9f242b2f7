"""ADTR's reconstructor: parameter counts, the structure against a slow float64 oracle, and what it must not do.

The counts are those of the paper's setting (C 720, 16 x 16 tokens) with either kind of positions.
"""

import functools

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pushpull_jax.models.reconstructor import Attention, Dropout, Reconstructor, fold_cells, unfold_cells

TINY = {"width": 8, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "hidden": 12}
GRID, CHANNELS = (2, 3), 5
LEAVES = ("kernel", "bias")


ABLATIONS = pytest.mark.parametrize(
    "ablation", [{}, {"attention": False}, {"query": False}], ids=["full", "without_attention", "without_query"]
)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 7_812_560),
        ({"positions": "per_token"}, 7_874_000),
        # By hand: 12 attentions lose two projections of 256 (256 + 1) each, and 2 x 16 x 128 positions are gone.
        ({"attention": False}, 7_812_560 - 12 * 2 * 256 * 257 - 4096),
        ({"query": False}, 7_812_560 - 256 * 256),
    ],
)
def test_parameter_count_is_the_papers(settings, count):
    features = jax.ShapeDtypeStruct((1, 16, 16, 720), jnp.float32)
    variables = jax.eval_shape(Reconstructor(**settings).init, jax.random.key(0), features)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    assert set(variables) == {"params"}


def random_parameters(model, *inputs, seed=0, **settings):
    """Every parameter random, norms and biases included: at their initial 1 and 0, mistakes in them would not show."""
    shapes = jax.eval_shape(functools.partial(model.init, **settings), jax.random.key(0), *inputs)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(size=leaf.shape, scale=1.5 / leaf.shape[0] ** 0.5)
        if name in ("scale", "bias"):
            return rng.normal(size=leaf.shape, loc=float(name == "scale"), scale=0.4)
        return rng.normal(size=leaf.shape)

    return jax.tree.map(np.float32, jax.tree_util.tree_map_with_path(draw, shapes))


@pytest.fixture(scope="module")
def features():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, *GRID, CHANNELS)), jnp.float32)


@pytest.fixture(scope="module")
def tiny(features):
    """A tiny network: its parameters, and compiled functions of (parameters, features) without and with dropout."""
    model = Reconstructor(**TINY)
    parameters = random_parameters(model, features)

    def with_dropout(parameters, features, key):
        return model.apply(parameters, features, train=True, rngs={"dropout": key})

    return parameters, jax.jit(model.apply), jax.jit(with_dropout)


def dense(x, parameters):
    return x @ parameters["kernel"] + parameters["bias"]


def slow_attention(query, key, value, parameters, heads):
    """[T,D], [S,D], [S,D] -> [T,D], one head and one token at a time; without a query the matrix is the identity."""
    if "query" not in parameters:
        return dense(dense(value, parameters["value"]), parameters["out"])
    q, k, v = (dense(x, parameters[n]) for x, n in ((query, "query"), (key, "key"), (value, "value")))
    size = q.shape[1] // heads
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for t in range(len(q)):
            weights = np.exp([q[t, part] @ row / np.sqrt(size) for row in k[:, part]])
            out[t, part] = (weights / weights.sum()) @ v[:, part]
    return dense(out, parameters["out"])


def slow_norm(x, parameters):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * parameters["scale"] + parameters["bias"]


def slow_feed_forward(x, parameters):
    return dense(np.maximum(dense(x, parameters["in"]), 0), parameters["out"])


def slow_reconstructor(features, p, heads):
    """One encoder and one decoder layer as the module's docstring has them: [h,w,C] float64 -> [h,w,C]."""
    h, w, channels = features.shape
    positions = 0.0
    if "row_positions" in p:
        rows, columns = p["row_positions"], p["column_positions"]
        positions = np.stack([np.concatenate([columns[x], rows[y]]) for y in range(h) for x in range(w)])
    memory = dense(features.reshape(h * w, channels), p["project_in"])
    e, d = p["encoder_0"], p["decoder_0"]

    at = memory + positions
    memory = slow_norm(memory + slow_attention(at, at, memory, e["self_attention"], heads), e["norm_self"])
    memory = slow_norm(memory + slow_feed_forward(memory, e["feed_forward"]), e["norm_feed_forward"])

    x = p.get("query", memory)
    at = x + positions
    x = slow_norm(x + slow_attention(at, at, x, d["self_attention"], heads), d["norm_self"])
    update = slow_attention(x + positions, memory + positions, memory, d["cross_attention"], heads)
    x = slow_norm(x + update, d["norm_cross"])
    x = slow_norm(x + slow_feed_forward(x, d["feed_forward"]), d["norm_feed_forward"])
    return dense(slow_norm(x, p["norm"]), p["project_out"]).reshape(h, w, channels)


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_attention_against_a_slow_oracle():
    rng = np.random.default_rng(2)
    query, key, value = (jnp.asarray(rng.normal(size=(2, n, 6)), jnp.float32) for n in (3, 4, 4))
    model = Attention(heads=3, dropout=0.5)
    variables = random_parameters(model, query, key, value, train=False)
    got = model.apply(variables, query, key, value, train=False)
    parameters = in_float64(variables["params"])
    for b in range(2):
        expected = slow_attention(*(in_float64(x[b]) for x in (query, key, value)), parameters, heads=3)
        np.testing.assert_allclose(got[b], expected, rtol=1e-4, atol=1e-5)


@ABLATIONS
def test_whole_network_against_a_slow_oracle(features, ablation):
    """The oracle has no dropout: without `train` the network, whose rate is 0.1, applies none either."""
    model = Reconstructor(**TINY, **ablation)
    parameters = random_parameters(model, features)
    got = jax.jit(model.apply)(parameters, features)
    for one, image in zip(got, in_float64(features), strict=True):
        expected = slow_reconstructor(image, in_float64(parameters["params"]), TINY["heads"])
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def parameter_shapes(**settings):
    model = Reconstructor(**TINY, **settings)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, *GRID, CHANNELS)))["params"]
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_ablations_lack_exactly_the_parameters_that_they_switch_off():
    full = parameter_shapes()
    attentions = ("encoder_0/self_attention", "decoder_0/self_attention", "decoder_0/cross_attention")
    matrices = {f"{name}/{side}/{leaf}" for name in attentions for side in ("query", "key") for leaf in LEAVES}
    positions = {"row_positions", "column_positions"}
    for settings, missing in (
        ({"query": False}, {"query"}),
        ({"attention": False}, matrices | positions),
        ({"attention": False, "query": False}, matrices | positions | {"query"}),
    ):
        assert missing <= set(full)
        assert parameter_shapes(**settings) == {name: full[name] for name in set(full) - missing}


@pytest.mark.parametrize("fold", [1, 2])
def test_without_attention_a_token_reaches_its_own_reconstruction_alone(fold):
    model = Reconstructor(**TINY, attention=False, fold=fold)
    features = jnp.asarray(np.random.default_rng(4).normal(size=(2, 2 * fold, 3 * fold, CHANNELS)), jnp.float32)
    parameters, apply = random_parameters(model, features), jax.jit(model.apply)
    # One cell of the first image: its token is the second of the first row.
    moved = apply(parameters, features.at[0, 0, 2 * fold - 1].add(1.0)) - apply(parameters, features)
    here = np.zeros(moved.shape[:3], bool)
    here[0, :fold, fold : 2 * fold] = True
    np.testing.assert_array_equal(moved[~here], 0)
    assert np.abs(moved[here]).max(-1).min() > 1e-4


def test_cells_of_a_token_by_hand():
    # A 2 x 4 grid of cells numbered row by row, two channels: c and 10 c.
    cells = np.arange(8.0).reshape(1, 2, 4, 1) * np.array([1.0, 10.0])
    tokens = fold_cells(jnp.asarray(cells), 2)
    expected = [[0, 0, 1, 10, 4, 40, 5, 50], [2, 20, 3, 30, 6, 60, 7, 70]]
    np.testing.assert_array_equal(tokens[0], expected)


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_unfolding_is_the_inverse_of_folding(fold):
    x = np.random.default_rng(3).normal(size=(2, 6, 12, 5)).astype(np.float32)
    tokens = fold_cells(jnp.asarray(x), fold)
    assert tokens.shape == (2, 72 // fold**2, 5 * fold**2)
    np.testing.assert_array_equal(unfold_cells(tokens, fold, (6, 12)), x)


def test_fold_shares_tokens_and_keeps_the_shape_of_the_features():
    features = jnp.ones((2, 4, 6, 5))
    out, variables = jax.eval_shape(Reconstructor(**TINY, fold=2).init_with_output, jax.random.key(0), features)
    assert out.shape == (2, 4, 6, 5)
    assert variables["params"]["query"].shape == (6, 8)
    assert variables["params"]["row_positions"].shape == (2, 4)
    assert variables["params"]["column_positions"].shape == (3, 4)
    assert variables["params"]["project_in"]["kernel"].shape == (20, 8)


@pytest.mark.parametrize("grid", [(4, 5), (5, 4)])
def test_fold_must_divide_the_grid(grid):
    model = Reconstructor(**TINY, fold=2)
    with pytest.raises(ValueError, match=f"fold 2 must divide the feature grid, which is {grid[0]}x{grid[1]}"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, *grid, 3)))


def test_output_is_float32_whatever_is_computed_in(tiny, features):
    parameters, apply, _ = tiny
    expected = apply(parameters, features)
    assert expected.shape == features.shape
    assert expected.dtype == jnp.float32
    got = jax.jit(Reconstructor(**TINY, dtype=jnp.bfloat16).apply)(parameters, features)
    assert got.dtype == jnp.float32
    # bfloat16 has 8 bits: near, and yet not the same, or it was not computed in bfloat16.
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


def test_parameters_stay_float32_in_bfloat16():
    model = Reconstructor(**TINY, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, *GRID, CHANNELS)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_dropout_is_a_function_of_its_key(tiny, features):
    parameters, apply, with_dropout = tiny
    first, again, other = (with_dropout(parameters, features, jax.random.key(seed, impl="rbg")) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first - apply(parameters, features)).max() > 0.01


# By hand: an encoder layer has 1 + 2 + 1, a decoder layer 2 + 3 + 1; without attention there are no weights of it.
@pytest.mark.parametrize(("train", "attention", "count"), [(True, True, 10), (False, True, 10), (True, False, 7)])
def test_dropout_is_where_torchs_layers_have_it(features, train, attention, count):
    """On the weights of each attention, on the output of each sublayer, and between the two dense layers."""
    model, draws = Reconstructor(**TINY, attention=attention), []

    def note(method, args, kwargs, context):
        if isinstance(context.module, nn.Dropout):
            draws.append((context.module.rate, context.module.deterministic))
        return method(*args, **kwargs)

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with nn.intercept_methods(note):
        jax.eval_shape(functools.partial(model.init, train=train), keys, features)
    assert draws == [(0.1, not train)] * count


def test_dropout_needs_a_key(tiny, features):
    with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
        Reconstructor(**TINY).apply(tiny[0], features, train=True)


def with_zeros(parameters, *path):
    """The same tree with every leaf below a path set to 0."""
    head, *rest = path
    below = with_zeros(parameters[head], *rest) if rest else jax.tree.map(jnp.zeros_like, parameters[head])
    return {**parameters, head: below}


def test_features_reach_their_reconstruction_through_cross_attention_alone(tiny, features):
    parameters, apply, _ = tiny
    other = features[::-1] * 3 + 1
    assert np.abs(apply(parameters, features) - apply(parameters, other)).max() > 0.01
    cut = with_zeros(parameters, "params", "decoder_0", "cross_attention", "out")
    np.testing.assert_array_equal(apply(cut, features), apply(cut, other))


def test_without_a_decoder_the_output_is_independent_of_the_features(features):
    model = Reconstructor(**TINY | {"decoder_layers": 0})
    parameters, apply = random_parameters(model, features), jax.jit(model.apply)
    first, other = (apply(parameters, x) for x in (features, features * 3 + 1))
    np.testing.assert_array_equal(first, other)
    np.testing.assert_array_equal(first[0], first[1])
    assert np.ptp(first, axis=(1, 2)).min() > 0.01  # the query alone tells cells apart


def permuted(x, order):
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return flat[:, order].reshape(x.shape)


ORDER = np.array([3, 0, 5, 1, 4, 2])


def test_permuting_cells_does_not_merely_permute_the_reconstruction(tiny, features):
    parameters, apply, _ = tiny
    got, before = apply(parameters, permuted(features, ORDER)), apply(parameters, features)
    assert np.abs(got - permuted(before, ORDER)).max() > 0.01
    assert np.abs(got - before).max() > 0.01


def test_positions_of_keys_alone_make_the_order_of_cells_matter(tiny, features):
    # Without positions the encoder's output is a set, which the decoder cannot tell from the same set in another order.
    parameters, apply, _ = tiny
    blind = with_zeros(with_zeros(parameters, "params", "row_positions"), "params", "column_positions")
    got, before = apply(blind, permuted(features, ORDER)), apply(blind, features)
    np.testing.assert_allclose(got, before, rtol=1e-4, atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other(tiny, features):
    parameters, apply, _ = tiny
    changed = features.at[1].multiply(-2)
    np.testing.assert_allclose(apply(parameters, changed)[0], apply(parameters, features)[0], rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_and_reach_every_parameter(tiny, features):
    parameters, apply, _ = tiny

    def loss(parameters):
        return jnp.square(apply(parameters, features) - features).mean()

    gradients = jax.jit(jax.grad(loss))(parameters)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # One bias added to all keys changes no softmax.
        assert np.abs(leaf).max() > 1e-6 or name.endswith("['key']['bias']"), name


def test_networks_run_side_by_side_under_vmap(tiny, features):
    parameters, apply, _ = tiny
    other = random_parameters(Reconstructor(**TINY), features, seed=7)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), parameters, other)
    got = jax.jit(jax.vmap(Reconstructor(**TINY).apply, in_axes=(0, None)))(stacked, features)
    for one, each in zip(got, (parameters, other), strict=True):
        np.testing.assert_allclose(one, apply(each, features), rtol=1e-4, atol=1e-4)


def test_per_token_positions_give_each_token_its_own(tiny, features):
    """Factorised positions written out as a table, one row a token, are the same network."""
    variables, apply, _ = tiny
    parameters = variables["params"]
    rows, columns = parameters["row_positions"], parameters["column_positions"]
    table = jnp.stack([jnp.concatenate([columns[x], rows[y]]) for y in range(GRID[0]) for x in range(GRID[1])])
    shared = {name: leaf for name, leaf in parameters.items() if not name.endswith("_positions")}
    per_token = Reconstructor(**TINY, positions="per_token")
    got = jax.jit(per_token.apply)({"params": shared | {"positions": table}}, features)
    np.testing.assert_allclose(got, apply(variables, features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_has_its_rate_and_independent_bits(rate):
    """Of ones: 1 / (1 - rate) or 0. Bounds are 5 deviations of the binomial; neighbours and keys share no bits."""
    x, count = jnp.ones((64, 128, 128)), 2**20

    @jax.jit
    def kept(key):
        return Dropout(rate, deterministic=False).apply({}, x, rngs={"dropout": key})

    first, other = np.asarray(kept(jax.random.key(0))), np.asarray(kept(jax.random.key(1)))
    np.testing.assert_allclose(np.unique(first), [0, 1 / (1 - rate)], rtol=1e-6)
    dropped, bound = first == 0, 5 * (rate * (1 - rate) / count) ** 0.5
    assert abs(dropped.mean() - rate) < bound
    both, bound = rate**2, 5 * (rate**2 * (1 - rate**2) / count) ** 0.5
    shifts = ((0, 1), (1, 1), (0, 2), (1, 2), (1, 32))
    for pair in [other == 0, *(np.roll(dropped, step, axis) for axis, step in shifts)]:
        assert abs((dropped & pair).mean() - both) < bound
    # A row of 128 loses rate x 128 of its entries, with the deviation of a binomial.
    assert dropped.sum(-1).var() == pytest.approx(128 * rate * (1 - rate), rel=0.1)


def test_dropout_sends_the_gradient_where_the_values_went():
    """Of w.dropout(x) the gradient is w / (1 - rate) where x was kept."""
    x, key = jnp.linspace(1, 2, 1000), jax.random.key(0)

    def drop(x):
        return Dropout(0.25, deterministic=False).apply({}, x, rngs={"dropout": key})

    gradient = jax.jit(jax.grad(lambda x: (jnp.arange(1000.0) * drop(x)).sum()))(x)
    np.testing.assert_allclose(gradient, np.where(drop(x) > 0, np.arange(1000) / 0.75, 0), rtol=1e-6)
