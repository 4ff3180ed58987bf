// The list of episodes: filters, a list that draws only the rows in sight, keys, and the place for the opened one.

const ROW = 54; // pixels, as in the style
const list = { shown: [], chosen: null, opened: null, byTask: null, box: null };

function lineOf(n) {
  const e = data.episodes;
  return {
    n,
    run: e.run[n],
    step: e.step[n],
    task: data.names.task[e.task[n]],
    rollout: e.rollout[n],
    success: e.success[n],
    steps: e.steps[n],
    ended: data.names.ended[e.ended[n]],
    targets: e.targets[n],
    trained: e.trained[n],
  };
}

// The link to an episode, or to one of its steps.
function linkOf(n, step) {
  const line = lineOf(n);
  return (
    "#" +
    ["episode", data.runs[line.run].name, line.step, line.task, line.rollout, ...(step ? [step] : [])]
      .map((part) => encodeURIComponent(part))
      .join("/")
  );
}

function findLink(parts) {
  const [name, step, task, rollout] = parts,
    e = data.episodes;
  const run = data.runs.findIndex((r) => r.name === name),
    known = data.names.task.indexOf(task);
  return e.run.findIndex((r, n) => r === run && e.task[n] === known && e.step[n] === Number(step) && e.rollout[n] === Number(rollout));
}

function siblingsOf(n) {
  const e = data.episodes,
    key = (m) => `${e.run[m]} ${e.step[m]} ${e.task[m]}`;
  if (!list.byTask) {
    list.byTask = new Map();
    e.run.forEach((_, m) => list.byTask.set(key(m), [...(list.byTask.get(key(m)) || []), m]));
  }
  return list.byTask.get(key(n));
}

function drawBrowser(main) {
  const total = data.runs.reduce((a, run) => a + run.episodes, 0),
    kept = data.episodes.run.length;
  if (!kept) {
    main.replaceChildren(make("p.empty", null, "No episodes are recorded yet."));
    return;
  }
  const option = (value, text) => make("option", { value }, text);
  const steps = [...new Set(data.episodes.step)].sort((a, b) => b - a);
  const outcomes = [
    ["", "all outcomes"],
    ["lost", "failed"],
    ["won", "succeeded"],
    ["targets", "with targets"],
    ["trained", "trained on"],
  ];
  list.filters = {
    run: make(
      "select",
      { "aria-label": "Run", onchange: filter },
      option("", "all runs"),
      data.runs.map((run, n) => option(n, run.name)),
    ),
    step: make(
      "select",
      { "aria-label": "Training step", onchange: filter },
      option("", "all training steps"),
      steps.map((s) => option(s, `training step ${s}`)),
    ),
    outcome: make(
      "select",
      { "aria-label": "Outcome", onchange: filter },
      outcomes.map(([v, t]) => option(v, t)),
    ),
    task: make("input", { type: "search", placeholder: "task", "aria-label": "Task contains", oninput: filter }),
  };
  list.count = make("p.note", { role: "status" });
  list.rows = make("div.rows");
  list.box = make("div.list", { role: "listbox", tabindex: 0, "aria-label": "Episodes", onscroll: drawRows }, list.rows);
  const note = kept < total ? make("p.note", null, `${short(kept)} of ${short(total)} recorded episodes are in this report (--episodes).`) : null;
  list.place = make("article.open", { "aria-live": "off" }, make("p.empty", null, "Choose an episode."));
  const button = (label, by, sign) => make("button", { type: "button", "aria-label": label, title: label, onclick: () => walk(by) }, sign);
  main.replaceChildren(
    make(
      "div.browser",
      null,
      make(
        "aside.side-list",
        null,
        make("div.filters", null, data.runs.length > 1 ? list.filters.run : null, list.filters.step, list.filters.outcome, list.filters.task),
        list.count,
        note,
        list.box,
      ),
      make(
        "div.opened",
        null,
        make(
          "div.walk",
          null,
          make("a.back", { href: "#episodes" }, "\u2190 all episodes"),
          make("span.keys-hint", null, "\u2190 \u2192 other episodes"),
          button("Previous episode", -1, "\u2190"),
          button("Next episode", 1, "\u2192"),
        ),
        list.place,
      ),
    ),
  );
  new ResizeObserver(drawRows).observe(list.box);
  filter();
}

function filter() {
  const { run, step, outcome, task } = list.filters,
    e = data.episodes,
    words = task.value.trim().toLowerCase();
  const names = words ? new Set(data.names.task.flatMap((name, n) => (name.toLowerCase().includes(words) ? [n] : []))) : null;
  list.shown = [];
  for (let n = 0; n < e.run.length; n++) {
    if (run.value !== "" && e.run[n] !== Number(run.value)) continue;
    if (step.value !== "" && e.step[n] !== Number(step.value)) continue;
    if (outcome.value === "won" && !e.success[n]) continue;
    if (outcome.value === "lost" && e.success[n]) continue;
    if (outcome.value === "targets" && !e.targets[n].length) continue;
    if (outcome.value === "trained" && !e.trained[n].length) continue;
    if (names && !names.has(e.task[n])) continue;
    list.shown.push(n);
  }
  const won = list.shown.filter((n) => e.success[n]).length;
  list.count.textContent = list.shown.length
    ? `${plural(list.shown.length, "episode")}, ${percent(won / list.shown.length, 0)} % succeeded`
    : "No episode is like that.";
  list.rows.style.height = `${list.shown.length * ROW}px`;
  list.box.scrollTop = 0;
  reveal();
  drawRows();
}

function drawRows() {
  const first = Math.max(0, Math.floor(list.box.scrollTop / ROW) - 4);
  const last = Math.min(list.shown.length, Math.ceil((list.box.scrollTop + list.box.clientHeight) / ROW) + 4);
  const rows = [];
  for (let i = first; i < last; i++) rows.push(drawRow(list.shown[i], i));
  list.rows.replaceChildren(...rows);
  const active = list.shown.indexOf(list.chosen);
  if (active >= first && active < last) list.box.setAttribute("aria-activedescendant", `row-${list.chosen}`);
  else list.box.removeAttribute("aria-activedescendant");
}

function drawRow(n, i) {
  const line = lineOf(n);
  const facts = [data.runs.length > 1 ? data.runs[line.run].name : null, `training step ${line.step}`, `rollout ${line.rollout}`, plural(line.steps, "step")]
    .filter(Boolean)
    .join(" \u00b7 ");
  const row = make(
    "div.item",
    {
      role: "option",
      id: `row-${n}`,
      "aria-selected": String(n === list.chosen),
      "aria-setsize": list.shown.length,
      "aria-posinset": i + 1,
      "aria-label": `${line.task}, ${line.success ? "succeeded" : "failed"}, ${facts}`,
      onclick: () => {
        location.hash = linkOf(n);
      },
    },
    outcomeSign(line.success),
    make("span.task", null, line.task),
    line.targets.length
      ? make(
          "span.count",
          { title: `targets: steps ${line.targets.join(", ")}` },
          line.targets.slice(0, 4).map((t) => make("i", null, String(t))),
          line.targets.length > 4 ? "\u2026" : null,
        )
      : null,
    make("span.soft", null, facts),
  );
  row.style.top = `${i * ROW}px`;
  return row;
}

// Scrolls the list so that the chosen row is in sight.
function reveal() {
  const at = list.shown.indexOf(list.chosen);
  if (at < 0) return;
  const top = at * ROW,
    height = list.box.clientHeight;
  if (top < list.box.scrollTop || top + ROW > list.box.scrollTop + height) list.box.scrollTop = Math.max(0, top - height / 2 + ROW / 2);
}

// To a neighbour in the list as it is filtered; without an opened episode, to the first or last one.
function walk(by) {
  const at = list.shown.indexOf(list.chosen);
  const to = at < 0 ? (by > 0 ? 0 : list.shown.length - 1) : at + by;
  if (list.shown[to] !== undefined) location.replace(linkOf(list.shown[to]));
}

async function open(n, step) {
  if (n === list.opened && step) return goTo(step);
  list.chosen = n;
  reveal();
  drawRows();
  let entry;
  try {
    entry = (await chunk(Math.floor(n / data.chunk)))[n % data.chunk];
  } catch (error) {
    if (n === list.chosen)
      return list.place.replaceChildren(make("p.empty", null, `This episode cannot be unpacked by this browser (${error.message}).`));
    return null;
  }
  if (n !== list.chosen) return null; // another was chosen meanwhile
  list.place.replaceChildren(...drawEpisode(lineOf(n), entry, siblingsOf(n)));
  list.opened = n;
  if (step) return goTo(step);
  list.place.parentElement.scrollTop = 0;
  scrollTo(0, 0); // on a narrow page, which scrolls as a whole
  return null;
}

// Chunks are unpacked when needed; the last few stay.
const unpacked = new Map();

// The page is drawn before the chunks have arrived: whoever wants one meanwhile waits. One is whole when another element follows it.
const arrived = new Promise((resolve) => addEventListener("DOMContentLoaded", resolve, { once: true }));

async function chunk(n) {
  if (document.readyState === "loading" && !document.getElementById(`chunk-${n}`)?.nextElementSibling) await arrived;
  if (!unpacked.has(n)) {
    unpacked.set(n, unpack(document.getElementById(`chunk-${n}`).textContent));
    if (unpacked.size > 6) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(n);
}

async function unpack(text) {
  const bytes_ = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes_]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
