"""Several trainings in one compiled program: everything of a run gets a leading axis of members, [M].

Members differ in numbers alone, their `Settings`; what is compiled, shapes above all, they share. They are trained in
blocks: a loop over blocks of m members, each block one `vmap`, and the members spread over the devices of the mesh axis
"grid". Features are the rows of one bank, [N,h,w,C] not standardised, which every member reads.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pushpull_jax.detector import Network, detect_features
from pushpull_jax.features import Standardisation
from pushpull_jax.mesh import device_mesh
from pushpull_jax.objectives import push_pull, squared
from pushpull_jax.resources import free_memory, needed_memory
from pushpull_jax.steps import (
    Batch,
    LossFunction,
    State,
    clipped_adamw,
    init_state,
    make_step,
    scan_steps,
    training_apply,
)
from pushpull_jax.whitening import Moments, moments

# Share of a device's free memory that a program may take.
MEMORY_SHARE = 0.5
# Members that are tried at a time at first, by platform: on CPU one fills the cores and their caches.
START = {"cpu": 1}


class Settings(NamedTuple):
    """The numbers of one run; those of several are stacked."""

    seed: Any  # [] uint32, of initial weights, dropout and jitter
    rates: Any  # [steps] float32: learning rate of each step
    weight_decay: Any  # [] float32, and so on
    clip_norm: Any
    jitter: Any
    alpha: Any
    k: Any  # [] int32
    is_push_pull: Any  # [] bool
    units: Any  # [stages]: of the residuals, see `objectives.push_pull`
    standardisation: Standardisation
    examples: dict[str, Any]  # "row" [E], "mask" [E,h,w], "label" [E] and "kind" [E]; members with fewer are padded


class Traits(NamedTuple):
    """What members share and the program is compiled for."""

    network: Network
    is_jittered: bool  # any of them
    losses: frozenset[bool]  # whether push-pull, of all members
    by_stage: bool


def over_members(function: Callable[[Any, Any], Any], mesh: Mesh) -> Callable[[Any, Any], Any]:
    """(members' arguments, each leaf [M,...]; shared arguments) -> members' results, each leaf [M,...].

    Args:
        function: (arguments of one member, shared arguments) -> result; a device computes one member after another.
        mesh: its axis "grid" divides M.
    """

    def on_device(members: Any, shared: Any) -> Any:
        return jax.lax.map(lambda member: function(member, shared), members)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(P("grid"), P()), out_specs=P("grid"), check_vma=False)


def advance_members(function: Callable, mesh: Mesh, *, block: int) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """(states, members' arguments, each leaf [M,...]; shared arguments) -> states, and members' results [M,...].

    The states are carried from block to block and changed where they are: `lax.map` would write them somewhere else,
    which takes their memory twice, and 4 % of the time of a step of the demo (docs/experiments.md, section 11).

    Args:
        function: (state and arguments of one member, shared arguments) -> state and result.
        mesh: M is a multiple of its axis "grid", and what each device gets a multiple of `block`.
        block: members that a device computes at a time.
    """

    def on_device(states: Any, members: Any, shared: Any) -> tuple[Any, Any]:
        count = len(jax.tree.leaves(states)[0])

        def advance(states: Any, first: jax.Array) -> tuple[Any, Any]:
            some = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, block), (states, members))
            # A block of one is no vmap, under which the steps of a last, shorter chunk would be computed all the same.
            over = jax.vmap if block > 1 else lambda one: functools.partial(jax.lax.map, one)
            changed, results = over(lambda member: function(member, shared))(some)
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
            return jax.tree.map(put, states, changed), results

        states, results = jax.lax.scan(advance, states, jnp.arange(0, count, block))
        return states, jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), results)

    grid, specs = P("grid"), (P("grid"), P("grid"), P())
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=grid, check_vma=False)


def initial(traits: Traits, member: Settings, shared: None) -> State:
    """The state of one member before the first step."""
    features, channels = traits.network.features, sum(traits.network.features.widths)
    shape = (features.grid, features.grid, channels)
    return init_state(jax.random.key(member.seed), traits.network.reconstructor, _optimizer(member), shape)


def train_chunk(
    traits: Traits, member: tuple[State, tuple[Settings, jax.Array]], features: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    """Some steps of one member: (state, (settings, indices [n,B] among its examples)) -> state, and metrics [n]."""
    state, (settings, indices) = member
    jitter = settings.jitter if traits.is_jittered else 0.0
    apply = training_apply(traits.network.reconstructor, jitter=jitter, precision=traits.network.matmul_precision)
    step = make_step(_loss(traits, settings), apply, _optimizer(settings))

    def choose(chosen: jax.Array) -> Batch:
        batch = {name: leaf[chosen] for name, leaf in settings.examples.items()}
        return batch | {"features": settings.standardisation(features[batch.pop("row")])}

    return scan_steps(step, choose, state, indices, jax.random.key(settings.seed))


def sum_moments(
    traits: Traits, member: tuple[Any, Standardisation, jax.Array], features: jax.Array
) -> dict[str, Moments]:
    """Moments of one member's residuals over some rows [B], -1 for none, of whatever its score is in units of."""
    parameters, standardisation, rows = member
    chosen = standardisation(features[rows])
    rest = chosen - traits.network.reconstruct(parameters, chosen)
    counts = (rows >= 0).astype(jnp.float32)
    return {
        name: Moments(
            *(jnp.tensordot(counts, leaf, axes=1, precision=jax.lax.Precision.HIGHEST) for leaf in moments(part))
        )
        for name, part in traits.network.measured(rest).items()
    }


def detect_rows(
    traits: Traits, member: tuple[dict[str, Any], Standardisation, jax.Array], features: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Scores [B] and maps [B,S,S] of one member of some rows [B]; of a row of -1 they mean nothing."""
    parameters, standardisation, rows = member
    return detect_features(traits.network, parameters, standardisation(features[rows]))


def _optimizer(settings: Settings):
    return clipped_adamw(
        lambda count: settings.rates[count], weight_decay=settings.weight_decay, clip_norm=settings.clip_norm
    )


def _loss(traits: Traits, settings: Settings) -> LossFunction:
    """The loss of one member; where members differ in it, both are computed and one is taken."""
    units = ()
    if traits.by_stage:
        widths = traits.network.features.widths
        units = tuple((width, settings.units[stage]) for stage, width in enumerate(widths))
    push = functools.partial(push_pull, k=settings.k, alpha=settings.alpha, units=units)
    if len(traits.losses) == 1:
        return push if True in traits.losses else squared
    return lambda batch, reconstruction: jnp.where(
        settings.is_push_pull, push(batch, reconstruction), squared(batch, reconstruction)
    )


class Compiled(NamedTuple):
    """A program over members that is compiled, and why it computes so many of them at a time."""

    run: Callable
    mesh: Mesh
    block: int
    reason: str


def meshes_for(members: int, *, wanted: int) -> list[Mesh]:
    """The meshes that may train some members, to be tried in this order.

    Devices of a CPU share its cores: as many are taken as divide the members, since a filler costs what a member does.
    They share its memory too, which may hold fewer members at a time.

    Args:
        members: how many there are, 1 or more.
        wanted: devices along "grid"; -1 leaves it to this function.
    """
    if wanted != -1 or jax.default_backend() != "cpu":
        return [device_mesh(grid=wanted)]
    most = min(members, jax.device_count())
    return [device_mesh(grid=count) for count in range(most, 0, -1) if members % count == 0]


def compile_in_blocks(function: Callable, meshes: Sequence[Mesh], states: Any, members: Any, shared: Any) -> Compiled:
    """Compile `advance_members`, which may overwrite the states, to fit the memory by XLA's own account.

    Args:
        function: (state and arguments of one member, shared arguments) -> state and result.
        meshes: see `meshes_for`; the first is taken on whose devices a block fits, otherwise the last.
        states: stacked states, or their shapes.
        members: stacked arguments, or their shapes.
        shared: shared arguments, or their shapes.
    """
    for mesh in meshes:
        free, whose = free_memory(mesh.devices.flat[0], devices=mesh.size)
        budget, each = MEMORY_SHARE * free, NamedSharding(mesh, P("grid"))
        shapes = _shapes(states, each), _shapes(members, each), _shapes(shared, NamedSharding(mesh, P()))
        program, block, need = _fitted(function, mesh, budget, shapes)
        if need <= budget:
            break
    count = jax.tree.leaves(states)[0].shape[0]
    where = f"{count} members on {mesh.size} of {jax.device_count()} devices"
    if mesh is not meshes[0]:
        where += ", since more do not fit the memory"
    elif len(meshes) > 1 and mesh.size < jax.device_count():
        where += ", the most that divide them"
    said = f"{need / 2**30:.2f} GB of {budget / 2**30:.1f} GB ({MEMORY_SHARE:.0%} of {whose})"
    return Compiled(
        program, mesh, block, f"{where}: {count // mesh.size} on each, {block} at a time, which need {said}"
    )


def _fitted(function: Callable, mesh: Mesh, budget: float, shapes: tuple) -> tuple[Callable, int, int]:
    """The program with the largest block that fits, or with one of 1, its block, and the bytes it needs on a device."""
    each = jax.tree.leaves(shapes)[0].shape[0] // mesh.shape["grid"]
    block = largest_block(each, START.get(mesh.devices.flat[0].platform, 8))
    while True:
        advance = jax.jit(advance_members(function, mesh, block=block), donate_argnums=0)
        compiled = advance.lower(*shapes).compile()
        need = needed_memory(compiled)
        # Temporary memory grows with the block; what is passed in and out does not.
        fitting = largest_block(each, max(1, int(block * budget / need)) if need > budget else block)
        if fitting >= block:
            return compiled, block, need
        block = fitting


def _shapes(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def largest_block(each: int, most: int) -> int:
    """The largest divisor of some members that is at most `most`."""
    return next(block for block in range(min(each, most), 0, -1) if each % block == 0)
