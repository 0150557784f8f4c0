// Two moons to touch: drag the point. Its disc is what the network claims, the cross is the nearest change of the answer.
// The page evaluates two small networks itself, with the weights in moons-data.js; there is no kernel behind it.
(() => {
  const VIEW = { left: -1.6, right: 2.6, bottom: -1.3, top: 1.8, scale: 150 };
  const WIDTH = (VIEW.right - VIEW.left) * VIEW.scale, HEIGHT = (VIEW.top - VIEW.bottom) * VIEW.scale;
  const COLOURS = { "1": "#CC79A7", "-1": "#009E73" };
  const STEP = 0.02; // of the grid on which the answers are known

  const relu = (values) => values.map((v) => Math.max(v, 0));
  const sortPairs = (values) => {
    const sorted = values.slice();
    for (let i = 0; i + 1 < sorted.length; i += 2) {
      if (sorted[i] > sorted[i + 1]) [sorted[i], sorted[i + 1]] = [sorted[i + 1], sorted[i]];
    }
    return sorted;
  };

  /** The output of a network at a point. */
  function score(kind, point) {
    const layers = MOONS.networks[kind];
    let values = point;
    layers.forEach(({ weight, bias }, place) => {
      values = weight.map((row, i) => row.reduce((sum, w, j) => sum + w * values[j], bias[i]));
      if (place < layers.length - 1) values = kind === "ordinary" ? relu(values) : sortPairs(values);
    });
    return values[0];
  }

  /** The signs of a network on the grid, computed once. */
  const grids = {};
  function grid(kind) {
    if (grids[kind]) return grids[kind];
    const columns = Math.round((VIEW.right - VIEW.left) / STEP) + 1, rows = Math.round((VIEW.top - VIEW.bottom) / STEP) + 1;
    const signs = new Int8Array(columns * rows);
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < columns; c++) {
        signs[r * columns + c] = score(kind, [VIEW.left + c * STEP, VIEW.bottom + r * STEP]) > 0 ? 1 : -1;
      }
    }
    return (grids[kind] = { columns, rows, signs });
  }

  /** The nearest point with another answer: the nearest on the grid, then bisection in directions around it. */
  function attack(kind, point) {
    const sign = score(kind, point) > 0 ? 1 : -1, { columns, signs } = grid(kind);
    let best = Infinity, target = null;
    signs.forEach((other, place) => {
      if (other === sign) return;
      const x = VIEW.left + (place % columns) * STEP, y = VIEW.bottom + Math.floor(place / columns) * STEP;
      const distance = Math.hypot(x - point[0], y - point[1]);
      if (distance < best) { best = distance; target = [x, y]; }
    });
    if (!target) return null;
    const towards = Math.atan2(target[1] - point[1], target[0] - point[0]);
    let found = { radius: best, point: target };
    for (let turn = -8; turn <= 8; turn++) {
      const angle = towards + turn * 0.03, far = best + STEP;
      const at = (r) => [point[0] + r * Math.cos(angle), point[1] + r * Math.sin(angle)];
      const differs = (r) => (score(kind, at(r)) > 0 ? 1 : -1) !== sign;
      if (!differs(far)) continue;
      let low = 0, high = far;
      for (let i = 0; i < 16; i++) { const middle = (low + high) / 2; if (differs(middle)) high = middle; else low = middle; }
      if (high < found.radius) found = { radius: high, point: at(high) };
    }
    return found;
  }

  const across = (x) => (x - VIEW.left) * VIEW.scale, down = (y) => (VIEW.top - y) * VIEW.scale;

  /** The answers as a picture: one colour a side. */
  function ground(kind) {
    const { columns, rows, signs } = grid(kind), canvas = document.createElement("canvas");
    canvas.width = columns; canvas.height = rows;
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    signs.forEach((sign, place) => {
      const flipped = (rows - 1 - Math.floor(place / columns)) * columns + (place % columns);
      image.data.set(sign > 0 ? [245, 225, 236, 255] : [211, 235, 226, 255], 4 * flipped);
    });
    context.putImageData(image, 0, 0);
    return canvas.toDataURL();
  }

  const MARKUP = `
    <div class="moons-switch" role="group" aria-label="network">
      <button type="button" data-kind="lipschitz" aria-pressed="true">1-Lipschitz network</button>
      <button type="button" data-kind="ordinary" aria-pressed="false">ordinary network</button>
    </div>
    <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="group" aria-label="The plane with two moons of points and the answers of a network">
      <image width="${WIDTH}" height="${HEIGHT}" preserveAspectRatio="none"/>
      <g class="data"></g>
      <circle class="disc"/><line class="way"/>
      <path class="cross" d="M-8 -8L8 8M8 -8L-8 8"/>
      <circle class="handle" r="11" tabindex="0" role="slider" aria-label="the point: arrow keys move it"
        aria-valuemin="0" aria-valuemax="3" aria-valuenow="0"/>
    </svg>
    <p class="moons-says" aria-live="polite"></p>`;

  function start(place) {
    place.innerHTML = MARKUP;
    place.classList.add("moons");
    const find = (name) => place.querySelector(name), svg = find("svg");
    let kind = "lipschitz", point = [-0.55, 0.55];
    find(".data").innerHTML = MOONS.points
      .map(([x, y, label]) => `<circle cx="${across(x)}" cy="${down(y)}" r="3" fill="${COLOURS[label]}"/>`).join("");

    function show() {
      const claim = Math.abs(score(kind, point)) / (kind === "lipschitz" ? Math.max(1, MOONS.bound) : 1);
      const found = attack(kind, point);
      const handle = find(".handle"), [x, y] = [across(point[0]), down(point[1])];
      handle.setAttribute("cx", x); handle.setAttribute("cy", y);
      const disc = find(".disc");
      disc.setAttribute("cx", x); disc.setAttribute("cy", y); disc.setAttribute("r", claim * VIEW.scale);
      const [u, v] = found ? [across(found.point[0]), down(found.point[1])] : [x, y];
      find(".cross").setAttribute("transform", `translate(${u} ${v})`);
      const way = find(".way");
      way.setAttribute("x1", x); way.setAttribute("y1", y); way.setAttribute("x2", u); way.setAttribute("y2", v);
      const inside = found && found.radius < claim;
      svg.classList.toggle("refuted", Boolean(inside));
      const sentence = found
        ? `The network claims ${claim.toFixed(2)}; the nearest attack needs ${found.radius.toFixed(2)}. ` +
          (inside ? "The claim is refuted: the attack lies inside the disc." : "The attack stays outside the disc.")
        : `The network claims ${claim.toFixed(2)}.`;
      find(".moons-says").textContent = sentence;
      handle.setAttribute("aria-valuenow", claim.toFixed(2));
      handle.setAttribute("aria-valuetext", sentence);
    }

    function move(x, y) {
      const held = (value, low, high) => Math.min(Math.max(value, low), high);
      point = [held(x, VIEW.left, VIEW.right), held(y, VIEW.bottom, VIEW.top)];
      show();
    }

    function select(next) {
      kind = next;
      find("image").setAttribute("href", ground(kind));
      for (const button of place.querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
      }
      show();
    }

    function follow(event) {
      const box = svg.getBoundingClientRect();
      move(VIEW.left + ((event.clientX - box.left) / box.width) * (VIEW.right - VIEW.left),
           VIEW.top - ((event.clientY - box.top) / box.height) * (VIEW.top - VIEW.bottom));
    }

    svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); follow(event); });
    svg.addEventListener("pointermove", (event) => { if (svg.hasPointerCapture(event.pointerId)) follow(event); });
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    find(".handle").addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step) return;
      event.preventDefault();
      const size = event.shiftKey ? 0.2 : 0.05;
      move(point[0] + size * step[0], point[1] + size * step[1]);
    });
    for (const button of place.querySelectorAll("button")) button.addEventListener("click", () => select(button.dataset.kind));
    select(kind);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const still = document.querySelector(".drawing img[src*='certificate']");
    if (still && typeof MOONS !== "undefined") start(still.closest(".drawing"));
  });
})();
