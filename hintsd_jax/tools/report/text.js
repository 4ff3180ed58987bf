// Numbers and texts for people, and the making of elements. Nothing here or elsewhere writes markup: only text nodes and attributes.

const MINUS = "\u2212";

// A number with about three digits: 0.0312, 4.57, 128, 12,345, 1.2M.
function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  const size = Math.abs(value);
  let text;
  if (size >= 1e9) text = trim(size / 1e9, 2) + "B";
  else if (size >= 1e6) text = trim(size / 1e6, 2) + "M";
  else if (size >= 1e4)
    text = Math.round(size)
      .toString()
      .replace(/\B(?=(\d{3})+$)/g, ",");
  else if (size >= 100 || size === 0) text = trim(size, size < 1000 ? 1 : 0);
  else if (size >= 1e-3) text = String(Number(size.toPrecision(3)));
  else text = size.toExponential(1).replace("e-", "e" + MINUS);
  return (value < 0 ? MINUS : "") + text;
}

function trim(value, digits) {
  return String(Number(value.toFixed(digits)));
}

// A share in percent. Ties go to the even digit, as in the tables that the run itself writes.
function percent(value, digits = 1) {
  if (value === null || value === undefined) return "\u2013";
  const scaled = Number((100 * value * 10 ** digits).toPrecision(12)),
    low = Math.floor(scaled);
  const whole = scaled - low === 0.5 ? low + (low % 2 === 0 ? 0 : 1) : Math.round(scaled);
  return (whole / 10 ** digits).toFixed(digits).replace("-", MINUS);
}

function signed(value, digits = 1) {
  return (value > 0 ? "+" : "") + percent(value, digits);
}

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  if (value < 120) return `${trim(value, value < 10 ? 1 : 0)} s`;
  const minutes = Math.round(value / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function plural(count, word) {
  return `${short(count)} ${word}${count === 1 ? "" : "s"}`;
}

// Round numbers that divide [low, high] into about `count` parts.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
  return found;
}

// What the model wrote, in parts: {say}, {think} or {call: {name, args}}; a call that is no JSON stays {say}.
function actionParts(text) {
  const parts = [],
    pattern = /<tool_call>\s*([\s\S]*?)\s*<\/tool_call>|<think>([\s\S]*?)<\/think>/g;
  let end = 0;
  const say = (words) => words.trim() && parts.push({ say: words.trim() });
  for (const match of text.matchAll(pattern)) {
    say(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) {
      if (match[2].trim()) parts.push({ think: match[2].trim() });
      continue;
    }
    const call = readCall(match[1]);
    parts.push(call ? { call } : { say: match[0] });
  }
  say(text.slice(end));
  return parts;
}

function readCall(text) {
  try {
    const value = JSON.parse(text);
    const args = value.arguments ?? {};
    return typeof value.name === "string" && typeof args === "object" ? { name: value.name, args } : null;
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof TypeError) return null;
    throw error;
  }
}

// An observation: what the tools answered, and what the user said next (written after "user: ").
function observationParts(text) {
  const at = text.search(/(^|\n)user: /);
  if (at < 0) return { tool: text, user: "" };
  return { tool: text.slice(0, at), user: text.slice(at).replace(/^\n?user: /, "") };
}

// make("p.note", {title: "..."}, "text", element, ...): an element with its classes, attributes, listeners (on...) and children.
function make(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  dress(element, attributes, children);
  return element;
}

// The same for the parts of a picture.
function draw(name, attributes, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElementNS(document.querySelector(".mark svg").namespaceURI, tag);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  dress(element, attributes, children);
  return element;
}

function dress(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) element.append(child);
}

// A long text: its beginning, and the rest on demand.
function longText(text, limit = 1200) {
  if (text.length <= limit) return document.createTextNode(text);
  const box = make("span", null, `${text.slice(0, limit)}\u2026 `);
  box.append(
    make("button.more", { type: "button", onclick: () => box.replaceWith(document.createTextNode(text)) }, `all ${short(text.length)} characters`),
  );
  return box;
}

// The small label beside the pointer.
const tip = {
  show(lines, x, y) {
    const box = document.getElementById("tip");
    box.replaceChildren(...lines.filter(Boolean));
    box.hidden = false;
    const width = box.offsetWidth,
      height = box.offsetHeight;
    box.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
    box.style.top = `${y + height + 22 > innerHeight ? Math.max(8, y - height - 12) : y + 16}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};
