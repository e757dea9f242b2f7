"""The documents: every block of code in them is run, on drawn parts and with trainings of two steps, or checked.

`HOW` has what is done with each program that a block calls, and `PARSED` the commands of ours and the blocks of Python
that are understood to the end, but not run; a block that is in neither fails. docs/experiments.md, a record of what was
done, and docs/api.md, of signatures that test_repository.py makes anew, are left out. The pictures are there, and their
script makes them.
"""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

import pushpull_jax
from pushpull_jax import ablation, cli, training
from pushpull_jax.config import Checkpoint, Config, Data, Log, Reconstructor, load_config
from pushpull_jax.data.demo import draw_part, write_demo
from pushpull_jax.data.manifest_table import read_table, table_categories
from pushpull_jax.service import serving

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
OTHERS = [
    ROOT / "README.md",
    *sorted({*ROOT.glob("docs/*.md")} - {ROOT / f"docs/{name}.md" for name in ("api", "experiments")}),
]
# Fenced, with its language, or indented, which is the shell's.
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]+\n)(?:\n* {4}[^\n]+\n)*)", re.DOTALL | re.MULTILINE)
# A file that a document calls by this name holds the block.
WRITTEN = re.compile(r"`(\w+\.py)`:\n\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACES = {"ROOT": "mvtec_ad", "CATEGORY": "bottle", "DIR": "runs/dir", "SEED": "0"}
# Not run: a grid, which the guide to sweeps runs; a service, since one runs already and is asked; a training on several
# devices, as test_processes.py runs it, one of another seed, and one in a bucket, as test_bucket.py runs it; a Python
# block that needs the SavedModel that test_exporting.py makes.
PARSED = ("ablate", "serve", "--mesh.data", "--seed", "gs://", "import tensorflow")
ADDRESS = "127.0.0.1:8000"


class Parsed(Exception):
    """A command has been understood, and would begin its work."""


def tiny(config: Config) -> Config:
    """A run of two steps on small images; a backbone of the guide's own stays."""
    features = replace(config.features, grid=8)
    if features.backbone == "efficientnet_lite0":
        features = replace(features, backbone="pixels", stages=(2, 3), stage_weights=())
    return replace(
        config,
        data=replace(config.data, image_size=64),
        features=features,
        reconstructor=Reconstructor(width=16, heads=2, hidden=16, encoder_layers=0, decoder_layers=1),
        training=replace(config.training, steps=2, warmup_steps=0, batch_size=4),
        scoring=replace(config.scoring, map_weights=(), held_out=0.25, folds=min(config.scoring.folds, 2)),
        log=Log(every=2),
        checkpoint=Checkpoint(every=2),
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("documents") / "photographs"
    write_demo(root, train=12, good=3, per_defect=3, size=64, category="screws")
    return root


@pytest.fixture(scope="module")
def run(photographs) -> Path:
    """A finished run."""
    config = replace(load_config("quick"), data=Data(root=str(photographs), category="screws"))
    training.train(tiny(config), photographs.parent / "run")
    return photographs.parent / "run"


@pytest.fixture(scope="module")
def address(run) -> Iterator[str]:
    """Host and port of a service."""
    server = serving.build_server(pushpull_jax.load(run), token=None, limits=serving.Limits())
    with serving.bind("127.0.0.1", 0, token=None) as listening:
        host, port = listening.getsockname()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while requests.get(f"http://{host}:{port}/health", timeout=60).status_code != 200:
            time.sleep(0.05)
        yield f"{host}:{port}"
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def folder(photographs, tmp_path, monkeypatch) -> Path:
    """Where a reader stands, with the data that the documents speak of; trainings are tiny."""
    (tmp_path / "photographs").symlink_to(photographs)
    (tmp_path / "mvtec_ad").mkdir()
    (tmp_path / "mvtec_ad/bottle").symlink_to(photographs / "screws")
    (tmp_path / "good_parts").symlink_to(photographs / "screws/test/good")
    for name in ("photograph.png", "part.png"):
        shutil.copy(photographs / "screws/test/dent/000.png", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    train, ablate = training.train, ablation.ablate
    monkeypatch.setattr(training, "train", lambda config, *a, **k: train(tiny(config), *a, **k))
    monkeypatch.setattr(
        ablation, "ablate", lambda grid, *a, **k: ablate(replace(grid, config=tiny(grid.config)), *a, **k)
    )
    assert pushpull_jax.train is training.train  # names are looked up when they are used
    return tmp_path


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and code."""
    return [(language or "bash", code or indented) for language, code, indented in BLOCK.findall(text)]


def commands(code: str) -> list[list[str]]:
    """The words of each command, without what is set before it, where its output goes, and [what is optional]."""
    code = re.sub(r"\b(\w+)\b", lambda word: PLACES.get(word[0], word[0]), code.replace("\\\n", " "))
    lines = [re.sub(r"^\s*\w+=\$\(.*?\)| \[.*?\]|>.*", "", line) for line in re.split(r"\n|&&", code)]
    return list(filter(None, (shlex.split(line, comments=True) for line in lines)))


def write(text: str, code: str) -> None:
    """Write the file that a block is called to be."""
    for name in (name for name, written in WRITTEN.findall(text) if written == code):
        Path(name).write_text(code)


def listed(path: Path):
    """The first guide that a newcomer opens is run always, the others in the slow suite."""
    return pytest.param(path, id=path.stem, marks=[] if path.stem == "own_folder" else pytest.mark.slow)


@pytest.mark.parametrize("guide", [listed(guide) for guide in GUIDES])
def test_every_block_of_a_guide_runs(guide, folder, capsys):
    text, names = guide.read_text(), {}
    assert blocks(text)
    for language, code in blocks(text):
        if language == "python":
            write(text, code)
            exec(compile(code, guide.name, "exec"), names)
        else:
            for words in commands(code):
                assert words[0] == "pushpull", words
                pushpull(words)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("document", OTHERS, ids=lambda path: path.stem)
def test_every_block_of_a_document_runs_or_is_checked(document, folder, run, address, monkeypatch, capsys):
    if document.name != "README.md":  # which trains it
        shutil.copytree(run, "runs/bottle")
    text = document.read_text().replace(ADDRESS, address)
    rng = np.random.default_rng(0)
    names = {"images": rng.integers(0, 256, (2, 50, 70, 3), np.uint8), "mask": rng.random((3, 8, 8)) > 0.9}
    names |= {name: rng.random((3, 8, 8, 4), np.float32) for name in ("features", "reconstruction")}
    for language, code in blocks(text):
        if language == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
            for words in commands(code):
                HOW[Path(words[0]).name](words)
        elif language == "csv":
            check_table(code)
        else:
            assert language == "python"
            write(text, code)
            compiled = compile(code, document.name, "exec")
            if not code.startswith(PARSED):
                exec(compiled, names)
    assert "Traceback" not in capsys.readouterr().err


def pushpull(words: list[str]) -> None:
    """Run a command of ours; those of `PARSED` until they would begin their work."""
    parsed = any(word.startswith(PARSED) for word in words)
    program = {"train": (training, "train"), "ablate": (ablation, "ablate"), "serve": (serving, "bind")}.get(words[1])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) if parsed else contextlib.nullcontext():
        patch.setattr(sys, "argv", words)
        if parsed:
            patch.setattr(*program, begin)
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, None), words


def begin(*_: object, **__: object) -> None:
    raise Parsed


def check_script(words: list[str]) -> None:
    """A script is there and has the options that it is given; one for the shell is well formed."""
    script = ROOT / words[1]
    text = script.read_text()
    if script.suffix == ".sh":
        subprocess.run(["bash", "-n", script], check=True)
    own, separator, command = (words, "", []) if "--" not in words else split(words, "--")
    missing = [word for word in own[2:] if word.startswith("-") and f'"{word}"' not in text]
    assert not missing, words
    if separator:
        pushpull([*command, "--hosts.processes", "1"])


def split(words: list[str], at: str) -> tuple[list[str], str, list[str]]:
    return words[: words.index(at)], at, words[words.index(at) + 1 :]


def check_install(words: list[str]) -> None:
    """The files that it reads are there, and so are the extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] == "install"
    for option, value in itertools.pairwise(words):
        if option in ("-c", "-r"):
            assert (ROOT / value).is_file(), words
        if option == "-e":
            assert re.fullmatch(r"\.(\[(\w+)\])?", value)[2] in {None, *extras}, words


def check_table(code: str) -> None:
    """A table is read, once the files that it names are there."""
    Path("table.csv").write_text(code)
    image, mask = draw_part(np.random.default_rng(0), size=64, defect="dent")
    for name in re.findall(r"[\w/]+\.(?:jpg|png)", code):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(mask if "masks" in name else image).save(name)
    records = [record for name in table_categories("table.csv") for record in read_table("table.csv", name)]
    assert len(records) == len(code.splitlines()) - 1 and all(Path(record.image).is_file() for record in records)


def run_curl(words: list[str]) -> None:
    if shutil.which("curl"):
        subprocess.run([*words, "--fail", "--silent", "--output", "answer.json"], check=True)
        assert '"verdict"' in Path("answer.json").read_text()


def nothing(words: list[str]) -> None:
    """A virtual environment is made and entered: Python's own commands."""
    assert words[:3] == ["python3", "-m", "venv"] or words[0] == "source", words


HOW = {
    "pushpull": pushpull, "curl": run_curl, "python": check_script, "bash": check_script, "pip": check_install,
    "python3": nothing, "source": nothing,
}  # fmt: skip


# The pictures.


def test_pictures_are_there_and_small():
    """All that are named, with a text for who cannot see them, and no others."""
    named = set()
    for document in [*OTHERS, *GUIDES]:
        for text, name in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", document.read_text()):
            assert len(text.split()) > 5, (document.name, name)
            named.add((document.parent / name).resolve())
    assert named == set((ROOT / "docs/pictures").iterdir())
    sizes = [path.stat().st_size for path in named]
    assert max(sizes) < 150_000 and sum(sizes) < 500_000


def test_the_script_makes_the_pictures(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_pictures

    for name in ("defects", "report"):  # the second needs a Chromium
        make_pictures.main([name, "--run", str(run), "--output", str(tmp_path)])
        made, kept = (Image.open(folder / f"{name}.webp") for folder in (tmp_path, make_pictures.OUTPUT))
        with made, kept:
            assert made.size == kept.size
