"""How scripts/benchmark.py measures: us and a peer in turn, A B A B, on the same machine in the same process.

Times are wall-clock seconds of one call, its result waited for. Calls that are shorter than a tenth of a second come
several in a row, as many on both sides, and their mean counts: the first after a pause has to wake the cores. The ratio
is the peer's median over ours, above 1 where we are faster; its spread are the quartiles of the ratios of single pairs.
The limit of a row is what its work would take at the rate of a large float32 matrix product, or its input and output at
that of a large copy, the longer of both.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pushpull_jax.progress import progress_bar

TOLERANCE = 1e-4  # of the largest value: how far outputs of ours and of a peer may be apart
WARM_UP = 2  # calls before the first that counts; the first of them compiles
FEWEST, MOST = 5, 50  # pairs
BLOCK = 0.1  # seconds that are timed at once, at least: shorter calls come several in a row
PAUSE = 0.02  # seconds before each block: OpenMP's threads wait for more work in a loop, and would slow the other side

Call = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """What all rows share: small sizes and few repeats instead of the real ones, cores, and a folder for files."""

    quick: bool
    cores: int
    folder: Path
    seconds: float = 20.0  # that the pairs of one row may take


@dataclass(frozen=True)
class Contest:
    """One row, ready to be measured; that both give the same result is asserted before it is made.

    Attributes:
        ours: one call.
        peers: the same work by a peer, each way of running it by its name; the fastest is compared with.
        unit: "s", or something "/s", of which more is better.
        work: units of work in a call: images, steps.
        flops: floating-point operations of a call; 0 where they do not count.
        bytes: that a call reads and writes at the very least; 0 likewise.
        note: what else there is to say; why there is no peer.
        repeats: pairs; by default as many as fit into the time.
        warm: whether calls are made before those that count.
        self_timed: the calls return the seconds that they took.
        facts: further entries of the row, which the calls may add to.
    """

    ours: Call
    peers: Mapping[str, Call]
    unit: str
    work: float = 1.0
    flops: float = 0.0
    bytes: float = 0.0
    note: str = ""
    repeats: int | None = None
    warm: bool = True
    self_timed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def in_unit(self, seconds: float) -> float:
        """Seconds of a call in the unit of the row."""
        return seconds / self.work if self.unit == "s" else self.work / seconds


class Row(NamedTuple):
    """A row by its name, what it is, and how it is prepared: built, compiled, and compared with the peer's result."""

    name: str
    title: str
    prepare: Callable[[Settings], Contest]


class Machine(NamedTuple):
    """What the machine reaches: flop/s of a large float32 matrix product, and bytes/s of a large copy, both ways."""

    flops: float
    bandwidth: float


def timed(call: Call, contest: Contest, clock: Callable[[], float], calls: int = 1) -> float:
    """Seconds of a call, the mean of some in a row."""
    time.sleep(PAUSE)
    began = clock()
    for _ in range(calls):
        result = jax.block_until_ready(call())
    return result if contest.self_timed else (clock() - began) / calls


def calls_of(contest: Contest, seconds: float) -> int:
    """Calls in a block, where one takes so long; one of those that time themselves, or that nothing warms up."""
    if contest.self_timed or not contest.warm:
        return 1
    return max(1, math.ceil(BLOCK / max(seconds, 1e-9)))


def warmed_up(contest: Contest, clock: Callable[[], float]) -> tuple[float, str | None, float, str]:
    """Seconds of a warm call of ours, the name and seconds of the fastest peer, and what was said on the way."""

    def warm(call: Call) -> float:
        if not contest.warm:
            return 0.0
        for _ in range(WARM_UP):
            last = timed(call, contest, clock)
        calls = calls_of(contest, last)
        return timed(call, contest, clock, calls) if calls > 1 else last

    seconds, notes = {}, []
    for name, call in contest.peers.items():
        try:
            seconds[name] = warm(call)
        except Exception as error:  # torch.compile raises whatever its compiler does
            notes.append(f"{name} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    peer = min(seconds, key=seconds.get) if seconds else None
    if len(seconds) > 1:
        notes += [
            f"{name} {contest.in_unit(took):.4g} {contest.unit}" for name, took in seconds.items() if name != peer
        ]
    return warm(contest.ours), peer, seconds.get(peer, 0.0), "; ".join(notes)


def measure(contest: Contest, settings: Settings, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Measure one row.

    Returns:
        "ours", "peer", "ours_best", "peer_best", "ratio" (of medians), "spread" (two quartiles), "peer_is", "repeats",
        "calls" (in a row, each time) and "note"; those of a peer are None where there is none.
    """
    ours_took, name, peer_took, said = warmed_up(contest, clock)
    calls = calls_of(contest, min(ours_took, peer_took or ours_took))
    pairs = contest.repeats or int(np.clip(settings.seconds / max(calls * (ours_took + peer_took), 1e-9), FEWEST, MOST))
    ours, peer = [], []
    gc.collect()
    gc.disable()
    try:
        for _ in progress_bar(range(pairs), desc="pairs", total=pairs, unit="pair"):
            ours.append(timed(contest.ours, contest, clock, calls))
            if name is not None:
                peer.append(timed(contest.peers[name], contest, clock, calls))
    finally:
        gc.enable()
    row = {"ours": contest.in_unit(median(ours)), "peer": None, "ratio": None, "spread": None, "peer_is": name}
    # The best blocks beside the medians tell how much else the machine had to do.
    row |= {"ours_best": contest.in_unit(min(ours)), "peer_best": contest.in_unit(min(peer)) if peer else None}
    if peer:
        ratios = np.divide(peer, ours)
        row |= {"peer": contest.in_unit(median(peer)), "ratio": median(peer) / median(ours)}
        row["spread"] = [float(q) for q in np.quantile(ratios, [0.25, 0.75])]
    return row | {"repeats": pairs, "calls": calls, "note": "; ".join(filter(None, (contest.note, said)))}


def limits(contest: Contest, machine: Machine, ours: float) -> dict[str, Any]:
    """The "limit" of a row in its unit, what it is "limited_by", and the "utilisation": flop/s over the matmul's."""
    by_flops, by_bytes = contest.flops / machine.flops, contest.bytes / machine.bandwidth
    if not max(by_flops, by_bytes):
        return {"limit": None, "limited_by": None, "utilisation": None}
    # `in_unit` is its own inverse, since the unit is either time or its reciprocal.
    seconds = ours * contest.work if contest.unit == "s" else contest.work / ours
    return {
        "limit": contest.in_unit(max(by_flops, by_bytes)),
        "limited_by": "flops" if by_flops >= by_bytes else "bytes",
        "utilisation": by_flops / seconds if by_flops else None,
    }


def measure_machine(settings: Settings) -> Machine:
    """What this machine reaches: the best of a few, and of the libraries that are here."""
    on_cpu = jax.default_backend() == "cpu"
    side = 256 if settings.quick else 2048 if on_cpu else 8192
    size = 2**22 if settings.quick else 2**28
    rng = np.random.default_rng(0)
    a = rng.standard_normal((side, side), np.float32)
    products = [lambda: a @ a] if on_cpu else []
    on_device, multiply = jax.device_put(a), jax.jit(jnp.matmul)
    products.append(lambda: multiply(on_device, on_device).block_until_ready())
    if on_cpu and (torch := torch_or_none(settings)):
        products.append(lambda: torch.from_numpy(a) @ torch.from_numpy(a))
    copy = _host_copy(size, settings.cores) if on_cpu else _device_copy(size)
    return Machine(2 * side**3 / min(map(_best, products)), 2 * size / _best(copy))


def _best(call: Call, repeats: int = 8) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _host_copy(size: int, cores: int) -> Call:
    """A copy of `size` bytes in the host's memory, a thread for each core."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    pairs = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    pool = ThreadPoolExecutor(cores)
    return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))


def _device_copy(size: int) -> Call:
    source, copy = jax.device_put(np.ones(size, np.uint8)), jax.jit(lambda x: x ^ np.uint8(1))
    return lambda: copy(source).block_until_ready()


def cost(function: Callable, *arguments: Any) -> tuple[float, float]:
    """Flops of a function as XLA counts them before it optimises, and bytes of its arguments and results.

    The body of a loop counts once, so the function must be written without.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # XLA counts for no other platform before it compiles
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), arguments)
        flops = jax.jit(function).lower(*shapes).cost_analysis()["flops"]
    leaves = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    return flops, float(sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves))


def assert_equal(what: str, ours: Any, peers: Any, tolerance: float = TOLERANCE) -> None:
    """Raises ValueError where two arrays are further apart than `tolerance` of the largest value, or not finite."""
    ours, peers = np.asarray(ours, np.float64), np.asarray(peers, np.float64)
    if ours.shape != peers.shape:
        raise ValueError(f"{what}: ours has shape {list(ours.shape)}, the peer's {list(peers.shape)}")
    apart = np.abs(ours - peers).max() / max(np.abs(peers).max(), 1e-30)
    if not apart <= tolerance:
        raise ValueError(f"{what}: ours and the peer's are {apart:.2g} of the largest value apart, over {tolerance:g}")


def torch_or_none(settings: Settings):
    """PyTorch with as many threads as there are cores, where it is installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(settings.cores)
    return torch
