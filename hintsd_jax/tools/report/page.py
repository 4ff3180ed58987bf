# SPDX-License-Identifier: Apache-2.0

"""The content of a page in, one HTML file out that is safe to open and needs no network.

Texts of episodes are hostile. None becomes markup: the overview is JSON with every `<`, `>` and `&` escaped, chunks are
compressed and in base64, and the script writes nothing but text nodes. A content security policy allows this style and
this script, by their hashes, and nothing else: no other script, no request, no frame. The same content gives the same
bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any

from hintsd_jax.tools.report.gather import Content

STYLES = ("page.css", "episodes.css")
SCRIPTS = tuple(
    f"{name}.js"
    for name in (
        *("text", "link", "csv", "marks", "axes", "charts"),
        *("results", "compare", "held_out", "curves", "overview", "targets"),
        *("tokens", "episode", "search", "filters", "browser", "live", "page"),
    )
)


def render(content: Content) -> str:
    """The page."""
    style, script = (
        "".join(map(_file, STYLES)),
        f'"use strict";\n(() => {{\n{"".join(_file(name) for name in SCRIPTS)}}})();\n',
    )
    allowed = f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    chunks = "\n".join(
        f'<script type="text/plain" id="chunk-{n}">{chunk}</script>' for n, chunk in enumerate(content.chunks)
    )
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "OVERVIEW": embed(content.overview), "CHUNKS": chunks}
    page = _file("page.html")
    before, *rest = page.split("{{")
    pieces = [before]
    for part in rest:  # by position, so that no text that was put in is searched for names
        name, after = part.split("}}", 1)
        pieces += [parts[name], after]
    return "".join(pieces)


def embed(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    return resources.files("hintsd_jax.tools.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
