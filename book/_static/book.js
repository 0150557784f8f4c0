// What style sheets cannot do: formulas that fit, buttons with names, and search results in words.

/** A formula in the text that is wider than its column gets a line and a scroll bar of its own. */
function fitFormulas() {
  for (const formula of document.querySelectorAll("span.math")) {
    formula.classList.remove("wide");
    const room = formula.closest("p, li, dd, td, .admonition, section");
    const drawn = formula.querySelector("mjx-container");
    if (room && drawn && drawn.getBoundingClientRect().width > room.clientWidth) {
      formula.classList.add("wide");
      formula.tabIndex = 0; // scrolled by the arrow keys too
    }
  }
}

/** The theme adds copy buttons late and without a name. */
function nameCopyButtons() {
  for (const button of document.querySelectorAll(".copybtn:not([aria-label])")) {
    button.setAttribute("aria-label", "Copy this code");
  }
}

/** A region that scrolls can be reached by the keyboard. */
function reachWhatScrolls() {
  const regions =
    "div.highlight pre, div.cell_output pre, div.math, .pst-scrollable-table-container, .wide-table, " +
    "div.cell_output div.output.text_html, #names-side-by-side table";
  for (const block of document.querySelectorAll(regions)) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
  }
}

/** A plot that its column shrinks until its letters cannot be read gets a width of its own, and a place to push it in. */
function widenPictures() {
  for (const picture of document.querySelectorAll("div.cell_output figure img")) {
    const readable = Math.round(0.5 * picture.naturalWidth); // letters of 7 pixels
    const frame = picture.closest("figure").parentElement.closest("div.cell_output");
    if (!frame || picture.closest(".epsilon-slider") || picture.closest(".wide-picture")) continue;
    if (readable <= 1.1 * frame.clientWidth) continue;
    const shelf = document.createElement("div");
    shelf.className = "wide-picture";
    shelf.tabIndex = 0; // pushed by the arrow keys too
    shelf.setAttribute("role", "region");
    shelf.setAttribute("aria-label", "a wide figure");
    shelf.style.setProperty("--least-width", `${readable}px`);
    const held = picture.closest("a.image-reference") ?? picture;
    held.replaceWith(shelf);
    shelf.append(held);
  }
}

/** Excerpts of search results without code, outputs and TeX. */
function searchInWords() {
  if (typeof Search === "undefined") return;
  const plain = Search.htmlToText;
  Search.htmlToText = (page, anchor) => {
    const parsed = new DOMParser().parseFromString(page, "text/html");
    const noise =
      ".cell_input, .cell_output, .math, pre, table, .run-box, .headerlink, #jb-print-docs-body, #jb-print-toc, nav";
    parsed.querySelectorAll(noise).forEach((element) => element.remove());
    return plain(parsed.documentElement.outerHTML, anchor);
  };
}

document.addEventListener("DOMContentLoaded", () => {
  searchInWords(); // sphinx loads its search after this file, and starts it after this listener
  nameCopyButtons();
  new MutationObserver(nameCopyButtons).observe(document.body, { childList: true, subtree: true });
  const typeset = window.MathJax?.startup?.promise;
  if (typeset) typeset.then(fitFormulas);
  window.addEventListener("resize", fitFormulas);
  reachWhatScrolls();
  window.addEventListener("load", reachWhatScrolls); // fonts and formulas have widened some
  window.addEventListener("load", widenPictures);
  window.addEventListener("resize", reachWhatScrolls);
});
