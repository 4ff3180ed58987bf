// The first view: what came out, the curves of all runs, where the targets fall, what a step costs, and the settings.

const PERCENT = (v) => `${trim(100 * v, Math.abs(v) < 0.1 && v !== 0 ? 1 : 0)} %`;
const EXACT = (v) => `${percent(v)} %`;
const CHARTS = [
  { title: "Success", keys: ["rollout/success", /^eval\/avg@\d+$/], names: ["rollouts", "evaluation"], unit: PERCENT, exact: EXACT, one: true },
  { title: "Loss", keys: ["train/loss"], unit: short, zero: true },
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
  { title: "Time of a training step", keys: ["time/step"], unit: seconds, zero: true },
  { title: "Peak memory, GiB", keys: ["memory/peak_bytes"], unit: (v) => short(v / 2 ** 30), size: 2 ** 30, zero: true },
];
const AXES = {
  step: { name: "training step", label: "steps", key: "step", text: short, whole: true },
  wall: { name: "training time", label: "time", key: "wall", text: seconds },
  generated: { name: "tokens generated", label: "tokens", key: "generated", text: short },
};
const view = { axis: "step", hidden: new Set() };

function drawOverview(box) {
  const { runs } = data;
  box.replaceChildren(
    heading(runs),
    drawResults(runs) || "",
    make("section.curves", { "aria-labelledby": "h-curves" }),
    make("section.pair", null, drawTargets(runs) || "", drawTimes(runs) || ""),
    drawSettings(runs),
  );
  drawCurves(box.querySelector(".curves"));
}

function drawCurves(section) {
  const { runs } = data,
    many = runs.length > 1,
    axis = AXES[view.axis];
  const choices = Object.entries(AXES).map(([key, a]) =>
    make(
      "button",
      {
        type: "button",
        "aria-pressed": String(key === view.axis),
        onclick: () => {
          view.axis = key;
          drawCurves(section);
          section.querySelector(`[aria-pressed=true]`).focus();
        },
      },
      a.label,
    ),
  );
  const legend = make(
    "div.legend",
    { role: "group", "aria-label": "Runs shown" },
    many
      ? runs.map((run, n) =>
          make(
            "button.run",
            {
              type: "button",
              "aria-pressed": String(!view.hidden.has(n)),
              onclick: (event) => {
                if (!view.hidden.delete(n)) view.hidden.add(n);
                if (view.hidden.size === runs.length) view.hidden.clear();
                drawCurves(section);
                section.querySelectorAll(".legend .run")[n].focus();
              },
            },
            label(run, n),
          ),
        )
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
      ontoggle: () => {
        if (others.open && !others.querySelector(".charts"))
          others.append(
            make(
              "div.charts",
              null,
              rest
                .flatMap((key) => drawSpec({ title: key, keys: [key], unit: key.startsWith("time/") ? seconds : short }, runs, axis))
                .filter(Boolean),
            ),
          );
      },
    },
    make("summary", null, `${rest.length} more metrics`),
  );
  section.replaceChildren(
    make(
      "div.line",
      null,
      make("h2", { id: "h-curves" }, "Training"),
      make("div.choice", { role: "group", "aria-label": "Horizontal axis" }, choices),
    ),
    legend,
    ...alarmNotes(runs),
    charts.length ? make("div.charts", null, charts) : make("p.note", null, "No training step is finished yet."),
    runs.some((run) => run.metrics.step?.length >= LONG)
      ? make("p.note", null, "Of long series the bold line is the mean of neighbouring steps.")
      : "",
    rest.length ? others : "",
  );
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

// The charts of one entry: with one run all its keys together, with several one chart a key.
function drawSpec(spec, runs, axis) {
  const nameOf = (run, key) => (typeof key === "string" ? key : Object.keys(run.metrics).find((name) => key.test(name)));
  const line = (run, key, n, name, label) => {
    const real = nameOf(run, key),
      ys = real && run.metrics[real];
    return ys ? [{ name, n, short: label, points: ys.map((y, i) => [run.metrics[axis.key][i], y]) }] : [];
  };
  const alarms = (run) =>
    Object.entries(run.metrics)
      .filter(([key]) => key.startsWith("alarm/"))
      .flatMap(([key, ys]) => ys.flatMap((y, i) => (y ? [{ x: run.metrics[axis.key][i], name: key.slice(6) }] : [])));
  if (runs.length === 1) {
    const series = spec.keys.flatMap((key, n) => line(runs[0], key, n, spec.names?.[n] ?? spec.title, spec.names?.[n]));
    return [chart({ ...spec, keyed: true }, series, axis, alarms(runs[0]))];
  }
  const shown = runs.map((run, n) => [run, n]).filter(([, n]) => !view.hidden.has(n));
  return spec.keys.map((key, k) =>
    chart(
      { ...spec, title: spec.names ? `${spec.title}: ${spec.names[k]}` : spec.title },
      shown.flatMap(([run, n]) => line(run, key, n, run.name)),
      axis,
      shown.flatMap(([run]) => alarms(run)),
    ),
  );
}

const PARTS = [
  ["time/rollout", "rollout", "rollout"],
  ["time/analysis", "analysis", "analysis"],
  ["time/update", "update", "update"],
];

function drawTimes(runs) {
  const mean = (run, key) => {
    const ys = (run.metrics[key] || []).filter((v) => v !== null);
    return ys.length ? ys.reduce((a, b) => a + b, 0) / ys.length : 0;
  };
  const times = runs.map((run) => PARTS.map(([key]) => mean(run, key)));
  const longest = Math.max(...times.map((t) => t.reduce((a, b) => a + b, 0)));
  if (!(longest > 0)) return null;
  const bars = runs.map((run, n) => {
    const total = times[n].reduce((a, b) => a + b, 0);
    const said = PARTS.map(([, , name], i) => `${name} ${seconds(times[n][i])}`).join(", ");
    return make(
      "div.bar",
      null,
      make(
        "div.line",
        null,
        make("span", null, runs.length > 1 ? run.name : "a training step, on average"),
        make("b", null, total ? seconds(total) : "\u2013"),
      ),
      make(
        "div.stack",
        { role: "img", "aria-label": said, title: said, "--w": `${(100 * total) / longest}%` },
        PARTS.map(([, kind], i) => make(`i.${kind}`, { "--f": times[n][i] })),
      ),
    );
  });
  const keys = PARTS.map(([, kind, name], i) =>
    make("span.key", null, make(`i.block.${kind}`), runs.length > 1 ? name : `${name} ${seconds(times[0][i])}`),
  );
  return make(
    "section.times",
    { "aria-labelledby": "h-times" },
    make("h2", { id: "h-times" }, "What a training step takes"),
    make("div.keys", null, keys),
    bars,
  );
}

function drawSettings(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))].sort();
  const text = (v) => (v === undefined ? "\u2013" : typeof v === "string" ? v || "\u201c\u201d" : JSON.stringify(v));
  const differ = keys.filter((key) => new Set(runs.map((run) => text(run.config[key]))).size > 1);
  const table = (chosen) =>
    make(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-label": "Settings" },
      make(
        "table.settings",
        null,
        runs.length > 1
          ? make(
              "thead",
              null,
              make(
                "tr",
                null,
                make("th"),
                runs.map((run, n) => make("th", { scope: "col" }, swatch(n), run.name)),
              ),
            )
          : null,
        make(
          "tbody",
          null,
          chosen.map((key) =>
            make(
              "tr",
              null,
              make("th", { scope: "row" }, key),
              runs.map((run) => make("td", null, text(run.config[key]))),
            ),
          ),
        ),
      ),
    );
  const versions = make(
    "p.note",
    null,
    [
      ...new Set(
        runs.map((run) =>
          Object.entries(run.versions)
            .map(([k, v]) => `${k} ${v}`)
            .join(" \u00b7 "),
        ),
      ),
    ].join(" | "),
  );
  const all = make(
    "details",
    {
      ontoggle: () => {
        if (all.open && !all.querySelector("table")) all.append(table(keys), versions);
      },
    },
    make("summary", null, `All ${keys.length} settings`),
  );
  return make(
    "section.config",
    { "aria-labelledby": "h-config" },
    make("h2", { id: "h-config" }, "Settings"),
    runs.length > 1 && differ.length ? [make("p.note", null, "Those that differ:"), table(differ)] : null,
    all,
  );
}
