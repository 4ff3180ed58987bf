"""How good is hindsight? Faults of a known kind at a known step are put into successful episodes, an analyser is asked
which step broke them, and a teacher is given its words.

  python -m benchmarks.attribution                               Desk, the embedded policy
  python -m benchmarks.attribution --config=configs/bfcl_qwen3_4b_clean.py --policy=DIR          BFCL, a policy of your
  own python -m benchmarks.attribution --config=configs/bfcl_qwen3_4b_clean.py --policy=assets/desk-policy
                                                                 --analysers=environment,random BFCL without a policy:
                                                                 only the tokenizer is used
  ... --analysers=endpoint endpoint.url=http://127.0.0.1:8000/v1 endpoint.model=NAME          any model behind a server

inject: scripts play the reference with one fault, and on as if nothing had happened; what still succeeds is counted and
left out.
where:  precision = named steps that are the injected one / named steps; recall = episodes whose injected step is named
        / all that were asked, unreadable answers included; distance = steps from the nearest named one to the injected
        one.
words:  see `benchmarks.attribution_words`. Feedback is the analyser's own where it named the step ("named"), else what
        it says when it is told the step ("told").
own:    the same policy's own failed rollouts; here the environment's report is the truth.

Writes benchmarks/results/attribution_<environment>.md and .json, and the tables between the markers of
docs/attribution.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.attribution_words import THIRDS, Case, bold, read, summary, tokens_table, words_table
from benchmarks.looking_back import (
    ANALYSERS,
    SPEAKERS,
    advise,
    cell,
    fill,
    guarded,
    header,
    load_config,
    look_back,
    open_session,
    parser,
    percent,
    ratio,
    write,
)
from hintsd_jax.envs.tool_calls import parse_action
from hintsd_jax.errors import UserError
from hintsd_jax.evaluate import EVAL_STEP
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import job_key
from hintsd_jax.rollout.collector import RolloutConfig, run_episodes
from hintsd_jax.rollout.episode import Episode
from hintsd_jax.rollout.scripted import ScriptedEngine
from hintsd_jax.sampling import Sampling
from hintsd_jax.session import Session

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/attribution.md"
UNBOUNDED = 1 << 30
ROLLOUT = RolloutConfig(UNBOUNDED, UNBOUNDED, Sampling(1.0, 1.0, 0, UNBOUNDED))
BATCH = 16  # tasks; each of their scripts has an environment in a thread of its own


@dataclasses.dataclass(frozen=True)
class Scripts:
    """An environment's scripts: kinds of fault with what they are; task -> right actions; (task, kind, seed) -> faulty
    script or None; (task, episode, step) -> what the policy's own faults are sorted by; kinds that are also told
    together, by a name."""

    faults: Mapping[str, str]
    right: Callable[[Mapping], Sequence[str]]
    faulty: Callable
    sort: Callable[[Mapping, Episode, int], str]
    groups: Mapping[str, Sequence[str]]


def scripts_of(environment: str, style: str) -> Scripts:
    """Raises UserError for an environment that has no scripts."""
    if environment == "desk":
        from hintsd_jax.envs.desk import script
        from hintsd_jax.envs.desk.generator import DECISIONS

        def request(task: Mapping, episode: Episode, step: int) -> str:
            """The kind of request that was open; one is closed by an action without a call."""
            actions = [parse_action(earlier.text, style) for earlier in episode.steps[: step - 1]]
            return task["requests"][sum(not (action.calls or action.problem) for action in actions)]["kind"]

        # what the embedded policy saw in its warm-up, with hints in the demonstrator's words, and what it never saw
        known = [kind for kind in script.FAULTS if kind.removeprefix("wrong_") in DECISIONS or kind == "forgotten_call"]
        groups = {
            "the demonstrator's kinds": known,
            "other kinds": [kind for kind in script.FAULTS if kind not in known],
        }
        return Scripts(
            script.FAULTS, lambda task: script.ground_truth(task).actions, script.with_fault, request, groups
        )
    if environment == "bfcl":
        from hintsd_jax.envs.bfcl import script

        right = lambda task: script.ground_truth(task, one_call_a_step=True, style=style).actions
        faulty = lambda task, kind, seed: script.with_fault(task, kind, seed, style=style)
        return Scripts(script.FAULTS, right, faulty, lambda task, episode, step: task["category"], {})
    raise UserError(f"no scripts of faults for environment {environment!r}: desk and bfcl have them")


def inject(
    session: Session, tasks: Sequence[Mapping], scripts: Scripts, seed: int
) -> tuple[list[Case], dict[str, Counter]]:
    """Cases that fail, and by kind what was `made` and what `failed`. Raises RuntimeError where an episode could not be
    played.
    """
    cases, counts = [], {kind: Counter(made=0, failed=0) for kind in scripts.faults}
    options, chat = session.config.env.options.to_dict(), session.chat
    for first in range(0, len(tasks), BATCH):
        batch = tasks[first : first + BATCH]
        right = {task["id"]: tuple(scripts.right(task)) for task in batch}
        faulty = {task["id"]: [scripts.faulty(task, kind, seed) for kind in scripts.faults] for task in batch}
        texts = {
            name: [right[name], *(made.actions if made else right[name] for made in faulty[name])] for name in right
        }
        engine = ScriptedEngine(chat, lambda job: texts[job.episode.task_id][job.episode.rollout])
        make_env = lambda: session.env_class(**options)
        played, dropped, _ = run_episodes(
            engine,
            None,
            chat,
            make_env,
            batch,
            1 + len(scripts.faults),
            ROLLOUT,
            seed=seed,
            step=0,
            call_timeout_s=60.0,
        )
        broken = [
            f"{episode.task_id}: {episode.detail}"
            for episode in played
            if episode.ended.startswith("env_") or episode.detail
        ]
        if dropped or broken:
            raise RuntimeError(f"episodes that could not be played: {dict(dropped)} {broken[:3]}")
        solved = {episode.task_id: episode.success for episode in played if episode.rollout == 0}
        for episode in played:
            made = faulty[episode.task_id][episode.rollout - 1] if episode.rollout else None
            if made and solved[episode.task_id]:  # some tasks of BFCL cannot be solved one call a step
                counts[made.fault]["made"] += 1
                if not episode.success:
                    counts[made.fault]["failed"] += 1
                    cases.append(Case.of(episode, made.fault, made.step, right[episode.task_id], chat.style))
    return cases, counts


def where(cases: Sequence[Case], named: Sequence[Sequence[Target]]) -> dict:
    """How the named steps meet the injected ones, with intervals over episodes."""
    hits = [any(target.step == case.step for target in targets) for case, targets in zip(cases, named, strict=True)]
    apart = [
        min((abs(target.step - case.step) for target in targets), default=None)
        for case, targets in zip(cases, named, strict=True)
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


def by_kind(cases: Sequence[Case], scripts: Scripts, count: Callable[[list[int]], dict]) -> dict[str, dict]:
    """`count(indices)` for each kind that has cases, for kinds that are told together, and for all of them."""
    groups = {kind: (kind,) for kind in scripts.faults} | dict(scripts.groups) | {"all": tuple(scripts.faults)}
    members = {name: [n for n, case in enumerate(cases) if case.fault in kinds] for name, kinds in groups.items()}
    return {name: count(found) for name, found in members.items() if found}


def measure(session: Session, name: str, cases: Sequence[Case], scripts: Scripts, seed: int) -> dict:
    """All that is reported about one analyser."""
    keyed = [(case.episode, job_key(seed, 0, f"{name} {case.fault} {case.episode.task_id}", 0)) for case in cases]
    looked = look_back(session, name, keyed)
    targets = {id(analysis.episode): analysis.targets for analysis in looked.analyses}
    named = [targets.get(id(case.episode), ()) for case in cases]
    counted = lambda members: where([cases[n] for n in members], [named[n] for n in members])
    found = {
        "dropped": dict(looked.dropped),
        "where": by_kind(cases, scripts, counted),
        "thirds": {third: counted([n for n, case in enumerate(cases) if case.third == third]) for third in THIRDS},
    }
    if session.policy is None or name == "random":
        return found
    own = [
        next((target for target in targets if target.step == case.step), None)
        for case, targets in zip(cases, named, strict=True)
    ]
    asked = [n for n, target in enumerate(own) if target is None]
    told, found["dropped when told the step"] = advise(session, name, [(*keyed[n], cases[n].step) for n in asked])
    spoken = {
        "named": [(n, target) for n, target in enumerate(own) if target],
        "told": [(n, t) for n, t in zip(asked, told) if t],
    }
    found["words"] = {group: {} for group in spoken}
    for group, pairs in spoken.items():
        if pairs:
            members = [cases[n] for n, _ in pairs]
            readings = read(session, members, [target.feedback for _, target in pairs], seed)
            fitting = [(case, reading) for case, reading in zip(members, readings, strict=True) if reading is not None]
            if len(fitting) < len(pairs):
                found["dropped"][f"{group}_too_long_for_the_teacher"] = len(pairs) - len(fitting)
            found["words"][group] = by_kind(
                [case for case, _ in fitting], scripts, lambda chosen: summary([fitting[n][1] for n in chosen])
            )
    return found


def own_failures(session: Session, name: str, tasks: Sequence[Mapping], scripts: Scripts, seed: int) -> dict:
    """The policy's own failed rollouts. By what its faults are sorted by: `recall` of the report's faults, `precision`
    of the named steps, and `same_words`: of the named steps that are faults, those whose feedback is the report's to
    the letter."""
    episodes, _, _ = session.play(
        session.weights(session.trained), tasks, session.config.tasks.rollouts, step=EVAL_STEP
    )
    task_of = {task["id"]: task for task in tasks}
    failed = [episode for episode in episodes if not episode.success and episode.report and episode.report.faults]
    keyed = [(episode, job_key(seed, 1, f"{name} {episode.task_id}", episode.rollout)) for episode in failed]
    counts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for analysis in look_back(session, name, keyed).analyses:
        episode = analysis.episode
        truth, named = (
            {fault.step: fault.feedback for fault in episode.report.faults},
            {t.step: t.feedback for t in analysis.targets},
        )
        for step in sorted(truth.keys() | named.keys()):
            for kind in (scripts.sort(task_of[episode.task_id], episode, step), "all"):
                if step in truth:
                    counts[kind]["recall"].append(step in named)
                if step in named:
                    counts[kind]["precision"].append(step in truth)
                if step in truth and step in named:
                    counts[kind]["same_words"].append(named[step] == truth[step])
    rates = ("recall", "precision", "same_words")
    rows = {
        kind: {rate: ratio(counts[kind][rate]) for rate in rates}
        for kind in sorted(counts, key=lambda kind: (kind == "all", kind))
    }
    return {"episodes": len(episodes), "failed": len(failed), "by": rows}


def injected_table(counts: Mapping[str, Mapping], scripts: Scripts) -> str:
    lines = ["| fault | what | injected | outcome fails |", "|---|---|--:|--:|"]
    for kind, count in counts.items():
        share = f" ({count['failed'] / count['made']:.1%})" if count["made"] else ""
        lines.append(f"| {kind} | {scripts.faults[kind]} | {count['made']} | {count['failed']}{share} |")
    made, failed = (sum(count[name] for count in counts.values()) for name in ("made", "failed"))
    return "\n".join([*lines, f"| **all** | | **{made}** | **{failed}** |"])


def where_table(name: str, found: Mapping, scripts: Scripts) -> str:
    lines = [f"**{name}** ({ANALYSERS[name]})", ""]
    lines += [
        "| fault | episodes | named a step | steps named | precision, % | recall, % | within 1 step, % | distance, steps |"
    ]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]
    for kind, row in (
        *found["where"].items(),
        *((f"all, {third} in the episode", row) for third, row in found["thirds"].items()),
    ):
        targets = "-" if row["targets"] is None else f"{row['targets']['value']:.2f}"
        rates = [percent(row["precision"]), percent(row["recall"]), percent(row["within_1"]), cell(row["distance"])]
        lines.append(
            f"| {bold(kind, scripts.faults)} | {row['episodes']} | {row['answered']} | {targets} | {' | '.join(rates)} |"
        )
    for when in ("dropped", "dropped when told the step"):
        if found.get(when):
            lines += [
                "",
                f"{when.capitalize()}: {', '.join(f'{count} {reason}' for reason, count in sorted(found[when].items()))}.",
            ]
    return "\n".join(lines)


def own_table(name: str, found: Mapping) -> str:
    by = found["by"]
    lines = [
        f"**{name}**: {found['failed']} failed of {found['episodes']} rollouts; the environment's report is the truth, intervals over steps",
        "",
    ]
    lines += [
        "| what | faults | recall, % | steps named | precision, % | the report's own words, % of the right ones |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, row in by.items():
        faults, steps = (0 if row[rate] is None else round(row[rate]["n"]) for rate in ("recall", "precision"))
        shares = [percent(row[rate]) for rate in ("recall", "precision", "same_words")]
        lines.append(
            f"| {bold(kind, by.keys() - {'all'})} | {faults} | {shares[0]} | {steps} | {shares[1]} | {shares[2]} |"
        )
    return "\n".join(lines)


def tables(results: Mapping, scripts: Scripts) -> str:
    found = results["analysers"]
    parts = [
        "## Injected",
        injected_table(results["injected"], scripts),
        "## Where",
        *(where_table(*item, scripts) for item in found.items()),
    ]
    parts += [
        part
        for name, rows in results["own"].items()
        for part in ("## Where, in the policy's own failures", own_table(name, rows))
    ]
    given = [
        (name, group, rows) for name, result in found.items() for group, rows in result.get("words", {}).items() if rows
    ]
    spoken = [words_table(*each, scripts.faults) for each in given]
    words = (
        [*spoken, tokens_table(found, scripts.faults)]
        if spoken
        else ["Not scored: no policy that can read these prompts was given."]
    )
    return "\n\n".join([*parts, "## Words", *words])


def main() -> None:
    arguments_of = parser(__doc__, f"some of {', '.join(ANALYSERS)}")
    arguments_of.add_argument("--splits", default="", help="by default test on Desk, and all three on BFCL")
    arguments_of.add_argument(
        "--own", type=int, default=200, help="tasks that the policy itself plays, where it is an analyser; 0: none"
    )
    arguments = arguments_of.parse_args()
    config = load_config(arguments.config, arguments.policy, arguments.overrides)
    names = arguments.analysers.split(",")
    session = open_session(config, names)
    config = session.config
    scripts = scripts_of(config.env.name, session.chat.style)
    splits = arguments.splits or ("test" if config.env.name == "desk" else "train,eval,test")
    tasks = [task for split in splits.split(",") for task in session.tasks(split)]
    tasks = tasks[:: max(1, len(tasks) // arguments.limit)][: arguments.limit] if arguments.limit else tasks
    cases, counts = inject(session, tasks, scripts, arguments.seed)
    print(f"{len(tasks)} tasks, {len(cases)} failed episodes", flush=True)
    results = {
        "tasks": len(tasks),
        "splits": splits,
        "seed": arguments.seed,
        "injected": counts,
        "analysers": {},
        "own": {},
    }
    for name in names:
        results["analysers"][name] = measure(session, name, cases, scripts, arguments.seed)
        print(where_table(name, results["analysers"][name], scripts), flush=True)
        if name in SPEAKERS and session.policy is not None and arguments.own:
            results["own"][name] = own_failures(session, name, tasks[: arguments.own], scripts, arguments.seed)
    head = header(f"Attribution: {config.env.name}", config, session)
    text = tables(results, scripts)
    said = f" {len(tasks)} tasks of {splits}, one place a kind and task, drawn by the seed {arguments.seed}."
    said += " 95 % intervals by bootstrap over episodes."
    write(
        arguments.out or REPO / f"benchmarks/results/attribution_{config.env.name}", f"{head}{said}\n\n{text}", results
    )
    if not arguments.out:
        fill(PAGE, f"attribution_{config.env.name}", text.replace("## ", "#### "))


if __name__ == "__main__":
    guarded(main)
