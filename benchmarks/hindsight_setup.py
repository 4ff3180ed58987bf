"""What `benchmarks.attribution` and `benchmarks.placement` share: command line, config, policy, and who analyses.

The analysers by name:

policy       the policy of the config; before any training its EMA teacher and its initial weights are the same.
endpoint     a server with an OpenAI-compatible /v1/chat/completions: endpoint.url=... endpoint.model=... among the
             further values.
environment  PRIVILEGED: the environment's report, which knows the ground truth. A ceiling.
random       a step drawn uniformly, one an episode. The floor.

`analyse` and `feedback_on_steps` are the only places that know how each of them is asked.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from hintsd_jax.checkpoints.tokenizer import generation_stops, load_tokenizer
from hintsd_jax.config import build, files
from hintsd_jax.config.schema import Config
from hintsd_jax.envs.base import Environment, Fault, Report
from hintsd_jax.envs.protocol import call_style, checked_tasks, checked_version
from hintsd_jax.envs.registry import resolve
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight import prompts
from hintsd_jax.hindsight.analyser import EnvironmentAnalyser, ModelAnalyser
from hintsd_jax.hindsight.analysis import Analysis, Hindsight
from hintsd_jax.hindsight.endpoint import Endpoint
from hintsd_jax.hindsight.questions import Asker, policy_asker
from hintsd_jax.hindsight.selectors import random_steps
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.rollout.chat import ChatFormat
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.runs.workdir import versions
from hintsd_jax.session import Session

ANALYSERS = {
    "policy": "the policy's own hindsight",
    "endpoint": "a model behind a server",
    "environment": "PRIVILEGED: the environment's report",
    "random": "one random step an episode",
}
MODELS = ("policy", "endpoint")  # those that answer questions
NO_FEEDBACK = "-"  # of the random analyser, which has nothing to say

Keyed = Sequence[tuple[Episode, np.ndarray]]  # episodes, each with the raw key of its questions


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a benchmark of hindsight works with. session: of the policy; None where only scripts are played and servers
    asked, which takes no weights. endpoint: the analyser behind a server, where it is asked.
    """

    config: Config
    chat: ChatFormat
    env_class: type[Environment]
    session: Session | None = None
    endpoint: Endpoint | None = None

    @property
    def policy(self) -> Session:
        """The policy's session. Raises UserError where there is none."""
        if self.session is None:
            raise UserError("this needs a policy: name it among --analysers")
        return self.session

    def make_env(self) -> Environment:
        """A new environment with the config's options."""
        return self.env_class(**self.config.env.options)

    def tasks(self, split: str) -> Sequence[Mapping]:
        """The tasks of a split."""
        env = self.config.env
        return checked_tasks(self.env_class, split, env.data_dir, env.options, env.name)

    @property
    def benchmark(self) -> str:
        """As `Session.benchmark`."""
        return checked_version(self.env_class, self.config.env.name)


def parser(text: str, analysers: str) -> argparse.ArgumentParser:
    """The arguments that every benchmark of hindsight takes. `analysers`: what there is to say of `--analysers`."""
    arguments = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--config", default="desk", help="the name of a shipped config, or a file")
    arguments.add_argument("--policy", help="a Hugging Face directory in place of the config's")
    arguments.add_argument("--analysers", default="policy,environment,random", help=analysers)
    arguments.add_argument("--limit", type=int, default=0, help="tasks; 0 for all")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="without its ending")
    arguments.add_argument("overrides", nargs="*", help="further values, key=value")
    return arguments


def load_config(named: str, policy: str | None, overrides: Sequence[str], analysers: Sequence[str] = ()) -> Config:
    """The config of a name or a file with another policy and other values, "key=value" each.

    Raises:
      UserError: an unknown key or an impossible value.
    """
    config, values = files.load(named), {}
    for key, _, text in (override.partition("=") for override in overrides):
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text  # a plain word
    if policy:
        values["policy.path"] = policy
    if "endpoint" in analysers:
        values["hindsight.analyser"] = "endpoint"
    try:
        config.update_from_flattened_dict(values)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"further values {' '.join(overrides)}: {error}") from error
    typed = build.build(config)
    if typed.chat.history != "keep":
        raise UserError("these benchmarks need chat.history = keep: a recorded stream of tokens must stand")
    return typed


def open_setup(config: Config, analysers: Sequence[str]) -> Setup:
    """The parts of a run that these analysers need; without "policy" no weights.

    Raises:
      UserError: an analyser that is not known, or see `Session.open`.
    """
    if unknown := set(analysers) - ANALYSERS.keys():
        raise UserError(f"no analyser {', '.join(sorted(unknown))}: choose some of {', '.join(ANALYSERS)}")
    if "policy" in analysers:
        session = Session.open(config)
        return Setup(config, session.chat, session.env_class, session, session.endpoint)
    path, thinking = config.policy.path, config.chat.enable_thinking
    stops, env_class = generation_stops(path), resolve(config.env.name)
    style = call_style(env_class, config.env.name, "auto")
    tokenizer = load_tokenizer(path)
    chat = ChatFormat(tokenizer, history="keep", stop_ids=stops, call_style=style, enable_thinking=thinking)
    endpoint = None
    if "endpoint" in analysers:
        endpoint = Endpoint(config.endpoint, build.answer_sampling(config))
    return Setup(config, chat, env_class, endpoint=endpoint)


def asker(setup: Setup, name: str) -> Asker:
    """Raises UserError where there is no analyser of that name that answers questions."""
    if name == "policy":
        session, config = setup.policy, setup.config
        params, sampling = session.weights(session.trained), build.answer_sampling(config)
        return policy_asker(session.engine, params, setup.chat, sampling, config.hindsight.context)
    if name == "endpoint" and setup.endpoint:
        return partial(setup.endpoint.ask, journal=None)
    raise UserError(f"no analyser {name!r} that answers questions: choose one of {', '.join(MODELS)}")


def analyse(setup: Setup, name: str, failed: Keyed, select: str = "hindsight", limit: int | None = None) -> Hindsight:
    """Targets of failed episodes by the analyser of that name; with another `select` its feedback on selected steps.
    limit: most targets of an episode, the config's by default.
    """
    config = setup.config.hindsight
    keys, episodes = {id(episode): key for episode, key in failed}, [episode for episode, _ in failed]
    key_of, limit = lambda episode: keys[id(episode)], config.max_targets if limit is None else limit
    if name == "environment":
        return EnvironmentAnalyser(key_of, select, limit).review(episodes)
    if name == "random":
        drawn = [(episode, random_steps(episode, key, 1)) for episode, key in failed]
        targets = [(episode, tuple(Target(step, NO_FEEDBACK) for step in steps)) for episode, steps in drawn]
        return Hindsight([Analysis(episode, of_episode) for episode, of_episode in targets])
    words, benchmark = prompts.find(config.prompts), prompts.Benchmark.of(setup.env_class, setup.config.env.name)
    ask = asker(setup, name)
    return ModelAnalyser(ask, words, benchmark, key_of, select, limit, config.max_trajectory_chars).review(episodes)


def feedback_on_steps(
    setup: Setup, name: str, given: Sequence[tuple[Episode, np.ndarray, int]]
) -> tuple[list[Target | None], Counter[str]]:
    """The analyser's feedback on a given step, one an episode; None where there is none, counted by reason."""
    if name == "environment":
        known = [{fault.step: fault.feedback for fault in (report_of(episode).faults or ())} for episode, *_ in given]
        steps = [step for *_, step in given]
        targets = [Target(step, said[step]) if step in said else None for said, step in zip(known, steps, strict=True)]
        return targets, +Counter(not_a_fault_to_it=targets.count(None))
    # The selector reads the step off a report; whatever the environment says of the episode is left out.
    asked = [
        (dataclasses.replace(episode, report=Report("given", (Fault(step, NO_FEEDBACK),))), key)
        for episode, key, step in given
    ]
    hindsight = analyse(setup, name, asked, select="oracle")
    by_episode = {id(analysis.episode): analysis.targets for analysis in hindsight.analyses}
    return [next(iter(by_episode.get(id(episode), ())), None) for episode, _ in asked], hindsight.dropped


def report_of(episode: Episode) -> Report:
    """What the environment reports; a report without faults where it says nothing."""
    return episode.report or Report("")


def header(title: str, setup: Setup) -> str:
    """What stands above the tables: date, command, policy, benchmark."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    benchmark = f", {setup.benchmark}" if setup.benchmark else ""
    return (
        f"# {title}\n\n{time.strftime('%Y-%m-%d')}. `{command}`. Environment {setup.config.env.name}{benchmark},"
        f" policy {setup.config.policy.path}."
    )


def write(out: Path, text: str, results: dict) -> None:
    """`out`.md and `out`.json, the versions in both."""
    here = versions()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(f"{text}\n\nVersions: {json.dumps(here)}\n")
    out.with_suffix(".json").write_text(json.dumps({"versions": here, "command": sys.argv[1:], **results}) + "\n")


def guarded(main: Callable[[], None]) -> None:
    """Runs it; what the user can mend ends in one line and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
