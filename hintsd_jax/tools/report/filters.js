// Which episodes the list shows and in which order. All of it stands in the link; a chart or a heat map leads to a link of its own.

// Link keys of the filters, at their defaults: what a link from elsewhere begins with.
const NO_FILTERS = { run: "", step: "", outcome: "", ended: "", review: "", turned: "", target: "", part: "", q: "", beside: "" };
const OUTCOMES = [
  ["", "all outcomes"],
  ["lost", "failed"],
  ["won", "succeeded"],
];
const REVIEWS = [
  ["", "hindsight: any"],
  ["named", "named steps"],
  ["nothing", "named no step"],
  ["unreadable", "answer unreadable"],
  ["missed", "missed the fault"],
  ["skipped", "failed, skipped"],
  ["trained", "trained on"],
  ["untrained", "targets not trained on"],
];
const SORTS = [
  ["", "in the order played"],
  ["newest", "last training step first"],
  ["longest", "most steps first"],
  ["shortest", "fewest steps first"],
  ["tokens", "most tokens first"],
  ["targets", "most targets first"],
  ["divergence", "teacher differs most first"],
  ["task", "by task"],
];
const HELD_OUT = { before: "held out, before", after: "held out, after" };

function drawFilters() {
  const e = data.episodes,
    kinds = new Set(data.names.kind);
  const own = kinds.has("training") ? "training" : "evaluation",
    steps = [...new Set(e.step.filter((_, n) => kindOf(n) === own))].sort((a, b) => b - a);
  const select = (key, label, options) => {
    const box = make(
      "select",
      { "aria-label": label, onchange: () => choose({ [key]: box.value }) },
      options.map(([value, text]) => make("option", { value }, text)),
    );
    return box;
  };
  list.filters = {
    run: select("run", "Run", [["", "all runs"], ...data.runs.map((run) => [run.name, run.name])]),
    step: select("step", "Training step", [
      ["", own === "training" ? "all training steps" : "all evaluations"],
      ...Object.entries(HELD_OUT).filter(([kind]) => kinds.has(kind)),
      ...steps.map((s) => [String(s), own === "training" ? `training step ${s}` : `after ${plural(s, "update")}`]),
    ]),
    outcome: select("outcome", "Outcome", OUTCOMES),
    ended: select("ended", "How it ended", [["", "ended: any way"], ...data.names.ended.map((text) => [text || "-", text || "not ended"])]),
    review: select("review", "Hindsight", REVIEWS),
    sort: select("sort", "Order", SORTS),
  };
  let waiting = 0;
  list.filters.q = make("input", {
    type: "search",
    placeholder: "search in tasks and all texts",
    "aria-label": "Search in tasks and all texts",
    oninput: () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => choose({ q: list.filters.q.value }), 250);
    },
  });
  const { run, step, outcome, ended, review, sort, q } = list.filters;
  return make("div.filters", null, q, data.runs.length > 1 ? run : null, step, outcome, review, ended, sort);
}

function choose(changes) {
  link.set(changes);
  applyFilters();
}

// Takes the filters from the link.
function applyFilters() {
  for (const [key, box] of Object.entries(list.filters)) {
    const value = link.get(key);
    if (key === "q" && document.activeElement === box) continue; // what somebody types comes first
    if (box.matches("select") && ![...box.options].some((option) => option.value === value))
      box.append(make("option", { value }, chipText(key, value)));
    if (box.value !== value) box.value = value;
  }
  const state = Object.keys(NO_FILTERS).map((key) => key !== "beside" && link.get(key)) + link.get("sort");
  if (state === list.state) return;
  list.state = state;
  lookFor(link.get("q").trim().toLowerCase(), filter);
  filter();
  list.box.scrollTop = 0;
  reveal();
}

function filtered() {
  const e = data.episodes,
    run = link.get("run"),
    step = link.get("step"),
    outcome = link.get("outcome"),
    ended = link.get("ended"),
    review = link.get("review"),
    turn = link.get("turned");
  const between = (span, value) => value >= span[0] && value <= span[1],
    steps = range(step),
    target = range(link.get("target")),
    part = range(link.get("part"));
  const tenth = (s, length) => Math.min(Math.max(Math.floor((10 * (s - 0.5)) / Math.max(length, 1)), 0), 9);
  const reviewed = {
    missed: (n) => e.missed[n],
    trained: (n) => e.trained[n].length,
    untrained: (n) => e.targets[n].some((t) => !e.trained[n].includes(t)),
  };
  const isReviewed = reviewed[review] ?? ((n) => data.names.review[e.review[n]] === review);
  const shown = [];
  for (let n = 0; n < e.run.length; n++) {
    if (run && data.runs[e.run[n]].name !== run) continue;
    if (step && (steps ? isHeldOut(n) || !between(steps, e.step[n]) : kindOf(n) !== step)) continue;
    if (outcome && Boolean(e.success[n]) !== (outcome === "won")) continue;
    if (ended && (data.names.ended[e.ended[n]] || "-") !== ended) continue;
    if (review && !isReviewed(n)) continue;
    if (turn && turned(n) !== turn) continue;
    if (target && !e.targets[n].some((t) => between(target, t))) continue;
    if (part && !e.targets[n].some((t) => between(part, tenth(t, e.steps[n])))) continue;
    if (search.words && !search.hits.has(n)) continue;
    shown.push(n);
  }
  return shown;
}

function sorted(shown) {
  const e = data.episodes,
    down = (value) => (a, b) => (value(b) ?? -Infinity) - (value(a) ?? -Infinity) || a - b;
  const orders = {
    newest: down((n) => e.step[n]),
    longest: down((n) => e.steps[n]),
    shortest: down((n) => -e.steps[n]),
    tokens: down((n) => e.tokens[n]),
    targets: down((n) => e.targets[n].length),
    divergence: down((n) => e.divergence[n] ?? -1),
    task: (a, b) => data.names.task[e.task[a]].localeCompare(data.names.task[e.task[b]], "en", { numeric: true }) || a - b,
  };
  const order = orders[link.get("sort")];
  return order ? shown.sort(order) : shown;
}

// A filter in words.
function chipText(key, value) {
  const many = (text) => (text.includes("-") ? text.replace("-", " to ") : text);
  if (key === "target") return `a target at step ${many(value)}`;
  if (key === "part") return `a target at ${10 * Number(value)} to ${10 * Number(value) + 10} % of the episode`;
  if (key === "turned") return Object.fromEntries(TURNS)[value] ?? value;
  if (key === "step" && range(value)) return `training step ${many(value)}`;
  return value;
}

// Filters that have no box of their own, each with a way out, and one out of all.
function drawChips(place) {
  const own = ["target", "part", "turned"].filter((key) => link.get(key));
  const set = Object.keys(NO_FILTERS).filter((key) => key !== "beside" && link.get(key));
  const chip = (text, changes, label) => make("button.chip", { type: "button", "aria-label": label, onclick: () => clear(changes) }, text, " \u00d7");
  const clear = (changes) => {
    choose(changes);
    if (!link.get("q")) list.filters.q.value = "";
    list.box.focus();
  };
  place.replaceChildren(
    ...own.map((key) => chip(chipText(key, link.get(key)), { [key]: "" }, `Without the filter: ${chipText(key, link.get(key))}`)),
    ...(set.length ? [chip("all filters", { ...NO_FILTERS, beside: link.get("beside") }, "Without any filter")] : []),
  );
}
