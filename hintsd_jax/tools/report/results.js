// What came out: the headline, the facts of a run, and held-out success before and after.

function heading(runs) {
  const one = runs.length === 1 ? runs[0] : null;
  const state = (run) =>
    run.planned && run.steps < run.planned ? `at training step ${run.steps} of ${run.planned}` : plural(run.steps, "training step");
  const facts = one
    ? runFacts(one)
    : [
        ["runs", String(runs.length)],
        ["environment", [...new Set(runs.map((run) => run.config["env.name"]))].join(", ")],
      ];
  const where = one ? state(one) : runs.some((run) => !run.finished) ? `${runs.filter((run) => !run.finished).length} not finished` : null;
  if (where) facts.unshift([one ? "training" : "state", where]);
  return make(
    "section.head",
    null,
    make("h1", null, headline(runs)),
    make(
      "dl.facts",
      null,
      facts.filter(([, v]) => v).map(([k, v]) => make("div", null, make("dt", null, k), make("dd", null, v))),
    ),
  );
}

// The result in one line: before and after of one run, the range of several (the best of many runs would flatter).
function headline(runs) {
  const done = runs.map((run) => [run, run.results[0]]).filter(([, line]) => line && line.before && line.after);
  if (!done.length) {
    const rates = runs.flatMap((run) => (run.metrics["rollout/success"] || []).filter((v) => v !== null).slice(-1));
    return rates.length ? ["Success of rollouts so far: ", make("em", null, `${percent(Math.max(...rates))} %`)] : "Nothing measured yet";
  }
  const name = done[0][1].name.replace(/^test /, ""),
    after = done.map(([, line]) => line.after.value);
  if (runs.length === 1) return [`${name}: ${percent(done[0][1].before.value)} \u2192 `, make("em", null, `${percent(after[0])} %`)];
  return [
    `${plural(done.length, "run")}, ${name} after training: `,
    make("em", null, [...new Set([Math.min(...after), Math.max(...after)])].map((v) => percent(v)).join(" to ") + " %"),
  ];
}

function runFacts(run) {
  const c = run.config;
  return [
    ["algorithm", c.algorithm],
    ["environment", c["env.name"]],
    ["analyser", c["hindsight.analyser"] && c["hindsight.analyser"] + (run.privileged ? " (privileged: knows the ground truth)" : "")],
    ["targets", c["hindsight.select"] && `${c["hindsight.select"]}, at most ${c["hindsight.max_targets"]}`],
    [
      "policy",
      String(c["policy.path"] ?? "")
        .split("/")
        .filter(Boolean)
        .pop(),
    ],
    ["device", run.versions.device_kind && `${run.versions.device_count ?? 1} \u00d7 ${run.versions.device_kind}`],
    ["seed", c.seed === undefined ? null : String(c.seed)],
  ];
}

function mark(run) {
  return run.privileged ? make("span.warn", { title: "its hindsight knows the ground truth" }, " privileged") : null;
}

function label(run, n) {
  return [swatch(n), run.name, mark(run)];
}

function drawResults(runs) {
  const rows = [];
  const measures = [...new Set(runs.flatMap((run) => run.results.map((line) => line.name)))];
  const evaluated = runs.flatMap((run, n) =>
    run.results.some((line) => line.after)
      ? []
      : (run.evaluation?.results || []).map((line) => [run, n, { ...line, name: `${line.name}, after ${plural(run.evaluation.step, "update")}` }]),
  );
  if (!measures.length && !evaluated.length) return null;
  const body = make("tbody");
  const section = make("section.results", { "aria-labelledby": "h-results" });
  section.append(
    make(
      "div.line",
      null,
      make("h2", { id: "h-results" }, "Held-out success"),
      csvButton("results", () => resultsTable(runs)),
    ),
  );
  measures.forEach((name, place) => {
    const lines = runs
      .map((run, n) => [run, n, run.results.find((line) => line.name === name)])
      .filter(([, , line]) => line && (line.before || line.after));
    if (!lines.length) return;
    if (runs.length > 1) rows.push(make("tr.group", null, make("th", { colspan: 5, scope: "colgroup" }, name)));
    lines.forEach(([run, n, line]) =>
      rows.push(resultRow(runs.length > 1 ? label(run, n) : [name, mark(run)], line, runs.length > 1 ? n : 0, place === 0)),
    );
  });
  for (const [run, n, line] of evaluated)
    rows.push(resultRow(runs.length > 1 ? [...label(run, n), `: ${line.name}`] : [line.name, mark(run)], line, n));
  body.append(...rows);
  const titles = ["0 to 100 %", "before", "after", "change"].map((t, i) => make(i ? "th.num" : "th", { scope: "col" }, t));
  section.append(make("table.result", null, make("thead", null, make("tr", null, make("td"), titles)), body));
  section.append(
    make(
      "p.note",
      null,
      "Success in %; bars and brackets are 95 % intervals over tasks (of this one run: other seeds differ by more), those of the change paired by task. Hollow: before. Filled: after.",
    ),
  );
  return section;
}

function resultRow(name, line, n) {
  const change = line.change
    ? [make("b", null, signed(line.change.value)), make("span.ends", null, ` [${signed(line.change.low)}, ${signed(line.change.high)}]`)]
    : "\u2013";
  return make(
    "tr",
    null,
    make("th", { scope: "row" }, name),
    make("td.span", null, dumbbell(line, n)),
    make("td.num", { "data-label": "before" }, percent(line.before?.value)),
    make("td.num.after", { "data-label": "after" }, percent(line.after?.value)),
    make("td.num", { "data-label": "change" }, change),
  );
}

// Before (hollow) and after (filled) on one scale of 0 to 100 %, with their intervals.
function dumbbell(line, n) {
  const said = ["before", "after"]
    .filter((when) => line[when])
    .map((when) => `${when} ${percent(line[when].value)} %`)
    .join(", ");
  const at = (v) => `${2 + 96 * v}%`;
  const parts = [0, 0.25, 0.5, 0.75, 1].map((v) => draw("line.grid", { x1: at(v), x2: at(v), y1: 2, y2: 26 }));
  if (line.before && line.after) parts.push(draw("line.reach", { x1: at(line.before.value), x2: at(line.after.value), y1: 14, y2: 14 }));
  for (const when of ["before", "after"]) {
    const end = line[when];
    if (!end) continue;
    const y = when === "before" ? 20 : 8;
    parts.push(draw("line.whisker", { x1: at(end.low), x2: at(end.high), y1: y, y2: y, stroke: when === "after" ? colour(n) : "var(--soft)" }));
    parts.push(
      draw(`circle.${when}`, {
        cx: at(end.value),
        cy: 14,
        r: 5,
        stroke: when === "after" ? colour(n) : "var(--soft)",
        fill: when === "after" ? colour(n) : "var(--bg)",
      }),
    );
  }
  return draw("svg.dumbbell", { role: "img", "aria-label": said, height: 28, width: "100%" }, parts);
}
