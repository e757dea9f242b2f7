"""ADTR's reconstructor: a transformer that maps features [B,h,w,C] to their reconstruction [B,h,w,C].

ADTR (arXiv 2209.01816), section 3.2, with UniAD's code for what the paper leaves out: an encoder over the projected
features, and a decoder whose input is a learned query, one vector a token, so that no path leads from a feature to its
reconstruction but through attention. Learned positions are added to queries and keys of every attention.
Post-norm, ReLU, Xavier-uniform weights, a final LayerNorm on the decoder.

The start is ours, for it decides whether a few hundred steps suffice (docs/experiments.md): positions of unit variance,
a query near zero, and in every attention a key projection that equals the query projection. Tokens then attend to their
own place from the first step, instead of learning first where they are.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Positions = Literal["factorised", "per_token"]

_xavier = nn.initializers.xavier_uniform()


def fold_cells(x: jax.Array, fold: int) -> jax.Array:
    """Gather fold x fold cells into the channels of one token: [B,h,w,C] -> [B,T,fold*fold*C], T = hw / fold^2."""
    batch, h, w, channels = x.shape
    x = x.reshape(batch, h // fold, fold, w // fold, fold, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, (h // fold) * (w // fold), fold * fold * channels)


def unfold_cells(x: jax.Array, fold: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `fold_cells` on a grid of h x w cells."""
    batch, channels, (h, w) = x.shape[0], x.shape[-1] // fold**2, grid
    x = x.reshape(batch, h // fold, w // fold, fold, fold, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, h, w, channels)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on every other (C. Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _drop(x: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    """Entries of x are 0 with probability `rate`, exact to 2^-32, and the others divided by 1 - rate."""
    bits = _mix(_mix(jnp.arange(x.size, dtype=jnp.uint32) + seeds[0]) ^ seeds[1]).reshape(x.shape)
    return jnp.where(bits >= jnp.uint32(int(rate * 2**32)), x / (1 - rate), 0).astype(x.dtype)


class Dropout(nn.Dropout):
    """Flax's dropout, but its bits are a hash of the place, far cheaper on CPU than Threefry's.

    Only the two seeds of a mask are drawn by jax's generator.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or self.rate == 0:
            return x
        seeds = jax.random.bits(self.make_rng(self.rng_collection), (2,))
        return _drop(x, seeds, self.rate)


def _at_least_float32(dtype: Any) -> Any:
    """What is summed in; float64 for the tests that compare to the last digits."""
    return jnp.promote_types(dtype, jnp.float32)


class Attention(nn.Module):
    """Multi-head attention [B,T,D] x [B,S,D] -> [B,T,D], heads moved in front of tokens (the fast order on CPU)."""

    heads: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, *, train: bool) -> jax.Array:
        batch, _, width = query.shape

        def heads_first(x: jax.Array, project: nn.Dense) -> jax.Array:
            return project(x).reshape(batch, x.shape[1], self.heads, width // self.heads).transpose(0, 2, 1, 3)

        project_query = nn.Dense(width, kernel_init=_xavier, dtype=self.dtype, name="query")
        q = heads_first(query, project_query)
        same = project_query.variables["params"]["kernel"]
        k = heads_first(key, nn.Dense(width, kernel_init=lambda *_: same, dtype=self.dtype, name="key"))
        v = heads_first(value, nn.Dense(width, kernel_init=_xavier, dtype=self.dtype, name="value"))
        logits = jnp.einsum("bntd,bnsd->bnts", q, k) / (width // self.heads) ** 0.5
        weights = nn.softmax(logits.astype(_at_least_float32(self.dtype))).astype(self.dtype)
        weights = Dropout(self.dropout, deterministic=not train)(weights)
        out = jnp.einsum("bnts,bnsd->bntd", weights, v).transpose(0, 2, 1, 3).reshape(query.shape)
        return nn.Dense(width, kernel_init=_xavier, dtype=self.dtype, name="out")(out)


class ValuePath(nn.Module):
    """What is left of an attention whose matrix is the identity, its values: [B,T,D] -> [B,T,D], each token alone."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, value: jax.Array) -> jax.Array:
        width = value.shape[-1]
        value = nn.Dense(width, kernel_init=_xavier, dtype=self.dtype, name="value")(value)
        return nn.Dense(width, kernel_init=_xavier, dtype=self.dtype, name="out")(value)


class FeedForward(nn.Module):
    """Two dense layers with ReLU between: [B,T,D] -> [B,T,D]."""

    hidden: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        hidden = nn.relu(nn.Dense(self.hidden, kernel_init=_xavier, dtype=self.dtype, name="in")(x))
        hidden = Dropout(self.dropout, deterministic=not train)(hidden)
        return nn.Dense(x.shape[-1], kernel_init=_xavier, dtype=self.dtype, name="out")(hidden)


class Layer(nn.Module):
    """One encoder layer, or, given a `memory` to attend to, one decoder layer: residual sublayers, norm after each.

    Without `positions`, which nothing but queries and keys takes, every attention is its `ValuePath`.
    """

    heads: int
    hidden: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array | None, memory: jax.Array | None = None, *, train: bool
    ) -> jax.Array:
        def attend(x: jax.Array, memory: jax.Array, name: str) -> jax.Array:
            if positions is None:
                return ValuePath(self.dtype, name=name)(memory)
            attention = Attention(self.heads, self.dropout, self.dtype, name=name)
            return attention(x + positions, memory + positions, memory, train=train)

        def residual(x: jax.Array, update: jax.Array, name: str) -> jax.Array:
            update = Dropout(self.dropout, deterministic=not train)(update)
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x + update)  # torch's epsilon, as UniAD

        x = residual(x, attend(x, x, "self_attention"), "norm_self")
        if memory is not None:
            x = jnp.broadcast_to(x, memory.shape)
            x = residual(x, attend(x, memory, "cross_attention"), "norm_cross")
        update = FeedForward(self.hidden, self.dropout, self.dtype, name="feed_forward")(x, train=train)
        return residual(x, update, "norm_feed_forward")


class Reconstructor(nn.Module):
    """ADTR's transformer, [B,h,w,C] -> [B,h,w,C] float32; defaults are the paper's.

    With `fold` f, f x f cells share one token, so that a finer grid costs no more attention; f divides h and w.
    Dropout is applied when `train` is true and draws from the rng "dropout".

    Two ablations of the paper, which tells no more than their names. `attention=False`, "without attention": the matrix
    of every attention is the identity, so that a token sees itself alone; what only makes that matrix, the projections
    of query and key, the positions and the dropout of weights, is not there. `query=False`, "without query": the
    decoder starts from the encoder's output instead of a learned query.
    """

    width: int = 256
    encoder_layers: int = 4
    decoder_layers: int = 4
    heads: int = 8
    hidden: int = 1024
    dropout: float = 0.1
    fold: int = 1
    positions: Positions = "factorised"
    attention: bool = True
    query: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        _, *grid, _ = features.shape
        if any(n % self.fold for n in grid):
            raise ValueError(f"fold {self.fold} must divide the feature grid, which is {grid[0]}x{grid[1]}")
        tokens = fold_cells(features.astype(self.dtype), self.fold)
        memory = nn.Dense(self.width, kernel_init=_xavier, dtype=self.dtype, name="project_in")(tokens)
        positions = None
        if self.attention:
            positions = self._position_embedding(grid[0] // self.fold, grid[1] // self.fold)[None].astype(self.dtype)

        settings = (self.heads, self.hidden, self.dropout, self.dtype)
        for i in range(self.encoder_layers):
            memory = Layer(*settings, name=f"encoder_{i}")(memory, positions, train=train)
        x = memory
        if self.query:
            query = self.param("query", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
            x = query[None].astype(self.dtype)
            # Until it attends to the memory it is the same for every example, but for what dropout leaves of it.
            if (train and self.dropout) or not self.decoder_layers:
                x = jnp.broadcast_to(x, memory.shape)
        for i in range(self.decoder_layers):
            x = Layer(*settings, name=f"decoder_{i}")(x, positions, memory, train=train)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        # Rounded to bfloat16, a reconstruction of 3.004 would be that of a feature of 3.000, and perfect.
        product = functools.partial(jax.lax.dot_general, preferred_element_type=_at_least_float32(self.dtype))
        project_out = nn.Dense(
            tokens.shape[-1], kernel_init=_xavier, dtype=self.dtype, dot_general=product, name="project_out"
        )
        return unfold_cells(project_out(x), self.fold, tuple(grid))

    def _position_embedding(self, rows: int, columns: int) -> jax.Array:
        """[T,D]; factorised: a row's and a column's vector of D/2 each."""
        normal = nn.initializers.normal(1.0)
        if self.positions == "per_token":
            return self.param("positions", normal, (rows * columns, self.width))
        row = self.param("row_positions", normal, (rows, self.width // 2))
        column = self.param("column_positions", normal, (columns, self.width // 2))
        table = jnp.concatenate(
            [
                jnp.broadcast_to(column[None], (rows, *column.shape)),
                jnp.broadcast_to(row[:, None], (rows, columns, self.width // 2)),
            ],
            axis=-1,
        )
        return table.reshape(rows * columns, self.width)
