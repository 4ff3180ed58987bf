// From values to axes: how far an axis goes, which places of it are named, and how.

// Values that are told apart by rounding only are the same.
const isFlat = (low, high) => high - low <= 1e-9 * Math.max(Math.abs(low), Math.abs(high));

// spec: {zero, one}; one: shares, which end at 0 and 1. Gives {low, high, flat}; a series that never changes is drawn above its own zero.
function span(values, spec) {
  let low = Infinity,
    high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (spec.one && low >= 0 && high <= 1) return { low: 0, high: high > 0.5 ? 1 : high > 0.25 ? 0.5 : Math.max(high, 0.1), flat: false };
  if (isFlat(low, high)) {
    const value = (low + high) / 2;
    return { low: Math.min(0, 1.25 * value), high: value === 0 ? 1 : Math.max(0, 1.25 * value), flat: value };
  }
  if (low > 0 && (spec.zero || low / high < 0.35)) low = 0;
  if (high < 0 && spec.zero) high = 0;
  const room = 0.06 * (high - low);
  return { low: low === 0 ? 0 : low - room, high: high === 0 ? 0 : high + room, flat: false };
}

// The places that are named, with their names: round numbers in the unit that is shown, no name twice.
function named({ low, high, flat }, unit, count) {
  const { size, text } = unit.scaled ? unit.scaled(Math.max(Math.abs(low), Math.abs(high))) : { size: 1, text: unit };
  const at = flat === false ? ticks(low / size, high / size, count).map((t) => t * size) : [...new Set([0, flat])];
  const seen = new Set();
  return at.map((value) => ({ value, text: text(value) })).filter((tick) => !seen.has(tick.text) && seen.add(tick.text));
}

// Units: from a value to words. `scaled`, of an axis: the size of what is counted in, and the words then.
const PERCENT = (v) => `${trim(100 * v, Math.abs(v) < 0.1 && v !== 0 ? 1 : 0)} %`;
const EXACT = (v) => `${percent(v)} %`;
const GIBIBYTES = Object.assign((v) => `${short(v / 2 ** 30)} GiB`, { scaled: () => ({ size: 2 ** 30, text: (v) => short(v / 2 ** 30) }) });
const TIME = Object.assign((v) => seconds(v), {
  scaled(most) {
    if (most >= 7200) return { size: 3600, text: (v) => `${trim(v / 3600, 1)} h` };
    if (most >= 120) return { size: 60, text: (v) => `${trim(v / 60, 1)} min` };
    if (most >= 1) return { size: 1, text: (v) => `${trim(v, 2)} s` };
    return { size: 0.001, text: (v) => `${short(1000 * v)} ms` };
  },
});

// What a metric that has no chart of its own is counted in, from its name (docs/metrics.md).
function unitOf(name) {
  const last = name.split("/").at(-1);
  if (name.startsWith("time/")) return { unit: TIME, zero: true };
  if (last.includes("bytes")) return { unit: GIBIBYTES, label: "GiB", zero: true };
  if (/^(avg|best|sgc)@\d+$|^(success|precision|recall|unreadable|first_fault)$|_(share|fraction)$/.test(last))
    return { unit: PERCENT, exact: EXACT, one: true };
  if (/(^|_)tokens$/.test(last)) return { unit: short, zero: true }; // the name says what
  if (/^(divergence|entropy|logprob|logprob_mismatch.*|teacher_gap|.*kl.*)$/.test(last)) return { unit: short, label: "nats" };
  return { unit: short };
}
