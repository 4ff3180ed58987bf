// One trained action span: every token shaded by its divergence, underlined by how the teacher would change it, the teacher's own word above.

const FULL = 4; // nats at which the shades are full; they grow with the square root, so that small values show
const UNDERLINED = 0.1; // nats from which a change is underlined
const shade = (v) => Math.sqrt(Math.min(1, Math.abs(v) / FULL));

function visible(piece) {
  if (piece === null || piece === undefined) return "";
  return piece.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5") || "\u2205";
}

function drawSpan(span) {
  const scored = Boolean(span.divergence),
    body = make("div.tokens", {
      role: "group",
      "aria-label": `${plural(span.tokens, "token")} of the action, shaded by ${scored ? "divergence" : "advantage"}`,
    });
  span.pieces.forEach((piece, n) => {
    const classes = ["tok"],
      style = { "data-n": n };
    const heat = scored ? span.divergence[n] : span.advantage?.[n];
    if (heat !== null && heat !== undefined) style["--t"] = shade(heat).toFixed(3);
    if (!scored && heat > 0) classes.push("good");
    const gap = span.teacher_gap?.[n];
    if (Math.abs(gap) >= UNDERLINED) {
      style["--g"] = shade(gap).toFixed(3);
      classes.push(gap > 0 ? "up" : "down");
    }
    const best = span.teacher_best?.[n];
    const changed = best !== undefined && best !== null;
    const word = make(`span.${classes.join(".")}`, style, changed ? visible(piece) : visible(piece).replace(/\u23ce/g, "\u23ce\n"));
    body.append(changed ? make("ruby", null, word, make("rt", { "data-n": n }, visible(best))) : word);
    if (changed && piece.includes("\n")) body.append(make("br")); // a word with another above it cannot break
  });
  const tell = (event) => {
    const n = event.target.closest("[data-n]")?.dataset.n;
    if (n === undefined) return tip.hide();
    tip.show(tokenLines(span, Number(n)), event.clientX, event.clientY);
  };
  body.addEventListener("pointermove", tell);
  body.addEventListener("pointerdown", tell);
  body.addEventListener("pointerleave", () => tip.hide());
  const box = make("div.trained", null, spanNote(span), body);
  const table = make(
    "details.table",
    {
      ontoggle: () => {
        if (table.open && !table.querySelector("table")) table.append(tokenTable(span));
      },
    },
    make("summary", null, "as a table"),
  );
  if (span.tokens > span.pieces.length) box.append(make("p.note", null, `The first ${short(span.pieces.length)} of ${short(span.tokens)} tokens.`));
  box.append(table);
  return box;
}

function spanNote(span) {
  const facts = [`trained on ${plural(span.tokens, "token")}`];
  const mean = (values) => {
    const known = values.filter((v) => v !== null);
    return known.reduce((a, b) => a + b, 0) / Math.max(known.length, 1);
  };
  if (span.divergence) facts.push(`divergence ${short(mean(span.divergence))} nats a token`);
  if (span.teacher_gap) facts.push(`teacher \u2212 student ${short(mean(span.teacher_gap))} nats a token`);
  if (span.advantage) facts.push(`advantage ${short(mean(span.advantage))}`);
  return make("p.note", null, facts.join(" \u00b7 "));
}

function tokenLines(span, n) {
  const lines = [make("div", null, make("code", null, visible(span.pieces[n])))];
  const add = (name, value) =>
    value !== undefined && value !== null && lines.push(make("div.row", null, make("span.soft", null, name), make("b", null, value)));
  if (span.divergence) add("divergence", `${short(span.divergence[n])} nats`);
  if (span.teacher_gap) add("teacher \u2212 student", `${short(span.teacher_gap[n])} nats`);
  if (span.teacher_best) add("teacher would write", span.teacher_best[n] === null ? "the same" : visible(span.teacher_best[n]));
  if (span.advantage) add("advantage", short(span.advantage[n]));
  return lines;
}

function tokenTable(span) {
  const columns = [
    ["token", "pieces", visible],
    ["teacher would write", "teacher_best", visible],
    ["divergence", "divergence", short],
    ["teacher \u2212 student", "teacher_gap", short],
    ["advantage", "advantage", short],
  ].filter(([, key]) => span[key]);
  const rows = span.pieces.map((_, n) =>
    make(
      "tr",
      null,
      columns.map(([, key, text]) => make(text === short ? "td.num" : "td", null, text(span[key][n]))),
    ),
  );
  return make(
    "div.scroll",
    { tabindex: 0, role: "region", "aria-label": "Tokens" },
    make(
      "table",
      null,
      make(
        "thead",
        null,
        make(
          "tr",
          null,
          columns.map(([name, , text]) => make(text === short ? "th.num" : "th", { scope: "col" }, name)),
        ),
      ),
      make("tbody", null, rows),
    ),
  );
}

// What the colours of tokens mean.
function tokenLegend(spans) {
  const scored = spans.some((span) => span.divergence),
    changed = spans.some((span) => span.teacher_best);
  const signed = !scored && spans.some((span) => span.advantage);
  if (!scored && !signed) return null;
  return make(
    "div.token-legend",
    null,
    scored ? make("span.key", null, make("span.ramp", { "aria-hidden": "true" }), `divergence, 0 to ${FULL}+ nats`) : null,
    signed ? make("span.key", null, make("span.ramp.both", { "aria-hidden": "true" }), "advantage, below and above 0") : null,
    scored ? make("span.key", null, make("i.mark-down", { "aria-hidden": "true" }), "teacher lowers") : null,
    scored ? make("span.key", null, make("i.mark-up", { "aria-hidden": "true" }), "teacher raises") : null,
    changed ? make("span.key", null, make("ruby", null, make("span.tok", null, "word"), make("rt", null, "above")), "teacher's word") : null,
  );
}
