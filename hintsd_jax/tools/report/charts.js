// Small line charts: several series over one x, values under the pointer or by the arrow keys.

const COLOURS = 7; // --s0 to --s6 in the style; further series are dashed
const colour = (n) => `var(--s${n % COLOURS})`;
const dash = (n) => ["", "6 4", "2 3"][Math.floor(n / COLOURS) % 3];
const LONG = 80; // points from which a series is drawn faint, with its smoothed course over it
const HEIGHT = 168,
  LEFT = 44,
  RIGHT = 10,
  TOP = 8,
  BOTTOM = 22;

// spec: {title, unit(value) -> text, zero, one, note}; series: [{name, n, points: [[x, y], ...], marks}]; x: {name, text(value)};
// alarms: [{x, name}]. Redraws itself when its width changes.
function chart(spec, series, x, alarms = []) {
  const drawn = series
    .map((line) => ({ ...line, points: line.points.filter((p) => p[0] !== null && p[1] !== null) }))
    .filter((line) => line.points.length);
  if (!drawn.length) return null;
  const last = drawn.length === 1 ? make("span.now", null, (spec.exact || spec.unit)(drawn[0].points.at(-1)[1])) : null;
  const box = make("div.plot");
  const keys =
    spec.keyed && drawn.length > 1
      ? make(
          "span.keys",
          null,
          drawn.map((line) => make("span.key", null, swatch(line.n), line.short || line.name)),
        )
      : null;
  const figure = make("figure.chart", null, make("figcaption", null, make("span.name", null, spec.title), keys, last), box);
  const all = drawn.flatMap((line) => line.points);
  const xs = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  const [x0, x1] = [xs[0], xs.at(-1)];
  let low = Math.min(...all.map((p) => p[1])),
    high = Math.max(...all.map((p) => p[1]));
  if (spec.zero || (low / high > 0.0 && low / high < 0.35)) low = Math.min(low, 0);
  if (spec.one) [low, high] = [0, high > 0.5 ? 1 : high > 0.25 ? 0.5 : Math.max(high, 0.1)];
  if (high === low) [low, high] = [low - (Math.abs(low) || 1) * 0.5, high + (Math.abs(high) || 1) * 0.5];
  else if (!spec.one) [low, high] = [low === 0 ? 0 : low - 0.06 * (high - low), high + 0.06 * (high - low)];
  let cursor = null,
    width = 0;
  const say =
    `${spec.title} by ${x.name}: ` +
    drawn
      .slice(0, 8)
      .map((line) => `${line.name} from ${spec.unit(line.points[0][1])} to ${spec.unit(line.points.at(-1)[1])}`)
      .join("; ");
  const picture = draw("svg", { role: "img", "aria-label": say, tabindex: 0, height: HEIGHT });
  box.append(picture);
  const px = (v) => LEFT + (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5) * (width - LEFT - RIGHT);
  const py = (v) => TOP + (1 - (v - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  function redraw() {
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    picture.setAttribute("width", width);
    const parts = [];
    const size = spec.size ?? 1;
    for (const v of ticks(low / size, high / size, 3).map((t) => t * size)) {
      parts.push(draw("line.grid", { x1: LEFT, x2: width - RIGHT, y1: py(v), y2: py(v) }));
      parts.push(draw("text.tick", { x: LEFT - 8, y: py(v) + 4, "text-anchor": "end" }, spec.unit(v)));
    }
    for (const v of ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter((t) => !x.whole || Number.isInteger(t))) {
      const at = px(v);
      parts.push(
        draw("text.tick", { x: at, y: HEIGHT - 5, "text-anchor": at > width - 24 ? "end" : at < LEFT + 12 ? "start" : "middle" }, x.text(v)),
      );
    }
    for (const alarm of alarms.filter((a) => a.x >= x0 && a.x <= x1))
      parts.push(draw("line.alarm", { x1: px(alarm.x), x2: px(alarm.x), y1: TOP, y2: HEIGHT - BOTTOM }, draw("title", null, `alarm: ${alarm.name}`)));
    for (const line of drawn) {
      const path = line.points.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("");
      const calm = smooth(line.points);
      if (calm) {
        const bold = calm.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(p[1]).toFixed(1)}`).join("");
        parts.push(draw("path.line.bold", { d: bold, stroke: colour(line.n), "stroke-dasharray": dash(line.n) || null }));
      }
      parts.push(draw(calm ? "path.line.faint" : "path.line", { d: path, stroke: colour(line.n), "stroke-dasharray": dash(line.n) || null }));
      const dots = line.points.length <= 4 ? line.points : [line.points.at(-1)];
      for (const p of dots) parts.push(draw("circle", { cx: px(p[0]), cy: py(p[1]), r: 2.6, fill: colour(line.n) }));
    }
    if (cursor !== null) {
      const at = px(xs[cursor]);
      parts.push(draw("line.cursor", { x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }));
      for (const line of drawn) {
        const p = valueAt(line, xs[cursor], x.whole);
        if (p) parts.push(draw("circle.at", { cx: px(p[0]), cy: py(p[1]), r: 4, fill: colour(line.n) }));
      }
    }
    picture.replaceChildren(...parts);
  }

  function move(to, clientX, clientY) {
    cursor = to;
    redraw();
    if (to === null) return tip.hide();
    const here = drawn.map((line) => [line, valueAt(line, xs[to], x.whole)]).filter(([, p]) => p);
    here.sort((a, b) => b[1][1] - a[1][1]);
    const lines = here
      .slice(0, 12)
      .map(([line, p]) =>
        make(
          "div.row",
          null,
          swatch(line.n),
          drawn.length > 1 ? make("span", null, line.name) : null,
          make("b", null, (spec.exact || spec.unit)(p[1])),
        ),
      );
    if (here.length > 12) lines.push(make("div.soft", null, `and ${here.length - 12} more`));
    const alarm = alarms.filter((a) => a.x === xs[to]).map((a) => make("div.soft", null, `alarm: ${a.name}`));
    tip.show([make("div.soft", null, `${x.name} ${x.text(xs[to])}`), ...lines, ...alarm], clientX, clientY);
  }

  const nearest = (event) => {
    const at = event.clientX - picture.getBoundingClientRect().left;
    return xs.reduce((best, v, i) => (Math.abs(px(v) - at) < Math.abs(px(xs[best]) - at) ? i : best), 0);
  };
  const follow = (event) => move(nearest(event), event.clientX, event.clientY);
  picture.addEventListener("pointermove", follow);
  picture.addEventListener("pointerdown", follow);
  picture.addEventListener("pointerleave", () => move(null));
  picture.addEventListener("blur", () => move(null));
  picture.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(xs.length - 1, cursor === null ? (by > 0 ? 0 : xs.length - 1) : cursor + by));
    const place = picture.getBoundingClientRect();
    move(to, place.left + px(xs[to]), place.top + 24);
  });
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) {
      width = box.clientWidth;
      redraw();
    }
  }).observe(box);
  return figure;
}

// The point of a series at x; where series have points at different places, its last one before x, as long as it goes on.
function valueAt(line, at, exactly) {
  if (exactly || line.points.at(-1)[0] < at) return line.points.find((p) => p[0] === at);
  return line.points.findLast((p) => p[0] <= at);
}

// A long series as the mean of each point's neighbourhood, a fortieth of the series wide; null for a short one.
function smooth(points) {
  if (points.length < LONG) return null;
  const reach = Math.round(points.length / 80);
  return points.map((p, i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1);
    return [p[0], near.reduce((sum, q) => sum + q[1], 0) / near.length];
  });
}

function swatch(n) {
  return draw(
    "svg.swatch",
    { viewBox: "0 0 16 8", width: 16, height: 8, "aria-hidden": "true" },
    draw("line", { x1: 0, x2: 16, y1: 4, y2: 4, stroke: colour(n), "stroke-width": 3, "stroke-dasharray": dash(n) || null }),
  );
}
