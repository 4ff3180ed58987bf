// Tables out, as files of comma-separated values.

// Spreadsheets run what begins so as a formula; numbers are none.
const FORMULA = /^[=+\-@\t\r]/;

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number" || typeof value === "boolean") return String(value);
  const text = FORMULA.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// As RFC 4180 has it; the mark at the beginning tells spreadsheets that it is UTF-8.
function csvText(header, rows) {
  return "\ufeff" + [header, ...rows].map((row) => row.map(csvCell).join(",") + "\r\n").join("");
}

// A button that saves what `table()` gives: {header, rows}.
function csvButton(name, table) {
  const save = () => {
    const { header, rows } = table();
    const address = URL.createObjectURL(new Blob([csvText(header, rows)], { type: "text/csv" }));
    const anchor = make("a", { href: address, download: `${name}.csv`, hidden: true });
    document.body.append(anchor);
    anchor.click();
    anchor.remove();
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  };
  return make("button.quiet", { type: "button", title: `save ${name}.csv`, "aria-label": `Save ${name} as CSV`, onclick: save }, "CSV");
}

function metricsTable(runs) {
  const axes = ["step", "wall", "generated"],
    names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => !axes.includes(name)).sort();
  const rows = runs.flatMap((run) =>
    (run.metrics.step || []).map((_, i) => [run.name, ...[...axes, ...names].map((name) => run.metrics[name]?.[i])]),
  );
  return { header: ["run", "step", "training_seconds", "tokens_generated", ...names], rows };
}

function resultsTable(runs) {
  const ends = ["before", "after", "change"],
    cells = (end) => [end?.value, end?.low, end?.high];
  const of = (run, line, updates) => [run.name, run.config.seed, line.name, updates, ...ends.flatMap((when) => cells(line[when]))];
  return {
    header: ["run", "seed", "measure", "updates", ...ends.flatMap((when) => [when, `${when}_low`, `${when}_high`])],
    rows: runs.flatMap((run) => [
      ...run.results.map((line) => of(run, line, run.steps)),
      ...(run.evaluation?.results || []).map((line) => of(run, line, run.evaluation.step)),
    ]),
  };
}

function episodesTable(chosen) {
  const header = [
    "run",
    "played",
    "step",
    "task",
    "rollout",
    "success",
    "steps",
    "tokens",
    "ended",
    "targets",
    "trained",
    "hindsight",
    "missed_the_fault",
  ];
  const rows = chosen
    .map(lineOf)
    .map((line) => [
      data.runs[line.run].name,
      line.kind,
      line.step,
      line.task,
      line.rollout,
      line.success,
      line.steps,
      line.tokens,
      line.ended,
      line.targets.join(" "),
      line.trained.join(" "),
      line.review,
      line.missed,
      line.divergence,
    ]);
  return { header: [...header, "divergence_nats"], rows };
}
