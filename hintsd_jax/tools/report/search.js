// Search in all texts: chunks of episodes are unpacked one after another, and the list grows while they are.

const search = { words: "", hits: new Set(), read: 0, running: 0 };

// Everything of an episode that a person can read on the page.
function* textsOf(entry) {
  yield entry.detail;
  yield entry.report;
  for (const message of entry.prompt) yield message.content;
  for (const step of entry.steps) {
    yield step.text;
    yield step.observation;
    yield step.note;
  }
  for (const fault of entry.faults) yield fault.feedback;
  if (entry.hindsight) {
    yield entry.hindsight.answer;
    yield entry.hindsight.problem ?? "";
    for (const target of entry.hindsight.targets) yield target.feedback;
  }
}

const holds = (entry, words) => [...textsOf(entry)].some((text) => String(text).toLowerCase().includes(words));

// Begins a search for `words` (small letters); `changed` is called whenever the hits have. The same words again are not looked for twice.
async function lookFor(words, changed) {
  if (words === search.words) return;
  const chunks = Math.ceil(data.episodes.run.length / data.chunk),
    mine = ++search.running;
  Object.assign(search, { words, hits: new Set(), read: words ? 0 : chunks });
  if (!words) return;
  data.episodes.task.forEach((task, n) => data.names.task[task].toLowerCase().includes(words) && search.hits.add(n));
  let said = performance.now();
  for (let c = 0; c < chunks; c++) {
    const entries = await chunk(c, false).catch(() => []); // one that cannot be unpacked says so when it is opened
    if (mine !== search.running) return; // other words meanwhile
    entries.forEach((entry, i) => holds(entry, words) && search.hits.add(c * data.chunk + i));
    search.read = c + 1;
    if (performance.now() - said > 200 || search.read === chunks) {
      said = performance.now();
      changed();
    }
  }
}

const searching = () => search.words !== "" && search.read < Math.ceil(data.episodes.run.length / data.chunk);

// Marks what was searched for in an opened episode, and gives its first place. By ranges beside the page's content, which stays as it is.
function markFound(box) {
  if (typeof Highlight === "undefined" || !CSS.highlights) return null;
  CSS.highlights.delete("found");
  if (!search.words) return null;
  const ranges = [],
    walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node && ranges.length < 2000; node = walker.nextNode()) {
    const text = node.data.toLowerCase();
    if (text.length !== node.data.length) continue; // letters whose small form has another length
    for (let at = text.indexOf(search.words); at >= 0; at = text.indexOf(search.words, at + search.words.length)) {
      const found = new Range();
      found.setStart(node, at);
      found.setEnd(node, at + search.words.length);
      ranges.push(found);
    }
  }
  if (ranges.length) CSS.highlights.set("found", new Highlight(...ranges));
  return ranges.find((found) => found.getClientRects().length) ?? null;
}
