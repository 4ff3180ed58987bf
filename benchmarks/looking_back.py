"""What `benchmarks.attribution` and `benchmarks.placement` share: a session from a config, who looks back, and rates with intervals.

The analysers by name:

policy       the policy of the config; before any training its EMA teacher and its initial weights are the same.
environment  PRIVILEGED: the environment's report, which knows the ground truth. A ceiling.
random       a step drawn uniformly, one an episode. The floor.

`look_back` and `advise` are the only places that know how each of them is asked.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from hintsd_jax.config import validate
from hintsd_jax.envs.base import resolve
from hintsd_jax.episodes.chat import ChatFormat
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.episodes.scripted import ScriptedEngine
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import RESAMPLES
from hintsd_jax.hindsight import analyser, prompts
from hintsd_jax.hindsight.analyser import Analysis, Hindsight
from hintsd_jax.hindsight.parse import parse_failures
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.policy.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.runs.workdir import versions
from hintsd_jax.sampling import Sampling
from hintsd_jax.session import Session

ANALYSERS = {"policy": "the policy's own hindsight", "environment": "PRIVILEGED: the environment's report", "random": "a random step"}
NO_WORDS = "-"  # in place of feedback, of which the random analyser has none

Key = np.ndarray
Failed = Sequence[tuple[Episode, Key]]


def load_config(path: str, policy: str | None, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file with another policy and other values, "key=value" each.

    Raises:
      UserError: an unknown key or an impossible value.
    """
    config = runpy.run_path(path)["get_config"]()
    try:
        for key, _, text in (override.partition("=") for override in overrides):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                value = text  # a plain word
            config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"override {key}={text}: {error}") from error
    if policy:
        config.policy.path = policy
    validate(config)
    if config.history != "keep":
        raise UserError("these benchmarks need history = keep: a recorded stream of tokens must stand")
    return config


def open_session(config: ConfigDict, weights: bool) -> Session:
    """The parts of a run; without `weights` only what plays scripts: tokenizer, chat format and environment."""
    if weights:
        return Session.open(config)
    path = config.policy.path
    chat = ChatFormat(load_tokenizer(path), history="keep", stop_ids=generation_stops(path), enable_thinking=config.enable_thinking)
    return Session(config, None, None, None, None, chat, ScriptedEngine(chat, lambda job: ()), resolve(config.env.name))


def look_back(session: Session, name: str, failed: Failed, select: str = "hindsight") -> Hindsight:
    """Targets of failed episodes by the analyser of that name; with select="random" its words about a step that is drawn.

    Raises:
      UserError: no analyser of that name.
    """
    config = dataclasses.replace(session.hindsight_config(), select=select)
    match name:
        case "policy":
            return analyser.ask_policy(session.engine, session.weights(session.trained), session.chat, failed, config)
        case "environment":
            return analyser.ask_environment(failed, config)
        case "random":
            steps = [(episode, analyser.given_step(episode, key)) for episode, key in failed]
            return Hindsight([Analysis(episode, (Target(step, NO_WORDS),)) for episode, step in steps], Counter())
    raise UserError(f"no analyser {name!r}: choose some of {', '.join(ANALYSERS)}")


def advise(session: Session, name: str, given: Sequence[tuple[Episode, Key, int]]) -> tuple[list[Target | None], Counter]:
    """The analyser's words about a step that it is told; None where there are none, counted by reason."""
    config, dropped = session.hindsight_config(), Counter()
    if name == "environment":
        known = [{fault.step: fault.feedback for fault in episode.report.faults or ()} for episode, _, _ in given]
        found = [Target(step, words[step]) if step in words else None for words, (_, _, step) in zip(known, given, strict=True)]
        dropped["not_a_fault_to_it"] = found.count(None)
        return found, +dropped
    if name != "policy":
        return [None] * len(given), Counter(no_words=len(given))
    asked: dict[int, Request] = {}
    for n, (episode, key, step) in enumerate(given):
        prompt = session.chat.prompt(prompts.advise_messages(episode, step, config.clip_chars)).ids
        if len(prompt) + config.sampling.max_tokens > config.context:
            dropped["prompt_too_long"] += 1
        else:
            asked[n] = Request(prompt, key, config.sampling, config.context)
    session.engine.run(session.weights(session.trained), asked.values())
    found = [None] * len(given)
    for n, request in asked.items():
        episode, _, step = given[n]
        parsed = parse_failures(session.chat.decode(request.ids), len(episode.steps), config.max_targets, only_step=step)
        dropped.update(parsed.dropped)
        if not parsed.targets and not parsed.dropped:
            dropped["nothing_named"] += 1
        found[n] = parsed.targets[0] if parsed.targets else None
    return found, dropped


@dataclasses.dataclass
class Request:
    """A single generation as a job of the engine; `ids` are what was sampled."""

    prompt: Sequence[int]
    key: Key
    sampling: Sampling
    context: int
    ids: list[int] = dataclasses.field(default_factory=list)

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids = ids

    def collect(self) -> None:
        return None


def ratio(parts_N: Sequence[float], wholes_N: Sequence[float] | None = None) -> dict[str, float] | None:
    """sum(parts) / sum(wholes) over N episodes with a 95 % percentile bootstrap over episodes; wholes are 1 by default, so that it is the
    mean. None where nothing was counted. Keys: value, low, high, n (the sum of wholes)."""
    parts = np.asarray(parts_N, float)
    wholes = np.ones_like(parts) if wholes_N is None else np.asarray(wholes_N, float)
    if not wholes.sum():
        return None
    rng, size, means = np.random.default_rng(0), len(parts), []
    for first in range(0, RESAMPLES, 500):
        drawn = rng.integers(0, size, (min(500, RESAMPLES - first), size))
        counted = wholes[drawn].sum(axis=1)
        means.append(parts[drawn].sum(axis=1)[counted > 0] / counted[counted > 0])
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return {"value": float(parts.sum() / wholes.sum()), "low": float(low), "high": float(high), "n": float(wholes.sum())}


def cell(found: dict[str, float] | None, form: str = "{:.2f}", scale: float = 1.0) -> str:
    """A value with its interval, for a table."""
    if found is None:
        return "-"
    value, low, high = (form.format(scale * found[name]) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def percent(found: dict[str, float] | None, sign: bool = False) -> str:
    return cell(found, "{:+.1f}" if sign else "{:.1f}", 100.0)


def header(title: str, config: ConfigDict, session: Session) -> str:
    """What stands above the tables: date, command, policy, benchmark."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    benchmark = f", {session.benchmark}" if session.benchmark else ""
    return f"# {title}\n\n{time.strftime('%Y-%m-%d')}. `{command}`. Environment {config.env.name}{benchmark}, policy {config.policy.path}."


def write(out: Path, text: str, results: dict) -> None:
    """`out`.md and `out`.json, the versions in both."""
    found = versions()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"{text}\n\nVersions: {json.dumps(found)}\n")
    out.with_suffix(".json").write_text(json.dumps({"versions": found, "command": sys.argv[1:], **results}, indent=1) + "\n")


def fill(page: Path, mark: str, text: str) -> None:
    """Puts tables between the page's markers of that name, where it has them."""
    begin, end = f"<!-- {mark}: made by benchmarks -->\n", f"\n<!-- {mark}: end -->"
    head, found, rest = page.read_text().partition(begin)
    if found:
        page.write_text(head + begin + text + end + rest.split(end, 1)[1])


def guarded(main: Callable[[], None]) -> None:
    """Runs it; what the user can mend ends in one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
