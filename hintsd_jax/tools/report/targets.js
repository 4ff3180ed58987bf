// Where the targets fall while training: a column a training step, a row a step (or tenth) of the episode, the share of the targets as shade.

const COLUMNS = 120,
  ROWS = 40;

function drawTargets(runs) {
  const shown = runs.map((run, n) => [run, n]).filter(([run]) => run.target_counts);
  if (!shown.length) return null;
  const section = make("section.targets", { "aria-labelledby": "h-targets" });
  const redraw = () => {
    const kind = link.get("targets") === "relative" ? "relative" : "absolute";
    section.replaceChildren(
      make(
        "div.line",
        null,
        make("h2", { id: "h-targets" }, "Where the targets fall"),
        choice(
          "Vertical axis",
          "targets",
          [
            ["absolute", "by step"],
            ["relative", "by part of the episode"],
          ],
          kind,
          redraw,
        ),
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
        "0 to 100 %; line: their mean. A cell leads to its episodes.",
      ),
    );
    return section;
  };
  return redraw();
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
  const stepNames = relative ? rows.map((_, r) => `${10 * r} %`) : rows.map((_, r) => String(r * turned.by + 1));
  const box = make("div.plot"),
    height = Math.max(166, Math.min(256, rows.length * 20 + 16)),
    left = 33 + widest(stepNames),
    bottom = 38;
  const sum = counts[kind].reduce((a, column) => a + column.reduce((x, y) => x + y, 0), 0);
  const known = counts.mean.filter((v) => v !== null);
  const trend = `their mean step goes from ${short(known[0])} to ${short(known.at(-1))}`;
  const said = `${short(sum)} targets in ${counts.steps.length} training steps; ${trend}`;
  const picture = draw("svg", { role: "img", "aria-label": `${said}. Arrow keys: cells. Enter: their episodes.`, tabindex: 0, height });
  box.append(picture);
  const rowName = (r) =>
    relative
      ? `${10 * r} to ${10 * r + 10} % of the episode`
      : turned.by > 1
        ? `steps ${r * turned.by + 1} to ${(r + 1) * turned.by}`
        : `step ${r + 1}`;
  let width = 0,
    at = null; // [column, row] of the cell that is looked at
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
      parts.push(draw("text.tick", { x: left - 8, y: y(r) + h / 2 + 4, "text-anchor": "end" }, stepNames[r]));
    for (const c of ticks(0, columns.length - 1, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger))
      parts.push(draw("text.tick", { x: left + (c + 0.5) * w, y: height - 22, "text-anchor": "middle" }, short(counts.steps[c * by])));
    parts.push(draw("text.tick.axis", { x: (left + width) / 2, y: height - 5, "text-anchor": "middle" }, "training step"));
    const middle = (height - bottom) / 2;
    const side = relative ? "part of the episode" : "step of the episode";
    parts.push(draw("text.tick.axis", { x: 13, y: middle, transform: `rotate(-90 13 ${middle})`, "text-anchor": "middle" }, side));
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
    markCell();
  };
  const markCell = () => {
    const [w, h] = cell();
    picture.querySelector(".here")?.remove();
    if (at) picture.append(draw("rect.here", { x: left + at[0] * w, y: height - bottom - (at[1] + 1) * h, width: w, height: h }));
  };
  const cellAt = (event) => {
    const place = picture.getBoundingClientRect(),
      [w, h] = cell();
    const c = Math.floor((event.clientX - place.left - left) / w),
      r = Math.floor((place.top + height - bottom - event.clientY) / h);
    return c >= 0 && c < columns.length && r >= 0 && r < rows.length ? [c, r] : null;
  };
  // The list of the episodes with a target in a cell.
  const href = ([c, r]) => {
    const last = Math.min((c + 1) * by, counts.steps.length) - 1;
    const steps = by > 1 ? `${counts.steps[c * by]}-${counts.steps[last]}` : String(counts.steps[c]);
    const where = relative ? { part: String(r) } : { target: turned.by > 1 ? `${r * turned.by + 1}-${(r + 1) * turned.by}` : String(r + 1) };
    return link.to("episodes", { ...NO_FILTERS, run: data.runs.length > 1 ? run.name : "", step: steps, ...where });
  };
  const look = (to, x, y) => {
    at = to;
    markCell();
    picture.classList.toggle("leads", Boolean(at && rows[at[1]][at[0]]));
    if (!at) return tip.hide();
    const [c, r] = at;
    return tip.show(
      [
        make("div.soft", null, `training step ${short(counts.steps[c * by])}${by > 1 ? " and on" : ""}`),
        make("div", null, make("b", null, `${rows[r][c]} of ${totals[c]}`), ` targets at ${rowName(r)}`),
        rows[r][c] ? make("div.go", null, "Enter or click: their episodes") : null,
      ],
      x,
      y,
    );
  };
  const go = () => {
    if (!at || !rows[at[1]][at[0]]) return;
    tip.hide();
    location.hash = href(at);
  };
  let touched = ""; // as in charts.js: a finger's first touch shows, its second one opens
  picture.addEventListener("pointermove", (event) => look(cellAt(event), event.clientX, event.clientY));
  picture.addEventListener("pointerdown", (event) => {
    const to = cellAt(event);
    if (event.pointerType === "mouse" || String(to) === touched) touched = `go ${to}`;
    else touched = String(to);
    look(to, event.clientX, event.clientY);
  });
  picture.addEventListener("click", () => touched.startsWith("go ") && go());
  picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && look(null));
  picture.addEventListener("blur", () => look(null));
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter") return go();
    const by_ = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!by_) return null;
    event.preventDefault();
    const within = (v, most) => Math.max(0, Math.min(most - 1, v));
    const to = at ? [within(at[0] + by_[0], columns.length), within(at[1] + by_[1], rows.length)] : [0, 0];
    const place = picture.getBoundingClientRect(),
      [w, h] = cell();
    return look(to, place.left + left + (to[0] + 0.5) * w, place.top + height - bottom - (to[1] + 0.5) * h);
  });
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) {
      width = box.clientWidth;
      redraw();
    }
  }).observe(box);
  return make("figure.chart", null, named ? make("figcaption", null, make("span.name", null, swatch(n), run.name)) : null, box);
}
