"""Ablation grids: every member's numbers are those of the same run alone, one compiled program for all that fits it."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from pushpull_jax import ablation as ablation_module
from pushpull_jax import cli, grid
from pushpull_jax import steps as steps_module
from pushpull_jax.ablation import ablate
from pushpull_jax.config import (
    Ablation,
    Checkpoint,
    Config,
    Data,
    Features,
    Log,
    Mesh,
    Reconstructor,
    Scoring,
    Supervision,
    Training,
    load_ablation,
    runs_of,
    shipped_ablations,
    varied,
)
from pushpull_jax.data.demo import write_demo
from pushpull_jax.errors import InputError
from pushpull_jax.mesh import device_mesh, replicate, spread
from pushpull_jax.resources import needed_memory
from pushpull_jax.training import train

METRICS = ("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two categories of different size."""
    folder = tmp_path_factory.mktemp("data")
    write_demo(folder, train=10, good=2, per_defect=2, size=64)
    other = tmp_path_factory.mktemp("other")
    write_demo(other, train=7, good=1, per_defect=1, size=64, seed=5)
    (other / "flange").rename(folder / "other")
    return folder


@pytest.fixture(scope="module")
def config(root) -> Config:
    return Config(
        data=Data(root=str(root), category="flange", image_size=64),
        features=Features(backbone="pixels", stages=(2, 3), grid=8, standardise=True),
        reconstructor=Reconstructor(width=16, encoder_layers=0, decoder_layers=1, heads=2, hidden=16),
        training=Training(steps=5, batch_size=4, loss="push_pull", learning_rate=3e-3),
        supervision=Supervision(shots=4, labels=("mask", "image"), share=0.5, by_stage=True),
        scoring=Scoring(held_out=0.2, map="whitened", blocks=(1,)),
        log=Log(every=2),
        checkpoint=Checkpoint(every=2),
    )


@pytest.fixture(scope="module")
def ablation(config) -> Ablation:
    """Everything that may differ within one program: 20 members, which 8 devices do not divide."""
    vary = {
        "data.category": ("flange", "other"),
        "supervision.alpha": (0.003, 0.3),
        "seed": (0, 1, 2, 3, 4),
    }
    return Ablation(replace(config, mesh=Mesh(grid=8)), vary)


@pytest.fixture(scope="module")
def finished(ablation, tmp_path_factory) -> tuple[Path, list[dict], int]:
    """Folder and rows of a grid, and how often its step was traced."""
    traced, original = [], steps_module.scan_steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "scan_steps", lambda *a: traced.append(1) or original(*a))
        folder = tmp_path_factory.mktemp("grids") / "grid"
        return folder, ablate(ablation, folder), len(traced)


@pytest.fixture
def one_device(monkeypatch):
    """Compiling for eight takes as many times as long, and most of it goes into programs that run a few times."""
    monkeypatch.setattr(ablation_module, "meshes_for", lambda *_, **__: [device_mesh()])
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_same(row: dict, alone: Path, *, loss: float = 1e-4) -> None:
    """A member's losses and metrics are those of a run."""
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in row["loss"]] == [line["step"] for line in lines]
    np.testing.assert_allclose([value for _, value in row["loss"]], [line["loss"] for line in lines], rtol=loss)
    metrics = json.loads((alone / "metrics.json").read_text())
    np.testing.assert_allclose([row["metrics"][n] for n in METRICS], [metrics[n] for n in METRICS], atol=5e-3)


def test_a_grid_is_one_trace_on_eight_devices(finished):
    assert jax.device_count() == 8
    assert finished[2] == 1 and len(finished[1]) == 20


@pytest.mark.parametrize("number", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_a_member_is_the_run_alone(ablation, finished, tmp_path, number):
    run = runs_of(ablation, source="test")[number]
    row = finished[1][number]
    shown = {"data.category": run.data.category, "supervision.alpha": run.supervision.alpha, "seed": run.seed}
    assert row["settings"] == shown
    train(run, tmp_path / "alone")
    assert_same(row, tmp_path / "alone")


def test_whatever_is_a_number_may_differ(config, tmp_path, one_device):
    vary = {"training.loss": ("squared", "push_pull"), "training.jitter": (0.0, 0.5)}
    base = replace(config, supervision=Supervision(normals="image", k=5))
    rows = ablate(Ablation(base, vary), tmp_path / "grid")
    assert {row["group"] for row in rows} == {0}
    train(runs_of(Ablation(base, vary), source="test")[3], tmp_path / "alone")
    assert_same(rows[3], tmp_path / "alone")


def test_every_setting_takes_effect(config, tmp_path, one_device, monkeypatch):
    """One that did nothing would leave members alike, and none of them would be noticed above; losses tell it."""
    unscored = dict.fromkeys(METRICS, 0.5)
    monkeypatch.setattr(ablation_module._Scoring, "__call__", lambda self, some, *_: [unscored] * len(some))
    vary = {
        "training.learning_rate": (1e-3, 1e-2),
        "training.schedule": ("constant", "cosine"),
        "training.weight_decay": (0.0, 3.0),
        "training.clip_norm": (0.01, 10.0),
        "supervision.k": (2, 30),
    }
    base = replace(config, supervision=replace(config.supervision, labels=("image",), normals="image"))
    rows = ablate(Ablation(base, vary), tmp_path)
    assert {row["group"] for row in rows} == {0}
    assert len({row["loss"][-1][1] for row in rows}) == len(rows) == 32


def test_what_changes_shapes_is_a_group_of_its_own(config, tmp_path, one_device):
    vary = {"features.grid": (4, 8), "seed": (0, 1)}
    rows = ablate(Ablation(replace(config, supervision=Supervision(k=5)), vary), tmp_path)
    assert [row["group"] for row in rows] == [0, 0, 1, 1]


def test_the_folder_holds_the_tables(ablation, finished):
    folder, rows, _ = finished
    with (folder / "ablation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 20
    assert [float(line["image_auroc"]) for line in table] == [row["metrics"]["image_auroc"] for row in rows]
    assert [line["data.category"] for line in table] == ["flange"] * 10 + ["other"] * 10
    assert "<svg" in (folder / "report.html").read_text()
    told = json.loads((folder / "ablation.json").read_text())
    # Two categories; shots and held-out images depend on the seed, but all are of the same files.
    assert told["vary"]["seed"] == [0, 1, 2, 3, 4] and "jax" in told["versions"] and told["fingerprints"]


def test_a_stopped_grid_goes_on_to_the_same_numbers(config, tmp_path, stopped_at, one_device):
    grid_of_two, folder = Ablation(config, {"seed": (0, 1)}), tmp_path / "stopped"
    whole = ablate(grid_of_two, tmp_path / "whole")
    with stopped_at(2):
        ablate(grid_of_two, folder)
    assert not (folder / "ablation.csv").exists()
    assert ablate(grid_of_two, folder) == whole
    # Killed while it scored: the rows that are there stay, the others come.
    lines = (folder / "members.jsonl").read_text().splitlines(keepends=True)
    (folder / "members.jsonl").write_text(lines[0] + lines[1][:20])
    assert ablate(grid_of_two, folder) == whole


def test_a_grid_whose_checkpoint_is_damaged_is_trained_anew(config, tmp_path, stopped_at, one_device, capsys):
    grid_of_two = Ablation(config, {"seed": (0, 1)})
    with stopped_at(2):
        ablate(grid_of_two, tmp_path)
    for path in (tmp_path / "group_0/checkpoints/2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    ablate(grid_of_two, tmp_path)
    assert "group_0 is trained anew" in capsys.readouterr().err
    assert [step for step, _ in json.loads((tmp_path / "members.jsonl").read_text().splitlines()[1])["loss"]] == [
        2,
        4,
        5,
    ]


def test_another_grid_in_the_folder_is_refused(ablation, finished):
    with pytest.raises(InputError, match="another vary"):
        ablate(replace(ablation, vary=ablation.vary | {"seed": (0, 1)}), finished[0])
    with pytest.raises(InputError, match="another config"):
        ablate(replace(ablation, config=replace(ablation.config, log=Log(every=1))), finished[0])


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_blocks_do_not_change_the_numbers(block):
    mesh = device_mesh(grid=2)
    states, members = np.arange(12.0, dtype=np.float32).reshape(12, 1), np.arange(12, dtype=np.int32)
    function = grid.advance_members(lambda own, shared: (own[0] + shared, own[0] * own[1]), mesh, block=block)
    placed = spread((states, members), mesh, "grid")
    states, result = jax.jit(function)(*placed, replicate(np.float32(2), mesh))
    np.testing.assert_array_equal(states[:, 0], np.arange(12.0) + 2)
    np.testing.assert_array_equal(result[:, 0], np.arange(12.0) ** 2)
    assert len(result.sharding.device_set) == len(states.sharding.device_set) == 2


def test_the_block_is_what_fits_the_memory(monkeypatch):
    """A member needs [256,256] float32 more than its argument of [256], 0.25 MB; two devices have six members each."""
    mesh = device_mesh(grid=2)
    one = 256 * 256 * 4

    def outer(member, shared):
        state, _ = member
        return jax.numpy.linalg.eigh(state[:, None] * state[None, :] + shared)[0], state[:1]

    chosen = {}
    monkeypatch.setattr(grid, "START", {"cpu": 6})
    for budget in (0.2, 0.8, 100):
        free = budget * 4 * one / grid.MEMORY_SHARE
        monkeypatch.setattr(grid, "free_memory", lambda *_, free=free, **__: (free, "a test"))
        states = spread(np.ones((12, 256), np.float32), mesh, "grid")
        program = grid.compile_in_blocks(outer, [mesh], states, (), replicate(np.float32(1), mesh))
        chosen[budget] = program.block
        assert f"{program.block} at a time" in program.reason and "a test" in program.reason
        assert program.run(states, (), replicate(np.float32(1), mesh))[0].shape == (12, 256)
    assert chosen[0.2] == 1 and chosen[100] == 6 and 1 <= chosen[0.8] < 6


def test_devices_of_a_cpu_are_those_that_divide_the_members():
    counts = {(members, wanted): [mesh.size for mesh in grid.meshes_for(members, wanted=wanted)]
              for members, wanted in ((20, -1), (7, -1), (11, -1), (20, 8), (20, 3))}  # fmt: skip
    assert counts == {(20, -1): [5, 4, 2, 1], (7, -1): [7, 1], (11, -1): [1], (20, 8): [8], (20, 3): [3]}


@pytest.mark.parametrize(
    ("fitting", "devices", "why"),
    [(100, 6, ", the most that divide them"), (2.5, 2, ", since more do not fit"), (0.1, 1, ", since more do not fit")],
)
def test_as_many_devices_of_a_cpu_as_the_memory_holds_members(monkeypatch, fitting, devices, why):
    """The memory that devices share is that of so many members."""

    def outer(member, shared):
        square = member[0][:, None] * member[0][None, :]
        return member[0] + shared, jax.numpy.sort(square, axis=1)[:, 0].sum()

    alone = grid.compile_in_blocks(outer, [device_mesh()], np.ones((6, 256), np.float32), (), np.float32(1))
    need = needed_memory(alone.run)
    monkeypatch.setattr(grid, "free_memory", lambda _, *, devices: (fitting * need / grid.MEMORY_SHARE / devices, "it"))
    meshes = grid.meshes_for(6, wanted=-1)
    program = grid.compile_in_blocks(outer, meshes, np.ones((6, 256), np.float32), (), np.float32(1))
    assert program.mesh.size == devices and f"6 members on {devices} of 8 devices{why}" in program.reason


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ({"supervision.alhpa": (1.0,)}, "no field 'supervision.alhpa' to vary; did you mean supervision.alpha?"),
        ({"seed": ()}, "seed must vary over one value or more"),
        ({"seed": (1, 1)}, "each once"),
        ({"supervision.k": (5, 1000)}, "supervision.k must be from 1 to the cells of the grid, got 1000"),
        ({"seed": ("a",)}, "seed must be int, got 'a'"),
    ],
)
def test_a_grid_that_cannot_be_is_one_message(config, tmp_path, vary, expected):
    with pytest.raises(InputError, match=expected.replace("?", r"\?")):
        ablate(Ablation(config, vary), tmp_path / "grid")
    assert not (tmp_path / "grid").exists()


def test_values_on_the_command_line(config):
    given = ("seed=0,1", "supervision.alpha=1e-3", "data.category=a,b", "features.stages=(1,2),(3,)")
    given += ("supervision.by_stage=true,false", "reconstructor.query=True,False")
    assert varied(given, config) == {
        "seed": (0, 1),
        "supervision.alpha": (1e-3,),
        "data.category": ("a", "b"),
        "features.stages": ((1, 2), (3,)),
        "supervision.by_stage": (True, False),
        "reconstructor.query": (True, False),
    }
    with pytest.raises(InputError, match="did you mean seed"):
        varied(("sed=1",), config)


def test_the_start_of_each_run_is_its_own(config):
    base = replace(config, training=replace(config.training, start="runs/{category}_{seed}"))
    runs = runs_of(Ablation(base, {"data.category": ("a", "b"), "seed": (7,)}), source="test")
    assert [run.training.start for run in runs] == ["runs/a_7", "runs/b_7"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "image_push_pull" else n for n in shipped_ablations()]
)
def test_a_shipped_ablation_runs(name, root, tmp_path, capsys, one_device):
    """On drawn images, with few of its members and steps, and a small network on pixels."""
    ablation = load_ablation(name)
    header = shipped_ablations()[name].read_text()
    assert f"pushpull ablate {name} " in header and "Data:" in header and "Verified here:" in header
    few = {field: values[:2] for field, values in ablation.vary.items()}
    if "data.category" in few:
        few["data.category"] = ("flange", "other")
    arguments = [name, "--workdir", str(tmp_path / "grid"), "--data.root", str(root), "--data.image_size", "64"]
    if "data.category" not in few:
        arguments += ["--data.category", "flange"]
    arguments += """
        --features.backbone pixels --features.stages 2 3 --features.stage_weights 1 1 --scoring.map_weights 1 1
        --features.grid 8 --reconstructor.width 16
        --reconstructor.heads 2 --reconstructor.hidden 16 --reconstructor.encoder_layers 0
        --reconstructor.decoder_layers 1 --training.steps 2 --training.batch_size 4 --log.every 1
        --checkpoint.every 2
    """.split()
    if ablation.config.supervision.shots:
        arguments += ["--supervision.shots", "2"]
    if "supervision.k" in few:
        few["supervision.k"] = (2, 5)
    short = [f"{field}={','.join(map(str, values))}" for field, values in few.items()]
    cli.ablate([*arguments, "--vary", *short])
    out = capsys.readouterr().out
    assert "report: " in out and ("±" in out) == ("seed" in ablation.vary)
    count = int(np.prod([len(values) for values in few.values()]))
    assert len((tmp_path / "grid" / "members.jsonl").read_text().splitlines()) == count
