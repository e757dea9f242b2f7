"""Make the pictures of the documents: what a detector sees, its report, and the page of the service.

    python scripts/make_pictures.py             all of them, of runs/demo, which is trained where it is not there
    python scripts/make_pictures.py defects     those named

They show the drawn parts of `pushpull demo` alone, since the licence of MVTec-AD forbids to publish its images with
this project. Needs the extra `dev`, and Chromium for the pages.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import requests
from PIL import Image, ImageDraw, ImageFont

from pushpull_jax import workdir as files
from pushpull_jax.data.images import read_image, read_mask
from pushpull_jax.data.mvtec_ad import read_mvtec_ad
from pushpull_jax.demo import run_demo
from pushpull_jax.detector import load
from pushpull_jax.errors import InputError
from pushpull_jax.tensorboard import side_by_side

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import chromium  # noqa: E402

OUTPUT = ROOT / "docs/pictures"
SIDE, LABEL, GAP = 200, 26, 10  # px: of one part, of the line with its name, between screens
DESKTOP, PHONE, HEIGHT = 1280, 390, 1100


def defects(run: Path) -> Image.Image:
    """The first test image of each kind of defect: above as it is, then its mask, then its heat map."""
    data, detector = files.read_config(run)[0].data, load(run)
    anomalous = [record for record in read_mvtec_ad(Path(data.root), data.category) if record.label]
    first = {record.defect_type: record for record in reversed(anomalous)}
    picture = Image.new("RGB", (SIDE * len(first), LABEL + 3 * SIDE), "white")
    draw = ImageDraw.Draw(picture)
    for i, (kind, record) in enumerate(sorted(first.items())):
        image = read_image(record)
        mask = read_mask(record, size=image.shape[:2])
        _, (score_map,) = detector(image[None])
        strip = side_by_side(image, mask, score_map, threshold=detector.map_threshold)
        column = Image.fromarray(np.concatenate(np.split(strip, 3, axis=1)))
        picture.paste(column.resize((SIDE, 3 * SIDE), Image.Resampling.LANCZOS), (i * SIDE, LABEL))
        draw.text(((i + 0.5) * SIDE, LABEL / 2), kind.replace("_", " "), "black", ImageFont.load_default(16), "mm")
    return picture


def report(run: Path) -> Image.Image:
    """The report: its top on a desktop, and its gallery on a phone in the dark."""
    url = (run / files.REPORT).resolve().as_uri()
    with chromium.opened() as page:
        page.show(url, width=DESKTOP, height=HEIGHT)
        desktop = seen(page)
        page.show(url, width=PHONE, height=HEIGHT, dark=True)
        page.evaluate("document.getElementById('controls').scrollIntoView()")
        page.wait_for("[...document.querySelectorAll('.case canvas')].slice(0, 6).every((one) => one.width !== 300)")
        return beside(desktop, seen(page))


def service(run: Path) -> Image.Image:
    """The page of the service with the first image of a foreign body, on a desktop and on a phone in the dark."""
    data = files.read_config(run)[0].data
    image = Path(data.root).resolve() / data.category / "test/foreign_body/000.png"
    shots = []
    with served(run) as url, chromium.opened() as page:
        for width, dark in ((DESKTOP, False), (PHONE, True)):
            page.show(url, width=width, height=940, dark=dark)
            page.choose_file("#file", image)
            page.wait_for("!document.getElementById('result').hidden")
            shots.append(seen(page))
    return beside(*shots)


PICTURES: dict[str, Callable[[Path], Image.Image]] = {"defects": defects, "report": report, "service": service}


@contextlib.contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a service that answers."""
    code = "from pushpull_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line:
            raise InputError(f"{' '.join(command)} ended with {process.wait()}")
        url = line.split()[-1]
        while requests.get(f"{url}/health", timeout=10).status_code != 200:
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def seen(page: chromium.Page) -> Image.Image:
    """What the screen shows of a page."""
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "shot.png", whole=False)
        return Image.open(Path(folder) / "shot.png").convert("RGB")


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two screens of one height on transparent ground."""
    picture = Image.new("RGBA", (left.width + GAP + right.width, left.height))
    picture.paste(left)
    picture.paste(right, (left.width + GAP, 0))
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run of `pushpull demo`")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the pictures")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(PICTURES):
        parser.error(f"no picture {', '.join(sorted(unknown))}: expected {', '.join(PICTURES)}")
    if set(given.names or PICTURES) != {"defects"} and not chromium.program():
        parser.error("no Chromium is on the path: name defects alone, or install it")
    if not (given.run / files.REPORT).is_file():
        run_demo(given.run)
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.names or PICTURES:
        path = given.output / f"{name}.webp"
        PICTURES[name](given.run).save(path, quality=80, method=6)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
