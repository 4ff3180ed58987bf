// Training as curves: a chart for each metric, of each run or of the means of an arm's seeds.

const CHARTS = [
  { title: "Success", keys: ["rollout/success", /^eval\/avg@\d+$/], names: ["rollouts", "evaluation"], unit: PERCENT, exact: EXACT, one: true },
  { title: "Loss, nats a token", keys: ["train/loss"], unit: short, zero: true },
  { title: "Entropy of the policy, nats", keys: ["train/entropy"], unit: short, zero: true },
  { title: "Teacher minus student, nats", keys: ["train/teacher_gap"], unit: short },
  { title: "Targets of a training step", keys: ["hindsight/targets"], unit: short, zero: true },
  { title: "Mean step of the targets", keys: ["hindsight/mean_target_step"], unit: short },
  {
    title: "Targets against true faults",
    keys: ["hindsight/precision", "hindsight/recall"],
    names: ["precision", "recall"],
    unit: PERCENT,
    exact: EXACT,
    one: true,
  },
  { title: "Tokens an action", keys: ["rollout/action_length"], unit: short, zero: true },
  { title: "Steps an episode", keys: ["rollout/steps"], unit: short, zero: true },
  { title: "Gradient norm", keys: ["train/grad_norm"], unit: short, zero: true },
  { title: "Time of a training step", keys: ["time/step"], unit: TIME, zero: true },
  { title: "Peak memory, GiB", keys: ["memory/peak_bytes"], unit: GIBIBYTES, zero: true },
];
const AXES = {
  step: { name: "training step", label: "steps", key: "step", unit: short, whole: true },
  wall: { name: "training time", label: "time", key: "wall", unit: TIME },
  generated: { name: "tokens generated", label: "tokens", key: "generated", unit: short },
};

// What the link says of this part. hidden: numbers of runs.
const view = {
  get axis() {
    return AXES[link.get("x")] ? link.get("x") : "step";
  },
  get hidden() {
    const names = link.values.getAll("hide");
    const found = new Set(data.runs.flatMap((run, n) => (names.includes(run.name) ? [n] : [])));
    return found.size === data.runs.length ? new Set() : found;
  },
  get means() {
    return link.get("lines") === "means" && hasSeeds();
  },
};

const hasSeeds = () => Boolean(data.compared?.arms.some((arm) => arm.runs.length > 1));

// Buttons of which one is pressed; a choice stands in the link under `key`, its first one as "".
function choice(label, key, choices, chosen, redraw) {
  return make(
    "div.choice",
    { role: "group", "aria-label": label },
    choices.map(([value, text], n) =>
      make(
        "button",
        {
          type: "button",
          "aria-pressed": String(value === chosen),
          onclick: () => {
            link.set({ [key]: n ? value : "" });
            redraw()?.querySelector(`[aria-label="${label}"] [aria-pressed=true]`).focus();
          },
        },
        text,
      ),
    ),
  );
}

function drawCurves(section) {
  const { runs } = data,
    many = runs.length > 1,
    axis = AXES[view.axis],
    hidden = view.hidden;
  const redraw = () => {
    drawCurves(section);
    return section;
  };
  const toggle = (n) => {
    if (!hidden.delete(n)) hidden.add(n);
    link.set({ hide: hidden.size === runs.length ? [] : [...hidden].map((m) => runs[m].name) });
    redraw().querySelectorAll(".legend .run")[n].focus();
  };
  const legend = make(
    "div.legend",
    { role: "group", "aria-label": "Runs shown" },
    many && !view.means
      ? runs.map((run, n) => make("button.run", { type: "button", "aria-pressed": String(!hidden.has(n)), onclick: () => toggle(n) }, label(run, n)))
      : null,
    view.means
      ? data.compared.arms.map((arm, n) => make("span.run", null, swatch(n), arm.name, make("span.soft", null, plural(arm.runs.length, "seed"))))
      : null,
  );
  const charts = CHARTS.flatMap((spec) => drawSpec(spec, runs, axis)).filter(Boolean);
  const used = new Set(["step", "wall", "generated", ...CHARTS.flatMap((spec) => spec.keys.filter((key) => typeof key === "string"))]);
  const rest = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))]
    .filter((key) => !used.has(key) && !key.startsWith("alarm/") && !/^eval\/avg@\d+$/.test(key))
    .sort();
  const others = make(
    "details.others",
    {
      open: link.get("more") === "1",
      ontoggle: () => {
        if (others.open !== (link.get("more") === "1")) link.set({ more: others.open ? "1" : "" });
        if (others.open && !others.querySelector(".charts"))
          others.append(make("div.charts", null, rest.flatMap((key) => drawSpec(restSpec(key), runs, axis)).filter(Boolean)));
      },
    },
    make("summary", null, `${rest.length} more metrics`),
  );
  section.replaceChildren(
    make(
      "div.line",
      null,
      make("h2", { id: "h-curves" }, "Training"),
      make(
        "div.tools",
        null,
        hasSeeds()
          ? choice(
              "Lines",
              "lines",
              [
                ["runs", "each run"],
                ["means", "means of seeds"],
              ],
              view.means ? "means" : "runs",
              redraw,
            )
          : null,
        choice(
          "Horizontal axis",
          "x",
          Object.entries(AXES).map(([key, a]) => [key, a.label]),
          view.axis,
          redraw,
        ),
        charts.length ? csvButton("metrics", () => metricsTable(runs)) : null,
      ),
    ),
    legend,
    ...alarmNotes(runs),
    charts.length ? make("div.charts", null, charts) : make("p.note", null, "No training step is finished yet."),
    charts.length
      ? make(
          "p.note",
          null,
          "A point leads to its episodes. ",
          runs.some((run) => run.metrics.step?.length >= LONG) ? "Of long series the bold line is the mean of neighbouring steps. " : "",
          view.means ? "Lines are means over an arm's seeds, where all of them have a value; bands reach from the lowest seed to the highest." : "",
        )
      : "",
    rest.length ? others : "",
  );
}

function restSpec(key) {
  const { label: counted, ...spec } = unitOf(key);
  return { title: counted ? `${key}, ${counted}` : key, keys: [key], ...spec };
}

function alarmNotes(runs) {
  return runs.flatMap((run) =>
    Object.entries(run.metrics)
      .filter(([key]) => key.startsWith("alarm/"))
      .flatMap(([key, ys]) => {
        const steps = ys.flatMap((y, i) => (y ? [run.metrics.step[i]] : []));
        if (!steps.length) return [];
        const where = `${runs.length > 1 ? ` in ${run.name}` : ""} at step${steps.length > 1 ? "s" : ""} `;
        const rest = steps.length > 12 ? ` and ${steps.length - 12} more` : "";
        return [make("p.alarm-note", null, make("b", null, `Alarm: ${key.slice(6)}`), where, steps.slice(0, 12).join(", "), rest)];
      }),
  );
}

// What a training step of some runs leads to: the list of its episodes; null where the report has none of them.
function stepLeads(runs) {
  const e = data.episodes,
    counts = runs.map(([, n]) => [n, new Map()]);
  const byRun = new Map(counts);
  e.step.forEach((step, i) => {
    const steps = data.names.kind[e.kind[i]] === "training" && byRun.get(e.run[i]);
    if (steps) steps.set(step, (steps.get(step) ?? 0) + 1);
  });
  return (step, n) => {
    const of = n !== null && byRun.get(n)?.has(step) ? [n] : [...byRun.keys()];
    const count = of.reduce((sum, m) => sum + (byRun.get(m).get(step) ?? 0), 0);
    if (!count) return null;
    const run = of.length === 1 && data.runs.length > 1 ? data.runs[of[0]].name : "";
    return { text: `Enter or click: ${plural(count, "episode")}`, href: link.to("episodes", { ...NO_FILTERS, run, step: String(step) }) };
  };
}

// The charts of one entry: with one run all its keys together, with several one chart a key.
function drawSpec(spec, runs, axis) {
  const nameOf = (run, key) => (typeof key === "string" ? key : Object.keys(run.metrics).find((name) => key.test(name)));
  const line = (run, key, n, name, short_) => {
    const real = nameOf(run, key),
      ys = real && run.metrics[real];
    return ys ? [{ name, n, short: short_, points: ys.map((y, i) => [run.metrics[axis.key][i], y, run.metrics.step[i]]) }] : [];
  };
  const alarms = (run) =>
    Object.entries(run.metrics)
      .filter(([key]) => key.startsWith("alarm/"))
      .flatMap(([key, ys]) => ys.flatMap((y, i) => (y ? [{ x: run.metrics[axis.key][i], name: key.slice(6) }] : [])));
  const x = { name: axis.name, unit: axis.unit, whole: axis.whole };
  if (runs.length === 1) {
    const series = spec.keys.flatMap((key, n) => line(runs[0], key, n, spec.names?.[n] ?? spec.title, spec.names?.[n]));
    const leads = stepLeads([[runs[0], 0]]);
    return [chart({ ...spec, keyed: true }, series, x, alarms(runs[0]), (step) => leads(step, 0))];
  }
  const hidden = view.means ? new Set() : view.hidden,
    shown = runs.map((run, n) => [run, n]).filter(([, n]) => !hidden.has(n)),
    leads = stepLeads(shown);
  return spec.keys.map((key, k) => {
    const title = spec.names ? `${spec.title}: ${spec.names[k]}` : spec.title;
    if (!view.means)
      return chart(
        { ...spec, title },
        shown.flatMap(([run, n]) => line(run, key, n, run.name)),
        x,
        shown.flatMap(([run]) => alarms(run)),
        leads,
      );
    const arms = data.compared.arms.flatMap((arm, n) =>
      meanLine(
        arm.runs.flatMap((m) => line(runs[m], key, n, arm.name)),
        arm,
        n,
      ),
    );
    return chart({ ...spec, title }, arms, { ...x, whole: axis.whole }, [], (step) => leads(step, null));
  });
}

// The mean of an arm's seeds, training step by training step; another x is the mean of theirs.
function meanLine(lines, arm, n) {
  if (lines.length < arm.runs.length) return [];
  const known = lines.map((line) => new Map(line.points.filter((p) => p[1] !== null).map((p) => [p[2], p])));
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const steps = [...known[0].keys()].filter((step) => known.every((points) => points.has(step)));
  const at = steps.map((step) => known.map((points) => points.get(step)));
  const points = at.map((seeds, i) => [mean(seeds.map((p) => p[0])), mean(seeds.map((p) => p[1])), steps[i]]);
  const band = at.map((seeds, i) => [points[i][0], Math.min(...seeds.map((p) => p[1])), Math.max(...seeds.map((p) => p[1]))]);
  return [{ name: arm.name, n, points, band: lines.length > 1 ? band : [] }];
}
