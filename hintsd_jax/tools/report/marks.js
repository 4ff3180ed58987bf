// What tells series apart: a colour, a form and, where there are many, a dash. Each says it without the others.

const COLOURS = 7; // --s0 to --s6 in the style; further series are dashed
const colour = (n) => `var(--s${n % COLOURS})`;
const dash = (n) => ["", "6 4", "2 3"][Math.floor(n / COLOURS) % 3];

// Seven forms about a centre, as paths of size r.
const FORMS = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x} ${y - 1.3 * r}L${x + 1.25 * r} ${y + r}H${x - 1.25 * r}Z`,
  (x, y, r) => `M${x} ${y - 1.45 * r}L${x + 1.3 * r} ${y}L${x} ${y + 1.45 * r}L${x - 1.3 * r} ${y}Z`,
  (x, y, r) => `M${x} ${y + 1.3 * r}L${x + 1.25 * r} ${y - r}H${x - 1.25 * r}Z`,
  (x, y, r) => {
    const a = 0.45 * r,
      b = 1.35 * r;
    return `M${x - a} ${y - b}h${2 * a}v${b - a}h${b - a}v${2 * a}h${a - b}v${b - a}h${-2 * a}v${a - b}h${a - b}v${-2 * a}h${b - a}Z`;
  },
  (x, y, r) => `M${x - 1.4 * r} ${y - 0.55 * r}h${2.8 * r}v${1.1 * r}h${-2.8 * r}Z`,
];

// The mark of series n at a place of a picture.
function markAt(n, x, y, r, name = "path") {
  return draw(name, { d: FORMS[n % FORMS.length](x, y, r), fill: colour(n) });
}

function swatch(n) {
  return draw(
    "svg.swatch",
    { viewBox: "0 0 22 10", width: 22, height: 10, "aria-hidden": "true" },
    draw("line", { x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour(n), "stroke-width": 2, "stroke-dasharray": dash(n) || null }),
    markAt(n, 11, 5, 3.4),
  );
}

// How wide texts are on an axis, in pixels.
const measuring = document.createElement("canvas").getContext("2d");

function widest(texts) {
  measuring.font = `11.5px ${getComputedStyle(document.body).fontFamily}`;
  return Math.ceil(Math.max(0, ...texts.map((text) => measuring.measureText(text).width)));
}
