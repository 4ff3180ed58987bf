# SPDX-License-Identifier: Apache-2.0

"""Parts that a config names: a registered name or a path "package.module:name" goes in, the object comes out.

Environments, algorithms and selectors of one's own all come in through here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean

_MOST_NAMES = 8  # of a module in a message


def load(path: str, kind: str, known: Iterable[str] = ()) -> Any:
    """The object at a path "package.module:name".

    Args:
      kind: what it is to be, for messages: "algorithm".
      known: the registered names, for a hint.
    Raises:
      UserError: the text is no such path and no known name, the module cannot be imported, or it has no such name.
    """
    module_name, colon, name = path.partition(":")
    if not colon:
        hint = did_you_mean(path, sorted(known))
        raise UserError(f"{kind} {path!r} is unknown: {hint} (or give your own as 'package.module:name')")
    if not (name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"{kind} {path!r}: write it as 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except UserError as error:  # of one of our base classes: what it says is for the module's author
        raise UserError(f"{kind} {path!r}: {error}") from error
    except Exception as error:  # the user's module may fail in any way at import
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            reason = f"there is no such module in {Path.cwd()} nor elsewhere on Python's path"
        raise UserError(f"{kind} {path!r}: cannot import {module_name!r} ({reason})") from error
    if not hasattr(module, name):
        own = [each for each, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        more = f" and {len(own) - _MOST_NAMES} more" if len(own) > _MOST_NAMES else ""
        hint = did_you_mean(name, own, f"it defines {', '.join(own[:_MOST_NAMES]) or 'nothing'}{more}")
        raise UserError(f"{kind} {path!r}: module {module_name!r} has no {name!r}; {hint}")
    return getattr(module, name)
