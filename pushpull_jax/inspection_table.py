"""An inspection for the terminal, and as plain values for JSON."""

import shlex
import statistics
from collections import defaultdict
from typing import Any

from pushpull_jax.inspection import Inspection, Problem

_SHOWN = 10  # problems of a kind on the terminal


def text_table(inspection: Inspection) -> str:
    """Layout, counts, sizes and problems as text of fixed width."""
    layout, records = inspection.layout, inspection.records
    masks = sum(record.mask is not None for record in records)
    lines = [
        f"{layout.root}: {layout.name} ({layout.source}), {layout.reason}",
        f"{len(records)} images, {masks} with masks, in {len(layout.categories)} "
        f"{'category' if len(layout.categories) == 1 else 'categories'}",
        "",
    ]
    lines += _aligned(
        [("category", "split", "type", "images", "masks", "least area", "median", "most"), *_rows(inspection)]
    )
    lines += ["", *_aligned([("size", "stored as", "images"), *inspection.sizes()])]
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in inspection.problems:
        by_kind[problem.kind].append(problem)
    for kind, problems in by_kind.items():
        severity = "error" if problems[0].is_error else "warning"
        lines += ["", f"{severity}: {kind.replace('_', ' ')} ({len(problems)})"]
        lines += [f"  {problem.file}: {problem.message}" for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"  and {len(problems) - _SHOWN} more, which --json and --html list")
    warnings = len(inspection.problems) - inspection.errors
    lines += ["", f"{_count(inspection.errors, 'error')}, {_count(warnings, 'warning')}"]
    if not inspection.errors:
        category = layout.categories[0] if len(layout.categories) == 1 else "CATEGORY"
        data = f"--data.source {layout.source} --data.root {shlex.quote(str(layout.root))}"
        lines += [f"pushpull train quick {data} --data.category {shlex.quote(category)} --workdir DIR"]
    return "\n".join(lines)


def as_values(inspection: Inspection) -> dict[str, Any]:
    """The same, whole, as dicts and lists; areas are shares of the image."""
    layout = inspection.layout
    groups = []
    for (category, split, defect_type), places in inspection.groups().items():
        areas = areas_of(inspection, places)
        groups.append(
            {
                "category": category,
                "split": split,
                "defect_type": defect_type,
                "label": inspection.records[places[0]].label,
                "images": len(places),
                "masks": sum(inspection.records[place].mask is not None for place in places),
                "area": dict(zip(("least", "median", "most"), areas, strict=True)) if areas else None,
            }
        )
    return {
        "root": str(layout.root),
        "layout": layout.source,
        "recognised": layout.reason,
        "images": len(inspection.records),
        "groups": groups,
        "sizes": [{"size": size, "stored": stored, "images": n} for size, stored, n in inspection.sizes()],
        "errors": inspection.errors,
        "warnings": len(inspection.problems) - inspection.errors,
        "problems": [problem._asdict() | {"is_error": problem.is_error} for problem in inspection.problems],
    }


def areas_of(inspection: Inspection, places: list[int]) -> tuple[float, float, float] | None:
    """Least, median and largest area of the defects of some records; None where no mask marks any."""
    areas = [area for place in places if (area := inspection.facts[place].area)]
    return (min(areas), statistics.median(areas), max(areas)) if areas else None


def percent(share: float) -> str:
    """A share of the image, to two figures as small ones differ."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _rows(inspection: Inspection) -> list[tuple[str, ...]]:
    rows = []
    for (category, split, defect_type), places in inspection.groups().items():
        masks = sum(inspection.records[place].mask is not None for place in places)
        areas = areas_of(inspection, places)
        shares = tuple(map(percent, areas)) if areas else ("", "", "")
        rows.append((category, split, defect_type, str(len(places)), str(masks or ""), *shares))
    return rows


def _aligned(rows: list[tuple[Any, ...]]) -> list[str]:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [tuple(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [all(cell[:1].isdigit() or not cell for cell in column[1:]) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in cells
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
