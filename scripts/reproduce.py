"""Run the paper's tables, and ours, on what data are there, and write the paper's figures and ours beside each other.

    python scripts/reproduce.py --data ROOT [--parts mvtec ablations cifar10 ours] [--training.steps 4 ...]

Every row, seed and category is one run of `pushpull train` in OUT/ROW/CATEGORY/SEED. After each, OUT/table.md and
OUT/table.json are replaced whole; killed, the same command goes on where it stopped, and a finished run is not touched
again. Further options are fields of the config, for every run. Figures are in [0,1] in the JSON, in percent elsewhere.
"""

import argparse
import functools
import math
import shlex
import sys
import time
import typing
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from reproduce_table import METRICS, PARTS, ROWS, Row, markdown, row_figures

from pushpull_jax import workdir as files
from pushpull_jax.cli import prepare_jax
from pushpull_jax.config import Config, Source, check, load_config
from pushpull_jax.data.manifest import Record, hold_out
from pushpull_jax.data.sources import category_names, read_records
from pushpull_jax.errors import InputError
from pushpull_jax.progress import say
from pushpull_jax.training import train
from pushpull_jax.weights import load_backbone

ONE_CLASS = ("classes", "cifar10")


Key = tuple[str, str, int]  # config, category, seed


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and the rest, which are fields of the config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", default="", help="root of the data; see --data.root of pushpull train")
    parser.add_argument("--source", default="mvtec_ad", choices=typing.get_args(Source), help="what the root holds")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="of the tables; default: all that the source is for")
    parser.add_argument("--categories", nargs="+", help="default: all that are there")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--irrelevant", help="folder of irrelevant images; default: CIFAR-100")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of the runs and the tables")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands, run nothing")
    given, overrides = parser.parse_known_args(arguments)
    if not (given.data or given.list or given.source == "cifar10" or given.source.startswith("tfds")):
        parser.error(f"--data: expected the folder of the data, which source {given.source} needs")
    if overrides and not overrides[0].startswith("--"):
        parser.error(f"expected options only, got {overrides[0]!r}")
    given.parts = given.parts or [part for part in PARTS if (part == "cifar10") == (given.source in ONE_CLASS)]
    given.data = str(Path(given.data).resolve()) if given.data else ""
    return given, overrides


def command(
    given: argparse.Namespace, row: Row, overrides: list[str], *, category: str, seed: str, steps: str
) -> list[str]:
    """What gives one run, as words; what is given last, on our command line, wins.

    Raises:
        InputError: the source is not for this row.
    """
    source, root = place(given, row)
    words = ["pushpull", "train", row.config, "--data.source", source, *(["--data.root", root] if root else [])]
    words += ["--data.category", category, "--seed", seed, "--workdir", str(given.out / row.config / category / seed)]
    if row.start:
        words += ["--training.start", str(given.out / row.start / category / seed)]
    if row.epochs:
        words += ["--training.steps", steps]
    if row.config in ("adtr_plus_images", "quick_cifar10_images") and given.irrelevant:
        words += ["--supervision.irrelevant", given.irrelevant]
    return [*words, *row.arguments, *overrides, *row.last]


def generic(given: argparse.Namespace, row: Row, overrides: list[str]) -> str:
    """The command of all runs of a row; of what its source is not for, nothing."""
    try:
        return shlex.join(command(given, row, overrides, category="CATEGORY", seed="SEED", steps="STEPS"))
    except InputError:
        return "-"


def place(given: argparse.Namespace, row: Row) -> tuple[Source, str]:
    """Source and root of a row's data: what was given, but for CIFAR-10 that of tensorflow-datasets beside others."""
    if ("cifar10" in row.parts) == (given.source in ONE_CLASS):
        return given.source, given.data
    if given.source in ONE_CLASS:
        raise InputError(f"source {given.source} is for the part cifar10 only: it has no defects")
    return "cifar10", given.data if given.source.startswith("tfds") else ""


@functools.cache
def resolve(words: tuple[str, ...]) -> Config:
    """The config of a command, as `pushpull train` reads it; a misspelt field ends the program."""
    at = words.index("--workdir")
    config = tyro.cli(
        Config, args=[*words[3:at], *words[at + 2 :]], default=load_config(words[2]), use_underscores=True,
        prog=f"reproduce.py, config {words[2]}:", config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    check(config, source="command line")
    return config


class Study:
    """All runs of some rows, those that are finished, and why others are not; its table is plain data."""

    def __init__(self, given: argparse.Namespace, overrides: list[str]) -> None:
        self.given, self.overrides = given, overrides
        self.rows = [row for row in ROWS if set(row.parts) & set(given.parts)]
        self.runs: dict[Key, list[str]] = {}  # their commands
        self.results: dict[Key, dict[str, float]] = {}
        self.problems: dict[Key, str] = {}
        for row in self.rows:
            self.plan(row)
        if not self.runs:
            raise InputError("nothing can be run: " + "; ".join(dict.fromkeys(self.problems.values())))
        if unknown := set(given.categories or ()) - {category for _, category, _ in (*self.runs, *self.problems)}:
            raise InputError(f"{given.data}: no category {', '.join(sorted(unknown))}")

    def plan(self, row: Row) -> None:
        """The runs of a row, seed by seed, and the figures of those that are finished."""
        names = self.given.categories
        try:
            known = category_names(*place(self.given, row))
            if names and not set(names) & set(known):
                raise InputError(f"none of the categories {', '.join(names)} is in {', '.join(known) or 'the data'}")
            config = resolve(tuple(command(self.given, row, self.overrides, category="", seed="0", steps="1")))
        except InputError as error:
            self.problems[row.config, "", 0] = one_line(error)  # of all its runs
            return
        for seed in self.given.seeds:
            for category in (name for name in known if not names or name in names):
                key = (row.config, category, seed)
                try:
                    steps = str(steps_of(row, config, category, seed))
                    words = command(self.given, row, self.overrides, category=category, seed=str(seed), steps=steps)
                    self.runs[key] = words
                    if metrics := finished(words):
                        self.results[key] = metrics
                except InputError as error:
                    self.problems[key] = one_line(error)

    def go_on(self) -> None:
        """Train what is not finished; the tables are written after every run."""
        self.write()
        left = [key for key in self.runs if key not in self.results]
        begin = time.monotonic()
        for count, key in enumerate(left, start=1):
            name = f"[{count} of {len(left)}] {key[0]}, {key[1]}, seed {key[2]}"
            say(name)
            try:
                self.results[key] = self.train(key)
                told = ", ".join(f"{METRICS[m]} {100 * value:.1f}" for m, value in self.results[key].items())
            except (InputError, jax.errors.JaxRuntimeError) as error:
                told = self.problems[key] = one_line(error)
            self.write()
            hours = (time.monotonic() - begin) / 3600
            say(f"{name}: {told}; {hours:.2f} h gone, about {hours / count * (len(left) - count):.2f} h left")

    def train(self, key: Key) -> dict[str, float]:
        """One run, from its start or where it was stopped."""
        row, words = next(row for row in self.rows if row.config == key[0]), self.runs[key]
        if row.start and (row.start, *key[1:]) not in self.results:
            raise InputError(f"it starts from {row.start}, of which this run is not there")
        config = resolve(tuple(words))
        if lack := lacking(config.features.backbone, config.features.weights):
            raise InputError(lack)
        return figures(train(config, workdir(words), command=words))

    def write(self) -> None:
        """Replace both files."""
        self.given.out.mkdir(parents=True, exist_ok=True)
        table = self.table()
        files.write_json(self.given.out / "table.json", table)
        files.write_text(self.given.out / "table.md", markdown(table))

    def table(self) -> dict[str, Any]:
        """Everything that the Markdown shows, and every run."""
        return {
            "data": self.given.data,
            "source": self.given.source,
            "overrides": shlex.join(self.overrides),
            "planned": len(self.runs),
            "rows": [self.summary(row) for row in self.rows],
            "runs": [
                {"row": key[0], "category": key[1], "seed": key[2], "command": shlex.join(self.runs[key])} | metrics
                for key, metrics in self.results.items()
            ],
        }

    def summary(self, row: Row) -> dict[str, Any]:
        """A row: the paper's figures and ours, over all categories and for each, and why runs are not there."""
        own = {key[1:]: metrics for key, metrics in self.results.items() if key[0] == row.config}
        reasons = defaultdict(list)
        for (config, category, seed), reason in self.problems.items():
            if config == row.config:
                reasons[reason] += [f"{category} {seed}"] if category else []
        told = {"row": row.config, "command": generic(self.given, row, self.overrides), "not_run": dict(reasons)}
        return told | row_figures(row, own)


def workdir(words: list[str]) -> Path:
    return Path(words[words.index("--workdir") + 1])


def finished(words: list[str]) -> dict[str, float]:
    """Figures of a finished run of just this command; nothing where there is none."""
    folder = workdir(words)
    if not (folder / files.METRICS).is_file() or files.read_config(folder)[1]["command"] != words:
        return {}
    return figures(files.read_json(folder / files.METRICS))


def figures(metrics: dict[str, Any]) -> dict[str, float]:
    """Those metrics of a run that have an answer."""
    found = {m: metrics[m] for m in METRICS if metrics.get(m) is not None and math.isfinite(metrics[m])}
    if not found:
        raise InputError("the data have no test images that it could be measured on")
    return found


@functools.cache
def lacking(backbone: str, weights: str) -> str:
    """Why the weights of a backbone cannot be had; asked once."""
    try:
        load_backbone(backbone, weights=weights or None)
    except InputError as error:
        return one_line(error)
    return ""


@functools.cache
def normal_images(source: Source, root: str, category: str) -> tuple[Record, ...]:
    return tuple(r for r in read_records(source, root, category) if r.split == "train" and r.label == 0)


def steps_of(row: Row, config: Config, category: str, seed: int) -> int:
    """Steps of a row's epochs, of the images that are not held out; 0 where the config tells them."""
    if not row.epochs:
        return 0
    normal = normal_images(config.data.source, config.data.root, category)
    fit, _ = hold_out(normal, fraction=config.scoring.held_out, seed=seed)
    return round(row.epochs * len(fit) / config.training.batch_size)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main(arguments: Sequence[str] | None = None) -> None:
    given, overrides = parse(arguments)
    try:
        if given.list:
            given.data = given.data or "ROOT"
            for row in ROWS:
                if set(row.parts) & set(given.parts):
                    print(f"{row.config}: {generic(given, row, overrides)}")
            return
        prepare_jax()  # as `pushpull train` does
        study = Study(given, overrides)
        study.go_on()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from there")
    print(f"{len(study.results)} of {len(study.runs)} runs finished: {given.out / 'table.md'}")


if __name__ == "__main__":
    main()
