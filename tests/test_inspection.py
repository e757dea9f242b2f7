"""`pushpull inspect`: layouts that are told, what is counted, and what is wrong with a data set."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pushpull_jax import cli, contact_sheet, inspection
from pushpull_jax.data.layouts import recognise
from pushpull_jax.errors import InputError
from pushpull_jax.inspection import inspect
from pushpull_jax.inspection_table import as_values, percent, text_table

SIZE = 48


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def marked(rows, size=SIZE):
    mask = np.zeros((size, size), np.uint8)
    mask[:rows] = 255
    return mask


@pytest.fixture
def root(tmp_path):
    """A sound category: four training images, two good and two bent test images with masks."""
    for number in range(4):
        save(tmp_path / f"nut/train/good/{number}.png", pixels(number))
    for number in range(2):
        save(tmp_path / f"nut/test/good/{number}.png", pixels(10 + number))
        save(tmp_path / f"nut/test/bent/{number}.png", pixels(20 + number))
        save(tmp_path / f"nut/ground_truth/bent/{number}_mask.png", marked(12 * (number + 1)))
    return tmp_path


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["pushpull", "inspect", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr()
    return 0, capsys.readouterr()


def problems(root, **options):
    return [(problem.kind, problem.file) for problem in inspect(root, **options).problems]


def test_a_sound_data_set(root, monkeypatch, capsys):
    found = inspect(root)
    assert found.problems == () and found.errors == 0
    values = as_values(found)
    assert (values["layout"], values["recognised"], values["images"]) == (
        "mvtec_ad",
        "recognised by nut/train/good/",
        8,
    )
    bent = {"category": "nut", "split": "test", "defect_type": "bent", "label": 1, "images": 2, "masks": 2}
    # 12 and 24 of 48 rows.
    assert values["groups"][2] == bent | {"area": {"least": 0.25, "median": 0.375, "most": 0.5}}
    assert [(group["split"], group["defect_type"], group["images"]) for group in values["groups"]] == [
        ("train", "good", 4),
        ("test", "good", 2),
        ("test", "bent", 2),
    ]
    assert values["sizes"] == [{"size": "48x48", "stored": "PNG RGB", "images": 8}]
    code, said = run(monkeypatch, capsys, root)
    assert code == 0 and said.out == text_table(found) + "\n" and "0 errors, 0 warnings" in said.out
    assert re.search(r"nut +test +bent +2 +2 +25 % +38 % +50 %", said.out)


def spoil(root):
    """The five faults that a data set often has."""
    nut = root / "nut"
    whole = (nut / "train/good/1.png").read_bytes()
    (nut / "train/good/1.png").write_bytes(whole[:2000])
    save(nut / "ground_truth/bent/0_mask.png", marked(12, size=SIZE - 8))
    (nut / "test/good/copy.png").write_bytes((nut / "train/good/2.png").read_bytes())
    save(nut / "ground_truth/bent/9_mask.png", marked(12))
    (nut / "test/bent/1.png").write_text("not an image")


def test_a_broken_data_set_is_named_whole(root, monkeypatch, capsys):
    spoil(root)
    code, said = run(monkeypatch, capsys, root, "--json")
    values = json.loads(said.out)
    assert code == 1 and values["errors"] == 5 and values["warnings"] == 0
    named = {(problem["kind"], problem["file"]): problem["message"] for problem in values["problems"]}
    assert named.keys() == {
        ("unreadable", "nut/train/good/1.png"),
        ("mask_size", "nut/ground_truth/bent/0_mask.png"),
        ("leak", "nut/test/good/copy.png"),
        ("mask_without_image", "nut/ground_truth/bent/9_mask.png"),
        ("unreadable", "nut/test/bent/1.png"),
    }
    assert "truncated" in named["unreadable", "nut/train/good/1.png"]
    assert "identical to nut/train/good/2.png" in named["leak", "nut/test/good/copy.png"]
    assert "the mask is 40x40, its image 48x48" in named["mask_size", "nut/ground_truth/bent/0_mask.png"]
    code, said = run(monkeypatch, capsys, root / "nut")  # the folder of the category itself
    assert code == 1 and "5 errors, 0 warnings" in said.out
    assert all(file in said.out for _, file in named)


def test_other_faults(root):
    nut = root / "nut"
    save(nut / "ground_truth/bent/0_mask.png", marked(0))
    save(nut / "ground_truth/good/0_mask.png", marked(1))
    save(nut / "train/good/again.bmp", pixels(0))  # the pixels of another file
    save(nut / "test/bent/2.png", pixels(10))
    (nut / "train/good/notes.webp").write_text("")
    assert problems(root) == [
        ("image_without_mask", "nut/test/bent/2.png"),
        ("empty_mask", "nut/ground_truth/bent/0_mask.png"),
        ("marked_normal", "nut/ground_truth/good/0_mask.png"),
        ("contradiction", "nut/test/good/0.png"),
        ("duplicate", "nut/test/good/0.png"),
        ("duplicate", "nut/train/good/again.bmp"),
        ("ignored", "nut/train/good/notes.webp"),
    ]


def test_copies_are_warnings(root, monkeypatch, capsys):
    smooth = np.asarray(Image.fromarray(pixels(5)[:6, :6]).resize((256, 256), Image.Resampling.BICUBIC))
    save(root / "nut/train/good/smooth.png", smooth)
    save(root / "nut/train/good/smooth2.png", np.clip(smooth * 1.02, 0, 255).astype(np.uint8))
    save(root / "nut/test/good/smooth.jpg", smooth)
    code, said = run(monkeypatch, capsys, root, "--json")
    values = json.loads(said.out)
    assert code == 0 and values["errors"] == 0
    assert [(p["kind"], p["file"], p["is_error"]) for p in values["problems"]] == [
        ("near_leak", "nut/test/good/smooth.jpg", False),
        ("near_duplicate", "nut/train/good/smooth2.png", False),
    ]


def test_a_table(tmp_path):
    save(tmp_path / "x/0.png", pixels(0))
    save(tmp_path / "x/1.png", pixels(1))
    (tmp_path / "manifest.csv").write_text("path,label,split\nx/0.png,0,train\nx/1.png,1,test\nx/2.png,1,test\n")
    expected = [("missing_file", "x/2.png")]
    assert problems(tmp_path) == problems(tmp_path / "manifest.csv") == expected
    (tmp_path / "manifest.csv").write_text("path,label\nx/0.png,0\nx/1.png,what\n")
    (problem,) = inspect(tmp_path).problems
    assert problem[:2] == ("table", "manifest.csv") and "row 3: label must be" in problem.message


@pytest.mark.parametrize(
    ("names", "source", "categories"),
    [
        (["nut/train/good/0.png", "bolt/test/good/0.png"], "mvtec_ad", ("bolt", "nut")),
        (["nut/train/good/0.png", "bolt/train/good/0.png", "nut/validation/good/0.png"], "mvtec_loco", ("bolt", "nut")),
        (["nut/test/good/0.png", "nut/ground_truth/bent/0/0.png"], "mvtec_loco", ("nut",)),
        (["01/train/ok/0.bmp", "01/test/ko/0.bmp"], "btad", ("01",)),
        (["kos01/Part0.jpg", "kos01/Part0_label.bmp"], "kolektor_sdd", ("kolektor_sdd",)),
        (["nut/good/0.png", "nut/bad/0.png"], "good_bad", ("nut",)),
    ],
)
def test_layouts_that_are_told(tmp_path, names, source, categories):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    layout = recognise(tmp_path)
    assert layout[:3] == (source, tmp_path, categories)
    if source != "kolektor_sdd":
        own = recognise(tmp_path / categories[-1], category=None)
        assert (own.root, own.categories) == (tmp_path, categories[-1:])


def test_visa_and_classes(tmp_path):
    (tmp_path / "visa/split_csv").mkdir(parents=True)
    (tmp_path / "visa/split_csv/1cls.csv").write_text("object,split,label,image,mask\npcb1,train,normal,a.JPG,\n")
    assert recognise(tmp_path / "visa")[:3] == ("visa", tmp_path / "visa", ("pcb1",))
    for name in ("train/cat", "train/dog", "test/cat"):
        (tmp_path / "pets" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="holds classes .cat, dog.: say with --category which is normal"):
        recognise(tmp_path / "pets")
    assert recognise(tmp_path / "pets", category="dog").categories == ("dog",)


def test_layouts_that_cannot_be_told(tmp_path):
    with pytest.raises(InputError, match="no layout that is known"):
        recognise(tmp_path)
    for name in ("nut/good", "nut/bad", "bolt/train/ok"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match=r"more than one .*: btad, by bolt/train/ok/; good_bad, by nut/good/. Say"):
        recognise(tmp_path)
    assert recognise(tmp_path, source="good_bad").categories == ("nut",)
    with pytest.raises(InputError, match="a layout must be one of mvtec_ad, .*, got 'cifar10'"):
        recognise(tmp_path, source="cifar10")
    with pytest.raises(InputError, match="no category in the layout kolektor_sdd"):
        recognise(tmp_path, source="kolektor_sdd")
    with pytest.raises(InputError, match="does not exist"):
        recognise(tmp_path / "nowhere")


def test_the_command_that_trains_is_told(root, monkeypatch, capsys):
    expected = f"pushpull train quick --data.source mvtec_ad --data.root {root} --data.category nut --workdir DIR\n"
    assert run(monkeypatch, capsys, root / "nut")[1].out.endswith(f"0 errors, 0 warnings\n{expected}")
    spoil(root)
    assert "pushpull train" not in run(monkeypatch, capsys, root)[1].out


def test_file_names_that_are_no_text(tmp_path, monkeypatch, capsys):
    odd = os.fsdecode(b"\xff.png")
    for name in ("good/a.png", "good/b.png", f"good/{odd}", f"bad/{odd}"):
        save(tmp_path / "nut" / name, pixels(len(name)))
    (tmp_path / "nut/good" / odd).write_text("no image")
    for options in ([], ["--json"], ["--html", tmp_path / "sheet.html"]):
        code, said = run(monkeypatch, capsys, tmp_path, *options)
        assert code == 1 and said.out.encode() and "unreadable" in said.out


def test_a_sheet_that_cannot_be_written_is_said_first(root, monkeypatch, capsys):
    for sheet in (root, root / "nowhere" / "sheet.html"):
        code, said = run(monkeypatch, capsys, root, "--html", sheet)
        assert code == 1 and f"--html {sheet}: expected a file in a folder that exists" in said.err
        assert not said.out and "reading" not in said.err


def test_areas_are_written_to_two_figures():
    assert [percent(share) for share in (0.00123, 0.0456, 0.1, 0.256)] == ["0.12 %", "4.6 %", "10 %", "26 %"]


def test_neither_jax_nor_tensorflow_is_imported(root):
    code = "import sys; from pushpull_jax.cli import main; main()\nprint({'jax', 'tensorflow'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "inspect", str(root), "--html", str(root / "sheet.html")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stderr


def test_contact_sheet(root, monkeypatch, capsys):
    spoil(root)
    save(root / "nut/test/<b>/0.png", pixels(30))
    sheet = root.parent / f"{root.name}.html"
    code, said = run(monkeypatch, capsys, root, "--html", sheet)
    assert code == 1 and f"contact sheet: {sheet}" in said.err
    page = sheet.read_text()
    for problem in inspect(root).problems:
        assert problem.file in page
    # Readable images: 3 for training, 3 good, 1 of type <b>; 0.png of bent does not fit its mask, 1.png is none.
    images = re.findall('<img src="data:image/webp;base64,[^"]+" alt="([^"]*)"', page)
    assert sorted(name for name in images if "/train/" in name) == [f"nut/train/good/{n}.png" for n in (0, 2, 2, 3)]
    assert "nut/test/&lt;b&gt;/0.png" in images and "<b>/" not in page
    assert page.count("cannot be read</span>") == 3 and "://" not in page and "$" not in page
    assert "<td>bent</td><td>2</td><td>2</td><td></td><td></td><td></td>" in page


def test_masks_are_outlined(root, monkeypatch, capsys):
    sheet = root / "sheet.html"
    save(root / "nut/test/bent/0.png", np.full((SIZE, SIZE, 3), 90, np.uint8))
    run(monkeypatch, capsys, root, "--html", sheet)
    encoded = re.search('base64,([^"]+)" alt="nut/test/bent/0.png"', sheet.read_text())[1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)
    # 12 of 48 rows are marked, so the line is row 12: the one that is most like magenta.
    assert np.abs(picture.mean(axis=1) - (255, 0, 200)).sum(axis=1).argmin() == 12


def test_threads_are_as_many_as_the_processors_of_this_process(root, tmp_path, monkeypatch):
    counts = []

    class Counted(ThreadPoolExecutor):
        def __init__(self, count):
            counts.append(count)
            super().__init__(count)

    for module in (inspection, contact_sheet):
        monkeypatch.setattr(module, "ThreadPoolExecutor", Counted)
        monkeypatch.setattr(module, "cores", lambda: 3)
    contact_sheet.write_contact_sheet(tmp_path / "page.html", inspect(root))
    assert counts == [3, 3]
