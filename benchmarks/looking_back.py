"""What `benchmarks.attribution` and `benchmarks.placement` share: a session from a config, who looks back, and rates
with intervals.

The analysers by name:

policy       the policy of the config; before any training its EMA teacher and its initial weights are the same.
endpoint     a server with an OpenAI-compatible /v1/chat/completions: endpoint.url=... endpoint.model=... among the
further values. environment  PRIVILEGED: the environment's report, which knows the ground truth. A ceiling.
random       a step drawn uniformly, one an episode. The floor.

`look_back` and `advise` are the only places that know how each of them is asked.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from hintsd_jax.methods import resolved
from ml_collections import ConfigDict

from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.config.validation import validate
from hintsd_jax.envs.base import Fault, Report
from hintsd_jax.envs.registry import resolve
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import RESAMPLES
from hintsd_jax.hindsight.analyser import Analysis, Hindsight, Keyed, analyse, ask_environment, given_steps
from hintsd_jax.hindsight.endpoint import Endpoint, EndpointConfig
from hintsd_jax.hindsight.questions import Asker
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.runs.workdir import versions
from hintsd_jax.sampling import Sampling
from hintsd_jax.session import Session, answer_sampling

ANALYSERS = {
    "policy": "the policy's own hindsight",
    "endpoint": "a model behind a server",
    "environment": "PRIVILEGED: the environment's report",
    "random": "one random step an episode",
}
SPEAKERS = ("policy", "endpoint")  # those that answer questions
NO_WORDS = "-"  # in place of feedback, of which the random analyser has none


def parser(text: str, analysers: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark of hindsight takes. `analysers`: what there is to say of `--analysers`."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--config", default="configs/desk.py")
    made.add_argument("--policy", help="a Hugging Face directory in place of the config's")
    made.add_argument("--analysers", default="policy,environment,random", help=analysers)
    made.add_argument("--limit", type=int, default=0, help="tasks; 0 for all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="without its ending")
    made.add_argument("overrides", nargs="*", help="further values, key=value")
    return made


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
    if config.chat.history != "keep":
        raise UserError("these benchmarks need history = keep: a recorded stream of tokens must stand")
    return config


def open_session(config: ConfigDict, names: Sequence[str]) -> Session:
    """The parts of a run that these analysers need; without "policy" no weights, only what plays scripts and asks
    servers.

    Raises:
      UserError: an analyser that is not known, or see `Session.open`.
    """
    if unknown := set(names) - ANALYSERS.keys():
        raise UserError(f"no analyser {', '.join(sorted(unknown))}: choose some of {', '.join(ANALYSERS)}")
    if "endpoint" in names:
        config.hindsight.analyser = "endpoint"
        validate(config)
    if "policy" in names:
        return Session.open(config)
    config, path = resolved(config), config.policy.path
    chat = ChatFormat(
        load_tokenizer(path),
        history="keep",
        stop_ids=generation_stops(path),
        enable_thinking=config.chat.enable_thinking,
    )
    endpoint = Endpoint(EndpointConfig(**config.endpoint), answer_sampling(config)) if "endpoint" in names else None
    return Session(
        config, None, None, None, None, chat, ScriptedEngine(chat, lambda job: ()), resolve(config.env.name), endpoint
    )


def asker(session: Session, name: str) -> Asker:
    """Raises UserError where there is no analyser of that name that answers questions."""
    if name == "policy":
        return session.policy_asker(session.weights(session.trained))
    if name == "endpoint":
        return partial(session.endpoint.ask, journal=None)
    raise UserError(f"no analyser {name!r} that answers questions: choose one of {', '.join(SPEAKERS)}")


def look_back(
    session: Session, name: str, failed: Keyed, select: str = "hindsight", limit: int | None = None
) -> Hindsight:
    """Targets of failed episodes by the analyser of that name; with another `select` its words about steps that are
    given. limit: most targets of an episode, the config's by default."""
    config = session.hindsight_config()
    config = dataclasses.replace(config, select=select, max_targets=config.max_targets if limit is None else limit)
    if name == "environment":
        return ask_environment(failed, config)
    if name == "random":
        config = dataclasses.replace(config, select="random", max_targets=1)
        drawn = [(episode, given_steps(episode, key, config)) for episode, key in failed]
        return Hindsight(
            [Analysis(episode, tuple(Target(step, NO_WORDS) for step in steps)) for episode, steps in drawn]
        )
    return analyse(failed, config, asker(session, name))


def advise(
    session: Session, name: str, given: Sequence[tuple[Episode, np.ndarray, int]]
) -> tuple[list[Target | None], Counter]:
    """The analyser's words about the step that it is told, one an episode; None where there are none, counted by
    reason.
    """
    if name == "environment":
        known = [{fault.step: fault.feedback for fault in episode.report.faults or ()} for episode, _, _ in given]
        found = [
            Target(step, words[step]) if step in words else None
            for words, (_, _, step) in zip(known, given, strict=True)
        ]
        return found, +Counter(not_a_fault_to_it=found.count(None))
    # what is told to the analyser is where the fault is, whatever the environment says of it
    told = [
        (dataclasses.replace(episode, report=Report("told", (Fault(step, NO_WORDS),))), key)
        for episode, key, step in given
    ]
    looked = look_back(session, name, told, select="oracle")
    targets = {id(analysis.episode): analysis.targets for analysis in looked.analyses}
    return [next(iter(targets.get(id(episode), ())), None) for episode, _ in told], looked.dropped


@dataclasses.dataclass
class Request:
    """A single generation as a job of the engine; `ids` are what was sampled."""

    prompt: Sequence[int]
    key: np.ndarray
    sampling: Sampling
    context: int
    ids: list[int] = dataclasses.field(default_factory=list)

    def submit(self, ids: list[int], logprobs: list[float], stopped: bool) -> None:
        self.ids = ids

    def collect(self) -> None:
        return None


def ratio(parts_N: Sequence[float], wholes_N: Sequence[float] | None = None) -> dict[str, float] | None:
    """sum(parts) / sum(wholes) over N episodes with a 95 % percentile bootstrap over episodes; wholes are 1 by default,
    so that it is the mean. None where nothing was counted. Keys: value, low, high, n (the sum of wholes)."""
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
    found = {"value": parts.sum() / wholes.sum(), "low": low, "high": high, "n": wholes.sum()}
    return {name: round(float(number), 6) for name, number in found.items()}


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
    out.with_suffix(".json").write_text(json.dumps({"versions": found, "command": sys.argv[1:], **results}) + "\n")


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
