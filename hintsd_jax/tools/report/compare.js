// Several runs: arms (runs that differ in their seed alone) with their means over seeds, and what each has more than the first one.

function drawCompared() {
  const { compared } = data;
  if (!compared || !compared.measures.length) return null;
  const first = compared.arms[0].name,
    several = compared.arms.length > 1;
  const titles = ["arm", "seeds", "before", "after", "change", ...(several ? [`after, minus ${first}`] : [])];
  const rows = compared.measures.flatMap((measure) => [
    make("tr.group", null, make("th", { colspan: titles.length, scope: "colgroup" }, measure.name)),
    ...measure.arms.flatMap((line, n) => (line.before || line.after ? [comparedRow(compared.arms[n], line, n, several, titles)] : [])),
  ]);
  const few = compared.measures.some((measure) => measure.arms.some((line) => line.after && line.after.seeds < 3));
  return make(
    "section.compared",
    { "aria-labelledby": "h-compared" },
    make(
      "div.line",
      null,
      make("h2", { id: "h-compared" }, several ? "Compared, paired by seed and task" : "Over seeds"),
      csvButton("compared", () => comparedTable(compared)),
    ),
    make(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-label": "Table of arms" },
      make(
        "table.result",
        null,
        make(
          "thead",
          null,
          make(
            "tr",
            null,
            titles.map((t, i) => make(i ? "th.num" : "th", { scope: "col" }, t)),
          ),
        ),
        make("tbody", null, rows),
      ),
    ),
    make(
      "p.note",
      null,
      "Runs whose settings differ in the seed alone are one arm. Brackets are 95 % intervals of the mean over seeds and tasks",
      few ? "; those marked * have fewer than 3 seeds and are over tasks alone: other seeds differ by more" : "",
      several ? `. The last column takes the seeds and tasks that an arm shares with ${first}, the first run that was named.` : ".",
    ),
  );
}

function comparedRow(arm, line, n, several, titles) {
  const cell = (value, sign) => {
    if (!value) return "\u2013";
    const text = sign ? signed : percent;
    return [make("b", null, text(value.value)), make("span.ends", null, ` [${text(value.low)}, ${text(value.high)}]${value.seeds < 3 ? "*" : ""}`)];
  };
  const seeds = `${arm.runs.length}: ${arm.seeds.map((seed) => seed ?? "?").join(", ")}`;
  const cells = [seeds, cell(line.before), cell(line.after), cell(line.change, true)];
  if (several) cells.push(n === 0 ? "\u2013" : line.why ? make("span.soft", null, line.why) : cell(line.against, true));
  return make(
    "tr",
    null,
    make("th", { scope: "row" }, arm.name),
    cells.map((content, i) => make("td.num", { "data-label": titles[i + 1] }, content)),
  );
}

function comparedTable({ arms, measures }) {
  const ends = ["before", "after", "change", "against"];
  return {
    header: ["measure", "arm", "runs", "seeds", ...ends.flatMap((end) => [end, `${end}_low`, `${end}_high`, `${end}_seeds`])],
    rows: measures.flatMap((measure) =>
      measure.arms.map((line, n) => [
        measure.name,
        arms[n].name,
        arms[n].runs.map((run) => data.runs[run].name).join(" "),
        arms[n].seeds.join(" "),
        ...ends.flatMap((end) => [line[end]?.value, line[end]?.low, line[end]?.high, line[end]?.seeds]),
      ]),
    ),
  };
}
