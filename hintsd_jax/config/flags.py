# SPDX-License-Identifier: Apache-2.0

"""Flags: the words of a command line go in; the config with its overrides, and the other flags' values come out.

`--config=NAME` gives the config, `--config.KEY=VALUE` an override of the type that the key has (ml_collections reads
it). Whatever cannot be read is one line in the schema's words.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_origin

from absl import flags
from ml_collections import ConfigDict, config_flags

from hintsd_jax import storage
from hintsd_jax.config import files, reference
from hintsd_jax.config.edge import add_option, change_environment, settings, unknown_key
from hintsd_jax.config.fields import expanded, shown
from hintsd_jax.errors import UserError
from hintsd_jax.texts import did_you_mean, is_encodable

FLAGS = {
    "config": "name of a shipped config, or path of a file with a get_config(); else that of the run in --workdir",
    "workdir": "folder of this run, or gs://bucket/folder; one that holds a run already continues it",
    "mode": "what to do, if the first word does not say it",
    "print_config": "print the resolved config and end",
    "help": "print this and end",
    "version": "print the version and end",
}

_SETTINGS = "settings are written --config.key=value"


class Flags(NamedTuple):
    """Parsed flags. config: not checked yet; where none is named that of the run in `workdir`, or None. rest: the words
    that are no flags.
    """

    config: ConfigDict | None
    workdir: str | None
    print_config: bool
    rest: Sequence[str]


def parse(words: Sequence[str]) -> Flags:
    """Reads the flags but --mode, --help and --version.

    Raises:
      UserError: an unknown flag or key, a value that cannot be read, a config file that cannot be used.
    """
    words, named = take(words, "config")
    words, workdir = take(words, "workdir")
    words = _joined(words)
    for word in words:
        if re.match(r"--?(flagfile|undefok)\b", word):  # absl's own, which would add and forgive flags unseen
            raise UserError(f"unknown flag {word.partition('=')[0]}: {_SETTINGS}")
        if word == "--":
            raise UserError(f"unexpected argument '--': {_SETTINGS}")
        override = re.match(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if override and (problem := unknown_key(override[1]) or _list_problem(override[1], override[2])):
            raise UserError(problem)
    if named is not None:
        config = files.load(named)
    else:
        config = None if workdir is None else files.of_run(checked_workdir(workdir))
    values = flags.FlagValues()
    flags.DEFINE_bool("print_config", False, FLAGS["print_config"], flag_values=values)
    try:
        if config is not None:
            for name in filter(None, (re.fullmatch(r"--?config\.env\.name=(.*)", word) for word in words)):
                change_environment(config, name[1])
            words = _new_options(config, words)
            config_flags.DEFINE_config_dict(
                "config", config, FLAGS["config"], flag_values=values, sys_argv=["hintsd-jax", *words]
            )
        rest = values(["hintsd-jax", *words])[1:]
    except flags.Error as error:
        raise UserError(_problem(error)) from error
    except (AttributeError, KeyError) as error:  # only keys of groups that take any key come so far
        key = str(error.args[0]).strip("\"'")
        raise UserError(f"config key {key} is not set in the config file: a flag changes only what is there") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"a --config. flag cannot be read: {error}") from error
    return Flags(config, workdir, bool(values["print_config"].value), rest)


def take(argv: Sequence[str], flag: str) -> tuple[list[str], str | None]:
    """The words without --FLAG=VALUE (or --FLAG VALUE), and that value; the last one counts."""
    rest, value, words = [], None, iter(argv)
    for word in words:
        match = re.fullmatch(rf"--?{flag}(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        value = next(words, None) if match[1] is None else match[1]
        if value is None or (match[1] is None and value.startswith("-")):  # the next flag is no value of this one
            raise UserError(f"--{flag} has no value: {FLAGS[flag]}")
    return rest, value


def _joined(words: Iterable[str]) -> list[str]:
    """The words with --config.KEY VALUE as --config.KEY=VALUE; one that is true or false may have no value."""
    joined, waits = [], False
    for word in words:
        if waits and not word.startswith("-"):
            joined[-1] += f"={word}"
            waits = False
            continue
        joined.append(word)
        key = re.fullmatch(r"--?config\.([^=]*)", word)
        setting = settings().get(key[1]) if key else None
        waits = key is not None and (setting is None or setting.kind is not bool)
    return joined


def _new_options(config: ConfigDict, words: Sequence[str]) -> list[str]:
    """The words without those that bring an option of the environment which the config file does not set."""
    pairs = ((word, re.fullmatch(r"--?config\.([^=]*)=(.*)", word, re.DOTALL)) for word in words)
    return [word for word, match in pairs if not (match and add_option(config, match[1], match[2]))]


def _list_problem(key: str, text: str | None) -> str | None:
    """Why a flag's text is no list, where a list is wanted; of sets, bytes and mappings `tuple` would make some."""
    setting = settings().get(key)
    if text is None or setting is None or get_origin(setting.kind) is not tuple:
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None  # a text as it stands, or what the reader refuses
    if isinstance(value, tuple | list | int | float | str):
        return None
    return f"{key} = {shown(text)} cannot be read; allowed: {reference.allowed(setting)}"


def _problem(error: flags.Error) -> str:
    """What absl says about a flag, in the schema's words where it is a key's."""
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        if name in settings():
            return f"unknown flag --{name}: write --config.{name}"
        if name.startswith("noconfig."):
            return f"--{name} turns off what is true or false, which {name.removeprefix('noconfig.')} is not"
        return f"unknown flag --{name}: {did_you_mean(name, FLAGS, _SETTINGS)}"
    text = " ".join(str(error).split())
    match = re.match(r"flag --(?:config\.)?([\w.]+)=(.*?): ", text)
    if match and match[1] in settings():
        takes = reference.allowed(settings()[match[1]])
        return f"{match[1]} = {shown(match[2])} cannot be read; allowed: {takes}"
    if match and "Non-boolean" in text:
        return f"--{match[1]} = {shown(match[2])} must be true or false"
    return text


def checked_workdir(named: str | None) -> str:
    """The workdir's path. Raises UserError where it is none that a run should have."""
    if named is None or not named.strip():
        raise UserError(f"--workdir is {'missing' if named is None else 'empty'}: give the {FLAGS['workdir']}")
    if not (is_encodable(named) and named.isprintable()):
        raise UserError(f"--workdir={shown(named)} cannot be the name of a folder")
    if storage.is_remote(named):
        if why := storage.problem(named) or storage.problem_of_checkpoints(named):
            raise UserError(f"--workdir={named} {why}")
        return named.rstrip("/")
    path = Path(expanded(named, "--workdir"))
    # Where --workdir=./$UNSET, --workdir=~/$UNSET and --workdir=$UNSET/ lead.
    for what, other in {"current folder": ".", "home folder": os.path.expanduser("~"), "root folder": "/"}.items():
        if path.exists() and os.path.exists(other) and path.samefile(other) and not (path / "config.json").exists():
            raise UserError(f"--workdir={named} is the {what} and holds no run: give a folder of its own")
    return str(path)
