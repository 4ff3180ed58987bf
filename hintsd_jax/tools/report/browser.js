// The list of episodes: a list that draws only the rows in sight, keys, and the place for the opened one.

const ROW = 54; // pixels, as in the style
const list = { shown: [], chosen: null, opened: "", byTask: null, box: null };

function lineOf(n) {
  const e = data.episodes;
  return {
    n,
    run: e.run[n],
    kind: kindOf(n),
    step: e.step[n],
    task: data.names.task[e.task[n]],
    rollout: e.rollout[n],
    success: e.success[n],
    steps: e.steps[n],
    tokens: e.tokens[n],
    ended: data.names.ended[e.ended[n]],
    targets: e.targets[n],
    trained: e.trained[n],
    review: data.names.review[e.review[n]],
    missed: e.missed[n],
    divergence: e.divergence[n],
  };
}

// When an episode was played, in words.
function whenOf(line) {
  if (line.kind === "before" || line.kind === "after") return `held out, ${line.kind}`;
  return line.kind === "evaluation" ? `evaluation after ${plural(line.step, "update")}` : `training step ${line.step}`;
}

// The link to an episode, or to one of its steps; the filters stay.
function linkOf(n, step, changes) {
  const line = lineOf(n),
    place = isHeldOut(n) ? line.kind : line.step;
  const parts = ["episode", data.runs[line.run].name, place, line.task, line.rollout, ...(step ? [step] : [])];
  return link.to(parts.map((part) => encodeURIComponent(part)).join("/"), changes);
}

function findLink(parts) {
  const [name, place, task, rollout] = parts,
    e = data.episodes;
  const run = data.runs.findIndex((r) => r.name === name),
    known = data.names.task.indexOf(task),
    heldOut = place === "before" || place === "after";
  const isThere = (n) => (heldOut ? kindOf(n) === place : !isHeldOut(n) && e.step[n] === Number(place));
  return e.run.findIndex((r, n) => r === run && e.task[n] === known && e.rollout[n] === Number(rollout) && isThere(n));
}

function siblingsOf(n) {
  const e = data.episodes,
    key = (m) => `${e.run[m]} ${e.kind[m]} ${e.step[m]} ${e.task[m]}`;
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
    const text = total ? `None of ${plural(total, "recorded episode")} is in this report (--episodes).` : "No episodes are recorded yet.";
    main.replaceChildren(make("h1.unseen", null, "Episodes"), make("p.empty", null, text));
    return;
  }
  list.count = make("p.note.count-line", { role: "status" });
  list.chips = make("div.chips");
  list.rows = make("div.rows");
  list.box = make("div.list", { role: "listbox", tabindex: 0, "aria-label": "Episodes", onscroll: drawRows }, list.rows);
  const note = kept < total ? make("p.note", null, `${short(kept)} of ${short(total)} recorded episodes are in this report (--episodes).`) : null;
  list.place = make("article.open", { "aria-live": "off" }, make("p.empty", null, "Choose an episode."));
  const button = (label, by, sign) => make("button", { type: "button", "aria-label": label, title: label, onclick: () => walk(by) }, sign);
  list.back = make("a.back", { href: "#episodes" }, "\u2190 all episodes");
  main.replaceChildren(
    make("h1.unseen", null, "Episodes"),
    make(
      "div.browser",
      null,
      make(
        "aside.side-list",
        { "aria-label": "List of episodes" },
        drawFilters(),
        list.chips,
        make(
          "div.line.counted",
          null,
          list.count,
          csvButton("episodes", () => episodesTable(list.shown)),
        ),
        note,
        list.box,
      ),
      make(
        "div.opened",
        null,
        make(
          "div.walk",
          null,
          list.back,
          make("span.keys-hint", null, "\u2190 \u2192 other episodes"),
          button("Previous episode", -1, "\u2190"),
          button("Next episode", 1, "\u2192"),
        ),
        list.place,
      ),
    ),
  );
  new ResizeObserver(drawRows).observe(list.box);
}

// Shows the episodes that the link's filters let through, in its order.
function filter() {
  list.shown = sorted(filtered());
  list.back.href = link.to("episodes");
  drawChips(list.chips);
  const won = list.shown.filter((n) => data.episodes.success[n]).length;
  const going = searching() ? `searching, ${percent(search.read / Math.ceil(data.episodes.run.length / data.chunk), 0)} %: ` : "";
  list.count.textContent =
    going +
    (list.shown.length
      ? `${plural(list.shown.length, "episode")}, ${percent(won / list.shown.length, 0)} % succeeded`
      : going
        ? ""
        : "No episode is like that.");
  list.rows.style.height = `${list.shown.length * ROW}px`;
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
  const facts = [data.runs.length > 1 ? data.runs[line.run].name : null, whenOf(line), `rollout ${line.rollout}`, plural(line.steps, "step")]
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
      onclick: () => {
        location.hash = linkOf(n);
      },
    },
    outcomeSign(line.success),
    make("span.task", null, make("span.unseen", null, line.success ? "succeeded: " : "failed: "), line.task),
    line.targets.length
      ? make(
          "span.count",
          { title: `targets: steps ${line.targets.join(", ")}` },
          make("span.unseen", null, "targets at steps "),
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
  const beside = link.get("beside") === "1" ? pairs.of(n) : undefined,
    shown = `${n} ${beside}`;
  if (shown === list.opened) {
    if (step) goTo(step);
    return null;
  }
  list.chosen = n;
  reveal();
  drawRows();
  let entry, other;
  try {
    entry = await entryOf(n);
    if (beside !== undefined) other = await entryOf(beside);
  } catch (error) {
    if (n === list.chosen)
      return list.place.replaceChildren(make("p.empty", null, `This episode cannot be unpacked by this browser (${error.message}).`));
    return null;
  }
  if (n !== list.chosen) return null; // another was chosen meanwhile
  list.place.classList.toggle("beside", Boolean(other));
  const parts = other ? drawPair(n, entry, beside, other) : drawEpisode(lineOf(n), entry, siblingsOf(n));
  list.place.replaceChildren(...parts.filter(Boolean));
  list.opened = shown;
  list.place.parentElement.scrollTop = 0;
  scrollTo(0, 0); // on a narrow page, which scrolls as a whole
  const found = markFound(list.place);
  if (step) goTo(step);
  else found?.startContainer.parentElement.scrollIntoView({ block: "center" });
  return null;
}

async function entryOf(n) {
  return (await chunk(Math.floor(n / data.chunk)))[n % data.chunk];
}

// Chunks are unpacked when needed; the last few stay.
const unpacked = new Map();

// The page is drawn before the chunks have arrived: whoever wants one meanwhile waits. One is whole when another element follows it.
const arrived = new Promise((resolve) => addEventListener("DOMContentLoaded", resolve, { once: true }));

// keep: whether it stays unpacked; those that a search goes through do not.
async function chunk(n, keep = true) {
  if (document.readyState === "loading" && !document.getElementById(`chunk-${n}`)?.nextElementSibling) await arrived;
  if (unpacked.has(n)) return unpacked.get(n);
  const entries = unpack(document.getElementById(`chunk-${n}`).textContent);
  if (keep) unpacked.set(n, entries);
  if (unpacked.size > 6) unpacked.delete(unpacked.keys().next().value);
  return entries;
}

async function unpack(text) {
  const bytes_ = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes_]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
