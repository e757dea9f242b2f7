"""The repository as a whole: imports point down, and lists of what there is are whole."""

import ast
import re
from pathlib import Path

import pytest

import pushpull_jax
from pushpull_jax.config import shipped_configs

ROOT = Path(__file__).resolve().parents[1]

# The architecture, from the command line down: a module imports only from those after it.
LAYERS = (
    "cli", "exporting", "export_formats", "export_card", "artefact", "export_verification", "export_example",
    "service.serving", "service.connections", "service.web", "service.microbatches", "service.limits",
    "service.measures", "demo", "ablation", "ablation_report", "training", "start", "evaluation", "scored",
    "recalibration", "prediction", "prediction_output", "tiling", "report", "gallery", "contact_sheet",
    "inspection_table", "inspection", "data.layouts", "data.near_duplicates", "examples", "grid", "streaming", "fit",
    "objectives", "detector", "feature_bank", "feature_stores", "feature_cache", "extraction", "checkpoint", "shares",
    "hosts", "preemption", "steps", "features", "tensorboard", "data.supervision", "data.sources", "data.prepared",
    "data.tfds_builders", "data.pipeline", "data.kolektor_sdd", "data.images", "data.visa", "data.btad",
    "data.mvtec_loco", "data.mvtec_ad", "data.split_folders", "data.good_bad", "data.manifest_table",
    "data.class_folders", "data.folders", "data.manifest", "data.demo", "weights", "torch_checkpoint", "backbones",
    "conversion.efficientnet", "conversion.resnet", "conversion.vit", "conversion.keras_h5", "conversion.tensors",
    "models.reconstructor", "models.convolutional", "models.nearest", "models.efficientnet", "models.resnet",
    "models.vit", "models.pixels", "models.layers", "heatmap", "charts", "confetti_noise", "batching", "calibration",
    "bootstrap", "page", "streaming_metrics", "metrics", "ranking", "compilation_cache", "cpu_options", "whitening",
    "scoring", "losses", "precision", "shapes", "workdir", "bucket", "mesh", "profiling", "resources", "user_cache",
    "progress", "config", "errors",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Files of the package by their dotted names within it."""
    package = ROOT / "pushpull_jax"
    names = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name: path for name, path in names.items() if not name.endswith("__init__")}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pushpull_jax"):
            inside = node.module.removeprefix("pushpull_jax").removeprefix(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
    return found


def test_every_module_has_its_place():
    assert sorted(modules()) == sorted(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_imports_point_down(name):
    below = LAYERS[LAYERS.index(name) + 1 :]
    assert imported(modules()[name]) <= set(below)


def test_only_the_data_import_tensorflow():
    homes = {name for name, path in modules().items() if "import tensorflow" in path.read_text()}
    assert homes == {"data.pipeline", "data.prepared", "data.tfds_builders"}


def test_readme_lists_the_shipped_configs():
    table = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert set(shipped_configs()) <= table


def test_the_api_reference_is_that_of_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_api_reference

    assert make_api_reference.OUTPUT.read_text(encoding="utf-8") == make_api_reference.reference(), (
        "run scripts/make_api_reference.py"
    )
    assert {name for part in make_api_reference.PARTS.values() for name in part} == set(pushpull_jax.__all__)
