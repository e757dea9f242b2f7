"""The command line: `pushpull COMMAND ...`, as `USAGE` lists them.

jax and tensorflow are imported by the command that needs them, after its arguments have been checked. What a user can
mend is one message and exit code 1; a usage error is exit code 2, as argparse and tyro have it.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from pushpull_jax.bucket import faults_said
from pushpull_jax.config import (
    FILE_SOURCES,
    Ablation,
    Config,
    Source,
    check,
    flatten,
    load_ablation,
    load_config,
    nearest,
    runs_of,
    shipped_ablations,
    varied,
)
from pushpull_jax.errors import InputError
from pushpull_jax.preemption import EXIT_CODE, Preempted, sigterm_raised

USAGE = """\
usage: pushpull COMMAND ...

Find defects in images: train a detector on a folder of photographs, see what it finds.

commands:
  train CONFIG --workdir DIR [--any.field VALUE]   train a detector and evaluate it
  evaluate DIR                                     evaluate a run again: metrics, predictions, report
  predict DIR IMAGES... --output OUT               score images: a table and heat maps
  calibrate DIR --normals IMAGES... --fpr F        fit the thresholds of a run anew, without training
  export DIR --output OUT [--verify IMAGES]        one folder that runs elsewhere, without this package
  ablate CONFIG --workdir DIR [--vary FIELD=A,B]   a grid of runs, trained together, in one table
  serve DIR [--port N]                             score images that are sent by HTTP; a page to drop them on
  inspect ROOT [--json] [--html FILE]              what is in a data set, and what is wrong with it
  demo [--workdir DIR]                             the whole job on drawn images, in minutes

CONFIG is a Python file or the name of a shipped config: quick, quick_masks, adtr, ... (a misspelt one lists them all).
`pushpull COMMAND --help` tells more."""

# Not a path, which would take a slash from gs://BUCKET/FOLDER.
_Workdir = Annotated[str, tyro.conf.arg(metavar="DIR")]
_Run = tyro.conf.Positional[_Workdir]
_Images = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGES...")]


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a detector and evaluate it; a run that was stopped goes on."""

    workdir: _Workdir
    """Folder of the run, new or empty, or that of the same run."""
    config: Annotated[Config, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a finished run on the test images of its category: metrics.json, predictions.csv, report.html."""

    workdir: _Run
    """Folder of the run."""
    root: Path | None = None
    """Where the data are now, if they have moved since the run was trained."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Score images with a finished run: OUT/predictions.csv and .jsonl, and a heat map an image at its native size.

    The same command goes on where it was stopped."""

    workdir: _Run
    """Folder of the run."""
    output: Path
    """Folder that is written to; it belongs to the run, its thresholds and the options below."""
    images: tyro.conf.Positional[_Images] = ()
    """Image files, and folders that are searched for images at any depth."""
    threshold: float | None = None
    """Scores above it are anomalous; by default that of the run."""
    pixel_threshold: float | None = None
    """Pixels of the map above it are defective; by default that of the run."""
    fpr: float | None = None
    """Instead: both thresholds for this false-positive rate, by the held-out normal images of the run."""
    heatmaps: bool = True
    """Write OUT/heatmaps: each image under the colours of its map."""
    masks: bool = False
    """Write OUT/masks: white where the map is above the pixel threshold."""
    maps: bool = False
    """Write OUT/maps: the maps in 16 bits, 10000 at the pixel threshold."""
    tile: int | None = None
    """Cut images into overlapping tiles of this side in pixels, each scored like an image; calibrate with the same."""
    watch: Path | None = None
    """Instead of IMAGES: predict the images in this folder and those that come, until Ctrl-C or SIGTERM."""


@dataclasses.dataclass(frozen=True)
class Calibrate:
    """Fit the thresholds of a finished run to other normal images, without training."""

    workdir: _Run
    """Folder of the run."""
    normals: _Images
    """Image files, and folders that are searched for images at any depth: all normal, none trained on."""
    fpr: float = 0.05
    """False-positive rate: share of normal images that may be called anomalous."""
    tile: int | None = None
    """Cut images into tiles of this side in pixels, as `predict` will."""


@dataclasses.dataclass(frozen=True)
class Export:
    """Export a finished run to one folder that runs elsewhere: a jax.export artefact, weights, model card, example."""

    workdir: _Run
    """Folder of the run."""
    output: Path
    """Folder that is made, whole or not at all. One that exists is refused, but for --verify of an export."""
    verify: Path | None = None
    """Folder of images that every artefact must score as the run itself does, or the command fails; where OUTPUT is an
    export already, it is verified as it is."""
    tolerance: float = 1e-4
    """Of --verify: largest difference of a score, relative, and of a map, relative to its largest value."""
    saved_model: bool = False
    """Write a TensorFlow SavedModel too."""


@dataclasses.dataclass(frozen=True)
class Ablate:
    """Train and score a grid of runs together: ablation.csv, a table of means over seeds, report.html."""

    workdir: _Workdir
    """Folder of the grid, new or empty, or that of the same grid, which goes on."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    vary: tuple[str, ...] = ()
    """Fields and their values, FIELD=A,B,C, besides or instead of those that vary in CONFIG; a field that is a tuple
    takes tuples: "features.stages=(1,2),(3,)"."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a finished run by HTTP until SIGTERM: POST /predict, and a page at / to drop images on."""

    workdir: _Run
    """Folder of the run."""
    port: int = 8000
    """Port; 0 takes any that is free."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a token in the environment variable PUSHPULL_TOKEN."""
    max_megabytes: float = 32.0
    """Largest request."""
    max_megapixels: float = 16.8
    """Largest image."""
    max_waiting: int = 64
    """Images at a time; a client that comes then is answered 503."""


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Look at a data set before training: what it holds, and what is wrong with it; exit code 1 where errors are."""

    root: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ROOT")]
    """Folder of the data, of one category, or a table (.csv, .jsonl)."""
    source: Source | None = None
    """Its layout, as data.source has it; by default it is told by the names of folders, where only one fits."""
    category: str | None = None
    """One category of it, or the normal class of a folder of classes; by default all."""
    json: bool = False
    """Print one JSON document in place of the table."""
    html: Path | None = None
    """File for a contact sheet: counts, problems, and pictures of each kind of image."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Draw a data set of parts with defects, train on it, and evaluate."""

    workdir: Path = Path("runs/demo")
    """Folder of the run; the drawn images go to its sibling demo_data."""


def _parse(command: type, arguments: list[str], **options: object):
    return tyro.cli(
        command, args=arguments, prog=f"pushpull {command.__name__.lower()}", use_underscores=True, **options
    )


def train(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        wants_help = any(argument in ("-h", "--help") for argument in arguments)
        if not wants_help:
            raise _UsageError("pushpull train: expected a config first: pushpull train CONFIG --workdir DIR")
        print("usage: pushpull train CONFIG --workdir DIR [--any.field VALUE]; the defaults below are CONFIG quick's\n")
        arguments = ["quick", *arguments]
    config = load_config(arguments[0])
    default = Train(workdir=tyro.MISSING, config=config)
    chosen = _parse(Train, arguments[1:], default=default, config=(tyro.conf.AvoidSubcommands,))
    config = chosen.config
    check(config, source="command line")
    _check_data(config, f"pushpull train: expected --data.{{}}, which config {arguments[0]} leaves open")

    prepare_jax()
    from pushpull_jax.training import train

    _summarise(train(config, chosen.workdir, command=["pushpull", "train", *arguments]), chosen.workdir)


def ablate(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        wants_help = any(argument in ("-h", "--help") for argument in arguments)
        if not wants_help:
            raise _UsageError("pushpull ablate: expected an ablation first: pushpull ablate CONFIG --workdir DIR")
        print("usage: pushpull ablate CONFIG --workdir DIR [--vary FIELD=A,B] [--any.field VALUE]")
        print(f"CONFIG is an ablation ({', '.join(shipped_ablations())}, or a file) or any config, as quick is below\n")
        arguments = ["quick", *arguments]
    ablation = load_ablation(arguments[0])
    default = Ablate(workdir=tyro.MISSING, config=ablation.config)
    chosen = _parse(Ablate, arguments[1:], default=default, config=(tyro.conf.AvoidSubcommands,))
    vary = ablation.vary | varied(chosen.vary, ablation.config)
    before, after = flatten(ablation.config), flatten(chosen.config)
    for name in vary:
        if name in after and after[name] != before[name]:
            raise _UsageError(f"pushpull ablate: {name} varies in this grid: give its values with --vary {name}=A,B")
    if not vary:
        raise _UsageError(f"pushpull ablate: nothing varies in {arguments[0]}: give --vary FIELD=A,B")
    ablation = Ablation(chosen.config, vary)
    for run in runs_of(ablation, source="command line"):
        _check_data(run, f"pushpull ablate: expected --data.{{}}, which {arguments[0]} leaves open")

    prepare_jax()
    from pushpull_jax.data.pipeline import cores
    from pushpull_jax.mesh import divide_cpu

    divide_cpu(cores())  # a member on each core is faster than all cores on one
    from pushpull_jax.ablation import ablate
    from pushpull_jax.ablation_report import summarise, text_table

    rows = ablate(ablation, chosen.workdir, command=["pushpull", "ablate", *arguments])
    print(text_table(summarise(rows)))
    print(f"table: {_within(chosen.workdir, 'ablation.csv')}\nreport: {_within(chosen.workdir, 'report.html')}")


def prepare_jax() -> None:
    """Choose XLA's options and keep what is compiled for the next time, as importing the package does not.

    To be called before jax is asked for a device or computes.
    """
    from pushpull_jax import compilation_cache, cpu_options

    cpu_options.set_cpu_options()
    compilation_cache.enable()


def _check_data(config: Config, message: str) -> None:
    """Raise where a config does not say which data it is for."""
    for name in ("root", "category") if config.data.source in FILE_SOURCES else ("category",):
        if not getattr(config.data, name):
            raise _UsageError(message.format(name))


def evaluate(arguments: list[str]) -> None:
    chosen = _parse(Evaluate, arguments)

    prepare_jax()
    from pushpull_jax.evaluation import evaluate

    _summarise(evaluate(chosen.workdir, root=chosen.root), chosen.workdir)


def predict(arguments: list[str]) -> None:
    chosen = _parse(Predict, arguments)

    if chosen.fpr is not None and (chosen.threshold is not None or chosen.pixel_threshold is not None):
        raise _UsageError("pushpull predict: --fpr gives both thresholds; leave out --threshold and --pixel_threshold")
    if chosen.watch and chosen.images:
        raise _UsageError("pushpull predict: give IMAGES or --watch FOLDER, not both")
    if chosen.pixel_threshold is not None and not 0 < chosen.pixel_threshold < math.inf:
        raise _UsageError(f"pushpull predict: --pixel_threshold {chosen.pixel_threshold}: expected one above 0")
    _check_tile(chosen.tile, "predict")

    prepare_jax()
    from pushpull_jax.prediction import find_images, predict

    if chosen.watch:
        return _watch(chosen)
    find_images(chosen.images, apart_from=chosen.output)  # a wrong path is said before the run is loaded
    options = {"pictures": _pictures(chosen), "tile": chosen.tile}
    predictions, unreadable = predict(_detector(chosen), chosen.images, chosen.output, **options)
    anomalous = sum(prediction.verdict == "anomalous" for prediction in predictions)
    print(f"{len(predictions)} images, {anomalous} anomalous: {chosen.output / 'predictions.csv'}")
    _raise_unreadable(unreadable)


def _check_tile(tile: int | None, command: str) -> None:
    if tile is not None and tile < 1:
        raise _UsageError(f"pushpull {command}: --tile {tile}: expected a side in pixels, 1 or more")


def _detector(chosen: Predict):
    """The run's detector with the thresholds that were asked for, which are said."""
    from pushpull_jax.detector import load
    from pushpull_jax.recalibration import at_false_positive_rate

    detector = load(chosen.workdir)
    if chosen.fpr is not None:
        detector = at_false_positive_rate(chosen.workdir, detector, rate=chosen.fpr)
    given = (chosen.threshold, chosen.pixel_threshold)
    own = (detector.threshold, detector.map_threshold)
    detector = detector.with_thresholds(*(b if a is None else a for a, b in zip(given, own, strict=True)))
    print(f"threshold {detector.threshold:.4g} for images, {detector.map_threshold:.4g} for pixels")
    return detector


def _pictures(chosen: Predict):
    from pushpull_jax.prediction_output import Pictures

    return Pictures(chosen.heatmaps, chosen.masks, chosen.maps)


def _watch(chosen: Predict) -> None:
    """Predict what comes into a folder until a signal ends it, which is how it is meant to end."""
    from pushpull_jax.prediction import watch
    from pushpull_jax.preemption import sigterm_noted

    def report(row) -> None:
        told = f"cannot be read: {row}" if isinstance(row, str) else f"{row.path}: {row.verdict}, score {row.score:.4g}"
        print(told, flush=True)

    detector = _detector(chosen)
    print(f"watching {chosen.watch}; Ctrl-C ends it", flush=True)
    with contextlib.suppress(KeyboardInterrupt), sigterm_noted() as notice:
        options = {"pictures": _pictures(chosen), "tile": chosen.tile}
        watch(detector, chosen.watch, chosen.output, **options, report=report, is_over=lambda: notice.came)


def _raise_unreadable(unreadable: dict[str, str]) -> None:
    if unreadable:
        raise InputError(f"{len(unreadable)} files could not be read:\n  " + "\n  ".join(unreadable.values()))


def calibrate(arguments: list[str]) -> None:
    chosen = _parse(Calibrate, arguments)
    _check_tile(chosen.tile, "calibrate")

    prepare_jax()
    from pushpull_jax.recalibration import calibrate

    result = calibrate(chosen.workdir, chosen.normals, false_positive_rate=chosen.fpr, tile=chosen.tile)
    fitted = result.threshold
    print(f"threshold {fitted.value:.4g} for images, {result.map_threshold:.4g} for pixels, by n = {fitted.n}")
    print(fitted.note())
    print(f"`pushpull evaluate {chosen.workdir}` counts its verdicts anew")
    _raise_unreadable(result.unreadable)


def export(arguments: list[str]) -> None:
    chosen = _parse(Export, arguments)

    prepare_jax()
    from pushpull_jax.exporting import export

    export(
        chosen.workdir,
        chosen.output,
        verify=chosen.verify,
        tolerance=chosen.tolerance,
        saved_model=chosen.saved_model,
    )
    print(f"export: {chosen.output}, see {chosen.output / 'README.md'}")


def serve(arguments: list[str]) -> None:
    chosen = _parse(Serve, arguments)

    prepare_jax()
    try:
        from pushpull_jax.service.serving import TOKEN, Limits, bind, run
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("pushpull_jax"):
            raise
        raise InputError(f"needs {error.name}, of the extra `serve`: pip install 'pushpull_jax[serve]'") from error
    from pushpull_jax.detector import load

    token = os.environ.get(TOKEN) or None
    with bind(chosen.host, chosen.port, token=token) as listening:
        detector = load(chosen.workdir)
        limits = Limits(
            body=int(chosen.max_megabytes * 1e6), pixels=int(chosen.max_megapixels * 1e6), waiting=chosen.max_waiting
        )
        host = f"[{chosen.host}]" if ":" in chosen.host else chosen.host
        print(f"serving {chosen.workdir} on http://{host}:{listening.getsockname()[1]}", flush=True)
        run(detector, listening, token=token, limits=limits)


def inspect(arguments: list[str]) -> None:
    chosen = _parse(Inspect, arguments)

    from pushpull_jax.inspection import inspect
    from pushpull_jax.inspection_table import as_values, text_table

    if chosen.html is not None and (chosen.html.is_dir() or not chosen.html.absolute().parent.is_dir()):
        raise InputError(f"--html {chosen.html}: expected a file in a folder that exists")
    inspection = inspect(chosen.root, source=chosen.source, category=chosen.category)
    text = json.dumps(as_values(inspection), indent=2) if chosen.json else text_table(inspection)
    print(text.encode("utf-8", "replace").decode())  # a file name may hold bytes that are no UTF-8
    if chosen.html is not None:
        from pushpull_jax.contact_sheet import write_contact_sheet

        write_contact_sheet(chosen.html, inspection)
        print(f"contact sheet: {chosen.html}", file=sys.stderr)
    if inspection.errors:
        sys.exit(1)


def demo(arguments: list[str]) -> None:
    chosen = _parse(Demo, arguments)

    prepare_jax()
    from pushpull_jax.demo import run_demo

    run_demo(chosen.workdir)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "calibrate": calibrate,
    "export": export,
    "ablate": ablate,
    "serve": serve,
    "inspect": inspect,
    "demo": demo,
}


class _UsageError(Exception):
    """A command line that does not fit; exit code 2."""


def _summarise(metrics: dict, workdir: str) -> None:
    """The final metrics in percent, and where the rest is."""
    if not metrics:
        print(f"run: {workdir}")
        return
    from pushpull_jax.evaluation import METRICS

    print("  ".join(f"{name} {100 * metrics[name]:.1f}" for name in METRICS))
    print(f"threshold {metrics['threshold']:.4g}: {metrics['false_alarms']} of {metrics['normal']} normal images "
          f"called anomalous, {metrics['missed']} of {metrics['anomalous']} anomalous ones missed")  # fmt: skip
    print(f"report: {_within(workdir, 'report.html')}")


def _within(workdir: str, name: str) -> str:
    """A file of a run, as its folder or address was typed."""
    return f"{workdir.rstrip('/')}/{name}"


def main() -> None:
    """Entry point of `pushpull`; exits with 0, 1 (input that cannot be used), 2 (usage) or 75 (preempted)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if arguments else 2)
    try:
        if arguments[0] not in COMMANDS:
            raise _UsageError(f"pushpull: no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}\n\n{USAGE}")
        with sigterm_raised(), faults_said():
            COMMANDS[arguments[0]](arguments[1:])
    except _UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except InputError as error:
        print(f"pushpull {arguments[0]}: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # an OSError too, so before it
        # Whoever read our output, a pager for instance, has had enough. Python would complain again on closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"pushpull {arguments[0]}: {error}", file=sys.stderr)
        sys.exit(1)
    except Preempted as error:
        print(f"pushpull {arguments[0]}: {error}; the same command goes on from there", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        more = (
            "; the same command goes on from the last checkpoint" if arguments[0] in ("train", "ablate", "demo") else ""
        )
        print(f"pushpull {arguments[0]}: stopped{more}", file=sys.stderr)
        sys.exit(130)
