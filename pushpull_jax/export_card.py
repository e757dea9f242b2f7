"""The model card of an exported detector, in Markdown: what it is, how good, on what data, whose, and where it ends."""

from collections.abc import Sequence
from typing import Any

from pushpull_jax.artefact import NEWER, OLDER
from pushpull_jax.export_verification import Agreement

_MVTEC = "MVTec-AD's: (c) 2019 MVTec Software GmbH, CC BY-NC-SA 4.0, not for commercial use"
_VISA = "VisA's: published by Amazon under CC BY 4.0"
# Terms of the images, by config.data.source.
_DATA_TERMS = {
    "mvtec_ad": f"any folder's in that layout, with the terms of their owner, or {_MVTEC}",
    "tfds_mvtec_ad": _MVTEC,
    "visa": _VISA,
    "visa_2cls_fewshot": _VISA,
    "visa_2cls_highshot": _VISA,
    "cifar10": "CIFAR-10's, published without a licence",
}
_WEIGHTS_NOTES = """ SHA-256 of the file: `{}`.
  The images of ImageNet, on which most backbones were trained, have terms of their own."""
_METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image average precision",
    "image_f1max": "image best F1",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel average precision",
    "pixel_f1max": "pixel best F1",
    "aupro": "AU-PRO",
}

_TILE = """
They are for tiles of {} native px: cut images into such tiles, and take the largest score."""

_EVALUATION = """\
On {images} test images, {normal} normal and {anomalous} anomalous: at a threshold of {threshold:.6g}, {false_alarms}
normal ones were called anomalous, and {missed} anomalous ones missed. Pixels are counted at {resolution} px, AU-PRO up
to a false-positive rate of {fpr_limit}.{means}

| metric | percent |
|---|---|
{rows}"""

_CARD = """\
# Anomaly detector for {category}

It takes photographs of {category} and gives each a score, and a map of where it departs from the normal images that it
was trained on. Made by pushpull_jax {version}: a frozen backbone ({backbone}), a {kind} that reconstructs its
features, and a score from what it cannot reconstruct.

    python example.py IMAGE...        # needs jax, numpy and pillow, not pushpull_jax

| file | what |
|---|---|
| `detector.jaxexport` | jax.export artefact (StableHLO), weights inside |
| `weights.safetensors` | the same weights for other tools, float32 |
| `config.json`, `metrics.json` | settings, thresholds, training data, versions; the evaluation |
| `example.py` | loads and runs the artefact |
{others}
An artefact takes images uint8 [B,H,W,3], RGB, upright, of any number and size, and gives scores [B] and maps [B,H,W],
float32. Resizing to {size} x {size} px ({resize}) is inside. It runs on {platforms}, and is compiled for each shape
that it meets: where images have many sizes, bring them to one first.

## Verdict

An image whose score is above **{threshold:.6g}** is anomalous; so is a window of the map whose mean is above
{map_threshold:.6g}. Both are fitted on normal images that were not trained on: {note}.{tile}

## How good it is

{metrics}

## Data and licences

- Trained on {trained}. Source `{source}`, fingerprint `{fingerprint}`.
- The images are {data_terms}. Ask whether such terms reach a model trained on them.
- Backbone: {weights_source}. Licence: {weights_licence}.{weights_notes}
- pushpull_jax is Apache-2.0.

## Limits

- It knows what it was shown: another camera, light, pose or product raises scores whether or not there is a defect.
  Calibrate the threshold on normal images of the place where it runs.
- What does not show once an image is reduced to {size} x {size} px is not found.
- The threshold bounds the share of normal images called anomalous; it says nothing about missed defects.
- The figures above are of those test images, and promise nothing for others.

## Computation

- {dtype}; statistics, scores and maps are float32. Another device or version of XLA gives the same numbers up to the
  rounding of its products.
- Verification: {verified}
- jax.export promises that a jax up to {newer} newer, or {older} older, than the one that wrote the file can run it: jax
  {jax}, jaxlib {jaxlib}. What counts is when the versions were built. Export again from the run for a newer one;
  `weights.safetensors` does not age.
"""


def model_card(
    told: dict[str, Any], metrics: dict[str, Any], agreements: Sequence[Agreement], *, saved_model: bool = False
) -> str:
    """The card.

    Args:
        told: contents of config.json.
        metrics: those of metrics.json; empty where there was nothing to test on.
        agreements: how far the artefacts are from the training code; empty if it was not looked at.
        saved_model: whether there is a SavedModel.
    """
    config, thresholds, backbone = told["config"], told["thresholds"], told["backbone"]
    versions = told["exported"]["versions"]
    return _CARD.format(
        category=_category(config),
        version=versions["pushpull_jax"],
        backbone=backbone["backbone"],
        kind=config["reconstructor"]["kind"],
        others="| `saved_model/` | the artefact for TensorFlow, its function `detect` |\n" if saved_model else "",
        platforms=", ".join(told["exported"]["platforms"]),
        size=config["data"]["image_size"],
        resize=config["data"]["resize"],
        threshold=thresholds["threshold"],
        map_threshold=thresholds["map_threshold"],
        note=thresholds["note"].removesuffix("."),
        tile=_TILE.format(thresholds["tile"]) if thresholds["tile"] else "",
        metrics=_metrics(metrics),
        trained=_trained(told["data"]),
        source=config["data"]["source"],
        fingerprint=told["data"]["fingerprint"][:16],
        data_terms=_DATA_TERMS.get(config["data"]["source"], "the user's, with the terms of their owner"),
        weights_source=backbone["source"],
        weights_licence=backbone["licence"],
        weights_notes=_WEIGHTS_NOTES.format(backbone["sha256"]) if backbone["sha256"] else "",
        dtype=_dtype(config),
        verified=_verified(agreements),
        newer=NEWER,
        older=OLDER,
        jax=versions["jax"],
        jaxlib=versions["jaxlib"],
    )


def _category(config: dict[str, Any]) -> str:
    name = config["data"]["category"]
    return f"all categories of {config['data']['root']}" if name == "all" else name


def _metrics(metrics: dict[str, Any]) -> str:
    if not metrics:
        return "There were no test images: nothing is known."
    rows = "\n".join(f"| {title} | {_percent(metrics[name])} |" for name, title in _METRICS.items())
    means = " The metrics are means over the categories." if "categories" in metrics else ""
    return _EVALUATION.format(**metrics, means=means, rows=rows)


def _percent(value: float | None) -> str:
    return "no answer" if value is None else f"{100 * value:.2f}"


def _trained(data: dict[str, Any]) -> str:
    parts = {"labelled anomalies": len(data["labelled"])} | {
        f"images with {name}": data[key]
        for name, key in (("confetti noise", "confetti"), ("irrelevant content", "irrelevant"))
    }
    anomalies = ", ".join(f"{count} {name}" for name, count in parts.items() if count) or "no anomaly"
    return f"{data['train']} normal images and {anomalies}, {len(data['held_out'])} held out for the thresholds"


def _dtype(config: dict[str, Any]) -> str:
    compute = config["compute"]
    return (
        f"Networks compute in {compute['dtype']}, float32 products at JAX's precision `{compute['matmul_precision']}`"
    )


def _verified(agreements: Sequence[Agreement]) -> str:
    if not agreements:
        return "none was made (`pushpull export --verify FOLDER`)."
    return (
        "against the training code, differences relative to the score and to the peak of the map. "
        + "; ".join(f"{agreement}" for agreement in agreements)
        + "."
    )
