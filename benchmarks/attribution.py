"""How good is hindsight? Faults of a known kind at a known step are put into successful episodes, an analyser is asked which step broke
them, and a teacher is given its words.

  python -m benchmarks.attribution                                            Desk, the embedded policy, about 10 minutes
  python -m benchmarks.attribution --config=configs/bfcl_qwen3_4b_clean.py --policy=DIR          BFCL, a policy of your own
  python -m benchmarks.attribution --config=configs/bfcl_qwen3_4b_clean.py --policy=assets/desk-policy --analysers=environment,random
                                                                              BFCL without a policy: only its tokenizer is used

inject: scripts play the reference with one fault, and on as if nothing had happened; what still succeeds is counted and left out.
where:  precision = named steps that are the injected one / named steps; recall = episodes whose injected step is named / all that were
        asked, unreadable answers included; distance = steps from the nearest named one to the injected one.
words:  the right action and the one that was taken, scored by the policy as a teacher: without feedback, with it at the step, with it
        at the start, and with another episode's feedback at the step (a word at that place, but not the right one). Feedback is the
        analyser's own where it named the step ("named"), else what it says when it is told the step ("told").

Writes benchmarks/results/attribution_<environment>.md and .json, and the tables between the markers of docs/attribution.md.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.looking_back import ANALYSERS, advise, cell, fill, header, load_config, look_back, open_session, percent, ratio, write
from hintsd_jax.episodes.chat import ChatFormat
from hintsd_jax.episodes.episode import Episode
from hintsd_jax.episodes.rollout import RolloutConfig, job_key, run_episodes
from hintsd_jax.episodes.scripted import ScriptedEngine
from hintsd_jax.errors import UserError
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.sampling import Sampling
from hintsd_jax.sampling.scoring import span_logprobs
from hintsd_jax.session import Session

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/attribution.md"
UNBOUNDED = 1 << 30
ROLLOUT = RolloutConfig(UNBOUNDED, UNBOUNDED, Sampling(1.0, 1.0, 0, UNBOUNDED))
BATCH = 16  # tasks; each of their scripts has an environment in a thread of its own
CONTEXTS = ("none", "start", "other", "step")
GROUPS = {"named": "its own words, where it named the step", "told": "its words when told the step, where it had not named it"}


@dataclasses.dataclass(frozen=True)
class Scripts:
    """An environment's scripts: kinds of fault with what they are, task -> right actions, (task, kind, seed) -> faulty script or None."""

    faults: Mapping[str, str]
    right: Callable[[Mapping], Sequence[str]]
    faulty: Callable


def scripts_of(environment: str, style: str) -> Scripts:
    """Raises UserError for an environment that has no scripts."""
    if environment == "desk":
        from hintsd_jax.envs.desk import script

        return Scripts(script.FAULTS, lambda task: script.ground_truth(task).actions, script.with_fault)
    if environment == "bfcl":
        from hintsd_jax.envs.bfcl import script

        right = lambda task: script.ground_truth(task, one_call_a_step=True, style=style).actions
        return Scripts(script.FAULTS, right, lambda task, kind, seed: script.with_fault(task, kind, seed, style=style))
    raise UserError(f"no scripts of faults for environment {environment!r}: desk and bfcl have them")


@dataclasses.dataclass
class Case:
    """A failed episode with its one fault: the kind, the 1-based step and the action that would have been right there."""

    episode: Episode
    fault: str
    step: int
    right: str

    @property
    def third(self) -> str:
        return ("early", "middle", "late")[min(2, 3 * (self.step - 1) // len(self.episode.steps))]


def inject(session: Session, tasks: Sequence[Mapping], scripts: Scripts, seed: int) -> tuple[list[Case], dict[str, Counter]]:
    """Cases that fail, and by kind what was `made` and what `failed`. Raises RuntimeError where an episode could not be played."""
    cases, counts = [], {kind: Counter() for kind in scripts.faults}
    options, chat = session.config.env.options.to_dict(), session.chat
    for first in range(0, len(tasks), BATCH):
        batch = tasks[first : first + BATCH]
        right = {task["id"]: tuple(scripts.right(task)) for task in batch}
        faulty = {task["id"]: [scripts.faulty(task, kind, seed) for kind in scripts.faults] for task in batch}
        texts = {name: [right[name], *(made.actions if made else right[name] for made in faulty[name])] for name in right}
        engine = ScriptedEngine(chat, lambda job: texts[job.episode.task_id][job.episode.rollout])
        make_env = lambda: session.env_class(**options)
        played, dropped, _ = run_episodes(
            engine, None, chat, make_env, batch, 1 + len(scripts.faults), ROLLOUT, seed=seed, step=0, call_timeout_s=60.0
        )
        broken = [f"{episode.task_id}: {episode.detail}" for episode in played if episode.ended.startswith("env_") or episode.detail]
        if dropped or broken:
            raise RuntimeError(f"episodes that could not be played: {dict(dropped)} {broken[:3]}")
        solved = {episode.task_id: episode.success for episode in played if episode.rollout == 0}
        for episode in played:
            made = faulty[episode.task_id][episode.rollout - 1] if episode.rollout else None
            if made and solved[episode.task_id]:  # some tasks of BFCL cannot be solved one call a step
                counts[made.fault]["made"] += 1
                if not episode.success:
                    counts[made.fault]["failed"] += 1
                    cases.append(Case(episode, made.fault, made.step, right[episode.task_id][made.step - 1]))
    return cases, counts


def where(cases: Sequence[Case], named: Sequence[Sequence[Target]]) -> dict:
    """How the named steps meet the injected ones, with intervals over episodes."""
    hits = [any(target.step == case.step for target in targets) for case, targets in zip(cases, named, strict=True)]
    apart = [
        min((abs(target.step - case.step) for target in targets), default=None) for case, targets in zip(cases, named, strict=True)
    ]
    return {
        "episodes": len(cases),
        "answered": sum(distance is not None for distance in apart),
        "targets": ratio([len(targets) for targets in named]),
        "precision": ratio(hits, [len(targets) for targets in named]),
        "recall": ratio(hits),
        "within_1": ratio([distance is not None and distance <= 1 for distance in apart]),
        "distance": ratio([distance for distance in apart if distance is not None]),
        "steps": ratio([len(case.episode.steps) for case in cases]),
    }


def contexts(chat: ChatFormat, case: Case, words: str, other: str) -> dict[str, list[int]]:
    """What the teacher reads before the action, by name of the context."""
    episode, step = case.episode, case.episode.steps[case.step - 1]
    tokens, first = episode.tokens, case.episode.steps[0]

    def advised(number: int, text: str) -> list[int]:
        trunk = tokens[: episode.steps[number - 1].branch]
        seen, added = chat.advised(episode.dialogue(number), episode.tools_at(number), trunk, text)
        return [*trunk[:seen], *added]

    return {
        "none": tokens[: step.start],
        "start": [*advised(1, words), *tokens[first.start : step.start]],
        "other": advised(case.step, other),
        "step": advised(case.step, words),
    }


def others(cases: Sequence[Case], words: Sequence[str]) -> list[str]:
    """For each case the words about the next case of another task whose words differ; its own where there is none."""
    found = []
    for n, case in enumerate(cases):
        later = ((n + k) % len(cases) for k in range(1, len(cases)))
        found.append(next((words[m] for m in later if cases[m].episode.task_id != case.episode.task_id and words[m] != words[n]), words[n]))
    return found


def score(session: Session, cases: Sequence[Case], words: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """For each case {"right none": the log-probs of the right action's tokens without feedback, "taken none": ..., "right step": ...}."""
    rows = []
    for case, text, other in zip(cases, words, others(cases, words), strict=True):
        step = case.episode.steps[case.step - 1]
        actions = (session.chat.encode(case.right), case.episode.tokens[step.start : step.stop])
        rows += [(context, action) for context in contexts(session.chat, case, text, other).values() for action in actions]
    longest = max((len(context) + len(action) for context, action in rows), default=0)
    if longest > session.policy.max_positions:
        raise UserError(f"a teacher's context of {longest} tokens exceeds the {session.policy.max_positions} positions of the policy")
    found = iter(span_logprobs(session.weights(session.trained), session.policy, rows, session.mesh))
    names = [f"{action} {context}" for context in CONTEXTS for action in ("right", "taken")]
    assert tuple(contexts(session.chat, cases[0], "-", "-")) == CONTEXTS if cases else True
    return [{name: next(found) for name in names} for _ in cases]


def summary(scores: Sequence[Mapping[str, np.ndarray]]) -> dict:
    """Means over episodes with intervals.

    probability: of the whole action; token_probability: its geometric mean over the action's tokens; logprob: nats a token; right_likelier:
    share of episodes in which the right action is likelier than the taken one; gain: of the right action's probability, at the step over
    each other context.
    """
    if not scores:
        return {"episodes": 0}
    whole = {name: np.array([np.exp(score[name].sum()) for score in scores]) for name in scores[0]}
    token = {name: np.array([score[name].mean() for score in scores]) for name in scores[0]}
    return {
        "episodes": len(scores),
        "probability": {name: ratio(values) for name, values in whole.items()},
        "token_probability": {name: ratio(np.exp(values)) for name, values in token.items()},
        "logprob": {name: ratio(values) for name, values in token.items()},
        "right_likelier": {context: ratio(whole[f"right {context}"] > whole[f"taken {context}"]) for context in CONTEXTS},
        "gain": {context: ratio(whole["right step"] - whole[f"right {context}"]) for context in CONTEXTS if context != "step"},
        "raised": ratio(whole["right step"] > whole["right none"]),
    }


def by_kind(cases: Sequence[Case], kinds: Sequence[str], measure: Callable[[list[int]], dict], key=lambda case: case.fault) -> dict[str, dict]:
    """`measure(indices)` for each kind that has cases, and for all of them."""
    members = defaultdict(list)
    for n, case in enumerate(cases):
        members[key(case)].append(n)
    return {kind: measure(members[kind]) for kind in kinds if members[kind]} | {"all": measure(list(range(len(cases))))}


def measure(session: Session, name: str, cases: Sequence[Case], scripts: Scripts, seed: int) -> dict:
    """All that is reported about one analyser."""
    keyed = [(case.episode, job_key(seed, 0, f"{name} {case.fault} {case.episode.task_id}", 0)) for case in cases]
    looked = look_back(session, name, keyed)
    targets = {id(analysis.episode): analysis.targets for analysis in looked.analyses}
    named = [targets.get(id(case.episode), ()) for case in cases]
    counted = lambda members: where([cases[n] for n in members], [named[n] for n in members])
    found = {
        "dropped": dict(looked.dropped),
        "where": by_kind(cases, list(scripts.faults), counted),
        "thirds": by_kind(cases, ("early", "middle", "late"), counted, key=lambda case: case.third),
    }
    if session.policy is None or name == "random":
        return found
    own = [next((target for target in targets if target.step == case.step), None) for case, targets in zip(cases, named, strict=True)]
    asked = [n for n, target in enumerate(own) if target is None]
    told, found["told_dropped"] = advise(session, name, [(*keyed[n], cases[n].step) for n in asked])
    spoken = {"named": [(n, target) for n, target in enumerate(own) if target], "told": [(n, t) for n, t in zip(asked, told) if t]}
    found["words"] = {}
    for group, pairs in spoken.items():
        members = [cases[n] for n, _ in pairs]
        scores = score(session, members, [target.feedback for _, target in pairs])
        found["words"][group] = by_kind(members, list(scripts.faults), lambda chosen: summary([scores[n] for n in chosen]))
    return found


def injected_table(counts: Mapping[str, Mapping], scripts: Scripts) -> str:
    lines = ["| fault | what | injected | outcome fails |", "|---|---|--:|--:|"]
    for kind, count in counts.items():
        share = f" ({count['failed'] / count['made']:.1%})" if count["made"] else ""
        lines.append(f"| {kind} | {scripts.faults[kind]} | {count['made']} | {count['failed']}{share} |")
    made, failed = (sum(count[name] for count in counts.values()) for name in ("made", "failed"))
    return "\n".join([*lines, f"| **all** | | **{made}** | **{failed}** |"])


def where_table(name: str, found: Mapping) -> str:
    lines = [f"**{name}** ({ANALYSERS[name]})", ""]
    lines += ["| fault | episodes | named a step | steps named | precision, % | recall, % | within 1 step, % | distance, steps |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]
    for kind, row in (*found["where"].items(), *((f"fault {third}", row) for third, row in found["thirds"].items() if third != "all")):
        targets = "-" if row["targets"] is None else f"{row['targets']['value']:.2f}"
        rates = [percent(row["precision"]), percent(row["recall"]), percent(row["within_1"]), cell(row["distance"])]
        label = f"**{kind}**" if kind == "all" else kind
        lines.append(f"| {label} | {row['episodes']} | {row['answered']} | {targets} | {' | '.join(rates)} |")
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(found["dropped"].items()))
    return "\n".join(lines) + (f"\n\nDropped, by reason: {dropped}." if dropped else "")


def words_table(name: str, group: str, rows: Mapping[str, Mapping]) -> str:
    lines = [f"**{name}**, {GROUPS[group]}: probability of the whole right action, %", ""]
    lines += ["| fault | episodes | none | at the start | another's, at the step | **at the step** | step minus none | step minus start | step minus another's |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for kind, row in rows.items():
        if row["episodes"]:
            values = [f"{100 * row['probability'][f'right {context}']['value']:.1f}" for context in CONTEXTS]
            gains = [percent(row["gain"][context], sign=True) for context in ("none", "start", "other")]
            label = f"**{kind}**" if kind == "all" else kind
            lines.append(f"| {label} | {row['episodes']} | {' | '.join(values)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def tokens_table(found: Mapping[str, Mapping]) -> str:
    """Over all kinds: nats a token, for the right action and the taken one."""
    lines = ["Over all kinds, log-probability a token in nats, and the share of episodes in which the right action is likelier than the taken one:", ""]
    lines += ["| analyser | words | episodes | action | none | at the start | another's, at the step | at the step |", "|---|---|--:|---|--:|--:|--:|--:|"]
    for name, result in found.items():
        for group, rows in result.get("words", {}).items():
            row = rows["all"]
            if row["episodes"]:
                for action in ("right", "taken"):
                    values = [cell(row["logprob"][f"{action} {context}"]) for context in CONTEXTS]
                    lines.append(f"| {name} | {group} | {row['episodes']} | {action} | {' | '.join(values)} |")
                shares = [percent(row["right_likelier"][context]) for context in CONTEXTS]
                lines.append(f"| {name} | {group} | {row['episodes']} | right likelier, % | {' | '.join(shares)} |")
    return "\n".join(lines)


def tables(results: Mapping, scripts: Scripts) -> str:
    found = results["analysers"]
    parts = ["## Injected", injected_table(results["injected"], scripts), "## Where", *(where_table(*item) for item in found.items())]
    spoken = [words_table(name, group, rows) for name, result in found.items() for group, rows in result.get("words", {}).items() if rows["all"]["episodes"]]
    if spoken:
        return "\n\n".join([*parts, "## Words", *spoken, tokens_table(found)])
    return "\n\n".join([*parts, "## Words\n\nNot scored: no policy that can read these prompts was given."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/desk.py")
    parser.add_argument("--policy", help="a Hugging Face directory in place of the config's")
    parser.add_argument("--analysers", default="policy,environment,random", help=f"some of {', '.join(ANALYSERS)}")
    parser.add_argument("--splits", default="", help="by default test on Desk, and all three on BFCL")
    parser.add_argument("--limit", type=int, default=0, help="tasks; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="without its ending")
    parser.add_argument("overrides", nargs="*", help="further values, key=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.policy, arguments.overrides)
    names = arguments.analysers.split(",")
    if set(names) - set(ANALYSERS):
        raise UserError(f"--analysers={arguments.analysers}: choose some of {', '.join(ANALYSERS)}")
    session = open_session(config, weights="policy" in names)
    scripts = scripts_of(config.env.name, session.chat.style)
    splits = arguments.splits or ("test" if config.env.name == "desk" else "train,eval,test")
    tasks = [task for split in splits.split(",") for task in session.tasks(split)]
    tasks = tasks[:: max(1, len(tasks) // arguments.limit)][: arguments.limit] if arguments.limit else tasks
    cases, counts = inject(session, tasks, scripts, arguments.seed)
    print(f"{len(tasks)} tasks, {len(cases)} failed episodes", flush=True)
    results = {"tasks": len(tasks), "splits": splits, "seed": arguments.seed, "injected": counts, "analysers": {}}
    for name in names:
        results["analysers"][name] = measure(session, name, cases, scripts, arguments.seed)
        print(where_table(name, results["analysers"][name]), flush=True)
    head = header(f"Attribution: {config.env.name}", config, session)
    text = tables(results, scripts)
    said = f" {len(tasks)} tasks of {splits}, one place a kind and task, drawn by the seed {arguments.seed}. 95 % intervals by bootstrap over episodes."
    write(arguments.out or REPO / f"benchmarks/results/attribution_{config.env.name}", f"{head}{said}\n\n{text}", results)
    if not arguments.out:
        fill(PAGE, f"attribution_{config.env.name}", text.replace("## ", "### "))


if __name__ == "__main__":
    main()
