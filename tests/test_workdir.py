"""The files of a run's folder: whole or not there, JSON that anybody can read, and which folder may be used."""

import json
import math
import os
from dataclasses import replace

import pytest

from pushpull_jax import workdir as files
from pushpull_jax.config import Checkpoint, Config, Data, Log, Training, to_dict
from pushpull_jax.errors import InputError

CONFIG = Config(data=Data(root="images", category="bolt"), training=Training(steps=20), seed=3)


def strict(text):
    """Parse JSON without Python's extensions NaN and Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_write_text_replaces(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "first, and longer")
    files.write_text(path, "ø\n")
    assert path.read_bytes() == "ø\n".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_is_not_finite_becomes_null(tmp_path):
    values = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (float("-inf"), 2)}, "e": "nan", "f": True}
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}, "e": "nan", "f": True}
    files.write_json(tmp_path / "a.json", values)
    assert strict((tmp_path / "a.json").read_text()) == expected == files.read_json(tmp_path / "a.json")
    files.write_lines(tmp_path / "a.jsonl", [values, values])
    assert [strict(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [expected, expected]


def test_floats_come_back_exactly(tmp_path):
    values = [0.1, 1 / 3, 1e-300, 1e300, 2**53 + 1]
    files.write_json(tmp_path / "a.json", values)
    assert files.read_json(tmp_path / "a.json") == values


@pytest.mark.parametrize("contents", [b"{", b"", b"\xff\xfe", None])
def test_read_json_names_the_file(tmp_path, contents):
    path = tmp_path / "threshold.json"
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(InputError, match=r"threshold\.json: cannot be read as JSON"):
        files.read_json(path)


# JSON lines.


def test_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_lines(path) == []
    files.write_lines(path, [])
    assert files.read_lines(path) == []
    files.write_lines(path, [{"step": step} for step in (1, 2)])
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]
    files.write_lines(path, (row for row in files.read_lines(path) if row["step"] < 2))
    assert path.read_text() == '{"step": 1}\n'


def test_a_log_is_whole_after_every_row_or_where_a_bucket_has_it_when_it_must_be(tmp_path, monkeypatch):
    path, written = tmp_path / "metrics.jsonl", []
    with files.Log(path, [{"step": 1}]) as log:
        log.add({"step": 2})
        assert files.read_lines(path) == [{"step": 1}, {"step": 2}]
    monkeypatch.setattr(files, "is_bucket", lambda path: True)
    monkeypatch.setattr(files, "write_object", lambda path, content: written.append(content.count(b"\n")))
    monkeypatch.setattr(files, "_SECONDS", math.inf)
    with files.Log(path, files.read_lines(path)) as log:
        for step in (3, 4):
            log.add({"step": step})
        assert not written
        log.flush()
        assert written == [4]
        log.flush()  # there is nothing new
        log.add({"step": 5})
        monkeypatch.setattr(files, "_SECONDS", 0.0)
        log.add({"step": 6})
        monkeypatch.setattr(files, "_SECONDS", math.inf)
        log.add({"step": 7})
    assert written == [4, 6, 7]
    with files.Log(path, [], is_wanted=False) as log:
        log.add({"step": 1})
    assert written == [4, 6, 7]


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', "{"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    # Without its end a line may be complete JSON and still be half of a number.
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert files.read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 "):
        files.read_lines(path)


# The config of a run.


def test_config_and_the_rest(tmp_path):
    files.write_config(tmp_path, CONFIG, versions=files.versions(), command=["pushpull", "train"])
    config, rest = files.read_config(tmp_path)
    assert config == CONFIG
    assert rest.keys() == {"versions", "command"} and rest["command"] == ["pushpull", "train"]
    assert {"pushpull_jax", "python", "jax", "numpy", "orbax-checkpoint"} <= rest["versions"].keys()
    assert files.is_run(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", r"config\.json: cannot be read as JSON"),
        ("[]", r"config\.json: expected an object with a field `config`"),
        ("{}", r"config\.json: expected an object with a field `config`"),
        ('{"config": 1}', r"config\.json: expected an object for the config, got 1"),
        ('{"config": {"seeds": 1}}', r"config\.json: unknown field seeds; did you mean seed\?"),
        ('{"config": {"seed": "1"}}', r"config\.json: seed must be int, got '1'"),
        ('{"config": {"training": {"steps": 0}}}', r"config\.json: training\.steps must be positive"),
    ],
)
def test_read_config_with_a_fault(tmp_path, contents, message):
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(InputError, match=message) as raised:
        files.read_config(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_read_config_where_there_is_no_run(tmp_path):
    with pytest.raises(InputError, match="is not a run: it has no config.json"):
        files.read_config(tmp_path)
    with pytest.raises(InputError, match="there is no such folder"):
        files.read_config(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="there is no such folder"):
        files.read_config(tmp_path / "file")


# Whether a run starts, goes on, or is refused.


def test_a_new_or_empty_folder_starts(tmp_path):
    assert files.check_startable(tmp_path, CONFIG) is False
    assert files.check_startable(tmp_path / "new" / "deeper", CONFIG) is False
    assert os.listdir(tmp_path) == []


def test_the_same_config_goes_on(tmp_path):
    files.write_config(tmp_path, CONFIG)
    assert files.check_startable(tmp_path, CONFIG) is True
    assert files.check_startable(tmp_path, Config(**vars(CONFIG))) is True


def test_how_it_runs_may_differ(tmp_path):
    files.write_config(tmp_path, CONFIG)
    other = replace(
        CONFIG,
        data=replace(CONFIG.data, root="elsewhere"),
        log=Log(every=1),
        checkpoint=Checkpoint(every=7, keep=9),
    )
    assert files.check_startable(tmp_path, other) is True


def test_another_config_is_refused_field_by_field(tmp_path):
    files.write_config(tmp_path, CONFIG)
    other = replace(CONFIG, training=replace(CONFIG.training, steps=30), seed=4, log=Log(every=5))
    with pytest.raises(InputError) as raised:
        files.check_startable(tmp_path, other)
    assert str(raised.value).endswith(
        "holds a run of another config: training.steps = 20 there, 30 here, seed = 3 there, 4 here"
    )
    with pytest.raises(InputError, match=r"data\.category = 'bolt' there, 'nut' here$"):
        files.check_startable(tmp_path, replace(CONFIG, data=replace(CONFIG.data, category="nut")))
    assert files.read_config(tmp_path)[0] == CONFIG


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "holiday.txt").write_text("")
    with pytest.raises(InputError, match="exists and is not a run: choose an empty or a new folder"):
        files.check_startable(tmp_path, CONFIG)
    with pytest.raises(InputError, match="exists and is not a run"):
        files.check_startable(tmp_path / "holiday.txt", CONFIG)
    assert os.listdir(tmp_path) == ["holiday.txt"]


def test_a_damaged_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(CONFIG)})[:-9])
    with pytest.raises(InputError, match=r"config\.json: cannot be read as JSON"):
        files.check_startable(tmp_path, CONFIG)


def test_the_final_name_never_holds_a_part(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.bin", []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append((a.read_bytes(), path.exists())), real(a, b)))
    files.write_bytes(path, b"whole")
    assert seen == [(b"whole", False)] and path.read_bytes() == b"whole"


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs:/bucket/run", "gs://bucket", "gs://bucket/"])
def test_an_address_is_no_folder(address):
    """Whatever comes after gs:, one slash is what `pathlib` leaves of two."""
    with pytest.raises(InputError, match=f"{address}: expected a folder, or gs://BUCKET/FOLDER as a string"):
        files.run_folder(address)
