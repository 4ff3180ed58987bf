// Held-out episodes: the same task with the same random numbers before and after training, as pairs and side by side.

// What was played: "training", "before", "after" or "evaluation".
const kindOf = (n) => data.names.kind[data.episodes.kind[n]];
const isHeldOut = (n) => kindOf(n) === "before" || kindOf(n) === "after";

// The other half of a pair, for each number of the list that has one.
const pairs = {
  found: null,
  of(n) {
    if (!this.found) {
      const e = data.episodes,
        places = new Map();
      this.found = new Map();
      e.run.forEach((run, m) => {
        if (!isHeldOut(m)) return;
        const key = `${run} ${e.task[m]} ${e.rollout[m]}`,
          other = places.get(key);
        if (other === undefined) places.set(key, m);
        else if (kindOf(other) !== kindOf(m)) this.found.set(other, m).set(m, other);
      });
    }
    return this.found.get(n);
  },
};

// How a pair turned out: "gained", "lost", "kept" or "never"; "" without a pair.
function turned(n) {
  const other = pairs.of(n);
  if (other === undefined) return "";
  const [before, after] = (kindOf(n) === "before" ? [n, other] : [other, n]).map((m) => data.episodes.success[m]);
  return after ? (before ? "kept" : "gained") : before ? "lost" : "never";
}

const TURNS = [
  ["gained", "failed before, succeeded after"],
  ["lost", "succeeded before, failed after"],
  ["kept", "succeeded both times"],
  ["never", "failed both times"],
];

function drawTurned() {
  const ofRuns = data.runs.map(() => ({ gained: 0, lost: 0, kept: 0, never: 0 }));
  let any = 0;
  data.episodes.run.forEach((run, n) => {
    if (kindOf(n) !== "after" || !turned(n)) return;
    ofRuns[run][turned(n)]++;
    any++;
  });
  if (!any) return null;
  const cell = (run, kind, text) => {
    const count = ofRuns[run][kind];
    const href = link.to("episodes", {
      ...NO_FILTERS,
      run: data.runs.length > 1 ? data.runs[run].name : "",
      step: "after",
      turned: kind,
      beside: "1",
    });
    return make(
      "td.num",
      null,
      count ? make("a", { href, "aria-label": `${data.runs[run].name}: ${plural(count, "episode")} that ${text}` }, String(count)) : "0",
    );
  };
  return make(
    "section.turned",
    { "aria-labelledby": "h-turned" },
    make("h2", { id: "h-turned" }, "Held-out episodes, before and after"),
    make(
      "div.scroll",
      { tabindex: 0, role: "region", "aria-label": "Table of held-out episodes" },
      make(
        "table.turns",
        null,
        make(
          "thead",
          null,
          make(
            "tr",
            null,
            make("td"),
            TURNS.map(([, text]) => make("th.num", { scope: "col" }, text)),
          ),
        ),
        make(
          "tbody",
          null,
          data.runs.map((run, n) =>
            make(
              "tr",
              null,
              make("th", { scope: "row" }, data.runs.length > 1 ? label(run, n) : "recorded pairs"),
              TURNS.map(([kind, text]) => cell(n, kind, text)),
            ),
          ),
        ),
      ),
    ),
    make(
      "p.note",
      null,
      "Of the recorded ones (eval.record_tasks). The same task with the same random numbers; a number leads to its episodes, side by side.",
    ),
  );
}

// The first step at which two episodes say or see something else; 0 where there is none.
function partAt(one, other) {
  const most = Math.max(one.steps.length, other.steps.length);
  for (let i = 0; i < most; i++)
    if (one.steps[i]?.text !== other.steps[i]?.text || one.steps[i]?.observation !== other.steps[i]?.observation) return i + 1;
  return 0;
}

// Both halves of a pair; the steps of the one that was opened have the ids that links name.
function drawPair(n, entry, other, otherEntry) {
  const at = partAt(entry, otherEntry),
    before = kindOf(n) === "before";
  const halves = [
    [n, entry, "step"],
    [other, otherEntry, "beside"],
  ];
  return (before ? halves : halves.reverse()).map(([m, each, name]) => {
    const line = lineOf(m);
    const box = make("section.half", { "aria-label": whenOf(line) }, drawEpisode(line, each, siblingsOf(m), name));
    const said = at
      ? ["The two part at step ", make("a.number", { href: linkOf(m, Math.min(at, line.steps)) }, String(at)), "."]
      : "The two are the same.";
    box.querySelector(".strip").before(make("p.note.parting", null, said));
    box.querySelector(`#${name}-${at}`)?.classList.add("parted");
    return box;
  });
}

// The choice between one half of a pair, the other, and both.
function pairLinks(n) {
  const other = pairs.of(n);
  if (other === undefined) return null;
  const beside = link.get("beside") === "1",
    [before, after] = kindOf(n) === "before" ? [n, other] : [other, n];
  const to = (m, both) => linkOf(m, null, { beside: both ? "1" : "" });
  const one = (text, href, here) => make("a.sibling", { href, "data-own": true, "aria-current": here ? "true" : null }, text);
  return make(
    "div.siblings",
    { role: "group", "aria-label": "Before and after training" },
    one("before", to(before, false), !beside && n === before),
    one("after", to(after, false), !beside && n === after),
    one("side by side", to(after, true), beside),
  );
}
