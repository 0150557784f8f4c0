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

async function complaints(page) {
  if (!query.has("axe")) return [];
  const script = page.document.createElement("script");
  script.src = "/axe.min.js";
  await new Promise((resolve) => { script.onload = resolve; page.document.head.append(script); });
  const found = await page.axe.run(page.document, { runOnly: ["wcag2a", "wcag2aa"], resultTypes: ["violations"] });
  return found.violations.map((rule) => `${rule.id}: ${rule.nodes.length}, as ${rule.nodes[0].html.slice(0, 120)}`);
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
    if (width === WIDTHS[0]) continue;
    for (const theme of ["light", "dark"]) {
      page.document.documentElement.dataset.theme = theme;
      await pause(300); // colours fade over
      report.axe[theme] = await complaints(page);
    }
  }
  document.body.replaceChildren();
  return report;
}

async function all() {
  const pages = await (await fetch("/pages.json")).json();
  for (const path of pages) {
    await fetch("/report", { method: "POST", body: JSON.stringify(await inspect(path)) });
  }
  await fetch("/report", { method: "POST", body: "done" });
}
all().catch((error) => fetch("/report", { method: "POST", body: JSON.stringify({ path: "harness", error: String(error) }) }));
