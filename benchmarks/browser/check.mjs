// Opens every report of a folder in headless Chromium, and prints a line for each: node check.mjs FOLDER [SCREENSHOTS].
// At 1280 and 390 pixels, light and dark: what the console says, what is asked of a network, texts that leave their picture or the page, and
// axe-core on both parts. Then, on pages that have it: what a person does with mouse, keyboard and links. The status is 1 if anything is wrong.

import { mkdirSync, readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";
import { behaviours } from "./behaviours.mjs";

const [folder, pictures] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf-8");
const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  args: [...chromium.args, "--no-sandbox"],
  headless: "shell",
  protocolTimeout: 600_000,
});
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
let wrong = 0;

// A page that notes what it should not do.
async function opened(file, hash, width, scheme) {
  const page = await browser.newPage(),
    said = [];
  page.setDefaultTimeout(180_000); // of a machine that has other things to do
  page.on("console", (message) => said.push(`console ${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => said.push(`error: ${error.message}`));
  page.on("dialog", (dialog) => said.push(`dialog: ${dialog.message()}`) && dialog.dismiss());
  page.on(
    "request",
    (request) => request.url().split("#")[0] === `file://${file}` || request.url().startsWith("blob:") || said.push(`request: ${request.url()}`),
  );
  await page.setViewport({ width, height: 900, isMobile: width < 600, hasTouch: width < 600 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  const began = Date.now();
  await page.goto(`file://${file}${hash}`);
  await page.waitForSelector(hash.startsWith("#ep") ? "#episodes > *" : "#overview > *");
  return { page, said, ms: Date.now() - began };
}

// Texts of pictures that are cut at an edge, and whether the page is wider than its window.
const cut = () => {
  const found = [...document.querySelectorAll("main:not([hidden]) svg text")].filter((text) => {
    const own = text.getBoundingClientRect(),
      picture = text.ownerSVGElement.getBoundingClientRect();
    return own.width && (own.left < picture.left - 0.5 || own.right > picture.right + 0.5 || own.bottom > picture.bottom + 0.5);
  });
  const wide = document.documentElement.scrollWidth > innerWidth + 1 ? [`${document.documentElement.scrollWidth} px wide`] : [];
  return [...found.map((text) => `cut: ${text.textContent}`), ...wide];
};

async function audited(page) {
  await page.evaluate(axe); // in the page's own world, which its content security policy does not reach
  const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
  return violations.map((v) => ({
    impact: v.impact,
    text: `axe ${v.impact} ${v.id}: ${v.nodes.length} x ${v.nodes[0].target} ${v.nodes[0].any[0]?.message ?? ""}`,
  }));
}

for (const name of readdirSync(folder)
  .filter((each) => each.endsWith(".html"))
  .sort()) {
  const file = path.resolve(folder, name),
    faults = new Set(),
    counts = { critical: 0, serious: 0, moderate: 0, minor: 0 };
  let slowest = 0;
  const looks = name.startsWith("odd_")
    ? [
        [1280, "light"],
        [390, "dark"],
      ]
    : [1280, 390].flatMap((width) => [
        [width, "light"],
        [width, "dark"],
      ]);
  for (const [width, scheme] of looks)
    for (const hash of ["#overview?more=1&live=off", "#episodes?live=off"]) {
      const { page, said, ms } = await opened(file, hash, width, scheme);
      slowest = Math.max(slowest, ms);
      await wait(700);
      if (hash.startsWith("#episodes") && width < 600) {
        await page.evaluate(() => document.querySelector(".item")?.click());
        await wait(500);
      }
      for (const text of [...said, ...(await page.evaluate(cut))]) faults.add(`${width} ${scheme} ${hash}: ${text}`);
      for (const { impact, text } of await audited(page)) {
        counts[impact]++;
        faults.add(`${width} ${scheme} ${hash}: ${text}`);
      }
      if (pictures) {
        mkdirSync(pictures, { recursive: true });
        const part = hash.slice(1).split("?")[0];
        await page.screenshot({
          path: path.join(pictures, `${name.replace(".html", "")}-${part}-${width}-${scheme}.png`),
          fullPage: part === "overview",
        });
      }
      if (await page.evaluate(() => window.hit !== undefined || document.querySelector("main img, main script, main iframe") !== null))
        faults.add("text became markup");
      await page.close();
    }
  const axes = Object.entries(counts)
    .map(([impact, n]) => `${n} ${impact}`)
    .join(", ");
  console.log(`${name}: drawn within ${slowest} ms; axe-core: ${axes}`);
  for (const fault of faults) console.log(`  ${fault}`);
  wrong += faults.size;
  const { page, said } = await opened(file, "#overview?live=off", 1280, "light");
  await wait(500);
  for await (const [what, right, got] of behaviours(page, file, wait)) {
    console.log(`  ${right ? "ok" : "WRONG"}  ${what}${right ? "" : `: ${got}`}`);
    wrong += !right;
  }
  for (const text of said) console.log(`  WRONG  ${text}`);
  wrong += said.length;
  await page.close();
}
await browser.close();
console.log(wrong ? `${wrong} wrong` : "nothing wrong");
process.exit(wrong ? 1 : 0);
