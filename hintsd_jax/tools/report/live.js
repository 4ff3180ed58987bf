// While a run goes on, `hintsd-jax report --watch` writes this file again and again, and the page loads itself; what is chosen stands in the
// link. Not while somebody types, has marked text, or reads an episode: then it waits.

const live = {
  get paused() {
    return link.get("live") === "off";
  },
  start() {
    if (!data.live) return;
    this.restore();
    const said = make("span.live-note", { role: "status" }),
      button = make("button.quiet", { type: "button" });
    const say = () => {
      const written = new Date(document.lastModified).toLocaleTimeString();
      said.textContent = this.paused ? `as of ${written}` : `live, as of ${written}`;
      button.textContent = this.paused ? "Go on" : "Pause";
    };
    button.addEventListener("click", () => {
      link.set({ live: this.paused ? "" : "off" });
      say();
    });
    document.querySelector(".top .bar nav").before(make("span.live", null, said, button));
    say();
    setInterval(() => {
      if (!this.paused && !this.busy()) {
        this.keep();
        location.reload();
      }
    }, 1000 * data.live);
  },
  busy() {
    const typing = document.activeElement?.matches("input, select, textarea"),
      reading = link.path.startsWith("episode/");
    return document.hidden || typing || reading || !getSelection().isCollapsed;
  },
  // Where the page was scrolled to outlives a load.
  keep() {
    try {
      sessionStorage.setItem("place", JSON.stringify([scrollY, list.box?.scrollTop ?? 0]));
    } catch {
      // a browser that lets no file keep anything: the page begins at its top
    }
  },
  restore() {
    try {
      const [page, rows] = JSON.parse(sessionStorage.getItem("place") ?? "[0,0]");
      sessionStorage.removeItem("place");
      requestAnimationFrame(() => {
        scrollTo(0, page);
        if (list.box) list.box.scrollTop = rows;
      });
    } catch {
      // as above
    }
  },
};
