// Opens every page of the book in a frame of its own width, measures it, and sends what it found back to the test.
const WIDTHS = [390, 1024];
const query = new URLSearchParams(location.search);

function open(page, width) {
  return new Promise((resolve) => {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width:${width}px;height:900px;border:0`;
    frame.addEventListener("load", () => resolve(frame));
    frame.src = page;
    document.body.append(frame);
  });
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** The nearest box around an element that hides what does not fit; none if that can be scrolled. */
function hider(page, element) {
  for (let box = element.parentElement; box; box = box.parentElement) {
    const { overflowX, display } = page.getComputedStyle(box);
    if (display === "inline" || overflowX === "visible") continue;
    return overflowX === "hidden" || overflowX === "clip" ? box : null;
  }
  return null;
}

/** Formulas of which a part cannot be seen. */
function cut(page) {
  const found = [];
  for (const drawn of page.document.querySelectorAll("mjx-container")) {
    const box = drawn.offsetParent && hider(page, drawn);
    if (box && drawn.getBoundingClientRect().right > box.getBoundingClientRect().right + 1) {
      found.push(drawn.textContent.slice(0, 40));
    }
  }
  return found;
}

function weight(page) {
  const resources = page.performance.getEntriesByType("resource");
  const own = page.performance.getEntriesByType("navigation");
  return [...resources, ...own].reduce((sum, entry) => sum + entry.encodedBodySize, 0);
}

/** Parts of a page that a reader would have to push sideways. */
function sideways(page, selector) {
  const parts = [...page.document.querySelectorAll(selector)];
  return parts.filter((part) => part.scrollWidth > part.clientWidth + 1).map((part) => part.textContent.slice(0, 40));
}

/** Curves in the page itself that are painted as surfaces, for want of their style. */
function patches(page) {
  const curves = [...page.document.querySelectorAll("svg polyline")];
  return curves.filter((curve) => page.getComputedStyle(curve).fill !== "none").length;
}

async function load(page, script) {
  const element = page.document.createElement("script");
  element.src = script;
  await new Promise((resolve) => { element.onload = resolve; page.document.head.append(element); });
}

/** What axe finds: all rules in the light, and in the dark those that look at colours. */
async function complaints(page, theme) {
  page.document.documentElement.dataset.theme = theme;
  const rules = theme === "light" ? ["wcag2a", "wcag2aa"] : { type: "rule", values: ["color-contrast", "link-in-text-block"] };
  const found = await page.axe.run(page.document, { runOnly: rules, resultTypes: ["violations"] });
  return found.violations.map((rule) => `${rule.id}: ${rule.nodes.length}, as ${rule.nodes[0].html.slice(0, 120)}`);
}

/** Colours change at once, so that nobody has to wait until they have faded over. */
function still(page) {
  const style = page.document.createElement("style");
  style.textContent = "*, *::before, *::after { transition: none !important; animation: none !important }";
  page.document.head.append(style);
}

async function inspect(path) {
  const report = { path, overflow: {}, cut: {}, axe: {} };
  for (const width of WIDTHS) {
    const frame = await open(path, width);
    const page = frame.contentWindow;
    await (page.MathJax?.startup?.promise ?? null);
    await pause(50);
    report.overflow[width] = page.document.documentElement.scrollWidth - width;
    report.cut[width] = cut(page);
    report.weight = weight(page);
    report.errors = page.complaintsOfThisPage;
    report.failed = page.document.querySelectorAll("mjx-merror").length;
    report.patches = patches(page);
    if (width === WIDTHS[0]) report.sideways = sideways(page, ".guidelines td, .guidelines :has(> table)");
    else if (query.has("axe")) {
      still(page);
      await load(page, "/axe.min.js");
      for (const theme of ["light", "dark"]) report.axe[theme] = await complaints(page, theme);
    }
  }
  document.body.replaceChildren();
  return report;
}

async function all() {
  let page;
  while ((page = await (await fetch("/next.json")).json())) {
    await fetch("/report", { method: "POST", body: JSON.stringify(await inspect(page)) });
  }
  await fetch("/report", { method: "POST", body: "done" });
}
all().catch((error) => fetch("/report", { method: "POST", body: JSON.stringify({ path: "harness", error: String(error) }) }));
