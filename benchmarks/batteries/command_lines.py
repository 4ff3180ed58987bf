"""Command lines and config files, drawn from the schema and picked by hand; each ends with 0 and the settings that were
asked for, or with 2 and one line.

  python -m benchmarks.batteries.command_lines [--seed N] [--cases N]

The modes are stood in for, so that a case takes milliseconds, but for those of the kinds "session", "plan" and
"process".
"""

from __future__ import annotations

import ast
import contextlib
import math
import os
import random
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from benchmarks.batteries import battery
from benchmarks.batteries import command_line_texts as texts
from benchmarks.batteries.battery import Case, Ending, Outcome
from benchmarks.pages import REPO
from hintsd_jax.config.edge import Setting, flatten, settings

STAND_INS = {"hintsd_jax.library": ("train", "evaluate"), "hintsd_jax.export": ("export",)}  # module -> its modes


@contextlib.contextmanager
def stood_in() -> Iterator[list[Any]]:
    """The modes keep what they receive instead of running."""
    received: list[Any] = []
    before = {name: sys.modules.get(name) for name in STAND_INS}
    keep = lambda config, workdir: received.append((config, workdir))
    streams, folder = (sys.stdout, sys.stderr), os.getcwd()
    for name, modes in STAND_INS.items():
        module: Any = types.SimpleNamespace(**dict.fromkeys(modes, keep))
        sys.modules[name] = module
    try:
        yield received
    finally:
        os.chdir(folder)
        sys.stdout, sys.stderr = streams
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def run_line(words: Sequence[str], wanted: Callable[[dict[str, Any]], str] | None = None) -> Outcome:
    """A command line with the modes stood in for. wanted: what is wrong with the settings that a mode gets, or ""."""
    with stood_in() as received:
        outcome = battery.command(*words).outcome
    values = flatten(received[0][0].to_dict()) if received and outcome.ending == Ending.FINE else {}
    problem = wanted(values) if wanted and values else ""
    return Outcome(Ending.SILENT, problem) if problem else outcome


def meant(setting: Setting, text: str) -> Any:
    """What a flag's text means for a key, read independently. Raises ValueError where nothing."""
    if get_origin(setting.kind) is tuple:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = text
        if not isinstance(value, str | int | float | tuple | list):
            raise ValueError("no list")
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    if setting.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    return {int: lambda text: int(text, 0), float: float, str: str}[setting.kind](text)


def same(value: Any, other: Any) -> bool:
    if isinstance(value, tuple | list) and isinstance(other, tuple | list):
        return len(value) == len(other) and all(map(same, value, other))
    return value == other and isinstance(value, str) == isinstance(other, str)


def flag_case(number: int, setting: Setting, text: str) -> Case:
    def wrong(values: dict[str, Any]) -> str:
        value = values[setting.name]
        try:
            expected = meant(setting, text)
        except (ValueError, KeyError):
            return f"{setting.name} = {value!r} from {text[:80]!r}, which means nothing"
        if setting.key.path and isinstance(expected, str):
            expected = os.path.expanduser(expected)
        derived = setting.key.derived and not expected
        return "" if derived or same(value, expected) else f"{setting.name} = {value!r} from {text[:80]!r}"

    words = (*texts.RUN, f"--config.{setting.name}={text}")
    return Case(f"value: {number} {setting.name} = {shown(text)}", lambda: run_line(words, wrong))


def key_case(number: int, key: str) -> Case:
    def run() -> Outcome:
        outcome = run_line((*texts.RUN, f"--config.{key}=1"))
        if outcome.ending == Ending.FINE:
            return Outcome(Ending.SILENT, "taken")
        return outcome

    return Case(f"key: {number} {shown(key)}", run)


def misspelt(name: str, rng: random.Random) -> str:
    at = rng.randrange(len(name))
    how = rng.randrange(7)
    changed = (
        name[:at] + name[at + 1 :],
        name[:at] + rng.choice("abcxyz_.") + name[at:],
        name.upper(),
        name.rpartition(".")[2] + "s",
        name.replace("_", "-"),
        f"{name}.{name}",
        ".".join(reversed(name.split("."))),
    )[how]
    return changed if changed not in settings() else f"{changed}x"


def file_case(number: int, what: str, text: str, folder: Path, wanted: Callable[[dict[str, Any]], str] | None) -> Case:
    path = folder / f"config_{number}.py"

    def run() -> Outcome:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return run_line((f"--config={path}", "--workdir=w"), wanted)

    return Case(what, run)


def assigned_case(number: int, setting: Setting, value: str, folder: Path) -> Case:
    """A config file that puts a value into a key: refused, or that value arrives."""

    def wrong(values: dict[str, Any]) -> str:
        import ml_collections
        import numpy as np

        try:
            asked = eval(value, {"ml_collections": ml_collections, "np": np, "c": None})
        except Exception:
            return ""  # of the config itself
        got = values.get(setting.name)
        if isinstance(asked, ml_collections.FieldReference):
            asked = asked.get()
        if asked is None or isinstance(asked, dict | ml_collections.ConfigDict) or (setting.key.derived and not asked):
            return "" if setting.key.by_algorithm or setting.name in FREE_GROUPS or not asked else f"{got!r}"
        if setting.key.path and isinstance(asked, str):
            asked = os.path.expanduser(asked)
        item = get_args(setting.kind)[0] if get_origin(setting.kind) is tuple else setting.kind
        if item is float and isinstance(asked, int | float) and isinstance(got, float):
            return "" if math.isclose(got, float(asked)) else f"{got!r} of {value}"
        return "" if same(got, asked) else f"{setting.name} = {got!r} from {value}"

    text = texts.FUNCTION.format(f"c.{setting.name} = {value}")
    return file_case(number, f"config file's value: {number} {setting.name} = {shown(value)}", text, folder, wrong)


FREE_GROUPS = [name for name, setting in settings().items() if get_origin(setting.kind) is dict]


def session_case(number: int, changes: dict[str, Any], folder: Path) -> Case:
    """A run that must not open, or a plan."""
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    words = ("evaluate", "--config=desk_smoke", f"--workdir={folder / f'session_{number}'}", *flags)

    def run() -> Outcome:
        from hintsd_jax import evaluate

        def opened(*unused: object, **also_unused: object) -> Any:
            raise Opened

        before, evaluate.score = evaluate.score, opened
        try:
            return battery.command(*words).outcome
        except Opened:
            return Outcome(Ending.FINE, "opens")
        finally:
            evaluate.score = before

    return Case(f"session: {', '.join(f'{name} = {shown(str(value))}' for name, value in changes.items())}", run)


class Opened(Exception):
    """Everything was accepted; what comes after is not of a command line."""


def process_case(line: str, folder: Path) -> Case:
    """In a process of its own, by the shell: the pipe's first status may be 0 or 2; stderr has one line at most."""

    def run() -> Outcome:
        command = f"{shlex.quote(sys.executable)} -m hintsd_jax {line.replace(' docs', f' {REPO}/docs')}"
        environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        if done.returncode not in (0, 1, 2) or done.stderr.count("\n") > 1 or "Traceback" in done.stderr:
            return Outcome(Ending.TRACEBACK, f"status {done.returncode}: {done.stderr}")
        ending = Ending.REFUSED if done.returncode == 2 else Ending.FINE
        return Outcome(ending, (done.stderr or done.stdout).strip()[:200])

    return Case(f"process: {line}", run)


def shown(text: str) -> str:
    text = text if len(text) <= 40 else f"{text[:40]}... of {len(text)}"
    return ascii(text)


def odd_places(folder: Path) -> list[Case]:
    """Config files that are no files."""
    names = {
        "a folder": "folder.py",
        "a pipe": "pipe.py",
        "a link to nothing": "nowhere.py",
        "a link to itself": "loop.py",
    }

    def run(what: str, name: str) -> Outcome:
        path = folder / name
        if not (path.exists() or path.is_symlink()):
            if what == "a folder":
                path.mkdir()
            elif what == "a pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(path if what == "a link to itself" else folder / "absent")
        return run_line((f"--config={path}", "--workdir=w"))

    return [Case(f"config file: {what}", lambda what=what, name=name: run(what, name)) for what, name in names.items()]


def make_cases(rng: random.Random, count: int, folder: Path) -> list[Case]:
    """All that are picked by hand, and drawn ones up to `count`."""
    seed_of = {"a byte order mark": 5, "other streams": 6, "another folder": 7}
    cases = [Case(f"words: {shown(' '.join(words))}", lambda words=words: run_line(words)) for words in texts.WORDS]
    for number, (what, text) in enumerate(texts.FILES.items()):
        seed = seed_of.get(what)
        wanted = None if seed is None else lambda values, seed=seed: "" if values["seed"] == seed else "another seed"
        cases.append(file_case(number, f"config file: {what}", text, folder, wanted))
    cases += odd_places(folder)
    for key in ("eval_split", "test_split", "train_split"):
        for split in texts.SPLITS:
            taken = lambda values, split=split, key=key: (
                "" if key == "train_split" and split == "train+train" else "taken"
            )
            words = (
                *texts.RUN,
                f"--config.tasks.{key}={split}",
                *(["--config.tasks.eval_split=train"] * (key == "train_split")),
            )
            cases.append(
                Case(f"split: tasks.{key} = {split!r}", lambda words=words, taken=taken: run_line(words, taken))
            )
    cases += [session_case(number, changes, folder) for number, changes in enumerate(texts.SESSIONS)]
    for devices in texts.PLANS:
        words = ("plan", "--config=desk_smoke", "--config.plan.compile=false", f"--config.plan.devices={devices}")
        cases.append(Case(f"plan: {shown(devices)}", lambda words=words: battery.command(*words).outcome))
    cases += [process_case(line, folder) for line in texts.PROCESSES]
    every = list(settings().values())
    plain = [setting for setting in every if get_origin(setting.kind) is not dict]
    for number in range(max(0, count - len(cases))):
        setting = rng.choice(every)
        if number % 4 == 0:
            cases.append(key_case(number, misspelt(setting.name, rng)))
        elif number % 4 == 1:
            value = repr(setting.default) if rng.random() < 0.3 else rng.choice(texts.VALUES)
            cases.append(assigned_case(1000 + number, setting, value, folder))
        else:
            cases.append(flag_case(number, rng.choice(plain), rng.choice(texts.TEXTS)))
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    return battery.main("command_lines", "Command lines and config files", make_cases, 600, argv)


if __name__ == "__main__":
    sys.exit(main())
