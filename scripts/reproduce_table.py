"""The rows of scripts/reproduce.py with the paper's figures, ours over seeds and categories, and both as Markdown.

A run's figures are its metrics in [0,1], by (category, seed); those of table.json are too, those of the Markdown in
percent.
"""

import statistics
from typing import Any, NamedTuple

from pushpull_jax.data.manifest import listed

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AU-PRO"}
EXPLANATION = """\
In percent. Ours: mean and deviation over seeds (n - 1) of the mean over categories; a seed counts once it has all
categories that another one has. The paper's are means over the 15 categories of MVTec-AD, or the ten classes of
CIFAR-10: figures on other data, or on a part of them, cannot be compared with it."""


class Row(NamedTuple):
    """One line of a table: a config, and what it is compared with."""

    config: str
    parts: tuple[str, ...]
    image: float | None = None  # AUROC of the paper, in percent
    pixel: float | None = None
    start: str = ""  # the row whose run of the same category and seed it starts from
    epochs: int = 0  # 0: the steps of the config
    arguments: tuple[str, ...] = ()
    last: tuple[str, ...] = ()  # what no further option changes


# All rows of ours are tested on the same images: those that ten labels leave.
TEN_UNUSED = ("--supervision.shots", "10", "--supervision.labels", "unused")
# Z. You et al., ADTR, ICONIP 2022, arXiv 2209.01816: means over the 15 categories of MVTec-AD (localisation is pixel
# AUROC, detection image AUROC; ablations are of pixel AUROC), and over the ten classes of CIFAR-10. Epochs are the
# paper's too. What a row starts from comes before it.
ROWS = (
    Row("adtr", ("mvtec", "ablations"), 96.4, 97.2, epochs=500),
    Row("adtr_plus_pixels", ("mvtec",), 96.9, 97.5, start="adtr", epochs=300),
    Row("ablation_cnn", ("ablations",), pixel=94.4, epochs=500),
    Row("ablation_no_attention", ("ablations",), pixel=94.8, epochs=500),
    Row("ablation_no_query", ("ablations",), pixel=94.2, epochs=500),
    Row("ablation_pixels", ("ablations",), pixel=91.3, epochs=500),
    Row("ablation_resnet18", ("ablations",), pixel=95.3, epochs=500),
    Row("ablation_resnet34", ("ablations",), pixel=95.7, epochs=500),
    Row("ablation_b0", ("ablations",), pixel=96.4, epochs=500),
    Row("ablation_last_stage", ("ablations",), pixel=96.0, epochs=500),
    Row("adtr_cifar10", ("cifar10",), image=94.7),
    Row("adtr_plus_images", ("cifar10",), image=96.1),
    Row("quick_cifar10", ("cifar10",)),
    Row("quick_cifar10_images", ("cifar10",), start="quick_cifar10"),
    Row("nearest", ("ours",), arguments=TEN_UNUSED, last=("--training.steps", "0")),
    Row("quick", ("ours",), arguments=TEN_UNUSED),
    Row("quick_confetti", ("ours",), start="quick", arguments=TEN_UNUSED),
    Row("quick_images", ("ours",), start="quick"),
    Row("quick_masks", ("ours",), start="quick"),
)
PARTS = tuple(dict.fromkeys(part for row in ROWS for part in row.parts))


def row_figures(row: Row, runs: dict[tuple[str, int], dict[str, float]]) -> dict[str, Any]:
    """The paper's figures of a row beside ours, and ours for each category."""
    paper = {"image_auroc": row.image, "pixel_auroc": row.pixel}
    by_category = {
        name: {
            metric: over_seeds({key: of for key, of in runs.items() if key[0] == name}, metric) for metric in METRICS
        }
        for name in sorted({category for category, _ in runs})
    }
    beside = {metric: _beside(paper.get(metric), over_seeds(runs, metric)) for metric in METRICS}
    return {"metrics": beside, "categories": by_category}


def over_seeds(runs: dict[tuple[str, int], dict[str, float]], metric: str) -> dict[str, Any]:
    """Mean and deviation (n - 1) over seeds of the mean over categories, of the seeds that have all of them."""
    values = {key: metrics[metric] for key, metrics in runs.items() if metric in metrics}
    categories = {category for category, _ in values}
    seeds = [seed for seed in sorted({seed for _, seed in values}) if all((c, seed) in values for c in categories)]
    means = [statistics.fmean(values[category, seed] for category in categories) for seed in seeds]
    return {
        "ours": statistics.fmean(means) if means else None,
        "deviation": statistics.stdev(means) if len(means) > 1 else None,
        "categories": len(categories),
        "seeds": seeds,
    }


def _beside(paper: float | None, ours: dict[str, Any]) -> dict[str, Any]:
    """Our figure with the paper's, from percent, and the difference."""
    known = paper is not None and ours["ours"] is not None
    return {
        "paper": None if paper is None else paper / 100,
        **ours,
        "difference": ours["ours"] - paper / 100 if known else None,
    }


def markdown(table: dict[str, Any]) -> str:
    """The tables for reading, in percent, of what table.json holds."""
    done, data = f"{len(table['runs'])} of {table['planned']} runs are finished.", table["data"] or "as prepared"
    lines = ["# The paper's figures and ours", "", f"{done} Data: {data} ({table['source']}).", "", EXPLANATION, ""]
    lines += [f"Fields that were changed in all runs: `{table['overrides']}`.", ""] if table["overrides"] else []
    lines += _header("row", "metric", "paper", "ours", "difference", "categories", "seeds", "command")
    for row in table["rows"]:
        for metric, of in row["metrics"].items():
            cells = [row["row"], METRICS[metric], _percent(of["paper"]), _spread(of), _percent(of["difference"], "+")]
            cells += [str(of["categories"]), str(len(of["seeds"])), f"`{row['command']}`"]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## By category", "", *_header("row", "category", "seeds", *METRICS.values())]
    for row in table["rows"]:
        for category, of in row["categories"].items():
            seeds = max(len(of[metric]["seeds"]) for metric in METRICS)
            lines.append(f"| {row['row']} | {category} | {seeds} | {' | '.join(_spread(of[m]) for m in METRICS)} |")
    reasons = [(row["row"], *item) for row in table["rows"] for item in row["not_run"].items()]
    lines += ["", "## Not run", ""] if reasons else []
    lines += [f"- {name}{f' ({listed(runs)})' if runs else ''}: {reason}" for name, reason, runs in reasons]
    return "\n".join(lines) + "\n"


def _header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _spread(of: dict[str, Any]) -> str:
    return _percent(of["ours"]) + ("" if of["deviation"] is None else f" ± {_percent(of['deviation'])}")
