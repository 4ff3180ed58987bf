// What a person does with a report: each yields [what, whether it came out right, what came out instead].

const hash = (page) => page.evaluate(() => decodeURIComponent(location.hash.replaceAll("+", " ")));
const shown = (page) => page.evaluate(() => document.querySelector(".count-line")?.textContent ?? "");
const count = (text) => Number(/(\d[\d,]*) episode/.exec(text)?.[1].replaceAll(",", "") ?? 0);
const go = async (page, to, wait) => {
  await page.evaluate((where) => (location.hash = where), to);
  await wait(400);
};

// What a button of CSV saves.
async function csv(page, part) {
  return page.evaluate(async (selector) => {
    const make = URL.createObjectURL;
    let text = null;
    URL.createObjectURL = (blob) => {
      text = blob.text();
      return make.call(URL, blob);
    };
    document.querySelector(selector)?.click();
    URL.createObjectURL = make;
    return text;
  }, `${part} button.quiet[aria-label$=CSV]`);
}

export async function* behaviours(page, file, wait) {
  const has = (selector) => page.evaluate((s) => document.querySelector(s) !== null, selector);
  const episodes = await page.evaluate(() => JSON.parse(document.getElementById("data").textContent).episodes.run?.length ?? 0);

  if (await has(".charts svg")) {
    await page.evaluate(() => document.querySelector(".charts .plot svg").focus());
    for (let n = 0; n < 2; n++) await page.keyboard.press("ArrowRight");
    const said = await page.evaluate(() => document.getElementById("tip").innerText);
    yield ["arrow keys in a chart show values", /training step/.test(said), said];
    if (/Enter or click/.test(said)) {
      const told = count(said);
      await page.keyboard.press("Enter");
      await wait(500);
      yield [
        "Enter on a chart's point opens its episodes",
        told > 0 && count(await shown(page)) === told,
        `${await hash(page)}: ${await shown(page)}`,
      ];
      await page.goBack();
      await wait(400);
      yield ["back leads to the overview", await page.evaluate(() => !document.getElementById("overview").hidden), await hash(page)];
    }
    const metrics = await csv(page, ".curves");
    yield ["metrics as CSV", metrics.startsWith("\ufeffrun,step,") || metrics.startsWith("run,step,"), metrics.slice(0, 80)];
    await go(page, "#overview?live=off&x=wall&targets=relative", wait);
    await page.reload();
    await wait(500);
    const axes = await page.evaluate(() => [...document.querySelectorAll("[aria-pressed=true]")].map((e) => e.textContent).join());
    yield ["what is chosen is in the link and outlives a reload", /time/.test(axes), axes];
  }
  await go(page, "#overview?live=off", wait);
  if (await has(".targets .plot svg")) {
    const cell = await page.evaluate(() => {
      const svg = document.querySelector(".targets .plot svg"),
        darkest = [...svg.querySelectorAll(".cell")].reduce((a, b) =>
          Number(b.getAttribute("fill-opacity")) > Number(a.getAttribute("fill-opacity")) ? b : a,
        );
      svg.scrollIntoView({ block: "center" });
      const box = darkest.getBoundingClientRect();
      return { x: box.left + box.width / 2, y: box.top + box.height / 2 };
    });
    await page.mouse.move(cell.x, cell.y);
    await page.mouse.click(cell.x, cell.y);
    await wait(500);
    const right = /target=/.test(await hash(page)) && /target/.test(await page.evaluate(() => document.querySelector(".chips").innerText));
    yield ["a click on a cell of the heat map opens its episodes", right, `${await hash(page)}: ${await shown(page)}`];
  }
  if (!episodes) {
    await go(page, "#episodes?live=off", wait);
    yield [
      "a report without episodes says so",
      await page.evaluate(() => /No episodes|None of/.test(document.getElementById("episodes").innerText)),
      "",
    ];
    return;
  }
  await go(page, "#episodes?live=off", wait);
  yield ["all episodes are listed", count(await shown(page)) === episodes, `${await shown(page)} of ${episodes}`];
  const before = await hash(page);
  await page.evaluate(() => document.querySelector(".list").focus());
  await page.keyboard.press("ArrowDown");
  await wait(400);
  const last = (await hash(page)) === before; // the one that is open is the last one: up, then
  if (last) await page.keyboard.press("ArrowUp");
  await wait(400);
  const moved = await hash(page);
  await page.keyboard.press(last ? "j" : "k");
  await wait(400);
  yield [
    "arrow and letter keys walk through the list",
    episodes < 2 || (moved !== before && (await hash(page)) === before),
    `${before} ${moved} ${await hash(page)}`,
  ];
  const word = await page.evaluate(
    () => /[\p{L}]{4,}/u.exec(document.querySelector(".action .words, .action .call, .user .words")?.textContent ?? "")?.[0] ?? "",
  );
  if (word) {
    await page.evaluate(() => document.querySelector(".filters input").focus());
    const began = Date.now();
    await page.keyboard.type(word);
    for (let n = 0; n < 100 && (n < 4 || /searching/.test(await shown(page))); n++) await wait(100);
    const took = Date.now() - began,
      found = await shown(page);
    yield [
      `search in all texts of ${episodes} episodes, within ${(took / 1000).toFixed(1)} s`,
      count(found) > 0 && (await hash(page)).includes(`q=${word}`),
      found,
    ];
    const rows = (await csv(page, ".counted")).trim().split("\r\n").length - 1;
    yield ["the listed episodes as CSV", rows >= count(found), `${rows} rows, ${found}`];
    await page.goto(`file://${file}#episodes?live=off&q=${encodeURIComponent(word)}`);
    await page.reload();
    for (let n = 0; n < 100 && (n < 8 || /searching/.test(await shown(page))); n++) await wait(100);
    yield ["a search is found again by its link", count(await shown(page)) === count(found), await shown(page)];
    await page.evaluate(() => [...document.querySelectorAll(".chip")].at(-1).click());
    await wait(300);
    yield ["all filters can be left", count(await shown(page)) === episodes, await shown(page)];
  }
  const lists = {};
  for (const review of ["named", "nothing", "unreadable", "missed", "skipped", "trained"]) {
    await go(page, `#episodes?live=off&review=${review}`, wait);
    lists[review] = count(await shown(page));
  }
  const counted = await page.evaluate(() => {
    const { episodes: e, names } = JSON.parse(document.getElementById("data").textContent);
    const of = (word) => e.review.filter((n) => names.review[n] === word).length;
    return {
      named: of("named"),
      nothing: of("nothing"),
      unreadable: of("unreadable"),
      missed: e.missed.filter(Boolean).length,
      skipped: of("skipped"),
      trained: e.trained.filter((t) => t.length).length,
    };
  });
  yield [
    `filters by hindsight: ${Object.entries(counted)
      .map((pair) => pair.join(" "))
      .join(", ")}`,
    JSON.stringify(lists) === JSON.stringify(counted),
    JSON.stringify(lists),
  ];
  await go(page, "#episodes?live=off&sort=longest", wait);
  await page.evaluate(() => (document.querySelector(".list").scrollTop = 0));
  await wait(200);
  const steps = await page.evaluate(() => [...document.querySelectorAll(".item")].map((row) => Number(/(\d+) steps?$/.exec(row.innerText)[1])));
  yield ["sorted by length", steps.every((value, n) => !n || steps[n - 1] >= value), steps.join()];
  await go(page, "#overview?live=off", wait);
  if (await has(".turns a")) {
    const told = await page.evaluate(() => document.querySelector(".turns a").textContent);
    await page.click(".turns a");
    await wait(600);
    const halves = await page.evaluate(() => [...document.querySelectorAll(".half")].map((half) => half.getAttribute("aria-label")).join());
    yield [
      "held-out episodes stand side by side",
      halves === "held out, before,held out, after" && count(await shown(page)) === Number(told),
      `${halves}; ${await shown(page)}`,
    ];
  }
  await go(page, "#overview?live=off", wait);
  if (await has(".compared")) {
    const table = await csv(page, ".compared");
    yield ["arms as CSV", /measure,arm,runs,seeds,before/.test(table), table.slice(0, 80)];
    const shownLines = await page.evaluate(() => document.querySelectorAll(".charts .chart:first-child path.line").length);
    await page.click(".legend .run");
    await wait(300);
    const fewer = await page.evaluate(() => document.querySelectorAll(".charts .chart:first-child path.line").length);
    yield ["a run can be hidden", fewer < shownLines && /hide=/.test(await hash(page)), `${shownLines} ${fewer}`];
  }
  if (await page.evaluate(() => JSON.parse(document.getElementById("data").textContent).live)) {
    await go(page, "#overview?x=generated", wait);
    await page.evaluate(() => (window.here = true));
    const loaded = async (ms) => {
      for (let n = 0; n < ms / 100; n++) {
        await wait(100);
        if (!(await page.evaluate(() => window.here ?? false).catch(() => true))) return true;
      }
      return false;
    };
    yield ["a page of a run that goes on loads itself again", (await loaded(4000)) && /x=generated/.test(await hash(page)), await hash(page)];
    await wait(300);
    await page.evaluate(() => {
      window.here = true;
      document.querySelector(".live button").click();
    });
    yield ["but not while it is paused", !(await loaded(3000)), ""];
  }
}
