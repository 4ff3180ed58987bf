// The start: reads the overview, and shows the part that the link names: #overview, #episodes, #episode/run/step/task/rollout,
// and one step of it: .../rollout/step.

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

function route() {
  tip.hide();
  const [kind, ...rest] = location.hash.slice(1).split("/").map(decode);
  if (kind !== "episode" && kind !== "episodes") return show("overview");
  show("episodes");
  const found = kind === "episode" ? findLink(rest) : -1;
  if (!list.box) return null; // no episode at all
  const wide = matchMedia("(min-width: 861px)").matches;
  document.body.classList.toggle("one", found >= 0);
  if (found >= 0) return open(found, Number(rest[4]) || null);
  if (kind === "episode") {
    list.place.replaceChildren(make("p.empty", null, "The linked episode is not in this report."));
    document.body.classList.add("one");
  } else if (wide && list.shown.length) location.replace(linkOf(list.chosen ?? firstOf()));
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

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch (error) {
    if (error instanceof URIError) return part;
    throw error;
  }
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

addEventListener("hashchange", route);
route();
