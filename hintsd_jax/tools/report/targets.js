// Where the targets fall while training: a column a training step, a row a step (or tenth) of the episode, the share of the targets as shade.

const COLUMNS = 120,
  ROWS = 40;

function drawTargets(runs) {
  const shown = runs.map((run, n) => [run, n]).filter(([run]) => run.target_counts);
  if (!shown.length) return null;
  const section = make("section.targets", { "aria-labelledby": "h-targets" });
  let kind = "absolute";
  const redraw = () => {
    const buttons = [
      ["absolute", "by step"],
      ["relative", "by part of the episode"],
    ].map(([key, label]) =>
      make(
        "button",
        {
          type: "button",
          "aria-pressed": String(key === kind),
          onclick: () => {
            kind = key;
            redraw();
            section.querySelector("[aria-pressed=true]").focus();
          },
        },
        label,
      ),
    );
    section.replaceChildren(
      make(
        "div.line",
        null,
        make("h2", { id: "h-targets" }, "Where the targets fall"),
        make("div.choice", { role: "group", "aria-label": "Vertical axis" }, buttons),
      ),
      make(
        shown.length > 1 ? "div.charts" : "div",
        null,
        shown.map(([run, n]) => heatmap(run, n, kind, shown.length > 1)),
      ),
      make(
        "p.note.scale",
        null,
        "share of a training step's targets",
        make("span.ramp", { role: "img", "aria-label": "from light, none, to dark, all" }),
        "0 to 100 %; line: their mean",
      ),
    );
  };
  redraw();
  return section;
}

// Counts [columns][rows] with neighbours added up until there are few enough.
function coarser(counts, most) {
  const by = Math.ceil(counts.length / most);
  const found = [];
  for (let n = 0; n < counts.length; n += by) found.push(counts.slice(n, n + by).reduce((a, b) => a.map((v, i) => v + b[i])));
  return { found, by };
}

function heatmap(run, n, kind, named) {
  const counts = run.target_counts,
    { found: columns, by } = coarser(counts[kind], COLUMNS);
  const turned = coarser(
    columns[0].map((_, r) => columns.map((column) => column[r])),
    ROWS,
  ); // [rows][columns]
  const rows = turned.found,
    relative = kind === "relative";
  const totals = columns.map((column) => column.reduce((a, b) => a + b, 0));
  const box = make("div.plot"),
    height = Math.max(150, Math.min(240, rows.length * 20)),
    left = 44,
    bottom = 22;
  const sum = counts[kind].reduce((a, column) => a + column.reduce((x, y) => x + y, 0), 0);
  const known = counts.mean.filter((v) => v !== null);
  const trend = `their mean step goes from ${short(known[0])} to ${short(known.at(-1))}`;
  const said = `${short(sum)} targets in ${counts.steps.length} training steps; ${trend}`;
  const picture = draw("svg", { role: "img", "aria-label": said, height });
  box.append(picture);
  const rowName = (r) =>
    relative
      ? `${10 * r} to ${10 * r + 10} % of the episode`
      : turned.by > 1
        ? `steps ${r * turned.by + 1} to ${(r + 1) * turned.by}`
        : `step ${r + 1}`;
  let width = 0;
  const cell = () => [(width - left) / columns.length, (height - bottom) / rows.length];
  const redraw = () => {
    const [w, h] = cell(),
      gap = w > 6 && h > 6 ? 1.5 : 0;
    const y = (r) => height - bottom - (r + 1) * h;
    const parts = [];
    rows.forEach((row, r) =>
      row.forEach((count, c) => {
        const share = totals[c] ? count / totals[c] : 0;
        parts.push(
          draw("rect.cell", {
            x: left + c * w,
            y: y(r),
            width: Math.max(w - gap, 0.5),
            height: Math.max(h - gap, 0.5),
            rx: gap,
            "fill-opacity": share ? (0.08 + 0.92 * Math.sqrt(share)).toFixed(3) : 0.035,
          }),
        );
      }),
    );
    const stride = Math.ceil(rows.length / (height / 22));
    for (let r = 0; r < rows.length; r += relative ? 3 : stride)
      parts.push(draw("text.tick", { x: left - 8, y: y(r) + h / 2 + 4, "text-anchor": "end" }, relative ? `${10 * r} %` : String(r * turned.by + 1)));
    for (const c of ticks(0, columns.length - 1, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger))
      parts.push(draw("text.tick", { x: left + (c + 0.5) * w, y: height - 5, "text-anchor": "middle" }, short(counts.steps[c * by])));
    // the mean target, in cells from the lower left corner
    const means = relative
      ? columns.flatMap((column, c) => (totals[c] ? [[c + 0.5, column.reduce((sum, v, r) => sum + v * (r + 0.5), 0) / totals[c]]] : []))
      : columns.flatMap((_, c) => {
          const known = counts.mean.slice(c * by, (c + 1) * by).filter((mean) => mean !== null);
          return known.length ? [[c + 0.5, (known.reduce((a, b) => a + b) / known.length - 0.5) / turned.by]] : [];
        });
    const path = means.map(([c, r], i) => `${i ? "L" : "M"}${(left + c * w).toFixed(1)} ${(height - bottom - r * h).toFixed(1)}`);
    parts.push(draw("path.mean", { d: path.join("") }));
    picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
    picture.setAttribute("width", width);
    picture.replaceChildren(...parts);
  };
  const follow = (event) => {
    const place = picture.getBoundingClientRect(),
      [w, h] = cell();
    const c = Math.floor((event.clientX - place.left - left) / w),
      r = rows.length - 1 - Math.floor((event.clientY - place.top) / h);
    if (c < 0 || c >= columns.length || r < 0 || r >= rows.length) return tip.hide();
    tip.show(
      [
        make("div.soft", null, `training step ${short(counts.steps[c * by])}${by > 1 ? " and on" : ""}`),
        make("div", null, make("b", null, `${rows[r][c]} of ${totals[c]}`), ` targets at ${rowName(r)}`),
      ],
      event.clientX,
      event.clientY,
    );
  };
  picture.addEventListener("pointermove", follow);
  picture.addEventListener("pointerdown", follow);
  picture.addEventListener("pointerleave", () => tip.hide());
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) {
      width = box.clientWidth;
      redraw();
    }
  }).observe(box);
  return make("figure.chart", null, named ? make("figcaption", null, make("span.name", null, swatch(n), run.name)) : null, box);
}
