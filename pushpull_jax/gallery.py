"""The test images that a report shows: which ones, and as what, so that the file stays small enough to send.

At most `LIMIT` images are shown, and no more than `BUDGET` bytes of pictures are embedded. A photograph is WebP, a mask
a PNG of one bit. A map is a PNG of 8 bits that counts hundredths of the threshold, rounded up: level v says
(v - 1) / 100 < score / threshold <= v / 100, and 255 says above 2.54. A browser colours it, and which pixels are above
a threshold of whole hundredths it tells without any error of rounding.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from pushpull_jax import heatmap
from pushpull_jax.page import escape, four_digits

LIMIT = 200  # images; whole categories of the usual data sets
BUDGET = 12_000_000  # bytes of the file; 200 photographs take 3 to 8 million
PICTURE_SIDE = 400  # longer side of a photograph in pixels: sharp on a phone
MAP_SIDE = 256  # longer side of a map and a mask
STEPS = 100  # levels for each threshold
_MASK_COLOUR = (255, 0, 200)  # magenta: in no colour of the heat scale and rare on parts


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One test image to show. Image, mask and map show the same, each at a size of its own."""

    key: str
    defect_type: str
    label: int
    score: float
    image: np.ndarray  # [H, W, 3] uint8
    mask: np.ndarray | None  # [h, w] bool; None where the truth of the pixels is unknown
    map: np.ndarray  # [h, w] float32


class Verdict(NamedTuple):
    """What the threshold says of an image, and whether it is right."""

    name: str
    is_right: bool

    @property
    def kind(self) -> str:
        return "right" if self.is_right else "wrong"

    @property
    def sign(self) -> str:
        return f"{'✓' if self.is_right else '✗'} {self.name}"


_VERDICTS = {
    (1, False): Verdict("missed", False),
    (0, True): Verdict("false alarm", False),
    (1, True): Verdict("found", True),
    (0, False): Verdict("passed", True),
}


def verdict(label: int, score: float, threshold: float) -> Verdict:
    """The verdict on an image of a label, 0 or 1: a score above the threshold is an alarm, one equal to it is not."""
    return _VERDICTS[int(label), bool(score > threshold)]


def choose_cases(
    labels: np.ndarray, scores: np.ndarray, defect_types: Sequence[str], threshold: float, *, limit: int = LIMIT
) -> list[int]:
    """Choose the images to show, of every defect type and verdict in turn those farthest from the threshold.

    An image that is not chosen among some images is not chosen among those and others either, so that images can be
    chosen batch by batch.

    Args:
        labels: [N], 0 or 1.
        scores: [N].
        defect_types: [N].
        threshold: a score above it is an alarm.
        limit: how many.

    Returns:
        Indices into N, the first of each type and verdict before the second of any, errors before what is right; ties
        in their order.
    """
    distances = np.abs(np.asarray(scores, np.float64) - threshold)
    seen: dict[tuple, int] = {}
    ranked = []
    for i in np.argsort(-distances, kind="stable").tolist():
        own = verdict(labels[i], scores[i], threshold)
        cell = (own.is_right, own.name, str(defect_types[i]))
        seen[cell] = seen.get(cell, -1) + 1
        ranked.append((seen[cell], cell, i))
    return [i for _, _, i in sorted(ranked)[:limit]]


def shrink_map(score_map: np.ndarray) -> np.ndarray:
    """A map [H,W] float32 as it is shown: its longer side `MAP_SIDE` at most, means over the area of each pixel."""
    size = _size(score_map.shape, MAP_SIDE)
    if size == score_map.shape:
        return score_map
    return np.asarray(Image.fromarray(score_map).resize(size[::-1], Image.Resampling.BOX))


def shrink_mask(mask: np.ndarray) -> np.ndarray:
    """A mask [H,W] bool as it is shown: of the size of its map, anomalous where any part of a pixel is."""
    size = _size(mask.shape, MAP_SIDE)
    if size == mask.shape:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize(size[::-1], Image.Resampling.BOX)) > 0


def map_levels(score_map: np.ndarray, *, threshold: float) -> np.ndarray:
    """A map [H,W] in hundredths of a threshold above 0, rounded up: uint8."""
    return np.clip(np.ceil(score_map.astype(np.float64) / threshold * STEPS), 0, 255).astype(np.uint8)


def scale_json() -> str:
    """What the page's script needs to colour levels as `heatmap.overlay` colours maps, as JSON."""
    relative = np.arange(256) / STEPS
    colours = heatmap.heat_colours(relative[None], threshold=1.0)[0]
    fade = heatmap.fade_in(relative)
    outlines = {"above": heatmap.CONTOUR, "mask": _MASK_COLOUR, "side": heatmap.LINE_SIDE}
    return json.dumps({"steps": STEPS, "colours": colours.tolist(), "fade": fade.tolist(), "outlines": outlines})


def render_cases(cases: Sequence[Case], *, threshold: float, map_threshold: float) -> tuple[str, int]:
    """The list of cases as HTML, from the highest score.

    Args:
        cases: those to show, the most important first: the last ones are left out where they exceed `BUDGET`.
        threshold: of scores.
        map_threshold: of maps, above 0.

    Returns:
        The items of the list, and how many there are.
    """
    items, size = [], 0
    for case in cases:
        item = _item(case, verdict(case.label, case.score, threshold), case.score - threshold, map_threshold)
        size += len(item)
        if size > BUDGET:
            break
        items.append((-case.score, len(items), item))
    return "\n".join(item for _, _, item in sorted(items)), len(items)


def _item(case: Case, own: Verdict, margin: float, map_threshold: float) -> str:
    if not np.isfinite(case.map).all():
        raise ValueError(f"the map of {case.key} must be finite")
    image = Image.fromarray(case.image)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    levels = Image.fromarray(map_levels(shrink_map(case.map), threshold=map_threshold))
    sources = f'data-map="{_source(levels, "PNG")}"'
    if case.mask is not None and case.mask.any():
        sources += f' data-mask="{_source(Image.fromarray(shrink_mask(case.mask)), "PNG")}"'
    about = {
        "label": case.label,
        "verdict": own.name,
        "kind": own.kind,
        "type": case.defect_type,
        "score": f"{case.score:.6g}",
        # By how much an image is on the wrong side of the threshold.
        "wrong": f"{-margin if case.label else margin:.6g}",
        "truth": _truth(case),
        "key": case.key,
    }
    data = " ".join(f'data-{name}="{escape(value)}"' for name, value in about.items())
    photograph = f'<img src="{_source(image, "WEBP", quality=80)}" alt="{escape(case.key)}">'
    shown = f'<span class="stage">{photograph}<canvas {sources}></canvas></span>'
    line = f'<span class="line"><b class="{own.kind}">{own.sign}</b> <span>{four_digits(case.score)}</span></span>'
    kind = f'<span class="soft">{escape(case.defect_type)}</span>'
    return f'<li class="case" {data}><button type="button">{shown}{line}{kind}</button></li>'


def _truth(case: Case) -> str:
    """What is known of the pixels, for people."""
    if not case.label:
        return "no defect"
    if case.mask is None:
        return "true defect: no mask"
    return f"true defect: {f'{100 * case.mask.mean():.2g}% of the image' if case.mask.any() else 'none in the mask'}"


def _source(picture: Image.Image, form: str, **options: int) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _size(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Of a picture whose longer side is `side` at most."""
    ratio = min(1.0, side / max(shape))
    return tuple(max(1, math.floor(length * ratio + 0.5)) for length in shape)
