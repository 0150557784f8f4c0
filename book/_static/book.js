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

/** Excerpts of search results without code, outputs and TeX. */
function searchInWords() {
  if (typeof Search === "undefined") return;
  const plain = Search.htmlToText;
  Search.htmlToText = (page, anchor) => {
    const parsed = new DOMParser().parseFromString(page, "text/html");
    const noise = ".cell_input, .cell_output, .math, pre, table, .run-box, .headerlink";
    parsed.querySelectorAll(noise).forEach((element) => element.remove());
    return plain(parsed.documentElement.outerHTML, anchor);
  };
}

searchInWords();
document.addEventListener("DOMContentLoaded", () => {
  nameCopyButtons();
  new MutationObserver(nameCopyButtons).observe(document.body, { childList: true, subtree: true });
  const typeset = window.MathJax?.startup?.promise;
  if (typeset) typeset.then(fitFormulas);
  window.addEventListener("resize", fitFormulas);
  for (const block of document.querySelectorAll("div.highlight pre, div.cell_output pre, div.math")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0; // a region that scrolls can be reached by keyboard
  }
});
