"""One self-contained HTML page from its templates: what every report of ours shares, and how text gets into it.

A page NAME has its body in `templates/NAME.html`, a `string.Template`, its script, if any, in NAME.js, and its style in
NAME.css after that of all pages, page.css. Nothing is loaded from anywhere, and the page's own policy says so: a
browser takes the one style and the one script whose hashes it names, pictures from data: URIs, and nothing else.
"""

import base64
import hashlib
import html
import os
import string
from importlib import resources

from pushpull_jax.workdir import write_bytes


def write_page(path: str | os.PathLike, name: str, *, title: str, parts: dict[str, str]) -> None:
    """Write a page as one file, whole or not at all.

    Args:
        path: the file; its folder must exist.
        name: of the templates.
        title: a text, which becomes the heading too.
        parts: HTML for each name in the body.
    """
    style, script = _template("page.css") + _template(f"{name}.css"), _template(f"{name}.js", default="")
    heading = escape(title)
    page = string.Template(_template("page.html")).substitute(
        title=heading,
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        body=string.Template(_template(f"{name}.html")).substitute(parts, title=heading),
    )
    # A file name may hold bytes that are no UTF-8, which Python keeps as lone surrogates: they become "?".
    write_bytes(path, page.encode("utf-8", "replace"))


def escape(value: object) -> str:
    """Anything as text that stands for itself in HTML, in attributes too."""
    return html.escape(str(value))


def four_digits(value: float) -> str:
    """A number with four significant digits, zeros among them: 6.410; from 0.0001 to 9999 as the pages' scripts do."""
    return f"{value:#.4g}".removesuffix(".")


def absent(reason: str) -> str:
    """What stands in for something that is not there, and why it is not."""
    return f'<p class="missing">&ndash; {escape(reason)}</p>'


def pair_rows(pairs: dict[str, object]) -> str:
    """Rows of a table of names and values."""
    return "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in pairs.items()
    )


def _template(name: str, *, default: str | None = None) -> str:
    """The text of a template; of one that is not there the default, unless it must be there."""
    template = resources.files("pushpull_jax").joinpath(f"templates/{name}")
    return default if default is not None and not template.is_file() else template.read_text("utf-8")


def _hash(content: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
