"""An inspection as a page for people: counts, problems with their pictures, and some images of each kind.

One self-contained HTML file, for any screen, in light and dark; nothing is loaded from anywhere. Pictures are data:
URIs of decoded images, masks outlined. Every text that comes from outside is escaped.
"""

import base64
import io
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pushpull_jax import heatmap
from pushpull_jax.data.images import decode_image, read_mask
from pushpull_jax.data.manifest import Record
from pushpull_jax.data.pipeline import cores
from pushpull_jax.errors import InputError
from pushpull_jax.inspection import Inspection, Problem
from pushpull_jax.inspection_table import areas_of, percent
from pushpull_jax.page import escape, write_page

_SIDE = 200  # longer side of a picture in pixels
_IMAGES, _EACH = 400, 12  # pictures in all, and of a kind: about 2 MB
_PROBLEMS, _WITH_PICTURES = 500, 40  # problems that are listed, and shown
_OUTLINE = (255, 0, 200)  # magenta, rare on parts


def write_contact_sheet(path: str | os.PathLike, inspection: Inspection) -> None:
    """Write the page, whole or not at all; pictures are decoded again, a few of each kind."""
    layout = inspection.layout
    with ThreadPoolExecutor(cores()) as pool:
        parts = {
            "name": escape(layout.root.name),
            "summary": f"{escape(layout.name)}, {escape(layout.reason)}",
            "cards": _cards(inspection),
            "problems": _problems(inspection, pool),
            "counts": _counts(inspection),
            "sizes": "".join(_row(row) for row in inspection.sizes()),
            "galleries": _galleries(inspection, pool),
        }
    write_page(path, "contact_sheet", title=f"{layout.root.name}: data", parts=parts)


def _cards(inspection: Inspection) -> str:
    records = inspection.records
    normal = [record for record in records if record.label == 0]
    figures = (
        ("images", len(records), ""),
        ("normal, to train on", sum(record.split == "train" for record in normal), ""),
        ("normal, tested", sum(record.split == "test" for record in normal), ""),
        ("anomalous", sum(record.label == 1 for record in records), ""),
        ("errors", inspection.errors, "error"),
        ("warnings", len(inspection.problems) - inspection.errors, "warning"),
    )
    return "".join(
        f'<div class="card {kind if number else ""}"><b>{number}</b>{name}</div>' for name, number, kind in figures
    )


def _problems(inspection: Inspection, pool: ThreadPoolExecutor) -> str:
    if not inspection.problems:
        return '<p class="soft">None was found.</p>'
    shown = inspection.problems[:_PROBLEMS]
    root = inspection.layout.root
    base = root.parent if root.is_file() else root
    pictures = pool.map(lambda problem: _problem_pictures(problem, base), shown[:_WITH_PICTURES])
    by_kind: dict[str, list[str]] = defaultdict(list)
    for problem, picture in zip(shown, [*pictures, *[""] * (len(shown) - _WITH_PICTURES)], strict=False):
        text = f"<div><b>{escape(problem.file)}</b><br>{escape(problem.message)}</div>"
        by_kind[problem.kind].append(f"<li>{picture}{text}</li>")
    sections = []
    for kind, items in by_kind.items():
        severity = "error" if Problem(kind, "", "").is_error else "warning"
        title = f'<span class="{severity}">{severity}</span> {kind.replace("_", " ")} <small>{len(items)}</small>'
        sections.append(f'<h3>{title}</h3><ul class="problems">{"".join(items)}</ul>')
    if len(inspection.problems) > len(shown):
        sections.append(f'<p class="soft">And {len(inspection.problems) - len(shown)} more, which --json lists.</p>')
    return "".join(sections)


def _problem_pictures(problem: Problem, base: Path) -> str:
    """The file and the one it is compared with, as far as they are images."""
    pictures = []
    for name in filter(None, (problem.file, problem.other)):
        try:
            pictures.append(_picture(_small(decode_image(base / name)), name))
        except InputError:
            pictures.append('<span class="none">no image</span>')
    return f'<span class="pair">{"".join(pictures)}</span>'


def _counts(inspection: Inspection) -> str:
    rows = []
    for (category, split, defect_type), places in inspection.groups().items():
        masks = sum(inspection.records[place].mask is not None for place in places)
        areas = areas_of(inspection, places)
        shares = map(percent, areas) if areas else ("", "", "")
        rows.append(_row((category, split, defect_type, len(places), masks or "", *shares)))
    return "".join(rows)


def _row(cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _galleries(inspection: Inspection, pool: ThreadPoolExecutor) -> str:
    groups = inspection.groups()
    each = max(2, min(_EACH, _IMAGES // max(1, len(groups))))
    sections = []
    for (category, split, defect_type), places in groups.items():
        # Spread over the group, as neighbours look alike.
        chosen = [places[position] for position in np.linspace(0, len(places) - 1, min(each, len(places))).astype(int)]
        figures = pool.map(_figure, [inspection.records[place] for place in chosen])
        title = f"{escape(category)} / {split} / {escape(defect_type)} <small>{len(chosen)} of {len(places)}</small>"
        sections.append(f'<h3>{title}</h3><div class="sheet">{"".join(figures)}</div>')
        if len(sections) * each >= _IMAGES:
            sections.append(f'<p class="soft">{len(groups) - len(sections)} more kinds are not shown.</p>')
            break
    return "".join(sections)


def _figure(record: Record) -> str:
    caption = f"<figcaption>{escape(record.key.rpartition('/')[2])}</figcaption>"
    try:
        image = decode_image(record.image)
        mask = read_mask(record, size=image.shape[:2])
    except InputError:
        return f'<figure><span class="none">cannot be read</span>{caption}</figure>'
    small = _small(image)
    if mask is not None and mask.any():
        marked = Image.fromarray(mask.astype(np.uint8) * 255).resize(small.shape[1::-1], Image.Resampling.BOX)
        small = heatmap.outline(small, np.asarray(marked) > 0, colour=_OUTLINE)
    return f"<figure>{_picture(small, record.key)}{caption}</figure>"


def _small(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(image)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.array(picture)


def _picture(image: np.ndarray, name: str) -> str:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "WEBP", quality=80)
    source = "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
    return f'<img src="{source}" alt="{escape(name)}" title="{escape(name)}" loading="lazy">'
