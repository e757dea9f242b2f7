"""scripts/benchmark.py: how it measures, on calls whose times are given; what it writes; its rows at small sizes."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from pushpull_jax import metrics

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))
harness = importlib.import_module("benchmark_harness")
benchmark = importlib.import_module("benchmark")
maps = importlib.import_module("benchmark_maps")


class Clock:
    """A clock that stands still until a call of ours or of a peer takes its next time."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, times):
        times = itertools.chain(times, itertools.repeat(1.0))

        def call():
            self.calls.append(name)
            self.now += next(times)

        return call


def settings(folder: Path, *, quick: bool = True, seconds: float = 20.0):
    return harness.Settings(quick, 2, folder, seconds)


def contest_of(clock: Clock, ours, peers, **more):
    return harness.Contest(
        clock.call("ours", ours), {name: clock.call(name, times) for name, times in peers.items()}, "s", **more
    )


def test_calls_take_turns_after_the_warm_up(tmp_path):
    clock = Clock()
    contest = contest_of(clock, [9, 1, 1, 1, 1], {"slow": [9, 3], "fast": [9, 2, 2, 2, 2]}, repeats=3)
    row = harness.measure(contest, settings(tmp_path), clock)
    assert clock.calls == ["slow"] * 2 + ["fast"] * 2 + ["ours"] * 2 + ["ours", "fast"] * 3
    assert (row["peer_is"], row["repeats"]) == ("fast", 3)
    assert row["note"] == "slow 3 s"


def test_medians_ratio_and_spread(tmp_path):
    clock = Clock()
    # After two calls each to warm up. Ratios of the pairs: 2, 3, 2, 1.5, 10; their quartiles, by hand: 2 and 3.
    contest = contest_of(clock, [9, 9, 1, 1, 2, 2, 0.5], {"peer": [9, 9, 2, 3, 4, 3, 5]}, repeats=5)
    row = harness.measure(contest, settings(tmp_path), clock)
    assert (row["ours"], row["peer"], row["ratio"]) == pytest.approx((1, 3, 3))
    assert (row["ours_best"], row["peer_best"]) == pytest.approx((0.5, 2))
    assert row["spread"] == pytest.approx([2, 3])


def test_rates_are_work_over_seconds_and_ratios_still_of_seconds(tmp_path):
    clock = Clock()
    contest = harness.Contest(
        clock.call("ours", [0.5] * 9), {"peer": clock.call("peer", [1.0] * 9)}, "images/s", work=8, repeats=2
    )
    row = harness.measure(contest, settings(tmp_path), clock)
    assert (row["ours"], row["peer"], row["ratio"]) == pytest.approx((16, 8, 2))


@pytest.mark.parametrize(("seconds", "pairs"), [(0.1, 5), (20.0, 10), (1000.0, 50)])
def test_as_many_pairs_as_fit_into_the_time(tmp_path, seconds, pairs):
    clock = Clock()
    contest = contest_of(clock, [1.0] * 99, {"peer": [1.0] * 99})
    assert harness.measure(contest, settings(tmp_path, seconds=seconds), clock)["repeats"] == pairs


def test_short_calls_come_several_in_a_row_and_their_mean_counts(tmp_path):
    clock = Clock()
    ours = [9, 0.06, 0.05, 0.05, *[0.02, 0.02, 0.08] * 2]  # to compile, to see how short, a block to warm up, two pairs
    contest = contest_of(clock, ours, {"peer": [9, 0.2, *[0.1, 0.1, 0.2] * 2]}, repeats=2)
    row = harness.measure(contest, settings(tmp_path), clock)
    assert clock.calls == ["peer"] * 2 + ["ours"] * 4 + (["ours"] * 2 + ["peer"] * 2) * 2
    assert row["calls"] == 2
    assert (row["ours"], row["peer"]) == pytest.approx((0.035, 0.125))


def test_without_a_peer_its_figures_are_none(tmp_path):
    clock = Clock()
    row = harness.measure(contest_of(clock, [1.0] * 9, {}, note="no torch", repeats=2), settings(tmp_path), clock)
    assert [row[name] for name in ("peer", "ratio", "spread", "peer_is")] == [None] * 4
    assert row["note"] == "no torch" and row["ours"] == 1


def test_a_peer_that_fails_is_told_and_the_other_taken(tmp_path):
    clock = Clock()

    def fails():
        raise RuntimeError("no compiler\nhere")

    contest = harness.Contest(
        clock.call("ours", []), {"compiled": fails, "eager": clock.call("eager", [])}, "s", repeats=1
    )
    row = harness.measure(contest, settings(tmp_path), clock)
    assert row["peer_is"] == "eager" and row["note"] == "compiled failed: RuntimeError: no compiler here"


def test_calls_that_time_themselves_are_believed_and_not_warmed_up(tmp_path):
    calls = []
    contest = harness.Contest(
        lambda: calls.append("ours") or 2.0, {"peer": lambda: calls.append("peer") or 5.0}, "s",
        repeats=1, warm=False, self_timed=True,
    )  # fmt: skip
    row = harness.measure(contest, settings(tmp_path))
    assert calls == ["ours", "peer"] and row["ratio"] == 2.5


@pytest.mark.parametrize(
    ("flops", "moved", "unit", "limit", "by", "utilisation"),
    # 100 flop/s and 10 bytes/s, 8 units of work in a call of 16 s.
    [(800, 20, "s", 1.0, "flops", 0.5), (400, 60, "s", 0.75, "bytes", 0.25), (800, 20, "images/s", 1.0, "flops", 0.5),
     (400, 60, "images/s", 8 / 6, "bytes", 0.25), (0, 40, "s", 0.5, "bytes", None), (0, 0, "s", None, None, None)],
)  # fmt: skip
def test_limits(flops, moved, unit, limit, by, utilisation):
    contest = harness.Contest(lambda: None, {}, unit, work=8, flops=flops, bytes=moved)
    got = harness.limits(contest, harness.Machine(100.0, 10.0), contest.in_unit(16.0))
    assert got == {"limit": pytest.approx(limit), "limited_by": by, "utilisation": pytest.approx(utilisation)}


def test_cost_counts_a_matrix_product():
    a, b = np.zeros((4, 8), np.float32), np.zeros((8, 16), np.float32)
    flops, moved = harness.cost(lambda a, b: a @ b, a, b)
    assert flops == 2 * 4 * 8 * 16
    assert moved == 4 * (4 * 8 + 8 * 16 + 4 * 16)


def test_what_is_not_equal_is_not_timed():
    ours = np.array([1.0, 2.0])
    harness.assert_equal("x", ours, ours + 1.9e-4)
    for theirs, words in (
        (ours + 2.1e-4, "x: ours and"),
        (np.array([1, np.nan]), "nan of the largest"),
        (ours[:1], r"x: ours has shape \[2\], the peer's \[1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            harness.assert_equal("x", ours, theirs)


@pytest.fixture
def fake_rows(monkeypatch):
    """Two rows that take no time."""
    rows = [
        harness.Row(name, f"title of {name}", lambda settings: harness.Contest(lambda: 2.0, {"it": lambda: 3.0}, "s",
                    flops=1.0, repeats=2, warm=False, self_timed=True, facts={"members": 8}))
        for name in ("one", "two")
    ]  # fmt: skip
    monkeypatch.setattr(benchmark, "ROWS", {row.name: row for row in rows})
    monkeypatch.setattr(benchmark, "measure_machine", lambda _: harness.Machine(1.0, 1.0))


def test_the_file_and_the_table(fake_rows, tmp_path, capsys):
    output = tmp_path / "benchmark.json"
    benchmark.main(["--output", str(output)])
    told = json.loads(output.read_text())
    assert {"versions", "hardware", "commit", "dirty", "date", "reached", "rows"} <= told.keys()
    assert {"python", "jax", "torch", "scikit-learn", "pushpull_jax"} <= told["versions"].keys()
    assert told["hardware"]["device"] == "cpu" and told["hardware"]["cores"] >= 1
    assert [row["name"] for row in told["rows"]] == ["one", "two"]
    expected = {"ours": 2, "peer": 3, "ratio": 1.5, "spread": [1.5, 1.5], "limit": 1, "members": 8, "unit": "s"}
    assert {name: told["rows"][0][name] for name in expected} == expected
    lines = capsys.readouterr().out.splitlines()
    assert "| title of one | s | 2 | 3 | 1.50 | 1.50 to 1.50 | 1 | 50% | it |" in lines


def test_rows_of_the_same_setting_stay_and_others_do_not(fake_rows, tmp_path, monkeypatch, capsys):
    output = tmp_path / "benchmark.json"

    def names(*arguments: str) -> list[str]:
        benchmark.main([*arguments, "--output", str(output)])
        return [row["name"] for row in json.loads(output.read_text())["rows"]]

    assert names("--rows", "two") == ["two"]
    assert names("--rows", "one") == ["one", "two"]
    monkeypatch.setattr(benchmark, "git", lambda *_: "another")
    assert names("--rows", "one") == ["one"]
    assert "is of another commit" in capsys.readouterr().err


def test_a_row_that_is_not_there_ends_with_those_that_are(capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(["--rows", "trunk"])
    assert end.value.code == 2 and "trunk-lite0-8" in capsys.readouterr().err


def test_the_machine_is_measured(tmp_path):
    machine = harness.measure_machine(settings(tmp_path))
    assert 1e6 < machine.flops < 1e15 and 1e6 < machine.bandwidth < 1e15


def test_the_plain_metrics_equal_ours_with_ties():
    peer = pytest.importorskip("peer_metrics", reason="scikit-learn is not installed", exc_type=ImportError)
    masks, scores = map(np.stack, zip(*maps.drawn_maps(5, 24), strict=True))
    for values in (scores, np.round(2 * scores)):
        ours, theirs = metrics.pixel_metrics(masks, values), peer.plain_pixel_metrics(masks, values)
        assert theirs == pytest.approx({name: ours[name] for name in theirs}, abs=1e-12)


def test_the_streamed_maps_are_measured_in_a_process_of_their_own(tmp_path):
    programs = importlib.import_module("benchmark_programs")
    contest = programs.streaming_metrics(settings(tmp_path))
    assert contest.ours() > 0
    assert 0 < contest.facts["peak_mebibytes_above_imports"] < 500


@pytest.mark.slow
@pytest.mark.parametrize("name", list(benchmark.ROWS))
def test_every_row_runs_at_a_small_size(name, tmp_path):
    pytest.importorskip("torch", reason="the peer needs PyTorch, the extra `bench`")
    output = tmp_path / "benchmark.json"
    benchmark.main(["--quick", "--rows", name, "--output", str(output)])
    row = json.loads(output.read_text())["rows"][0]
    assert row["ours"] > 0 and (row["ratio"] is None) == (name == "metrics-stream")
