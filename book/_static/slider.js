// The sliders over ε: each shows what its cell has computed for the position that is chosen (lipguide/book/slider.py).
(() => {
  function start(place) {
    const find = (name) => place.querySelector(name);
    const epsilons = JSON.parse(place.dataset.epsilons), knob = find(".epsilon-knob input");
    const says = JSON.parse(knob.dataset.says), shows = JSON.parse(knob.dataset.shows);
    const bars = [...place.querySelectorAll(".epsilon-bar")].map((bar) => ({
      fill: bar.querySelector(".rail span"),
      value: bar.querySelector(".value"),
      widths: JSON.parse(bar.dataset.widths),
      values: JSON.parse(bar.dataset.values),
    }));

    function show() {
      const at = Number(knob.value);
      for (const image of place.querySelectorAll("[data-at]")) image.hidden = Number(image.dataset.at) !== at;
      for (const box of place.querySelectorAll("[data-until]")) {
        const kept = Number(box.dataset.until) > epsilons[at];
        box.classList.toggle("kept", kept);
        box.classList.toggle("lost", !kept);
      }
      for (const { fill, value, widths, values } of bars) {
        fill.style.width = `${widths[at]}%`;
        value.textContent = values[at];
      }
      find(".epsilon-says").textContent = shows[at];
      knob.setAttribute("aria-valuetext", says[at]);
    }

    find(".epsilon-knob").hidden = false;
    knob.addEventListener("input", show);
    show(); // a browser may remember another position than the still picture's
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".epsilon-slider").forEach(start));
})();
