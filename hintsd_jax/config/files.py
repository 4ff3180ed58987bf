"""Config files: a shipped config's name or a path goes in, a locked ConfigDict comes out.

A config file is Python with a `get_config()` that starts from `hintsd_jax.config.base()`. Whatever goes wrong in it is
told in one line with its place.
"""

from __future__ import annotations

import importlib.util
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from hintsd_jax.errors import UserError
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
    path = Path(named).expanduser()
    if path.is_file():
        return path
    if "/" not in named and not named.endswith(".py"):
        raise UserError(f"config {named!r} is neither shipped nor a file: {did_you_mean(named, shipped())}")
    raise UserError(f"the config file {named} cannot be read ({'a folder' if path.is_dir() else 'no such file'})")


def load(named: str) -> ConfigDict:
    """The config of a file's `get_config()`.

    Raises:
      UserError: there is no such file, it is no Python, it fails, or it gives no config.
    """
    path = find(named)
    spec = importlib.util.spec_from_file_location("hintsd_jax_config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"the config file {path} cannot be read: its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"the config file {path} has no function get_config(): see docs/running.md")
        config = get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's file may fail in any way
        raise UserError(f"the config file {path} fails: {_place(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config() of {path} returns {type(config).__name__}, not hintsd_jax.config.base() with changes"
        )
    return config


def _place(error: BaseException, path: Path) -> str:
    """Type and message of an error, and the last line of the file that led to it."""
    message = " ".join(str(error).split())[:300]
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} (line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{type(error).__name__}: {message}" + (f" (line {lines[-1]})" if lines else "")
