// Small line charts: several series over one x, values under the pointer or by the arrow keys; a point leads to its episodes.

const LONG = 80; // points from which a series is drawn faint, with its smoothed course over it
const HEIGHT = 184,
  RIGHT = 12,
  TOP = 8,
  BOTTOM = 38;

// spec: {title, unit: as in axes.js, exact, zero, one}; series: [{name, n, points: [[x, y, training step], ...], band: [[x, low, high], ...]}];
// x: {name, unit, whole}; alarms: [{x, name}]; opens(step, n): what a training step leads to, {text, href}, or null; n: the series, or null.
// Redraws itself when its width changes.
function chart(spec, series, x, alarms = [], opens = () => null) {
  const drawn = series
    .map((line) => ({ ...line, points: line.points.filter((p) => p[0] !== null && p[1] !== null) }))
    .filter((line) => line.points.length)
    .map((line) => ({ ...line, calm: smooth(line.points) }));
  if (!drawn.length) return null;
  const exact = spec.exact || spec.unit;
  const last = drawn.length === 1 ? make("span.now", null, exact(drawn[0].points.at(-1)[1])) : null;
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
  const stepOf = new Map(all.map((p) => [p[0], p[2]]));
  const xs = [...stepOf.keys()].sort((a, b) => a - b);
  const [x0, x1] = [xs[0], xs.at(-1)];
  const y = span([...all.map((p) => p[1]), ...drawn.flatMap((line) => (line.band || []).flatMap((p) => p.slice(1)))], spec);
  const names = named(y, spec.unit, 4),
    LEFT = 12 + widest(names.map((tick) => tick.text));
  let cursor = null,
    width = 0;
  const say =
    `${spec.title} by ${x.name}: ` +
    drawn
      .slice(0, 8)
      .map((line) => `${line.name} from ${exact(line.points[0][1])} to ${exact(line.points.at(-1)[1])}`)
      .join("; ") +
    ". Arrow keys: values. Enter: episodes.";
  const picture = draw("svg", { role: "img", "aria-label": say, tabindex: 0, height: HEIGHT });
  box.append(picture);
  const px = (v) => LEFT + (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5) * (width - LEFT - RIGHT);
  const py = (v) => TOP + (1 - (v - y.low) / (y.high - y.low)) * (HEIGHT - TOP - BOTTOM);
  const course = (points, at = 1) => points.map((p, i) => `${i ? "L" : "M"}${px(p[0]).toFixed(1)} ${py(p[at]).toFixed(1)}`).join("");

  function redraw() {
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    picture.setAttribute("width", width);
    const parts = [];
    for (const tick of names) {
      parts.push(draw("line.grid", { x1: LEFT, x2: width - RIGHT, y1: py(tick.value), y2: py(tick.value) }));
      parts.push(draw("text.tick", { x: LEFT - 8, y: py(tick.value) + 4, "text-anchor": "end" }, tick.text));
    }
    const places =
      x1 > x0 ? named({ low: x0, high: x1, flat: false }, x.unit, Math.max(2, Math.floor(width / 90))) : [{ value: x0, text: x.unit(x0) }];
    for (const tick of places.filter((t) => !x.whole || Number.isInteger(t.value))) {
      const at = px(tick.value);
      const anchor = at > width - 24 ? "end" : at < LEFT + 12 ? "start" : "middle";
      parts.push(draw("text.tick", { x: anchor === "end" ? width - 2 : at, y: HEIGHT - 22, "text-anchor": anchor }, tick.text));
    }
    parts.push(draw("text.tick.axis", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, x.name));
    for (const alarm of alarms.filter((a) => a.x >= x0 && a.x <= x1))
      parts.push(draw("line.alarm", { x1: px(alarm.x), x2: px(alarm.x), y1: TOP, y2: HEIGHT - BOTTOM }, draw("title", null, `alarm: ${alarm.name}`)));
    for (const line of drawn) parts.push(...drawLine(line));
    if (cursor !== null) {
      const at = px(xs[cursor]);
      parts.push(draw("line.cursor", { x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM }));
      for (const line of drawn) {
        const p = valueAt(line, xs[cursor], x.whole);
        if (p) parts.push(markAt(line.n, px(p[0]), py(p[1]), 4, "path.at"));
      }
    }
    picture.replaceChildren(...parts);
  }

  function drawLine(line) {
    const parts = [],
      stroke = { stroke: colour(line.n), "stroke-dasharray": dash(line.n) || null },
      { calm } = line;
    if (line.band?.length > 1)
      parts.push(draw("path.band", { d: `${course(line.band)}${course([...line.band].reverse(), 2).replace("M", "L")}Z`, fill: colour(line.n) }));
    if (calm) parts.push(draw("path.line.bold", { d: course(calm), ...stroke }));
    parts.push(draw(calm ? "path.line.faint" : "path.line", { d: course(line.points), ...stroke }));
    // Forms on the way tell series apart; each begins at another place, so that they do not cover one another.
    const count = line.points.length,
      stride = count <= 4 ? 1 : Math.ceil(count / 4);
    for (let i = count - 1; i >= 0; i -= drawn.length > 1 || count <= 4 ? stride : count) {
      const p = calm ? calm[i] : line.points[i];
      parts.push(markAt(line.n, px(p[0]), py(p[1]), 3));
    }
    return parts;
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
        make("div.row", null, swatch(line.n), drawn.length > 1 ? make("span", null, line.name) : null, make("b", null, exact(p[1]))),
      );
    if (here.length > 12) lines.push(make("div.soft", null, `and ${here.length - 12} more`));
    const alarm = alarms.filter((a) => a.x === xs[to]).map((a) => make("div.soft", null, `alarm: ${a.name}`));
    const there = opens(stepOf.get(xs[to]), null);
    tip.show(
      [make("div.soft", null, `${x.name} ${x.unit(xs[to])}`), ...lines, ...alarm, there && make("div.go", null, there.text)],
      clientX,
      clientY,
    );
    picture.classList.toggle("leads", Boolean(there));
    return null;
  }

  const nearest = (event) => {
    const at = event.clientX - picture.getBoundingClientRect().left;
    return xs.reduce((best, v, i) => (Math.abs(px(v) - at) < Math.abs(px(xs[best]) - at) ? i : best), 0);
  };
  // The series whose line is nearest to the pointer.
  const lineAt = (event) => {
    const at = event.clientY - picture.getBoundingClientRect().top;
    const far = (line) => Math.abs(py(valueAt(line, xs[cursor], x.whole)?.[1] ?? Infinity) - at);
    return drawn.reduce((best, line) => (far(line) < far(best) ? line : best)).n;
  };
  const go = (n) => {
    const there = cursor === null ? null : opens(stepOf.get(xs[cursor]), n);
    if (!there) return;
    tip.hide();
    location.hash = there.href;
  };
  // A finger has no way to look without touching: its first touch of a place shows the values, its second one opens.
  let touched = null;
  picture.addEventListener("pointermove", (event) => move(nearest(event), event.clientX, event.clientY));
  picture.addEventListener("pointerdown", (event) => {
    const to = nearest(event);
    touched = event.pointerType === "mouse" || touched === to ? to : -1 - to;
    move(to, event.clientX, event.clientY);
  });
  picture.addEventListener("click", (event) => {
    if (touched >= 0 && cursor !== null) go(lineAt(event));
    else touched = -1 - touched;
  });
  picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && move(null));
  picture.addEventListener("blur", () => move(null));
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Enter") return go(null);
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return null;
    event.preventDefault();
    const to = Math.max(0, Math.min(xs.length - 1, cursor === null ? (by > 0 ? 0 : xs.length - 1) : cursor + by));
    const place = picture.getBoundingClientRect();
    return move(to, place.left + px(xs[to]), place.top + 24);
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
