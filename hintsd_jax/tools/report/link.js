// The state of the page stands in its link: #PART/...?key=value&... What is at its default is not in it, so a link can be sent beside the file.

const link = {
  get path() {
    return location.hash.slice(1).split("?")[0];
  },
  get values() {
    return new URLSearchParams(location.hash.slice(1).split("?").slice(1).join("?"));
  },
  get(key) {
    return this.values.get(key) ?? "";
  },
  // The link to a part with the state as it is, but for `changes`: key -> text, a list of texts, or "" for the default.
  to(path, changes = {}) {
    const values = this.values;
    for (const [key, value] of Object.entries(changes)) {
      values.delete(key);
      for (const text of [value].flat()) if (text !== "" && text !== null) values.append(key, text);
    }
    const query = values.toString();
    return `#${path}${query ? `?${query}` : ""}`;
  },
  // Without an entry in the browser's history.
  set(changes) {
    location.replace(this.to(this.path || "overview", changes));
  },
};

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch (error) {
    if (error instanceof URIError) return part;
    throw error;
  }
}

// "5" or "5-8" as [5, 8]; null where it is neither.
function range(text) {
  const match = /^(\d+)(?:-(\d+))?$/.exec(text);
  return match ? [Number(match[1]), Number(match[2] ?? match[1])] : null;
}
