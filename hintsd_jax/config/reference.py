# SPDX-License-Identifier: Apache-2.0

"""The reference of all settings: the schema goes in, the text of --help and docs/config.md come out.

`python -m hintsd_jax.config.reference` writes docs/config.md of the checkout; a test compares.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import get_args, get_origin

from hintsd_jax.config import files
from hintsd_jax.config.edge import RENAMED, RENAMED_VALUES, Setting, sections, settings

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
_WIDTH = 100


def help_text(modes: Mapping[str, str], flags: Mapping[str, str]) -> str:
    """Modes, flags and every key with its default and meaning."""
    lines = ["usage: hintsd-jax MODE --config=NAME_OR_FILE --workdir=FOLDER [--config.KEY=VALUE ...]", "", "modes:"]
    lines += [_entry(name, meaning) for name, meaning in modes.items()]
    lines += ["", "flags:", *(_entry(f"--{name}", meaning) for name, meaning in flags.items())]
    configs = textwrap.fill(f"shipped configs: {', '.join(files.shipped())}", 110, subsequent_indent="  ")
    lines += ["", configs, "", "keys, each a flag --config.KEY=VALUE:"]
    for section, about in sections().items():
        lines += ["", f"{section or 'run'}: {about}"]
        for setting in settings().values():
            if setting.name.rpartition(".")[0] == section:
                choices = f" ({allowed(setting)})" if setting.key.choices else ""
                lines.append(_entry(setting.name, f"{setting.key.meaning}{choices} [{_default(setting)}]"))
    return "\n".join(lines)


def page() -> str:
    """docs/config.md."""
    lines = [
        "# Configuration",
        "",
        "Every key of `hintsd_jax/config/schema.py`, written by `python -m hintsd_jax.config.reference`. A config file",
        "starts from `hintsd_jax.config.base()`; on the command line every key is a flag: `--config.optim.lr=1e-4`.",
        "Defaults are the paper's released settings for BFCL where it states them. *By algorithm*: the algorithm",
        "decides unless the config does ([algorithms.md](algorithms.md)).",
    ]
    for section, about in sections().items():
        lines += ["", f"## {section or 'The run'}", "", *((about, "") if section else ())]
        lines += ["| key | default | range | meaning |", "|---|---|---|---|"]
        for setting in settings().values():
            if setting.name.rpartition(".")[0] == section:
                cells = (f"`{setting.name}`", _default(setting), allowed(setting), setting.key.meaning)
                lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += ["", "## Old names", "", "Refused, with the new name in the message.", "", "| old | new |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    lines += [f"| `{key} = {old}` | `{key} = {new}` |" for (key, old), new in RENAMED_VALUES.items()]
    return "\n".join(lines) + "\n"


def _entry(name: str, text: str) -> str:
    indent = " " * 34
    body = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent) or [indent]
    head = f"  {name}"
    return "\n".join([head.ljust(len(indent)) + body[0].strip(), *body[1:]] if len(head) < 33 else [head, *body])


def _default(setting: Setting) -> str:
    if setting.key.by_algorithm:
        return "by algorithm"
    value = setting.default
    if isinstance(value, str):
        return value or "empty"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "none" if value == {} else str(value)


def allowed(setting: Setting) -> str:
    """Type and range, or choices, of a key; what kind of path."""
    key, kind = setting.key, setting.kind
    if get_origin(kind) is dict:
        return "mapping with any keys"
    if key.path:
        return "path, gs://... or s3://..." if key.remote else "path"
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind
    what = ", ".join(key.choices) if key.choices else f"{_KINDS[item]} {key.interval}".strip()
    file = f", a {key.suffix} file" if key.suffix else ""
    of_own = f"{file}, or package.module:name" if key.open else ""
    empty = "" if not key.derived else ", or 0" if item is kind else ", or empty"
    return f"{'list of ' if item is not kind else ''}{what}{of_own}{empty}"


_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
