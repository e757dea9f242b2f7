"""Write docs/api.md: the signature and docstring of every public name, in the order of the README's parts.

    python scripts/make_api_reference.py

The test suite holds the file to what this writes.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import pushpull_jax

PARTS = {
    "The mathematics": (
        "pseudo_huber_map", "pixel_push_pull_loss", "top_k_score", "image_push_pull_loss", "push_pull_loss",
        "reconstruction_loss", "confetti", "score_map", "upsample", "smooth", "image_score",
    ),
    "Metrics": ("image_auroc", "pixel_auroc", "average_precision", "f1_max", "aupro"),
    "Networks and training": ("Reconstructor", "load_backbone", "init_state", "make_step", "make_chunk"),
    "Programs": (
        "Config", "load_config", "inspect", "train", "evaluate", "load", "Detector", "predict", "calibrate",
        "InputError",
    ),
}  # fmt: skip
OUTPUT = Path(__file__).parents[1] / "docs" / "api.md"


def reference() -> str:
    """The whole file."""
    lines = ["# API", "", "Written by scripts/make_api_reference.py from the docstrings.", ""]
    for title, names in PARTS.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += entry(f"pushpull_jax.{name}", getattr(pushpull_jax, name))
    return "\n".join(lines)


def entry(name: str, thing: object) -> list[str]:
    """A name with its signature and docstring, and the public methods of a class."""
    signature = "" if inspect.isclass(thing) else signature_of(thing)
    lines = [
        f"### `{name}`",
        "",
        "```text",
        f"{name.rpartition('.')[2]}{signature}",
        "",
        inspect.getdoc(thing) or "",
        "```",
        "",
    ]
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            is_public = inspect.isfunction(function) and (not method.startswith("_") or method == "__call__")
            if is_public and function.__doc__ and function.__module__.startswith("pushpull_jax"):
                lines += entry(f"{name}.{method}", function)
    return lines


def signature_of(function: Callable) -> str:
    """The signature as it is written, so that it is the same with every version of what its types are of."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    told = f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    return textwrap.fill(told, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    OUTPUT.write_text(reference(), encoding="utf-8")
