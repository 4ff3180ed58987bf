# SPDX-License-Identifier: Apache-2.0

"""Config files: a shipped config's name or a path goes in, a locked ConfigDict comes out.

A config file is Python with a `get_config()` that starts from `hintsd_jax.config.base()`. Whatever goes wrong in it is
told in one line with its place.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from hintsd_jax.config import validation
from hintsd_jax.config.edge import base, flatten, plain, set_key, unknown_key
from hintsd_jax.config.fields import expanded, shown
from hintsd_jax.errors import UserError, reason
from hintsd_jax.jsonl import read_object
from hintsd_jax.storage import located
from hintsd_jax.texts import did_you_mean

SHIPPED = Path(__file__).parents[1] / "configs"  # in a checkout a link to the configs at its top
_OTHERS = ("__init__", "desk_warmup")  # not configs of a run


def shipped() -> list[str]:
    """The names of the configs that ship with the package."""
    return sorted(file.stem for file in SHIPPED.glob("*.py") if file.stem not in _OTHERS)


def find(named: str) -> Path:
    """The file of a shipped config's name, or of a path. Raises UserError where there is none."""
    if not named:
        raise UserError(f"--config is empty: give a path, or one of {', '.join(shipped())}")
    if named in shipped():
        return SHIPPED / f"{named}.py"
    path = Path(expanded(named, "--config"))
    if path.is_file():
        return path
    if path.stem in shipped():
        raise UserError(f"the config file {named} does not exist: --config={path.stem} is the one that ships")
    if path.exists() or "/" in named or named.endswith(".py"):
        raise UserError(f"the config file {named} {'is no file' if path.exists() else 'does not exist'}")
    raise UserError(f"config {shown(named)} is neither shipped nor a file: {did_you_mean(named, shipped())}")


def of_run(workdir: str) -> ConfigDict | None:
    """The config of the run in a folder, to be changed by flags like that of a file; None where none is kept there.

    Raises:
      UserError: its `config.json` cannot be read, or no run could begin with what it holds.
    """
    path = located(workdir) / "config.json"
    stored = read_object(path, "a config written by this program")
    kept = (stored or {}).get("config")
    if not isinstance(kept, dict):
        return None  # who opens the folder says what is wrong with it
    config = base()
    for key, value in flatten(kept).items():
        if unknown_key(key) is None:  # a version of before may have had others
            set_key(config, key, tuple(value) if isinstance(value, list) else value)
    try:
        validation.check(config)
    except UserError as error:
        raise UserError(f"{path} is of no use ({error}): give the run's --config") from error
    return config


def load(named: str) -> ConfigDict:
    """The config of a file's `get_config()`.

    Raises:
      UserError: there is no such file, it is no Python, it fails, or it gives no config.
    """
    path = find(named)
    spec = importlib.util.spec_from_file_location("hintsd_jax_config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"the config file {path} cannot be read: its name must end with .py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"the config file {path} has no function get_config(): see docs/running.md")
        config = get_config()
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may fail in any way, and exit
        raise UserError(f"the config file {path} fails: {_reason(error, path)}") from error
    if inspect.iscoroutine(config):
        config.close()  # else Python remarks on it
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {path} returns {type(config).__name__}, not hintsd_jax.config.base() with changes"
        )
    tree = plain(config)  # refuses what has no value or no end
    return ConfigDict(tree) if isinstance(config, FrozenConfigDict) else config


def _reason(error: BaseException, path: Path) -> str:
    """What went wrong, and the last line of the file that led to it."""
    if isinstance(error, SyntaxError):
        where = f"{Path(error.filename).name}, line {error.lineno}" if error.filename and error.lineno else path.name
        return f"{type(error).__name__}: {error.msg} ({where})"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename) == path.absolute()]
    what = f"{type(error).__name__}: {reason(error)}"
    if frames and Path(frames[-1].filename).name == "config_dict.py" and isinstance(error, AttributeError | KeyError):
        what = _wrong_key(error, (ours[-1].line or "") if ours else "") or what
    return what + (f" ({path.name}, line {ours[-1].lineno})" if ours else "")


def _wrong_key(error: BaseException, line: str) -> str | None:
    """One line about the key that a ConfigDict has refused, read off the line of the config file that named it."""
    quoted = re.search(r"['\"](\w+)['\"]", str(error).replace("\\", ""))
    if quoted is None:
        return None
    for chain in re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", line):
        key = chain.partition(".")[2]
        if quoted[1] in key.split(".") and (problem := unknown_key(key)):
            return problem
    return unknown_key(quoted[1])
