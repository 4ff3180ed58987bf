// The first view: what came out, the curves of all runs, where the targets fall, what a step costs, and the settings.

function drawOverview(box) {
  const { runs } = data;
  box.replaceChildren(
    heading(runs),
    drawCompared() || "",
    drawResults(runs) || "",
    drawTurned() || "",
    make("section.curves", { "aria-labelledby": "h-curves" }),
    make("section.pair", null, drawTargets(runs) || "", drawTimes(runs) || ""),
    drawSettings(runs),
  );
  drawCurves(box.querySelector(".curves"));
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
      runs.length > 1 ? make("div.note", null, said) : null,
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
  const table = (chosen, which) =>
    make(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-label": `Table of ${which} settings` },
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
                make("td"),
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
        if (all.open && !all.querySelector("table")) all.append(table(keys, "all"), versions);
      },
    },
    make("summary", null, `All ${keys.length} settings`),
  );
  return make(
    "section.config",
    { "aria-labelledby": "h-config" },
    make("h2", { id: "h-config" }, "Settings"),
    runs.length > 1 && differ.length ? [make("p.note", null, "Those that differ:"), table(differ, "differing")] : null,
    all,
  );
}
