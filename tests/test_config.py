"""The config: what is accepted, what is refused and with which words, and that it costs no
import of jax.

Expected values are by hand: a rule of `check` is tested by a value on each side of its bound.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pushpull_jax.config import (
    Checkpoint,
    Config,
    Features,
    Log,
    Reconstructor,
    Scoring,
    Training,
    check,
    flatten,
    from_dict,
    load_config,
    nearest,
    shipped_configs,
    to_dict,
)
from pushpull_jax.errors import InputError

# Differs from the defaults in every section, with every kind of field.
OTHER = Config(
    features=Features(stages=(2, 4), stage_weights=(0.25, 0.75), grid=8, standardise=True, resample="area"),
    reconstructor=Reconstructor(width=64, dropout=0.0, positions="per_token"),
    training=Training(steps=7, learning_rate=1e-3, schedule="step", loss="push_pull"),
    scoring=Scoring(smoothing=4.0, held_out=0.2),
    log=Log(every=3),
    checkpoint=Checkpoint(every=6, keep=1),
    seed=5,
)


def changed(name, value, config=OTHER):
    """The config with one field, by its dotted name, replaced."""
    section, _, field = name.rpartition(".")
    if not section:
        return replace(config, **{field: value})
    return replace(config, **{section: replace(getattr(config, section), **{field: value})})


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text("from pushpull_jax.config import *\n" + text)
    return str(path)


def test_shipped_configs_load_and_check():
    assert {"demo", "quick"} <= set(shipped_configs())
    for name, path in shipped_configs().items():
        config = load_config(name)
        check(config, source=name)
        assert config == load_config(str(path)) == load_config(f"configs/{name}.py")


def test_defaults_and_the_other_config_pass():
    check(Config(), source="defaults")
    check(OTHER, source="other")
    assert not {name for name, value in flatten(OTHER).items() if value is None}
    assert all(getattr(OTHER, s) != getattr(Config(), s) for s in ("features", "reconstructor", "training", "scoring"))


# Files.


def test_a_config_file(tmp_path):
    path = write(tmp_path, "steps = 3\nconfig = Config(training=Training(steps=steps * 4), seed=9)\n")
    assert load_config(path) == Config(training=Training(steps=12), seed=9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]


def test_a_config_file_that_changes_is_read_again(tmp_path, monkeypatch):
    # Python's cache of compiled files compares whole seconds and sizes; a script may write a config faster than that.
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    seeds = [load_config(write(tmp_path, f"config = Config(seed={seed})\n")).seed for seed in (1, 2)]
    assert seeds == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = Config(training=Training(stepz=3))\n", r"Training has no field stepz; did you mean steps\?"),
        ("config = Config(trainig=Training())\n", r"Config has no field trainig; did you mean training\?"),
        ("config = Config(features=Features(resampel='area'))\n", r"did you mean resample\?"),
        ("config = Config(xyzzy=1)\n", "Config has no field xyzzy$"),
        ("config = Config(training=Training(steps=2.5))\n", r"training\.steps must be int, got 2\.5 \(float\)"),
        ("config = Config(training=Training(steps=0))\n", r"training\.steps must be positive, got 0"),
        ("raise RuntimeError('no luck')\n", "RuntimeError: no luck"),
        ("config = Config(\n", "SyntaxError"),
        ("import no_such_module_here\n", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("cfg = Config()\n", "expected a Config named `config`, got NoneType"),
        ("config = {'seed': 1}\n", "expected a Config named `config`, got dict"),
        ("config = Config\n", "expected a Config named `config`, got type"),
    ],
)
def test_a_config_file_with_a_fault(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as raised:
        load_config(path)
    assert path in str(raised.value) and "__init__" not in str(raised.value)


@pytest.mark.parametrize("name", ["quik", "quik.py", "configs/quik.py"])
def test_an_unknown_name_offers_the_nearest(name):
    with pytest.raises(InputError, match=rf"no config file {name}; did you mean quick\? \(shipped configs: .*quick"):
        load_config(name)


@pytest.mark.parametrize("name", ["elsewhere/quick.py", "quick.txt", "/quick", "configs/quick/", ""])
def test_only_a_name_stands_for_a_shipped_config(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "configs/quick/":
        assert load_config(name) == load_config("quick")  # pathlib drops the slash
        return
    with pytest.raises(InputError, match="no config file"):
        load_config(name)


def test_nothing_near_offers_nothing():
    assert nearest("qqq", ["steps", "seed"]) == ""
    assert nearest("sead", ["steps", "seed"]) == "; did you mean seed?"


# JSON.


@pytest.mark.parametrize("config", [Config(), OTHER])
def test_through_json_and_back(config):
    text = json.dumps(to_dict(config), allow_nan=False)
    again = from_dict(json.loads(text), source="config.json")
    assert again == config and isinstance(again.features.stages, tuple)
    check(again, source="config.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seeds": 1}, r"a\.json: unknown field seeds; did you mean seed\?"),
        ({"training": {"step": 1}}, r"a\.json: unknown field training\.step; did you mean steps\?"),
        ({"training": 3}, r"a\.json: expected an object for training\., got 3"),
        ([1], r"a\.json: expected an object for the config, got \[1\]"),
    ],
)
def test_json_with_a_fault(values, message):
    with pytest.raises(InputError, match=message):
        from_dict(values, source="a.json")


def test_wrong_types_from_json_are_found_by_check():
    message = r"a\.json: features\.stages must be tuple\[int, \.\.\.\], got \('1',\) \(tuple\)"
    with pytest.raises(InputError, match=message):
        check(from_dict({"features": {"stages": ["1"]}}, source="a.json"), source="a.json")


def test_flatten_names_every_field_once():
    flat = flatten(OTHER)
    sections = [item.name for item in dataclasses.fields(Config) if item.name != "seed"]
    assert len(flat) == 1 + sum(len(dataclasses.fields(getattr(OTHER, name))) for name in sections)
    assert flat["seed"] == 5 and flat["training.steps"] == 7 and flat["features.stage_weights"] == (0.25, 0.75)
    assert {name.partition(".")[0] for name in flat} == {*sections, "seed"}


# Types.


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", True, "int"),  # a bool is an int to Python
        ("training.steps", False, "int"),
        ("training.learning_rate", True, "float"),
        ("features.stages", (1, True), r"tuple\[int, \.\.\.\]"),
        ("features.stages", [1, 2], r"tuple\[int, \.\.\.\]"),
        ("features.stages", 3, r"tuple\[int, \.\.\.\]"),
        ("features.stage_weights", (0.5, "0.5"), r"tuple\[float, \.\.\.\]"),
        ("features.standardise", 1, "bool"),
        ("seed", 1.0, "int"),
        ("seed", "1", "int"),
        ("seed", None, "int"),
        ("training.learning_rate", "1e-3", "float"),
        ("training.learning_rate", float("nan"), "float"),
        ("training.jitter", float("inf"), "float"),
        ("data.root", Path("images"), "str"),
        ("data.resize", "crop", r"Literal\['stretch', 'letterbox'\]"),
        ("features.resample", "bicubic", r"Literal\['bilinear', 'area'\]"),
        ("reconstructor.positions", "sine", "Literal"),
        ("training.loss", "l1", "Literal"),
        ("training.schedule", "linear", "Literal"),
        ("data.on_unreadable", None, "Literal"),
        ("training", None, "Training"),
        ("training", Features(), "Training"),
    ],
)
def test_wrong_types(name, value, expected):
    with pytest.raises(InputError, match=rf"here: {name} must be {expected}.*got .*\({type(value).__name__}\)"):
        check(changed(name, value), source="here")


def test_an_int_is_a_float():
    check(changed("training.learning_rate", 1), source="here")
    check(changed("features.stage_weights", (1, 3)), source="here")


# Ranges: values that hold, and values that do not, for each rule; OTHER has grid 8, width 64, two stages, log.every 3.


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("data.image_size", [32], [31, 0, -64]),
        ("features.stages", [(1, 5), (3, 12)], [(), (0, 1), (2, 1), (1, 1)]),
        ("features.stage_weights", [(), (1e-6, 9.0)], [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -1.0)]),
        ("features.grid", [8], [0, -4]),
        ("reconstructor.fold", [1, 2, 8], [3, 16, 0, -1]),
        ("reconstructor.heads", [1, 64], [3, 128, 0, -8]),
        ("reconstructor.width", [8], [0, -64]),
        ("reconstructor.dropout", [0.0, 0.999], [1.0, -0.1]),
        ("reconstructor.hidden", [1], [0]),
        ("reconstructor.encoder_layers", [0], [-1]),
        ("reconstructor.decoder_layers", [0], [-1]),
        ("training.steps", [1], [0, -1]),
        ("training.batch_size", [1], [0]),
        ("training.jitter", [0.0], [-1e-9]),
        ("training.learning_rate", [1e-9], [0.0, -1.0]),
        ("training.warmup_steps", [0, 99], [-1]),
        ("training.weight_decay", [0.0], [-1e-9]),
        ("training.clip_norm", [1e-3], [0.0]),
        ("scoring.smoothing", [0.0], [-0.5]),
        ("scoring.blocks", [(), (1,), (2, 8)], [(3,), (0,), (1, 16)]),
        ("scoring.map_weights", [()], [(1.0, 1.0)]),  # the map is not whitened
        ("scoring.window", [1, 256], [0, 257]),
        ("scoring.false_positive_rate", [0.001, 0.999], [0.0, 1.0, -0.1]),
        ("scoring.held_out", [0.001, 0.999], [0.0, 1.0]),
        ("log.every", [1, 2, 6], [0, -3]),
        ("checkpoint.every", [3, 9], [4, 0, -3]),
        ("checkpoint.keep", [1], [0]),
        ("supervision.shots", [0, 10], [-1]),
        ("supervision.confetti_copies", [0, 4], [-1]),
        ("supervision.irrelevant_count", [0, 4], [-1]),
        ("supervision.labels", [("image",), ("mask", "unlabelled", "unused")], [()]),
        ("supervision.share", [0.01, 0.99], [0.0, 1.0]),
        ("supervision.alpha", [0.0, 3.0], [-0.1]),
        ("supervision.k", [1, 64], [0, 65]),
        ("seed", [0, 2**32 - 1], [-1, 2**32, 2**70]),
    ],
)
def test_ranges(name, good, bad):
    for value in good:
        check(changed(name, value), source="here")
    for value in bad:
        with pytest.raises(InputError, match=rf"here: {name} must be ") as raised:
            check(changed(name, value), source="here")
        assert f"got {value!r}" in str(raised.value)


def test_ranges_that_join_two_fields():
    with pytest.raises(InputError, match=r"features\.stage_weights must be .* with standardise, got \(0\.25, 0\.75\)"):
        check(changed("features.standardise", False), source="here")
    with pytest.raises(InputError, match=r"checkpoint\.every must be a multiple of log\.every, got 6"):
        check(changed("log.every", 4), source="here")
    with pytest.raises(InputError, match=r"training\.loss must be push_pull, to learn from anomalies, got 'squared'"):
        check(changed("training.loss", "squared", changed("supervision.confetti_copies", 1)), source="here")
    # Images that are left out of training and test alike are not learned from.
    unused = changed("supervision.labels", ("unused",), changed("supervision.shots", 3))
    check(changed("training.loss", "squared", unused), source="here")
    check(changed("training.steps", 0, changed("reconstructor.kind", "nearest")), source="here")
    with pytest.raises(InputError, match=r"scoring\.folds must be 0, for the run it starts from saw them all, got 2"):
        check(changed("scoring.folds", 2, changed("training.start", "run")), source="here")
    whitened = changed("scoring.map", "whitened")
    check(changed("scoring.map_weights", (1.0, 0.0), whitened), source="here")
    for weights in ((1.0,), (0.0, 0.0), (1.0, -1.0)):
        with pytest.raises(InputError, match=r"scoring\.map_weights must be one weight of 0 or more a stage"):
            check(changed("scoring.map_weights", weights, whitened), source="here")
    odd = Reconstructor(width=63, heads=7)
    with pytest.raises(InputError, match=r"reconstructor\.width must be even, where positions are factorised, got 63"):
        check(replace(OTHER, reconstructor=odd), source="here")
    check(replace(OTHER, reconstructor=replace(odd, positions="per_token")), source="here")


# Imports.


@pytest.mark.parametrize(
    "statement",
    [
        "import pushpull_jax; pushpull_jax.__all__; dir(pushpull_jax)",
        "import pushpull_jax.cli",
        "import pushpull_jax; pushpull_jax.load_config('quick'); pushpull_jax.Config()",
    ],
)
def test_what_is_quick_imports_nothing_heavy(statement):
    heavy = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorflow", "scipy", "sklearn", "matplotlib")
    code = f"import sys\n{statement}\nprint(sorted(set(sys.modules) & set({heavy!r})))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_every_public_name_is_where_the_package_says():
    import pushpull_jax

    for name in pushpull_jax.__all__:
        assert getattr(pushpull_jax, name).__name__ == name
        # Importing a submodule sets it as an attribute of the package, over the function of that name.
        assert importlib.util.find_spec(f"pushpull_jax.{name}") is None
    assert set(pushpull_jax.__all__) <= set(dir(pushpull_jax))
    with pytest.raises(AttributeError, match="no attribute 'pseudo_hubert'"):
        pushpull_jax.pseudo_hubert  # noqa: B018
