"""How fast we are beside what one would use instead: a table, and benchmark.json.

    python scripts/benchmark.py [--rows trunk-lite0-8,step] [--quick] [--output benchmark.json] [--list]

Each row measures us and a peer in turn in this process (benchmark_harness.py), after it has asserted that both compute
the same. benchmark.json holds versions, hardware, commit, date, and the rows; rows that are in the file already stay,
unless they were measured at another commit or on another machine.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import benchmark_grid
import benchmark_models
import benchmark_programs
import jax
from benchmark_harness import Contest, Machine, Row, Settings, limits, measure, measure_machine

from pushpull_jax import workdir as files
from pushpull_jax.cpu_options import set_cpu_options
from pushpull_jax.data.pipeline import cores
from pushpull_jax.errors import InputError

ROWS = {row.name: row for row in (*benchmark_models.ROWS, *benchmark_programs.ROWS, *benchmark_grid.ROWS)}
PEERS = ("torch", "scikit-learn")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rows", help="names, separated by commas; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: to try, not to report")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--list", action="store_true", help="name the rows, run nothing")
    given = parser.parse_args(arguments)
    given.rows = given.rows.split(",") if given.rows else list(ROWS)
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    return given


def processor() -> str:
    """The name of the processor, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*words: str) -> str | None:
    """What git says of the repository; None where there is none."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def setting(settings: Settings) -> dict[str, Any]:
    """What the rows of one file must share: commit, versions, hardware, options of XLA."""
    changes = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "quick": settings.quick,
        "versions": files.versions() | {name: installed(name) for name in PEERS},
        "hardware": {
            "processor": processor(),
            "cores": settings.cores,
            "device": jax.default_backend(),
            "accelerators": [d.device_kind for d in jax.devices() if d.platform != "cpu"],
        },
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def earlier_rows(path: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file, if they were measured in the same setting."""
    if not path.is_file():
        return []
    there = files.read_json(path)
    different = [name for name in here if not isinstance(there, dict) or there.get(name) != here[name]]
    if different:
        print(f"{path} is of another {', '.join(different)}, and is replaced", file=sys.stderr)
        return []
    return there["rows"]


def run(rows: Sequence[Row], settings: Settings, output: Path) -> list[dict[str, Any]]:
    """Measure rows one after another; the file is written after each.

    Returns:
        All rows of the file.
    """
    here = setting(settings)
    machine = measure_machine(settings)
    results = {row["name"]: row for row in earlier_rows(output, here)}
    began = time.perf_counter()
    for done, row in enumerate(rows):
        left = (time.perf_counter() - began) / done * (len(rows) - done) if done else None
        estimate = "" if left is None else f", about {left / 60:.0f} min left"
        print(f"[{done + 1}/{len(rows)}{estimate}] {row.title}", file=sys.stderr, flush=True)
        results[row.name] = measured(row, settings, machine)
        reached = {"matmul_gflops": machine.flops / 1e9, "copy_gbytes": machine.bandwidth / 1e9}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        ordered = [results[name] for name in ROWS if name in results]
        files.write_json(output, here | {"date": date, "reached": reached, "rows": ordered})
    return ordered


def measured(row: Row, settings: Settings, machine: Machine) -> dict[str, Any]:
    """One row of the file."""
    with tempfile.TemporaryDirectory(prefix="pushpull_benchmark_") as folder:
        contest: Contest = row.prepare(Settings(settings.quick, settings.cores, Path(folder), settings.seconds))
        result = measure(contest, settings)
    told = {"name": row.name, "title": row.title, "unit": contest.unit}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # above the cores: others computed, too
    return told | result | limits(contest, machine, result["ours"]) | {"load": load} | contest.facts


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; a ratio above 1 says that we are faster."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"

    lines = [
        "| | unit | ours | peer | ratio | quartiles | limit | utilisation | peer is |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        spread = "-" if row["spread"] is None else "{:.2f} to {:.2f}".format(*row["spread"])
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        share = "-" if row["utilisation"] is None else f"{row['utilisation']:.0%}"
        values = (number(row["ours"]), number(row["peer"]), ratio, spread, number(row["limit"]), share)
        lines.append(f"| {' | '.join((row['title'], row['unit'], *values, row['peer_is'] or '-'))} |")
    return "\n".join(lines + [f"\n{row['title']}: {row['note']}" for row in rows if row["note"]])


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if given.list:
        print("\n".join(f"{row.name:<16}{row.title}" for row in ROWS.values()))
        return
    set_cpu_options()  # as `pushpull` does
    settings = Settings(given.quick, cores(), Path(), 0.5 if given.quick else 20.0)
    try:
        rows = run([ROWS[name] for name in given.rows], settings, given.output)
    except InputError as error:
        sys.exit(f"benchmark.py: {error}")
    print(table(rows))


if __name__ == "__main__":
    main()
