"""Embedded demonstration data: a machined three-bolt flange on a bench, good and with five kinds of defect.

A part is a height field with a lay (the direction of its tool marks) under one lamp, seen from above. A defect
changes that surface, not the picture, so the renderer gives it shading and shadow; the mask is what changed.
Lengths are pixels of a 256 px picture, times `size / 256`; angles are radians; x points right and y down.
The files follow the MVTec-AD layout (Bergmann et al., CVPR 2019). Needs numpy, scipy.ndimage and Pillow alone.
The drawing's numbers were chosen by eye, unless they say otherwise.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pushpull_jax.errors import InputError

DRAWING_VERSION = 1  # goes up with every change that alters a pixel: folders of different versions must not mix
# Pose, each way: radians, px, share. Chosen for what 200 steps on 120 parts can learn. Image AUROC of a reconstructor
# of 2 + 2 layers (Lite0, stages 1-4, seed 2), and of the distance to the mean training picture: 0.98 and 0.61 as it is;
# 0.93 and 0.53 at 0.07, 3.5 px, 0.015; 0.83 and 0.48 at 0.12, 5 px, 0.02.
_TURN, _SHIFT, _ZOOM = 0.035, 2.0, 0.01
_VISIBLE = 3.0  # grey levels: a smaller change drowns in the sensor's noise and is left out, a larger survives rounding


@dataclass(frozen=True)
class _Surface:
    """What the renderer sees and a defect changes: a part on its bench, float32 [H,W] unless said."""

    edge: np.ndarray  # signed distance to the outline and the holes, px, negative in the metal
    relief: np.ndarray  # height of the metal above the bench, px
    lay: np.ndarray  # [2,H,W] unit vector along the tool marks
    grain: np.ndarray  # the tool marks, about N(0, 1)
    tint: np.ndarray  # [H,W,3] reflectance of the metal
    gloss: np.ndarray  # its mirror-like share, about 1
    cover: np.ndarray  # 0..1, how much of the pixel lies under a foreign body
    lift: np.ndarray  # height of that body above what it lies on, px
    body: np.ndarray  # [3] its reflectance


@dataclass(frozen=True)
class _Scene:
    """Everything random in the picture of a good part; all of it is drawn before any defect."""

    s: float  # px a pixel of the 256 px picture
    px: np.ndarray  # [H,W] pixel positions from the centre
    py: np.ndarray
    surface: _Surface
    bench: np.ndarray  # [H,W,3] reflectance
    lamp: np.ndarray  # [3] unit vector to the lamp
    light: np.ndarray  # [H,W,3] its colour and strength, with fall-off and vignette
    window: np.ndarray  # [2] slope towards the bright side of the room
    noise: np.ndarray  # [H,W,3] the sensor's, N(0, 1)


def _step(distance, width):
    """1 where distance < -width, 0 where distance > 0, smooth between."""
    t = np.clip(distance * (-1.0 / width), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _field(rng, size, length):
    """Smooth noise [H,W], N(0, 1) at every pixel, correlated over `length` px."""
    nodes = np.arange(-2, math.ceil(size / length) + 3, dtype=np.float32)
    weights = np.exp(-((np.arange(size, dtype=np.float32)[:, None] / length - nodes) ** 2))
    weights /= np.sqrt((weights**2).sum(1, keepdims=True))
    coarse = rng.standard_normal((nodes.size, nodes.size), dtype=np.float32)
    # einsum, not @: the same bits whatever the linear algebra library and its threads, and no slower at this size
    return np.einsum("ij,jk->ik", np.einsum("ij,jk->ik", weights, coarse), weights.T.copy())


def _streaks(rng, length, along, across):
    """Noise [H,W], about N(0, 1), stretched by `length` along one of two coordinates (256 px tiles that wrap)."""
    from scipy import ndimage

    tile = rng.standard_normal((256, 256), dtype=np.float32)
    for _ in range(2):
        tile = ndimage.uniform_filter1d(tile, length, axis=1, mode="wrap")
    tile += 1.5 * ndimage.uniform_filter1d(tile, 4, axis=0, mode="wrap")
    tile /= tile.std()
    column = np.round(along).astype(np.int32) & 255
    row = np.floor(across)
    part, row = across - row, row.astype(np.int32)
    return tile[row & 255, column] * (1 - part) + tile[(row + 1) & 255, column] * part


def _flange(rng, x, y, turn, unit, s):
    """The good part in the coordinates x, y turned by `turn`: (edge, relief, lay, grain)."""
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    sector = np.round(theta * (1.5 / math.pi)) * (math.pi / 1.5)  # three lobes, folded onto one
    fx, fy = r * np.cos(theta - sector) - 0.74, r * np.sin(theta - sector)
    bolt, spin = np.hypot(fx, fy), np.arctan2(fy, fx)
    lobe, hub = bolt - 0.25, r - 0.60
    blend = np.clip(0.5 + (lobe - hub) / 0.60, 0.0, 1.0)
    outline = lobe + (hub - lobe) * blend - 0.30 * blend * (1.0 - blend)
    keyway = np.maximum(np.abs(x) - 0.055, np.abs(y + 0.2) - 0.105)
    bore = np.minimum(r - 0.235, keyway)
    dowel = np.hypot(x - 0.27, y - 0.468) - 0.04
    edge = unit * np.max([outline, 0.105 - bolt, -bore, -dowel], axis=0)

    px = unit / s
    relief = 10.0 + 4.0 * _step((r - 0.475) * px, 4.0) - 1.8 * _step((bolt - 0.175) * px, 2.0)
    relief += 3.0 * _step((np.abs(r - 0.365) - 0.035) * px, 3.0) - 2.5 * (1.0 - _step(edge / s, 4.0))

    turned, faced = r < 0.475, bolt < 0.175
    circular = turned | faced
    angle = np.where(turned, theta, spin)
    heading = np.where(circular, np.where(turned, theta, spin + sector) + math.pi / 2, 0.0) + turn
    along = np.where(circular, angle * (128 / math.pi), x * px)  # one turn is one tile
    grain = _streaks(rng, 40, along, np.where(turned, r, np.where(faced, bolt, y)) * px)
    return edge, s * relief, np.stack([np.cos(heading), np.sin(heading)]), grain


def _wood(rng, px, py, size, s):
    a = rng.uniform(-0.12, 0.12)
    u, v = (px * math.cos(a) + py * math.sin(a)) / s, (py * math.cos(a) - px * math.sin(a)) / s
    grain = _streaks(rng, 60, u, v + 5.0 * _field(rng, size, 90 * s))
    pores = np.maximum(_streaks(rng, 9, u, v) - 1.5, 0)
    wood = 1 + 0.10 * grain - 0.20 * pores + 0.07 * _field(rng, size, 60 * s)
    colour = np.array([0.120, 0.078, 0.048], np.float32) * rng.uniform(0.65, 1.35)
    return np.clip(wood, 0.2, 2.0)[..., None] * colour


def _draw_scene(rng, size):
    s = size / 256
    turn, zoom = rng.uniform(-_TURN, _TURN), 1 + rng.uniform(-_ZOOM, _ZOOM)
    dx, dy = rng.uniform(-_SHIFT, _SHIFT) * s, rng.uniform(-_SHIFT, _SHIFT) * s
    unit = 98.0 * s * zoom
    rows = np.arange(size, dtype=np.float32) - (size - 1) / 2
    px, py = np.meshgrid(rows, rows)
    qx, qy = (px - dx) / unit, (py - dy) / unit
    c, w = math.cos(turn), math.sin(turn)
    edge, relief, lay, grain = _flange(rng, c * qx + w * qy, c * qy - w * qx, turn, unit, s)
    tone = (np.array([0.58, 0.57, 0.555]) * (1 + rng.uniform(-0.012, 0.012, 3))).astype(np.float32)
    tint = tone * (1 + 0.05 * _field(rng, size, 30 * s) + 0.06 * grain)[..., None]
    gloss = 1 + 0.10 * _field(rng, size, 25 * s)
    zero = np.zeros_like(edge)
    surface = _Surface(edge, relief, lay, grain, tint, gloss, zero, zero, np.zeros(3, np.float32))

    azimuth, height = -2.27 + rng.uniform(-0.35, 0.35), rng.uniform(0.77, 0.93)
    lamp = np.array([math.cos(azimuth) * math.cos(height), math.sin(azimuth) * math.cos(height), math.sin(height)])
    warm = rng.uniform(-1, 1)
    colour = np.array([1 + 0.07 * warm, 1.0, 1 - 0.10 * warm]) * rng.uniform(0.88, 1.12)
    ramp = 1 + rng.uniform(-0.15, 0.15) * qx + rng.uniform(-0.15, 0.15) * qy
    lens = 1 - 0.15 * (px**2 + py**2) / (size / 2) ** 2
    light = (ramp * lens)[..., None] * colour.astype(np.float32)
    room = rng.uniform(-math.pi, math.pi)
    window = np.array([math.cos(room), math.sin(room)], np.float32)
    bench = _wood(rng, px, py, size, s)
    noise = 0.8 * rng.standard_normal((size, size, 3), dtype=np.float32)
    noise += 0.6 * rng.standard_normal((size, size, 1), dtype=np.float32)  # luminance: shared by the channels
    return _Scene(s, px, py, surface, bench, lamp.astype(np.float32), light, window, noise)


def _shadow(height, lamp, s):
    """0..1, how much of the lamp is hidden from each pixel by what stands between."""
    hidden, n = np.zeros_like(height), height.shape[0]
    flat = math.hypot(lamp[0], lamp[1])
    rise = float(lamp[2]) / flat
    for t in range(1, math.ceil(24 * s / rise) + 1):
        dx, dy = round(t * float(lamp[0]) / flat), round(t * float(lamp[1]) / flat)
        here = slice(max(0, -dy), n - max(0, dy)), slice(max(0, -dx), n - max(0, dx))
        there = slice(max(0, dy), n - max(0, -dy)), slice(max(0, dx), n - max(0, -dx))
        over = (height[there] - height[here] - t * rise) * (1 / (0.8 * s + 0.25 * t))
        np.maximum(hidden[here], over, out=hidden[here])
    return np.minimum(hidden, 1.0)


def _render(scene, surface):
    """The picture without noise, float32 [H,W,3] in 0..255."""
    from scipy import ndimage

    s, lamp = scene.s, scene.lamp
    solid = np.clip(0.5 - surface.edge, 0, 1)
    height = surface.relief * solid + surface.lift
    gy, gx = np.gradient(surface.relief + surface.lift)
    sx, sy = -gx, -gy
    hx, hy = (lamp[:2] / (1 + lamp[2])).tolist()
    gx, gy = hx - sx, hy - sy
    lx, ly = surface.lay
    along, across = gx * lx + gy * ly, gy * lx - gx * ly + 0.12 * surface.grain
    streak = np.exp(-0.5 * ((along * (1 / 0.15)) ** 2 + (across * (1 / 0.36)) ** 2))
    broad = np.exp((gx * gx + gy * gy) * (-0.5 / 0.40**2))
    lit = 1 - ndimage.gaussian_filter(_shadow(height, lamp, s), 1.0 * s)
    hollow = np.clip((ndimage.gaussian_filter(height, 9 * s, truncate=2.5) - height) / (13 * s), 0, 0.8)
    crease = np.clip((ndimage.gaussian_filter(height, 2.5 * s) - height) / (6 * s), -0.1, 0.5)
    free = (1 - hollow) * (1 - crease)
    up = 1 / np.sqrt(1 + sx * sx + sy * sy)
    lambert = np.maximum(sx * lamp[0] + sy * lamp[1] + lamp[2], 0) * up
    facing = 2 * (sx * scene.window[0] + sy * scene.window[1]) * up * up
    room = np.clip(0.16 + 0.22 * facing, 0.02, 1)
    metal = (surface.gloss * (0.85 * streak + 0.20 * broad) + 0.10 * lambert) * lit + room * free
    rough = (0.8 * lambert + 0.10 * broad) * lit + 0.30 * free
    flat = 0.8 * lamp[2] * lit * (1 - 0.6 * hollow) + 0.30 * free
    image = scene.bench * flat[..., None]
    image += (surface.tint * metal[..., None] - image) * solid[..., None]
    image += (surface.body * rough[..., None] - image) * surface.cover[..., None]
    image = ndimage.gaussian_filter(image * scene.light, (0.6 * s, 0.6 * s, 0))
    return 255 * (1 - np.exp(-1.5 * np.maximum(image, 0))) ** (1 / 2.2)


def _metal_point(rng, scene, margin):
    """A pixel at least `margin` px inside the metal."""
    at = rng.choice(np.flatnonzero(scene.surface.edge < -margin * scene.s))
    return float(scene.px.flat[at]), float(scene.py.flat[at])


def _blob(rng, dx, dy, radius, ragged):
    """Signed distance, about in px, to a lump of this mean radius whose outline wavers by a share `ragged`."""
    angle, reach = np.arctan2(dy, dx), 1.0
    for k in range(2, 7):
        reach = reach + ragged * rng.uniform(-1, 1) / (k - 1) * np.cos(k * angle + rng.uniform(0, 2 * math.pi))
    return np.hypot(dx, dy) - radius * reach


def _curve(dx, dy, points, reach):
    """Distance [H,W] to a polyline [n,2], px, and the place 0..1 along it; infinite farther than `reach` around it."""
    best, place = np.full_like(dx, np.inf), np.zeros_like(dx)
    low, high = points.min(0) - reach, points.max(0) + reach
    rows = slice(*np.searchsorted(dy[:, 0], [low[1], high[1]]))
    columns = slice(*np.searchsorted(dx[0], [low[0], high[0]]))
    dx, dy, near_best, near_place = dx[rows, columns], dy[rows, columns], best[rows, columns], place[rows, columns]
    for i, (a, b) in enumerate(zip(points[:-1].tolist(), points[1:].tolist(), strict=True)):
        ux, uy = b[0] - a[0], b[1] - a[1]
        ax, ay = dx - a[0], dy - a[1]
        t = np.clip((ax * ux + ay * uy) * (1 / (ux * ux + uy * uy)), 0, 1)
        distance = np.hypot(ax - t * ux, ay - t * uy)
        near = distance < near_best
        near_best[near] = distance[near]
        near_place[near] = (i + t[near]) / (len(points) - 1)
    return best, place


def _bend(rng, length, sag, pieces):
    """[pieces + 1, 2] points of a bow of this length at a random angle, centred; its sag is a share of the length."""
    t = np.linspace(-0.5, 0.5, pieces + 1)
    angle, sag = rng.uniform(0, 2 * math.pi), rng.uniform(-sag, sag)
    x, y = length * t, length * sag * (1 - 4 * t * t)
    c, w = math.cos(angle), math.sin(angle)
    return np.stack([c * x - w * y, w * x + c * y], axis=1)


def _dent(rng, scene):
    s, part = scene.s, scene.surface
    cx, cy = _metal_point(rng, scene, 5)
    radius, flat, angle = rng.uniform(8, 20) * s, rng.uniform(0.55, 1.0), rng.uniform(0, math.pi)
    c, w = math.cos(angle), math.sin(angle)
    dx, dy = scene.px - cx, scene.py - cy
    blob = _blob(rng, c * dx + w * dy, (c * dy - w * dx) / flat, radius, 0.10)
    depth = rng.uniform(0.28, 0.45) * radius * flat
    rho = np.clip(1 + blob / radius, 0, 1.35)
    bowl = np.where(rho < 1, -((1 - rho * rho) ** 2), 0.0) + 0.14 * np.exp(-(((rho - 1.05) / 0.12) ** 2))
    inside = _step(blob, 0.35 * radius)
    return replace(
        part,
        relief=part.relief + (depth * bowl).astype(np.float32),
        grain=part.grain * (1 - 0.8 * inside),
        tint=part.tint * (1 - 0.10 * inside)[..., None],
    )


def _scratch(rng, scene):
    s, part = scene.s, scene.surface
    cx, cy = _metal_point(rng, scene, 6)
    points = _bend(rng, rng.uniform(36, 75) * s, 0.12, 10)
    width, depth = rng.uniform(1.2, 2.3) * s, rng.uniform(1.2, 2.2) * s
    groove, polish = np.zeros_like(part.relief), np.zeros_like(part.relief)
    for _ in range(rng.integers(1, 4)):
        dx, dy = scene.px - cx - rng.uniform(-5, 5) * s, scene.py - cy - rng.uniform(-5, 5) * s
        distance, place = _curve(dx, dy, points, 10 * s)
        press = np.clip(6 * place * (1 - place), 0, 1) * (0.75 + 0.25 * np.cos(place * rng.uniform(5, 25)))
        near = (distance / width) ** 2
        groove += press * (np.exp(-near) - 0.35 * np.exp(-((np.sqrt(near) - 1.6) ** 2) * 3)).astype(np.float32)
        polish = np.maximum(polish, press * np.exp(-near))
    fresh = -0.45 if rng.random() < 0.5 else 0.25  # a dark, dirty one or bare metal
    return replace(
        part,
        relief=part.relief - depth * groove,
        tint=part.tint * (1 + fresh * polish)[..., None],
        grain=part.grain * (1 - polish),
    )


_STAINS = np.array(  # reflectance left by rust, oil, heat, and a dried coolant's film
    [[0.45, 0.20, 0.09], [0.26, 0.21, 0.14], [0.42, 0.36, 0.62], [0.45, 0.62, 0.55]], np.float32
)


def _stain(rng, scene):
    s, part = scene.s, scene.surface
    cx, cy = _metal_point(rng, scene, 4)
    radius, size = rng.uniform(8, 25) * s, len(part.edge)
    blob = _blob(rng, scene.px - cx, (scene.py - cy) * rng.uniform(0.7, 1.4), radius, 0.30)
    blob = blob + 1.5 * s * _field(rng, size, 6 * s)
    amount = _step(blob, rng.uniform(2, 8) * s) * np.clip(0.85 + 0.25 * _field(rng, size, 8 * s), 0.3, 1.2)
    rim = 0.35 * np.exp(-(((blob + 2.5 * s) / (1.5 * s)) ** 2))  # a drop dries from its edge inwards
    amount = (rng.uniform(0.75, 1.0) * np.clip(amount + rim * (blob < 0), 0, 1))[..., None].astype(np.float32)
    colour = _STAINS[rng.integers(len(_STAINS))]
    return replace(
        part,
        tint=part.tint * (1 - amount * (1 - colour)),
        gloss=part.gloss * (1 - rng.uniform(0.0, 0.5) * amount[..., 0]),
        grain=part.grain * (1 - 0.5 * amount[..., 0]),
    )


def _missing_piece(rng, scene):
    """Broken off the rim, right through; or spalled off the face, leaving a rough floor."""
    s, part = scene.s, scene.surface
    through = rng.random() < 0.65
    if through:
        rim = (np.abs(part.edge) < s) & (np.hypot(scene.px, scene.py) > 55 * s)
        at = rng.choice(np.flatnonzero(rim))
        cx, cy, radius = float(scene.px.flat[at]), float(scene.py.flat[at]), rng.uniform(9, 22) * s
    else:
        (cx, cy), radius = _metal_point(rng, scene, 5), rng.uniform(8, 16) * s
    size = len(part.edge)
    blob = _blob(rng, scene.px - cx, scene.py - cy, radius, 0.35) + 1.2 * s * _field(rng, size, 5 * s)
    crumb = _field(rng, size, 2.5 * s)
    face = _step(blob - (4 * s if through else 0.0), 3 * s)
    drop = (4.0 if through else rng.uniform(3.5, 6.0)) * s
    return replace(
        part,
        edge=np.maximum(part.edge, -blob) if through else part.edge,
        relief=part.relief - face * (drop + 0.8 * s * crumb),
        tint=part.tint * (1 - face * (0.35 + 0.08 * crumb))[..., None],
        gloss=part.gloss * (1 - 0.7 * face),
        grain=part.grain * (1 - face),
    )


_PLASTICS = np.array(  # reflectance of what falls on a bench: blue, red, yellow, black, white, green
    [
        [0.06, 0.16, 0.45],
        [0.50, 0.07, 0.05],
        [0.60, 0.40, 0.06],
        [0.03, 0.03, 0.035],
        [0.70, 0.69, 0.65],
        [0.08, 0.30, 0.10],
    ],
    np.float32,
)


def _foreign_body(rng, scene):
    """A granule, a thread or a curled metal chip lying on the part."""
    from scipy import ndimage

    s, part = scene.s, scene.surface
    cx, cy = _metal_point(rng, scene, 3)
    dx, dy = scene.px - cx, scene.py - cy
    kind, body = rng.integers(3), _PLASTICS[rng.integers(len(_PLASTICS))]
    if kind == 0:
        radius = rng.uniform(6, 12) * s
        blob = _blob(rng, dx, dy * rng.uniform(1.0, 1.6), radius, 0.15)
        lift = 0.7 * radius * np.sqrt(np.clip(-blob / radius, 0, 1))
    elif kind == 1:
        width = rng.uniform(1.1, 1.9) * s
        points = _bend(rng, rng.uniform(35, 70) * s, 0.35, 12)
        points += np.cumsum(rng.uniform(-1.2, 1.2, points.shape), axis=0) * s
        blob = _curve(dx, dy, points, 6 * s)[0] - width
        lift = np.sqrt(np.clip(width**2 - (blob + width) ** 2, 0, None)) + 1.2 * s * (blob < 0)
    else:
        t = np.linspace(0, 1, 26)
        angle = rng.uniform(0, 6.3) + rng.choice([-1, 1]) * rng.uniform(6, 11) * t
        spiral = (rng.uniform(2, 4) + rng.uniform(6, 14) * t) * s
        blob, place = _curve(dx, dy, np.stack([spiral * np.cos(angle), spiral * np.sin(angle)], axis=1), 6 * s)
        blob = blob - (0.8 + 1.4 * place) * s
        lift = (blob < 0) * s * (2.5 + 2.0 * np.cos(9 * place))
        body = np.array([0.62, 0.58, 0.50], np.float32)
    cover = np.clip(0.5 - blob, 0, 1).astype(np.float32)
    rest = ndimage.gaussian_filter(part.relief, 4 * s)  # it bridges what is under it and does not follow every edge
    relief = part.relief + (rest - part.relief) * cover
    return replace(part, relief=relief, cover=cover, lift=lift.astype(np.float32), body=body)


_DRAW = {
    "dent": _dent,
    "foreign_body": _foreign_body,
    "missing_piece": _missing_piece,
    "scratch": _scratch,
    "stain": _stain,
}
DEFECTS = tuple(_DRAW)


def _changed(change, s):
    """The pixels [H,W] with a visible change (grey levels), without specks or pinholes."""
    from scipy import ndimage

    closed = ndimage.binary_closing(change >= _VISIBLE, np.ones((3, 3)))
    pieces, count = ndimage.label(closed, np.ones((3, 3)))
    area = np.bincount(pieces.ravel(), minlength=count + 1)
    return closed & (area >= 12 * s * s)[pieces]


def _spoil(rng, scene, good, defect):
    """The picture with a defect, and its mask: the first of some draws that is plain to see, or the plainest."""
    best, most = None, -1.0
    for _ in range(8):
        bad = _render(scene, _DRAW[defect](rng, scene))
        change = np.abs(bad - good).max(-1)
        plain = float((change >= 25).sum()) / scene.s**2
        if plain > most:
            best, most = (bad, change), plain
        if plain >= 100:
            break
    bad, change = best
    mask = _changed(change, scene.s)
    return np.where(mask[..., None], bad, good), mask


def draw_part(rng: np.random.Generator, *, size: int = 256, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Draws one picture of the part and the mask of its defect.

    Two generators in the same state draw the same part, pose, light and sensor noise whatever the defect, so that the
    mask is exact: outside it the two pictures are equal, inside it they differ but for pinholes of a pixel or two.

    Args:
        rng: source of everything random; it is advanced.
        size: side of the square picture, px, at least 64.
        defect: one of `DEFECTS`, or None for a good part.

    Returns:
        (image uint8 [size,size,3] sRGB, mask bool [size,size]); the mask of a good part is empty.

    Raises:
        ValueError: an unknown defect, or a size below 64.
    """
    if defect is not None and defect not in _DRAW:
        raise ValueError(f"defect: expected None or one of {', '.join(DEFECTS)}, got {defect!r}")
    if size < 64:
        raise ValueError(f"size: expected at least 64 px, got {size}")
    scene = _draw_scene(rng, size)
    picture, mask = _render(scene, scene.surface), np.zeros((size, size), bool)
    if defect is not None:
        picture, mask = _spoil(rng, scene, picture, defect)
    noisy = picture + scene.noise * (1.0 + 0.008 * picture)  # about 2 grey levels in the metal, as of a small sensor
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8), mask


def _plan(train: int, good: int, per_defect: int) -> Iterator[tuple[str, str | None, str | None, tuple[int, int]]]:
    """Every picture of a set: (its file, its mask's file, its defect, its place in the stream of seeds)."""
    for index in range(train):
        yield f"train/good/{index:03d}.png", None, None, (0, index)
    for index in range(good):
        yield f"test/good/{index:03d}.png", None, None, (1, index)
    for number, defect in enumerate(DEFECTS, start=2):
        for index in range(per_defect):
            mask = f"ground_truth/{defect}/{index:03d}_mask.png"
            yield f"test/{defect}/{index:03d}.png", mask, defect, (number, index)


def _write(folder: Path, manifest: dict, plan: list) -> None:
    from PIL import Image

    def save(name: str, pixels: np.ndarray) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for name, mask_name, defect, place in plan:
        rng = np.random.default_rng([manifest["seed"], *place])
        image, mask = draw_part(rng, size=manifest["size"], defect=defect)
        save(name, image)
        if mask_name is not None:
            save(mask_name, mask.astype(np.uint8) * 255)
    (folder / "demo.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _check_same(folder: Path, manifest: dict, plan: list) -> None:
    """Raises InputError unless the folder holds just the set that would be written."""
    hint = "remove it, or write to another root or category"
    try:
        found = json.loads((folder / "demo.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: exists and has no readable demo.json, so it is not ours; {hint}") from error
    if found != manifest:
        raise InputError(f"{folder}: expected a demo set of {manifest}, found one of {found}; {hint}")
    files = [name for name, *_ in plan] + [mask for _, mask, *_ in plan if mask is not None]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: the demo set lacks {missing[0]} ({len(missing)} of {len(files)} files); {hint}")


def write_demo(
    root: str | os.PathLike,
    *,
    seed: int = 0,
    train: int = 120,
    good: int = 30,
    per_defect: int = 10,
    size: int = 256,
    category: str = "flange",
) -> Path:
    """Writes a set of drawn parts in the MVTec-AD layout, whole or not at all, and returns its folder ROOT/CATEGORY.

    Equal arguments give equal files, bit for bit, with equal versions of numpy, scipy and Pillow on one kind of
    processor; a picture depends on the seed, the size and its own name, not on the counts. `demo.json` in the folder
    records the arguments and the version of the drawing; a complete folder that records the same is left as it is.

    Args:
        root: folder of the data set, made where it is missing.
        seed: at least 0.
        train, good, per_defect: numbers of pictures in train/good, in test/good and of each of `DEFECTS`, at least 1.
        size: side of the pictures, px, at least 64.
        category: name of the folder under `root`.

    Raises:
        InputError: an argument out of range, a folder that holds anything else, or one that cannot be written.
    """
    manifest = {"seed": seed, "train": train, "good": good, "per_defect": per_defect, "size": size}
    least = {"seed": 0, "train": 1, "good": 1, "per_defect": 1, "size": 64}
    for name, value in manifest.items():
        if value < least[name]:
            raise InputError(f"{name}: expected at least {least[name]}, got {value}")
    if category in ("", "..") or Path(category).name != category:
        raise InputError(f"category: expected the name of one folder, got {category!r}")
    manifest["drawing_version"] = DRAWING_VERSION
    root, plan = Path(root), list(_plan(train, good, per_defect))
    folder = root / category
    if folder.exists():
        _check_same(folder, manifest, plan)
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{category}.", dir=root) as draft:
            _write(Path(draft) / category, manifest, plan)
            os.rename(Path(draft) / category, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error}") from error
    return folder


def mean_difference_maps(train_images: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The detector that any other must beat: the distance to the mean training picture.

    map(u) = mean over channels of |image(u) - mean over the training set of image(u)|

    Args:
        train_images: [M,H,W,3] good pictures, grey levels of any dtype.
        images: [N,H,W,3] of the same size.

    Returns:
        Maps float32 [N,H,W], grey levels.

    Raises:
        ValueError: no training picture, or pictures of two sizes.
    """
    if train_images.ndim != 4 or len(train_images) == 0 or images.shape[1:] != train_images.shape[1:]:
        raise ValueError(
            "train_images and images: expected [M,H,W,3] with M > 0 and [N,H,W,3] of one size, "
            f"got {train_images.shape} and {images.shape}"
        )
    mean = train_images.mean(axis=0, dtype=np.float64)
    maps = np.empty(images.shape[:3], np.float32)
    for index, image in enumerate(images):  # one at a time: the differences of a whole set need not fit
        maps[index] = np.abs(image - mean).mean(axis=-1)
    return maps
