# SPDX-License-Identifier: Apache-2.0

"""Models by name: "Qwen/Qwen3-4B-Instruct-2507", also with "@revision", flows in; a folder of the Hugging Face cache
flows out, which holds the files that a policy needs and no others. And the other way: folders become a model of the
Hub.

`huggingface_hub` does the work: it goes on where a connection broke, keeps whole files under HF_HOME, and knows
HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN and the login. No key passes through here.

Invariant: a name that is pinned to a commit always stands for the same files.
"""

from __future__ import annotations

import errno
import glob
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hintsd_jax.errors import UserError, reason

_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9_][A-Za-z0-9_./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# All but the weights. Which files those are, the index says: repositories hold them in other forms as well.
_SMALL = (
    *(_CONFIG, "generation_config.json", _INDEX, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja"),
    *("chat_template.json", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*"),
)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Name(NamedTuple):
    """model: "owner/name". revision: a branch, a tag or a commit; "" where none is given."""

    model: str
    revision: str

    def __str__(self) -> str:
        return f"{self.model}@{self.revision}" if self.revision else self.model

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a whole commit."""
        return bool(_COMMIT.fullmatch(self.revision))

    @property
    def folder(self) -> Path:
        """Where the cache has the files of a pinned name, once they were fetched."""
        return _cache() / f"models--{self.model.replace('/', '--')}" / "snapshots" / self.revision


def name_of(path: str) -> Name | None:
    """The name of a model; None of what is a path: something is there, or it does not look like a name."""
    match = _NAME.fullmatch(path)
    if not match or path.startswith("assets/") or path.endswith(".json") or ".." in path or Path(path).exists():
        return None
    return Name(match[1], match[2] or "")


def is_model(text: str) -> bool:
    """Whether a text can be the name of a model, without a revision."""
    match = _NAME.fullmatch(text)
    return match is not None and not match[2] and ".." not in text


def fetch(name: Name, *, only_config: bool = False) -> Name:
    """Brings the files of a model into the cache, as far as they are not there; gives its name pinned to a commit.

    only_config: config.json alone. Without the Hub, the commit that the cache knows is taken, and that is said.

    Raises:
      UserError: no such model or revision, one that needs a login, no connection and no copy, no safetensors weights,
        no room on the disk, or a download that broke off.
    """
    pinned = Name(name.model, _download(name, (_CONFIG,) if only_config else _SMALL))
    needed = [_CONFIG]
    if not only_config:
        weights = _weight_files(pinned.folder / _INDEX)
        # by these very names: a * in one would stand for others
        _download(pinned, [glob.escape(file) for file in weights])
        needed += ["tokenizer.json", *weights]
    for file in needed:
        if not (pinned.folder / file).is_file():
            what = "no safetensors weights, the only ones that are read" if file == _WEIGHTS else f"no {file}"
            raise UserError(f"{pinned} has {what}: choose another model or revision ({pinned.folder} is the copy here)")
    return pinned


def check_push(to: str) -> None:
    """Raises UserError where a push cannot work: nobody is logged in, or there shall be no network. Asks nobody."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"export.push_to = {to}: HF_HUB_OFFLINE forbids it: unset one of the two")
    if not get_token():
        raise UserError(f"export.push_to = {to}: nobody is logged in: {_LOGIN}")


def push(folders: Sequence[Path], to: str, *, private: bool, message: str) -> str:
    """Makes a model of the Hub of folders, in one commit: the first at its root, each other in a folder of its name.
    What else is there stays. Gives its address. private: of a model that is not there yet.

    Raises:
      UserError: no login, no right to write there, no connection; the model is then as it was before.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(
            str(file.relative_to(folder) if n == 0 else Path(folder.name, file.relative_to(folder))), file
        )
        for n, folder in enumerate(folders)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    _quiet()
    try:
        api = HfApi()
        api.create_repo(to, private=private, exist_ok=True)
        api.create_commit(to, operations, commit_message=message)
    except Exception as error:  # see `_download`
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"export.push_to = {to}: this needs a token that may write there: {_LOGIN}") from error
        raise UserError(f"export.push_to = {to}: nothing was pushed: {_said(error)}") from error
    return f"{api.endpoint}/{to}"


def _download(name: Name, patterns: Sequence[str]) -> str:
    """Fetches the files that match; gives their commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    wanted: dict[str, Any] = {
        "revision": name.revision or None,
        "allow_patterns": list(patterns),
        "cache_dir": _cache(),
    }
    _quiet()
    try:
        try:
            files = snapshot_download(name.model, dry_run=True, **wanted)
        except DryRunError as error:
            return _without_hub(name, wanted, error.__cause__ or error)
        _check_room(name, sum(file.file_size or 0 for file in files if not file.is_cached))
        return Path(snapshot_download(name.model, **wanted)).name
    except UserError:
        raise
    except Exception as error:  # the library's families of errors are its own, httpx's and the system's
        raise UserError(_problem(name, error)) from error


def _without_hub(name: Name, wanted: dict[str, Any], why: BaseException) -> str:
    """The commit that the cache has, where the Hub gives none. Raises UserError where there is none."""
    from huggingface_hub import snapshot_download

    try:
        commit = Path(snapshot_download(name.model, local_files_only=True, **wanted)).name
    except OSError as error:  # not there, or in part
        raise UserError(_problem(name, why)) from error
    if not name.is_pinned:
        print(f"{name}: {_said(why)}; taking commit {commit}, which is in the cache", file=sys.stderr)
    return commit


def _weight_files(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(map(str, weight_map.values())))
    except FileNotFoundError:
        return [_WEIGHTS]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no weight_map from tensor names to files") from error


def _check_room(name: Name, needed: int) -> None:
    cache = _cache()
    disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(
            f"{name} takes {needed / 1e9:.3g} GB, {cache} has room for {free / 1e9:.3g} GB: make room, or let"
            " HF_HOME name a folder on another disk"
        )


def _problem(name: Name, error: BaseException) -> str:
    """What went wrong with a model's files, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms on its page of the Hub, and {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return (
            f"{name} is no folder here and no model that the Hub shows: mend the name; to see a private one, {_LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name.model} has no revision {name.revision!r}: give a branch, a tag or a whole commit of it"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"{name}: no room left in {_cache()}: make room; the same command fetches what is missing"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{name} is no folder here, and not whole in the cache {_cache()}; HF_HUB_OFFLINE forbids to fetch it:"
            " fetch it where there is a network, or give a folder"
        )
    return f"{name} is no folder here, and cannot be fetched: {_said(error)}. The same command fetches what is missing"


def _said(error: BaseException) -> str:
    """An error in a few words. Those of the Hub go on over several lines, with request ids."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the Hub answers with status {response.status_code} ({reason(error)[:200]})"
    if isinstance(error, ConnectionError) or "onnect" in type(error).__name__:
        return f"the Hub cannot be reached ({reason(error)[:200]})"
    return f"{type(error).__name__}: {reason(error)[:300]}"


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def _quiet() -> None:
    """No lines of the library's own; bars where a person looks on."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
