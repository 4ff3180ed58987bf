// The start: reads the overview, and shows the part that the link names: #overview, #episodes, #episode/run/step/task/rollout (for the step also
// before or after: held-out tasks), and one step of it: .../rollout/step; behind a ? what is chosen there (link.js).

const data = JSON.parse(document.getElementById("data").textContent);
const drawn = new Set();

const titled = data.runs.length === 1 ? data.runs[0].name : `${data.runs.length} runs`;
document.title = `${titled} \u00b7 run report`;
document.getElementById("title").textContent = titled;

function show(part) {
  for (const name of ["overview", "episodes"]) {
    document.getElementById(name).hidden = name !== part;
    const tab = document.getElementById(`tab-${name}`);
    if (name === part) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  if (!drawn.has(part)) {
    drawn.add(part);
    (part === "overview" ? drawOverview : drawBrowser)(document.getElementById(part));
  }
}

// Anew where the link says something else than what is drawn, such as after a step back in the browser's history.
let drawnAs = null;
function showOverview() {
  const said = JSON.stringify([view.axis, [...view.hidden], view.means, link.get("targets")]);
  if (drawnAs !== null && drawnAs !== said) drawn.delete("overview");
  drawnAs = said;
  show("overview");
}

function route() {
  tip.hide();
  const [kind, ...rest] = link.path.split("/").map(decode);
  for (const name of ["overview", "episodes"]) document.getElementById(`tab-${name}`).href = link.to(name);
  if (kind !== "episode" && kind !== "episodes") return showOverview();
  show("episodes");
  const found = kind === "episode" ? findLink(rest) : -1;
  if (!list.box) return null; // no episode at all
  applyFilters();
  const wide = matchMedia("(min-width: 861px)").matches;
  document.body.classList.toggle("one", found >= 0);
  if (found >= 0) return open(found, Number(rest[4]) || null);
  if (kind === "episode") {
    list.place.replaceChildren(make("p.empty", null, "The linked episode is not in this report."));
    document.body.classList.add("one");
  } else if (wide && list.shown.length) location.replace(linkOf(list.shown.includes(list.chosen) ? list.chosen : firstOf()));
  reveal();
  drawRows();
  return null;
}

// What to open first: an episode of the last training step in the report that was trained on, or has targets.
function firstOf() {
  const e = data.episodes,
    last = (test) => list.shown.filter(test).reduce((best, n) => (best === null || e.step[n] > e.step[best] ? n : best), null);
  return last((n) => e.trained[n].length) ?? last((n) => e.targets[n].length) ?? list.shown[0];
}

document.addEventListener("keydown", (event) => {
  if (document.getElementById("episodes").hidden || !list.box || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const within = event.target instanceof Element ? event.target : document.body,
    typing = within.matches("input, select, textarea");
  const inList = within === list.box;
  const by = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1, ...(inList ? { ArrowUp: -1, ArrowDown: 1 } : {}) }[event.key];
  if (!by || typing || within.closest(".scroll")) return;
  event.preventDefault();
  walk(by);
});

// A link that was drawn before a filter was chosen takes it along now, unless it chooses itself.
document.addEventListener(
  "click",
  (event) => {
    const anchor = event.target instanceof Element && event.target.closest('a[href^="#episode/"]:not([data-own])');
    if (anchor) anchor.setAttribute("href", link.to(anchor.getAttribute("href").slice(1).split("?")[0]));
  },
  true,
);

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.querySelector("main:not([hidden])").focus();
});

addEventListener("hashchange", route);
route();
live.start();
