// One episode, opened: outcome, a strip of its steps, what hindsight said, and the dialogue with the feedback at its targets.

// line: the row of the list; entry: the whole episode; siblings: list numbers of the other rollouts of its task in that training step;
// name: what the ids of its steps begin with.
function drawEpisode(line, entry, siblings, name = "step") {
  const targets = new Map((entry.hindsight?.targets || []).map((t) => [t.step, t.feedback]));
  const trained = new Map(entry.trained.map((span) => [span.step, span]));
  const faults = new Map(entry.faults.map((f) => [f.step, f.feedback]));
  const facts = [plural(line.steps, "step"), make("bdi", null, line.ended || "not ended"), `reward ${short(entry.reward)}`];
  if (targets.size) facts.push(plural(targets.size, "target"));
  const rollouts =
    siblings.length > 1
      ? make(
          "div.siblings",
          { role: "group", "aria-label": "Rollouts of this task" },
          make("span.soft", null, "rollouts"),
          siblings.map((n) => {
            const other = lineOf(n);
            return make(
              "a.sibling",
              {
                href: linkOf(n),
                "aria-current": n === line.n ? "true" : null,
                "aria-label": `rollout ${other.rollout}, ${other.success ? "succeeded" : "failed"}`,
              },
              outcomeSign(other.success),
              String(other.rollout),
            );
          }),
        )
      : null;
  const steps = entry.steps.map((step, i) => drawStep(step, i + 1, line, targets, trained, faults, `${name}-${i + 1}`));
  return [
    make(
      "div.episode-head",
      null,
      make(
        "h2",
        { tabindex: -1 },
        line.task,
        make("span.outcome" + (line.success ? ".won" : ".lost"), null, outcomeSign(line.success), line.success ? "succeeded" : "failed"),
      ),
      make(
        "p.note",
        null,
        [data.runs.length > 1 ? make("bdi", null, data.runs[line.run].name) : null, whenOf(line), `rollout ${line.rollout}`, ...facts]
          .filter(Boolean)
          .flatMap((fact, n) => (n ? [" \u00b7 ", fact] : [fact])),
      ),
      entry.detail ? make("p.note", null, longText(entry.detail)) : null,
      pairLinks(line.n),
      rollouts,
      drawStrip(line, targets, trained, faults),
    ),
    drawHindsight(line, entry),
    entry.trained.length ? tokenLegend(entry.trained) || "" : "",
    make("ol.dialogue", null, drawPrompt(entry), steps),
  ];
}

function outcomeSign(success) {
  const shape = success ? draw("path", { d: "M1.5 5.5 4.2 8.2 9 2.2" }) : draw("path", { d: "M2 2 8.5 8.5M8.5 2 2 8.5" });
  return draw(`svg.sign.${success ? "won" : "lost"}`, { viewBox: "0 0 10.5 10.5", width: 11, height: 11, "aria-hidden": "true" }, shape);
}

function goTo(n) {
  const step = document.getElementById(`step-${n}`);
  if (!step) return;
  step.scrollIntoView({ block: step.offsetHeight > innerHeight / 2 ? "start" : "center" });
  step.focus({ preventScroll: true });
}

function drawStrip(line, targets, trained, faults) {
  const cells = [];
  for (let n = 1; n <= line.steps; n++) {
    const kinds = [targets.has(n) && "a target", trained.has(n) && "trained on", faults.has(n) && "a true fault"].filter(Boolean);
    const name = ["cell", targets.has(n) && "hit", trained.has(n) && "fed", faults.has(n) && "fault"].filter(Boolean).join(".");
    cells.push(
      make(
        `a.${name}`,
        { href: linkOf(line.n, n), title: [`step ${n}`, ...kinds].join(", "), "aria-label": [`Go to step ${n}`, ...kinds].join(", ") },
        String(n),
      ),
    );
  }
  return make("div.strip", { role: "group", "aria-label": "Steps of the episode" }, cells);
}

function drawHindsight(line, entry) {
  const hindsight = entry.hindsight,
    box = make("div.hindsight-note");
  if (hindsight) {
    const how = [
      hindsight.analyser && `analyser ${hindsight.analyser}`,
      hindsight.select && hindsight.select !== "hindsight" && `steps chosen: ${hindsight.select}`,
      hindsight.feedback_position === "start" && "feedback placed at the start",
    ]
      .filter(Boolean)
      .join(" \u00b7 ");
    box.append(
      make(
        "p",
        null,
        make("b", null, "Hindsight "),
        hindsight.privileged ? make("span.warn", null, "privileged: knows the ground truth") : "",
        make("span.soft", null, ` ${how}`),
      ),
    );
    const part = hindsight.targets.length ? "Part of its answer" : "Its answer";
    if (hindsight.problem) box.append(make("p", null, `${part} could not be read: ${hindsight.problem}`));
    if (hindsight.targets.length)
      box.append(
        make(
          "ul.named",
          null,
          hindsight.targets.map((t) =>
            make(
              "li",
              null,
              make("a.number", { href: linkOf(line.n, t.step), "aria-label": `Go to step ${t.step}` }, String(t.step)),
              make("span", null, longText(t.feedback, 300)),
            ),
          ),
        ),
      );
    else if (!hindsight.problem) box.append(make("p", null, "It named no step."));
    if (line.missed) box.append(make("p.warn", null, "Ground truth: none of the steps that it named is a true fault."));
    if (hindsight.answer)
      box.append(make("details", null, make("summary", null, "The analyser's answer"), make("pre", null, longText(hindsight.answer, 4000))));
  } else if (line.review === "skipped") box.append(make("p", null, make("b", null, "Hindsight "), "It failed and was not looked back on."));
  if (entry.faults.length || entry.report) {
    box.append(
      make(
        "details",
        null,
        make("summary", null, "The environment's report (ground truth)"),
        entry.report ? make("p", null, longText(entry.report)) : null,
        entry.faults.length
          ? make(
              "ul",
              null,
              entry.faults.map((f) => make("li", null, make("b", null, `step ${f.step}: `), longText(f.feedback))),
            )
          : null,
      ),
    );
  }
  return box.childNodes.length ? box : "";
}

function drawPrompt(entry) {
  return entry.prompt.map((message) => {
    if (message.role === "user") return saying("user", message.content);
    const first = message.content.split("\n")[0];
    return make(
      "li.message.system",
      null,
      make("div.who", null, message.role),
      message.content.length > 160
        ? make("details.words", null, make("summary", null, first.slice(0, 120), "\u2026"), make("pre", null, longText(message.content, 6000)))
        : make("div.words", null, message.content),
    );
  });
}

function saying(who, text) {
  return make(`li.message.${who}`, null, make("div.who", null, who), make("div.words", null, longText(text)));
}

function drawStep(step, n, line, targets, trained, faults, id) {
  const span = trained.get(n),
    hit = targets.has(n),
    parts = [];
  for (const part of actionParts(step.text)) {
    if (part.call) parts.push(drawCall(part.call));
    else if (part.think) parts.push(make("details.think", null, make("summary", null, "thinking"), make("div", null, longText(part.think, 4000))));
    else parts.push(make("div.words", null, longText(part.say)));
  }
  if (!parts.length) parts.push(make("div.words.soft", null, "(nothing)"));
  const body = make("div.body", null, parts);
  if (step.reward) body.append(make("div.note", null, `reward ${short(step.reward)}`));
  if (step.note) body.append(make("div.note", null, step.note));
  if (hit) body.append(make("div.feedback", null, make("span.label", null, "feedback"), make("div", null, longText(targets.get(n)))));
  if (faults.has(n))
    body.append(
      make(
        "div.truth",
        null,
        make("span.label", null, "ground truth, from the environment's report"),
        make("div", null, "A true fault. ", longText(faults.get(n))),
      ),
    );
  if (span) body.append(drawSpan(span));
  const action = make(
    `li.message.action${hit ? ".hit" : ""}`,
    { id, tabindex: -1 },
    make("div.who", null, make("a.number", { href: linkOf(line.n, n), "aria-label": `step ${n}` }, String(n)), "agent"),
    body,
  );
  const { tool, user } = observationParts(step.observation);
  return [
    action,
    tool ? make("li.message.tool", null, make("div.who", null, "tools"), make("pre.words", null, longText(tool, 900))) : null,
    user ? saying("user", user) : null,
  ];
}

// A call as one reads code: name(key: value, ...).
function drawCall(call) {
  const entries = Object.entries(call.args),
    long = JSON.stringify(call.args).length > 70;
  const args = entries.flatMap(([key, value], i) => [
    i ? (long ? ",\n  " : ", ") : long ? "\n  " : "",
    make("span.key-name", null, `${key}: `),
    make("span.value", null, longText(JSON.stringify(value), 900)),
  ]);
  return make("pre.call", null, make("b", null, call.name), "(", args, long ? "\n)" : ")");
}
