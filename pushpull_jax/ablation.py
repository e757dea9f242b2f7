"""The ablation program: a grid of runs, trained and scored together, in a table with its deviation over seeds.

Runs that differ in nothing that is compiled form a group, and one program trains all of it (`grid`). Images are read
and their features extracted once, whoever uses them. A grid that was stopped goes on: a finished group from its rows,
an unfinished one from its newest checkpoint.

ablation.json                    the grid, versions, command, and what data it saw
group_N/checkpoints, metrics.jsonl        states of all members of a group, and their losses
members.jsonl                    a row for each member that is finished
ablation.csv, report.html        the result
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pushpull_jax import workdir as files
from pushpull_jax.ablation_report import ablation_csv, write_ablation_report
from pushpull_jax.batching import BATCH_SIZE
from pushpull_jax.bucket import absolute
from pushpull_jax.checkpoint import Checkpoints
from pushpull_jax.config import Ablation, Config, flatten, from_dict, runs_of, to_dict
from pushpull_jax.data.manifest import Record
from pushpull_jax.detector import build_network, build_optimizer
from pushpull_jax.errors import InputError
from pushpull_jax.evaluation import METRICS, measure_categories
from pushpull_jax.examples import RunRecords, TrainingData, prepare, read_run
from pushpull_jax.feature_bank import FeatureBank
from pushpull_jax.features import Standardisation
from pushpull_jax.fit import chunk_indices, first_state, with_residuals
from pushpull_jax.grid import (
    Compiled,
    Settings,
    Traits,
    compile_in_blocks,
    detect_rows,
    initial,
    meshes_for,
    over_members,
    sum_moments,
    train_chunk,
)
from pushpull_jax.hosts import process_count
from pushpull_jax.mesh import device_mesh, replicate, replicate_memory, spread
from pushpull_jax.models.nearest import NearestNeighbour
from pushpull_jax.objectives import stage_levels
from pushpull_jax.preemption import Preempted, sigterm_noted
from pushpull_jax.progress import progress_bar, say
from pushpull_jax.scored import Scored, with_pixels
from pushpull_jax.start import Start, check_start, read_start
from pushpull_jax.steps import State, learning_rates
from pushpull_jax.streaming_metrics import ExactPixels
from pushpull_jax.weights import load_backbone
from pushpull_jax.whitening import Moments

GRID, MEMBERS, TABLE, REPORT = "ablation.json", "members.jsonl", "ablation.csv", "report.html"

# Fields in which the runs of one program agree; all others are numbers to it, or rows of the bank.
COMPILED = (
    "features.", "reconstructor.", "data.source", "data.root", "data.image_size", "data.resize", "data.on_unreadable",
    "training.steps", "training.batch_size", "supervision.by_stage", "scoring.map", "scoring.blocks",
    "scoring.smoothing", "scoring.window", "compute.", "log.", "checkpoint.", "mesh.",
)  # fmt: skip
# Fields that runs which read the same images agree in.
READ = ("features.", "compute.", "data.source", "data.root", "data.image_size", "data.resize", "data.on_unreadable")


class Test(NamedTuple):
    """The test images of a member that can be read."""

    records: tuple[Record, ...]
    rows: np.ndarray  # [n] of the bank
    masks: np.ndarray  # [n,S,S] bool
    has_mask: np.ndarray  # [n] bool


class Member(NamedTuple):
    """One run of a group."""

    number: int  # among all runs of the grid
    config: Config
    data: TrainingData
    test: Test
    start: Start | None


def ablate(ablation: Ablation, workdir: str | Path, *, command: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train and score all runs of a grid, or go on with one that was stopped.

    No threshold is fitted: the metrics need none. Each run's numbers are those of `train`, to float rounding.

    Args:
        ablation: the grid.
        workdir: its folder, new or empty, or that of the same grid.
        command: what was typed, for ablation.json.

    Returns:
        A row for each run: "member", "group", "settings" (the fields that vary), "metrics", and "loss", pairs of a step
        and the mean loss up to it.

    Raises:
        InputError: a run or its data cannot be used (nothing is written then), or the folder holds something else.
    """
    folder, runs = files.run_folder(workdir), runs_of(ablation, source="ablation")
    if process_count(ablation.config.hosts) > 1:
        raise InputError(
            "hosts.processes: an ablation runs in one process, on all devices of it; start it once, and within a "
            "cluster's job with --hosts.processes 1"
        )
    if elsewhere := sorted({run.features.keep for run in runs} - {"auto", "memory"}):
        raise InputError(f"features.keep: an ablation keeps features in memory, not {' or '.join(elsewhere)}")
    resumed = _check_startable(folder, ablation)
    records = [read_run(run) for run in runs]
    starts = [read_start(run, None) if run.training.start else None for run in runs]
    members = _prepared(runs, records, starts)
    _write_grid(folder, ablation, members, command, resumed)
    files.write_lines(folder / MEMBERS, files.read_lines(folder / MEMBERS))  # without a line that was torn
    groups = _grouped(runs, COMPILED)
    say(f"{len(runs)} runs, in {len(groups)} compiled program{'s' if len(groups) > 1 else ''}")
    for number, group in enumerate(groups):
        done = {row["member"] for row in files.read_lines(folder / MEMBERS)}
        if not done >= set(group):
            bank, chosen = members[group[0]][0], [members[i][1] for i in group]
            _run_group(bank, chosen, folder, number, ablation, done)
    rows = sorted(files.read_lines(folder / MEMBERS), key=lambda row: row["member"])
    rows = [row | {"metrics": {n: np.nan if v is None else v for n, v in row["metrics"].items()}} for row in rows]
    files.write_text(folder / TABLE, ablation_csv(rows))
    write_ablation_report(folder / REPORT, rows, title=absolute(folder).name, details=_details(folder))
    return rows


def _check_startable(folder: Path, ablation: Ablation) -> bool:
    """Whether a grid is resumed; raises where the folder holds something else."""
    if not (folder / GRID).is_file():
        if folder.exists() and (not folder.is_dir() or any(path.suffix != ".part" for path in files.contents(folder))):
            raise InputError(f"workdir {folder} exists and is not an ablation: choose an empty or a new folder")
        return False
    there, here = files.read_json(folder / GRID), _plain(ablation)
    # Fields that are newer than the grid have their defaults.
    config = from_dict(there.get("config"), source=str(folder / GRID))
    there |= files.as_json({"config": to_dict(config)})
    for name in ("config", "vary"):
        if there.get(name) != here[name]:
            raise InputError(f"workdir {folder} holds an ablation with another {name}; choose a new folder")
    return True


def _plain(ablation: Ablation) -> dict[str, Any]:
    """The grid as JSON has it."""
    vary = {name: [list(v) if isinstance(v, tuple) else v for v in values] for name, values in ablation.vary.items()}
    return files.as_json({"config": to_dict(ablation.config), "vary": vary})


def _write_grid(folder: Path, ablation: Ablation, members: list, command: Sequence[str], resumed: bool) -> None:
    fingerprints = sorted({member.data.summary["fingerprint"] for _, member in members})
    if resumed:
        if files.read_json(folder / GRID)["fingerprints"] != fingerprints:
            raise InputError(f"workdir {folder} holds an ablation on other data: its files differ from those there now")
        return
    folder.mkdir(parents=True, exist_ok=True)
    rest = {"fingerprints": fingerprints, "versions": files.versions(), "command": list(command)}
    files.write_json(folder / GRID, _plain(ablation) | rest)


def _grouped(runs: Sequence[Config], fields: tuple[str, ...]) -> list[list[int]]:
    """Positions of the runs that agree in some fields, by their prefixes."""
    groups: dict[tuple, list[int]] = {}
    for i, run in enumerate(runs):
        key = tuple(item for item in flatten(run).items() if item[0].startswith(fields))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _prepared(
    runs: Sequence[Config], records: Sequence[RunRecords], starts: Sequence[Start | None]
) -> list[tuple[FeatureBank, Member]]:
    """Each run with its data, and the bank that these are rows of; what several runs have in common is read once."""
    prepared: list = [None] * len(runs)
    for group in _grouped(runs, READ):
        features = runs[group[0]].features
        backbone, parameters = load_backbone(features.backbone, weights=features.weights or None)
        bank = FeatureBank(build_network(runs[group[0]], backbone=backbone).features, parameters, runs[group[0]].data)
        data: dict[Any, TrainingData] = {}
        tests: dict[Any, Test] = {}
        for i in group:
            run, start = runs[i], starts[i]
            supervision = replace(run.supervision, alpha=0.0, k=1)  # these choose no image
            key = (records[i], run.seed, supervision, run.scoring, run.training.start, run.training.batch_size)
            if key not in data:
                known = Standardisation(**start.frozen["standardisation"]) if start else None
                data[key] = prepare(run, bank, records[i], standardisation=known)
                if start:
                    check_start(start, data[key])
            if records[i].test not in tests:
                tests[records[i].test] = _read_test(bank, records[i].test)
            prepared[i] = bank, Member(i, run, data[key], tests[records[i].test], start)
    return prepared


def _read_test(bank: FeatureBank, records: tuple[Record, ...]) -> Test:
    dropped: dict[str, str] = {}
    rows, masks, has_mask = bank.rows_with_masks(records, what="test images", dropped=dropped)
    return Test(tuple(record for record in records if record.key not in dropped), rows, masks, has_mask)


def _run_group(
    bank: FeatureBank, members: list[Member], folder: Path, number: int, ablation: Ablation, done: set[int]
) -> None:
    """Train the members of a group, then score those that are not done, one row each."""
    config = members[0].config
    network = build_network(config, backbone=bank.spec.backbone)
    losses = frozenset(member.config.training.loss == "push_pull" for member in members)
    is_jittered = any(member.config.training.jitter for member in members)
    traits = Traits(network, is_jittered, losses, config.supervision.by_stage)
    meshes = meshes_for(len(members), wanted=config.mesh.grid)
    mesh = meshes[0]
    features = replicate_memory(bank.features, mesh)
    settings, states = _first(traits, bank, members, mesh)
    inside = folder / f"group_{number}"
    states, losses_by_step, mesh = _train(traits, members, states, settings, features, meshes, inside)
    parameters, standardisations = jax.device_get((states.parameters, settings.standardisation))
    score = _Scoring(traits, mesh, replicate(features, mesh))
    size = mesh.shape["grid"]
    bar = progress_bar(desc=f"scoring group {number}", total=len(members), unit="run")
    with bar, files.Log(folder / MEMBERS, files.read_lines(folder / MEMBERS)) as rows:
        for first in range(0, len(members), size):
            some = members[first : first + size]
            if not done >= {member.number for member in some}:
                own = jax.tree.map(lambda leaf: leaf[first : first + size], (parameters, standardisations))  # noqa: B023
                for place_, (member, metrics) in enumerate(zip(some, score(some, *own), strict=True)):
                    if member.number not in done:
                        flat = flatten(member.config)
                        row = {"member": member.number, "group": number}
                        row |= {"settings": {name: flat[name] for name in ablation.vary}, "metrics": metrics}
                        curve = [[step, values[first + place_]] for step, values in losses_by_step]
                        rows.add(row | {"loss": curve})
            bar.update(len(some))


def _first(traits: Traits, bank: FeatureBank, members: list[Member], mesh: Any) -> tuple[Settings, State]:
    """Settings and first states of all members, stacked, and repeated until every device has as many."""
    network = traits.network
    hosted = [_host_state(member, bank, network) for member in members]
    most = max(len(member.data.examples["row"]) for member in members)
    numbers = []
    for member, state in zip(members, hosted, strict=True):
        units = np.ones(len(network.features.widths), np.float32)
        if traits.by_stage:
            normal = member.data.features(bank, member.data.normal)
            start = first_state(member.config, network, normal, None, device_mesh()) if state is None else state
            units = np.float32(stage_levels(network, start.parameters, normal))
        numbers.append(_settings(member, units, most))
    missing = -len(members) % mesh.shape["grid"]
    settings = _spread(_stacked(numbers + numbers[:1] * missing), mesh)
    if all(state is None for state in hosted):
        return settings, jax.jit(over_members(functools.partial(initial, traits), mesh))(settings, None)
    return settings, _spread(_stacked([jax.device_get(state) for state in hosted + hosted[:1] * missing]), mesh)


def _host_state(member: Member, bank: FeatureBank, network: Any) -> State | None:
    """The first state where it depends on more than the seed."""
    if member.start is None and not isinstance(network.reconstructor, NearestNeighbour):
        return None
    normal = member.data.features(bank, member.data.normal)
    return first_state(member.config, network, normal, member.start and member.start.parameters, device_mesh())


def _settings(member: Member, units: np.ndarray, most: int) -> Settings:
    """The numbers of a run; its examples filled up to `most`, of which none is ever drawn."""
    config, training, supervision = member.config, member.config.training, member.config.supervision
    rate = build_optimizer(config)[1]
    examples = {
        name: np.pad(leaf, ((0, most - len(leaf)), *((0, 0),) * (leaf.ndim - 1)))
        for name, leaf in member.data.examples.items()
    }
    return Settings(
        seed=np.uint32(config.seed),
        rates=learning_rates(rate, max(training.steps, 1)),
        weight_decay=np.float32(training.weight_decay),
        clip_norm=np.float32(training.clip_norm),
        jitter=np.float32(training.jitter),
        alpha=np.float32(supervision.alpha),
        k=np.int32(supervision.k),
        is_push_pull=np.bool_(training.loss == "push_pull"),
        units=units,
        standardisation=Standardisation(*map(np.asarray, member.data.standardisation)),
        examples=examples,
    )


def _spread(members: Any, mesh: Any) -> Any:
    """Stacked leaves on the devices of their members."""
    return spread(members, mesh, "grid")


def _stacked(trees: list) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _train(
    traits: Traits, members: list[Member], states: State, settings: Settings, features: Any, meshes: list, folder: Path
) -> tuple[State, list, Mesh]:
    """Train to the last step, from the newest checkpoint on.

    Returns:
        The states, pairs of step and losses [M], and the mesh to go on with: the one whose memory holds the members.
    """
    config = members[0].config
    steps, size, count = config.training.steps, config.log.every, len(settings.seed)
    log = folder / files.LOG
    saved = Checkpoints(folder / files.CHECKPOINTS, keep=1, minutes=config.checkpoint.minutes)
    with sigterm_noted() as notice, saved as checkpoints:
        step = checkpoints.latest or 0
        try:
            states = _spread(checkpoints.restore(states, step=step), meshes[0]) if step else states
        except InputError as error:
            say(f"{error}; {folder.name} is trained anew")
            checkpoints.discard_after(step := 0)
        rows = [row for row in files.read_lines(log) if row["step"] <= step]
        files.write_lines(log, rows)
        mesh = meshes[-1]  # where nothing is left to train, nothing tells what the memory holds
        if step < steps:
            program = _compile_training(traits, states, settings, features, meshes, size, config)
            mesh = program.mesh
            states, settings, features = *_spread((states, settings), mesh), replicate(features, mesh)
        bar = progress_bar(desc=folder.name, total=steps, initial=step, unit="step")
        with bar, files.Log(log, rows) as written:
            while step < steps:
                last = min((step // size + 1) * size, steps)
                drawn = [chunk_indices(m.config, m.data.pools, step, last) for m in members]
                indices = _spread(np.stack(drawn + drawn[:1] * (count - len(drawn))), mesh)
                states, told = program.run(states, (settings, indices), features)
                losses = jax.device_get(told["loss"])[: len(members), : last - step].mean(axis=1)
                written.add({"step": last, "loss": losses.tolist()})
                checkpoints.check()
                told_to_stop = notice.is_due()
                if last % config.checkpoint.every == 0 or last == steps or told_to_stop or checkpoints.is_due():
                    written.flush()
                    checkpoints.save(states, step=last)
                if told_to_stop:
                    raise Preempted(f"{folder}: told to stop; the states of step {last} are saved")
                bar.set_postfix(loss=f"{np.min(losses):.4f} to {np.max(losses):.4f}", refresh=False)
                bar.update(last - step)
                step = last
    curves = [(row["step"], row["loss"]) for row in files.read_lines(log)]
    if curves:
        for member, value in zip(members, curves[-1][1], strict=True):
            if value is None:
                say(f"run {member.number}: its last losses are not finite, and those steps were not applied")
    return states, curves, mesh


def _compile_training(
    traits: Traits, states: State, settings: Settings, features: Any, meshes: list, size: int, config: Config
) -> Compiled:
    indices = np.zeros((len(settings.seed), size, config.training.batch_size), np.int32)
    function = functools.partial(train_chunk, traits)
    program = compile_in_blocks(function, meshes, states, (settings, indices), features)
    say(program.reason)
    return program


class _Scoring:
    """Metrics of some members at a time, one a device, by two programs that are compiled once a group."""

    def __init__(self, traits: Traits, mesh: Any, features: Any):
        self.traits, self.mesh, self.features = traits, mesh, features
        self.moments = jax.jit(over_members(functools.partial(sum_moments, traits), mesh))
        self.detect = jax.jit(over_members(functools.partial(detect_rows, traits), mesh))

    def __call__(self, members: list[Member], parameters: Any, standardisations: Any) -> list[dict[str, float]]:
        """METRICS of each member."""
        some = _spread((parameters, standardisations), self.mesh)
        normal = [np.concatenate([m.data.normal, m.data.held]) for m in members]
        sums: list[dict[str, Moments]] = [{} for _ in members]
        for rows in self._batches(normal):
            for name, added in jax.device_get(self.moments((*some, rows), self.features)).items():
                for i, total in enumerate(sums):
                    own = Moments(*(leaf[i].astype(np.float64) for leaf in added))
                    total[name] = Moments(*map(np.add, total[name], own)) if name in total else own
        trees = [with_residuals({}, total) for total in sums]
        trees += trees[:1] * (len(jax.tree.leaves(parameters)[0]) - len(members))
        usual = _spread(_stacked(trees), self.mesh)
        tree = {"reconstructor": some[0], **usual}
        scored = [Scored((), np.zeros(0, np.float32), np.zeros(0, bool), {}, {}) for _ in members]
        for first, rows in enumerate(self._batches([m.test.rows for m in members])):
            scores, maps = jax.device_get(self.detect((tree, some[1], rows), self.features))
            for i, member in enumerate(members):
                scored[i] = _with_batch(scored[i], member.test, first * BATCH_SIZE, scores[i], maps[i])
        results = [measure_categories(of_member, np.inf) for of_member in scored]
        return [{name: result[name] for name in METRICS} for result in results]

    def _batches(self, rows: list[np.ndarray]):
        """Batches [M,BATCH_SIZE] of rows, one member's beside another's, filled up with -1."""
        count, most = self.mesh.shape["grid"], max(map(len, rows))
        table = np.full((count, -(-most // BATCH_SIZE) * BATCH_SIZE), -1, np.int32)
        for i, own in enumerate(rows):
            table[i, : len(own)] = own
        for first in range(0, table.shape[1], BATCH_SIZE):
            yield _spread(table[:, first : first + BATCH_SIZE], self.mesh)


def _with_batch(scored: Scored, test: Test, first: int, scores: np.ndarray, maps: np.ndarray) -> Scored:
    """What is scored so far, with the images of a batch that are there."""
    some = slice(first, min(first + BATCH_SIZE, len(test.records)))
    count = max(some.stop - some.start, 0)
    truth = {"mask": test.masks[some], "has_mask": test.has_mask[some]}
    records = test.records[some]
    return Scored(
        scored.records + records,
        np.concatenate((scored.scores, scores[:count])),
        np.concatenate((scored.has_mask, truth["has_mask"])),
        with_pixels(scored.pixels_of, records, truth, maps[:count], ExactPixels()),
        {},
    )


def _details(folder: Path) -> dict[str, str]:
    """Where the numbers come from."""
    grid = files.read_json(folder / GRID)
    return {
        "command": " ".join(grid["command"]) or "called from Python",
        "data fingerprint": ", ".join(grid["fingerprints"]),
        "versions": ", ".join(f"{name} {version}" for name, version in grid["versions"].items()),
    }
