"""How good is hindsight? Faults of a known kind at a known step are put into successful episodes, an analyser is asked
which step broke them, and a teacher reads its feedback.

  python -m benchmarks.attribution                            Desk, the embedded policy
  python -m benchmarks.attribution --config=bfcl_qwen3_4b_clean --policy=DIR      BFCL, a policy of your own
  python -m benchmarks.attribution --config=bfcl_qwen3_4b_clean --policy=assets/desk-policy \\
      --analysers=environment,random                          BFCL without a policy: only the tokenizer is used
  ... --analysers=endpoint endpoint.url=http://127.0.0.1:8000/v1 endpoint.model=NAME     any model behind a server

injected: scripts play the reference with one fault, and on as if nothing had happened; what still succeeds is counted
          and left out.
location: precision = named steps that are the injected one / named steps; recall = episodes whose injected step is
          named / all that were asked, unreadable answers included; distance = steps from the nearest named one to the
          injected one.
feedback: see `benchmarks.feedback_effect`. It is the analyser's own where it named the step ("named"), else what it
          says when it is asked about the step ("asked").
own:      the same policy's own failed rollouts; here the environment's report is the truth.

Writes benchmarks/results/attribution_<environment>.md and .json; what they say stands in docs/attribution.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from benchmarks import feedback_effect, hindsight_setup
from benchmarks.feedback_effect import bold
from benchmarks.hindsight_setup import ANALYSERS, MODELS, Setup, analyse, feedback_on_steps
from benchmarks.injected_faults import THIRDS, Case, Scripts, inject, scripts_of
from benchmarks.pages import RESULTS, markdown_table
from benchmarks.rates import cell, percent, ratio
from hintsd_jax.evaluate import EVAL_STEP
from hintsd_jax.hindsight.targets import Target
from hintsd_jax.random_keys import job_key

SPLITS = {"desk": "test", "appworld": "train"}  # of AppWorld nothing else may be looked at task by task


def location(cases: Sequence[Case], named: Sequence[Sequence[Target]]) -> dict:
    """How the named steps meet the injected ones, with intervals over episodes."""
    pairs = list(zip(cases, named, strict=True))
    hits = [any(target.step == case.step for target in targets) for case, targets in pairs]
    distances = [min((abs(target.step - case.step) for target in targets), default=None) for case, targets in pairs]
    return {
        "episodes": len(cases),
        "answered": sum(distance is not None for distance in distances),
        "targets": ratio([len(targets) for targets in named], span=None),
        "precision": ratio(hits, [len(targets) for targets in named]),
        "recall": ratio(hits),
        "within_1": ratio([distance is not None and distance <= 1 for distance in distances]),
        "distance": ratio([distance for distance in distances if distance is not None], span=None),
        "steps": ratio([len(case.episode.steps) for case in cases], span=None),
    }


def by_kind(cases: Sequence[Case], scripts: Scripts, count: Callable[[list[int]], dict]) -> dict[str, dict]:
    """`count(indices)` for each kind that has cases, for kinds that are reported together, and for all of them."""
    groups = {kind: (kind,) for kind in scripts.faults} | dict(scripts.groups) | {"all": tuple(scripts.faults)}
    members = {name: [n for n, case in enumerate(cases) if case.fault in kinds] for name, kinds in groups.items()}
    return {name: count(indices) for name, indices in members.items() if indices}


def measure(setup: Setup, name: str, cases: Sequence[Case], scripts: Scripts, seed: int) -> dict:
    """All that is reported about one analyser."""
    keyed = [(case.episode, job_key(seed, 0, f"{name} {case.fault} {case.episode.task_id}", 0)) for case in cases]
    hindsight = analyse(setup, name, keyed)
    targets = {id(analysis.episode): analysis.targets for analysis in hindsight.analyses}
    named = [targets.get(id(case.episode), ()) for case in cases]
    counted = lambda members: location([cases[n] for n in members], [named[n] for n in members])
    result = {
        "dropped": dict(hindsight.dropped),
        "location": by_kind(cases, scripts, counted),
        "thirds": {third: counted([n for n, case in enumerate(cases) if case.third == third]) for third in THIRDS},
    }
    if setup.session is None or name == "random":
        return result
    own = [
        next((target for target in targets if target.step == case.step), None)
        for case, targets in zip(cases, named, strict=True)
    ]
    missing = [n for n, target in enumerate(own) if target is None]
    asked, result["dropped when asked about the step"] = feedback_on_steps(
        setup, name, [(*keyed[n], cases[n].step) for n in missing]
    )
    groups = {
        "named": [(n, target) for n, target in enumerate(own) if target],
        "asked": [(n, target) for n, target in zip(missing, asked, strict=True) if target],
    }
    result["feedback"] = {group: {} for group in groups}
    for group, pairs in groups.items():
        if pairs:
            members, feedback = [cases[n] for n, _ in pairs], [target.feedback for _, target in pairs]
            readings = feedback_effect.read(setup, members, feedback, seed)
            read = [(case, reading) for case, reading in zip(members, readings, strict=True) if reading is not None]
            if len(read) < len(pairs):
                result["dropped"][f"{group}_too_long_for_the_teacher"] = len(pairs) - len(read)
            count = lambda indices, read=read: feedback_effect.summary([read[n][1] for n in indices])
            result["feedback"][group] = by_kind([case for case, _ in read], scripts, count)
    return result


def own_failures(setup: Setup, name: str, tasks: Sequence[Mapping], scripts: Scripts, seed: int) -> dict:
    """The policy's own failed rollouts. By what its faults are sorted by: `recall` of the report's faults, `precision`
    of the named steps, `same_words`: of the named steps that are faults, those whose feedback is the report's to
    the letter, and `asked`: of all faults, those where it is so when the analyser is asked about the step, as arms that
    choose their steps otherwise do.
    """
    session = setup.policy
    params, rollouts = session.weights(session.trained), setup.config.tasks.rollouts
    episodes = session.play(params, tasks, rollouts, step=EVAL_STEP).episodes
    task_of = {task["id"]: task for task in tasks}
    failed = [episode for episode in episodes if not episode.success and episode.report and episode.report.faults]
    keyed = [(episode, job_key(seed, 1, f"{name} {episode.task_id}", episode.rollout)) for episode in failed]
    counts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    given = [(*each, fault) for each in keyed for fault in hindsight_setup.report_of(each[0]).faults or ()]
    asked, _ = feedback_on_steps(setup, name, [(episode, key, fault.step) for episode, key, fault in given])
    for (episode, _, fault), target in zip(given, asked, strict=True):
        for kind in (scripts.sort(task_of[episode.task_id], episode, fault.step), "all"):
            counts[kind]["asked"].append(target is not None and target.feedback == fault.feedback)
    for analysis in analyse(setup, name, keyed).analyses:
        episode = analysis.episode
        truth = {fault.step: fault.feedback for fault in hindsight_setup.report_of(episode).faults or ()}
        named = {target.step: target.feedback for target in analysis.targets}
        for step in sorted(truth.keys() | named.keys()):
            for kind in (scripts.sort(task_of[episode.task_id], episode, step), "all"):
                if step in truth:
                    counts[kind]["recall"].append(step in named)
                if step in named:
                    counts[kind]["precision"].append(step in truth)
                if step in truth and step in named:
                    counts[kind]["same_words"].append(named[step] == truth[step])
    rates = ("recall", "precision", "same_words", "asked")
    rows = {
        kind: {rate: ratio(counts[kind][rate]) for rate in rates}
        for kind in sorted(counts, key=lambda kind: (kind == "all", kind))
    }
    return {"episodes": len(episodes), "failed": len(failed), "by": rows}


def injected_table(counts: Mapping[str, Mapping], scripts: Scripts) -> str:
    lines = []
    for kind, count in counts.items():
        share = f" ({count['failed'] / count['injected']:.1%})" if count["injected"] else ""
        lines.append([kind, scripts.faults[kind], count["injected"], f"{count['failed']}{share}"])
    totals = [f"**{sum(count[name] for count in counts.values())}**" for name in ("injected", "failed")]
    return markdown_table(["fault", "what", "injected", "outcome fails"], [*lines, ["**all**", "", *totals]], (0, 1))


def location_table(name: str, result: Mapping, scripts: Scripts) -> str:
    head = ["fault", "episodes", "named a step", "steps named", "precision, %", "recall, %", "within 1 step, %"]
    thirds = {f"all, {third} in the episode": row for third, row in result["thirds"].items()}
    lines = []
    for kind, row in (*result["location"].items(), *thirds.items()):
        targets = "-" if row["targets"] is None else f"{row['targets']['value']:.2f}"
        rates = [percent(row["precision"]), percent(row["recall"]), percent(row["within_1"]), cell(row["distance"])]
        lines.append([bold(kind, scripts.faults), row["episodes"], row["answered"], targets, *rates])
    parts = [f"**{name}** ({ANALYSERS[name]})", markdown_table([*head, "distance, steps"], lines)]
    for when in ("dropped", "dropped when asked about the step"):
        if result.get(when):
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(result[when].items()))
            parts.append(f"{when.capitalize()}: {counts}.")
    return "\n\n".join(parts)


def own_table(name: str, result: Mapping) -> str:
    rows, lines = result["by"], []
    for kind, row in rows.items():
        faults, steps = (0 if row[rate] is None else round(row[rate]["n"]) for rate in ("recall", "precision"))
        rates = [percent(row[rate]) for rate in ("precision", "same_words", "asked")]
        lines.append([bold(kind, rows.keys() - {"all"}), faults, percent(row["recall"]), steps, *rates])
    head = ["what", "faults", "recall, %", "steps named", "precision, %"]
    head += ["the report's own words, % of the right ones", "the same when asked about a fault, %"]
    caption = (
        f"**{name}**: {result['failed']} failed of {result['episodes']} rollouts; the environment's report is the"
        " truth, intervals over steps"
    )
    return f"{caption}\n\n{markdown_table(head, lines)}"


def tables(results: Mapping, scripts: Scripts) -> str:
    analysers = results["analysers"]
    parts = ["## Injected", injected_table(results["injected"], scripts), "## Location"]
    parts += [location_table(name, result, scripts) for name, result in analysers.items()]
    for name, result in results["own"].items():
        parts += ["## Location, in the policy's own failures", own_table(name, result)]
    measured = [
        (name, group, rows)
        for name, result in analysers.items()
        for group, rows in result.get("feedback", {}).items()
        if rows
    ]
    effects = [feedback_effect.effect_table(*each, scripts.faults) for each in measured]
    if effects:
        effects.append(feedback_effect.tokens_table(analysers, scripts.faults))
    else:
        effects.append("Not scored: no policy that can read these prompts was given.")
    return "\n\n".join([*parts, "## Feedback", *effects])


def main() -> None:
    parser = hindsight_setup.parser(__doc__ or "", f"some of {', '.join(ANALYSERS)}")
    parser.add_argument("--splits", default="", help="by default test on Desk, train on AppWorld, all on BFCL")
    parser.add_argument(
        "--own", type=int, default=200, help="tasks that the policy itself plays, where it is an analyser; 0: none"
    )
    arguments = parser.parse_args()
    names, seed = arguments.analysers.split(","), arguments.seed
    config = hindsight_setup.load_config(arguments.config, arguments.policy, arguments.overrides, names)
    setup = hindsight_setup.open_setup(config, names)
    scripts = scripts_of(config.env.name, setup.chat.style, config.env.options)
    splits = arguments.splits or SPLITS.get(config.env.name, "train,eval,test")
    tasks = [task for split in splits.split(",") for task in setup.tasks(split)]
    tasks = tasks[:: max(1, len(tasks) // arguments.limit)][: arguments.limit] if arguments.limit else tasks
    cases, counts = inject(setup.chat, setup.make_env, tasks, scripts, seed)
    print(f"{len(tasks)} tasks, {len(cases)} failed episodes", flush=True)
    results = {"tasks": len(tasks), "splits": splits, "seed": seed, "injected": counts, "analysers": {}, "own": {}}
    for name in names:
        results["analysers"][name] = measure(setup, name, cases, scripts, seed)
        print(location_table(name, results["analysers"][name], scripts), flush=True)
        if name in MODELS and setup.session is not None and arguments.own:
            results["own"][name] = own_failures(setup, name, tasks[: arguments.own], scripts, seed)
    text = tables(results, scripts)
    head = hindsight_setup.header(f"Attribution: {config.env.name}", setup)
    head += f" {len(tasks)} tasks of {splits}, one place a kind and task, drawn by the seed {seed}."
    head += " 95 % intervals by bootstrap over episodes."
    hindsight_setup.write(arguments.out or RESULTS / f"attribution_{config.env.name}", f"{head}\n\n{text}", results)


if __name__ == "__main__":
    hindsight_setup.guarded(main)
