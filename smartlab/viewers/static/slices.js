// The viewer in the page: tools, linked slices, read-out. Nothing here asks the kernel for a slice.

const PLANES = ["axial", "coronal", "sagittal"];
const NAMES = { mask: "Hidden units", attention: "Attention", reconstruction: "Reconstruction", error: "Absolute error", labels: "Labels" };
const KEYS = { mask: "m", attention: "a", reconstruction: "r", error: "e", labels: "l" };
const HELP = "Wheel, ↑ ↓ ← →: slice · Page ↑ ↓: ten slices · Home, End: first, last · Shift + arrows, click, drag: cursor · 1–4: window · m a r e l: overlays · h: head · p: plane";
const PATIENCE = 8000; // ms to wait for the kernel before saying so
const TALLEST = 460; // px of the tallest slice

// A page element: make("button", { class: "x", "aria-label": "…" }, child, …).
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((c) => c !== null && c !== undefined));
  return element;
}

class SliceView {
  constructor(root, meta, arrays, state, changed) {
    Object.assign(this, { root, meta, changed, state, wheel: 0, cells: [] });
    this.painter = new Painter(meta, arrays);
    this.painter.setWindow(state.window);
    root.classList.add("smartlab-viewer");
    // the notebook's own keys, m or a among them, are ours here; Ctrl+S and its like stay the notebook's
    const own = (event) => root.toggleAttribute("data-lm-suppress-shortcuts", !(event?.ctrlKey || event?.metaKey));
    for (const name of ["keydown", "keyup", "focusin"]) root.addEventListener(name, own);
    own();
    root.addEventListener("keydown", (event) => this.key(event));
    this.grid = make("div", { class: "smartlab-grid" });
    this.readout = make("output", { class: "smartlab-readout", "aria-live": "off" });
    this.legend = make("div", { class: "smartlab-legend" });
    const notes = meta.notes.map((text) => make("div", { class: "smartlab-note", role: "note" }, text));
    const title = meta.title ? make("div", { class: "smartlab-title" }, meta.title) : "";
    root.replaceChildren(title, ...notes, this.tools(), this.grid, this.readout, this.legend);
    this.sizes = new ResizeObserver(() => this.lines());
    this.layOut();
    this.explain();
  }

  get planes() {
    return this.state.plane === "all" ? PLANES : [this.state.plane];
  }

  close() {
    this.sizes.disconnect();
  }

  // Change part of the state, draw, and let Python know.
  set(change, redraw = true) {
    Object.assign(this.state, change);
    if (change.window) this.painter.setWindow(change.window);
    if (change.plane) this.layOut();
    else if (redraw) this.draw();
    if (!change.cursor) this.refresh(), this.explain();
    this.changed(change);
  }

  // ---- tools ----

  tools() {
    this.buttons = [];
    const button = (text, key, pressed, click) => {
      const one = make("button", { type: "button", onclick: click, title: key ? `key ${key}` : null, "aria-keyshortcuts": key || null }, text);
      this.buttons.push([one, pressed]);
      return one;
    };
    const group = (name, ...inside) => make("div", { class: "smartlab-group", role: "group", "aria-label": name }, ...inside);
    const same = (a, b) => a[0] === b[0] && a[1] === b[1];
    const windows = this.meta.windows.map(([name, ...bounds], i) =>
      button(name, `${i + 1}`, () => same(bounds, this.state.window), () => this.set({ window: bounds })));
    const planes = this.meta.flat ? [] : [...PLANES, "all"].map((plane) =>
      button(plane === "all" ? "all three" : plane, null, () => this.state.plane === plane, () => this.set({ plane })));
    this.sliders = {};
    const overlays = this.meta.overlays.map((name) => {
      this.sliders[name] = make("input", {
        type: "range", min: 0, max: 100, value: Math.round(this.state.opacity[name] * 100),
        "aria-label": `Opacity of ${NAMES[name].toLowerCase()}`, title: "opacity", "data-overlay": name,
        oninput: (event) => this.set({ opacity: { ...this.state.opacity, [name]: Number(event.target.value) / 100 } }),
      });
      const toggle = button(NAMES[name], KEYS[name], () => this.state.shown.has(name), () => this.toggle(name));
      toggle.dataset.overlay = name;
      return group(NAMES[name], toggle, this.sliders[name]);
    });
    this.heads = null;
    if (this.meta.heads) {
      const options = [["-1", "mean of heads"], ...Array.from({ length: this.meta.heads }, (_, i) => [`${i}`, `head ${i + 1}`])];
      this.heads = make("select", { "aria-label": "Attention head", title: "key h", onchange: (event) => this.set({ head: Number(event.target.value) }) },
        ...options.map(([value, text]) => make("option", { value }, text)));
    }
    const save = make("button", { type: "button", class: "smartlab-save", onclick: () => this.save() }, "Save PNG");
    const help = make("details", { class: "smartlab-help" }, make("summary", { "aria-label": "Keys" }, "Keys"), make("div", {}, HELP));
    return make("div", { class: "smartlab-bar", role: "toolbar", "aria-label": "Viewer" },
      group("Window", ...windows), planes.length ? group("Plane", ...planes) : null, ...overlays, this.heads, make("span", { class: "smartlab-space" }), save, help);
  }

  toggle(name) {
    if (!this.meta.overlays.includes(name)) return;
    const shown = new Set(this.state.shown);
    if (!shown.delete(name)) shown.add(name);
    this.set({ shown });
  }

  // Tools as the state has them.
  refresh() {
    for (const [button, pressed] of this.buttons) button.setAttribute("aria-pressed", String(pressed()));
    for (const [name, slider] of Object.entries(this.sliders)) {
      slider.value = Math.round(this.state.opacity[name] * 100);
      slider.disabled = !this.state.shown.has(name);
    }
    if (this.heads) {
      this.heads.value = String(this.state.head);
      this.heads.disabled = !this.state.shown.has("attention");
    }
  }

  // ---- slices ----

  layOut() {
    const { meta, planes } = this;
    const mm = (axis) => meta.shape[axis] * meta.spacing[axis];
    this.sizes.disconnect();
    this.cells = [];
    const many = planes.length > 1;
    const columns = many ? planes.length : meta.panels.length <= 4 ? meta.panels.length : Math.ceil(meta.panels.length / 2);
    const widths = many ? planes.map((p) => mm(AXES[p][0])) : Array(columns).fill(mm(AXES[planes[0]][0]));
    const tallest = Math.max(...planes.map((p) => mm(AXES[p][1])));
    const total = widths.reduce((a, b) => a + b);
    this.grid.style.gridTemplateColumns = widths.map((w) => `minmax(0, ${w / total}fr)`).join(" ");
    this.grid.style.maxWidth = `${Math.round((TALLEST / tallest) * total) + 10 * columns}px`;
    const figures = meta.panels.flatMap((panel, number) => planes.map((plane) => this.cell(panel, number, plane, many)));
    this.grid.replaceChildren(...figures);
    this.refresh();
    this.draw();
  }

  cell(panel, number, plane, many) {
    const [across, up, through] = AXES[plane];
    const [width, height] = this.painter.size(plane);
    const { shape, spacing, flat } = this.meta;
    const picture = make("canvas", { width, height, class: "smartlab-pixels" });
    const lines = make("canvas", { class: "smartlab-lines" });
    const name = [panel.title, flat ? "image" : `${plane} slice`].filter(Boolean).join(", ");
    const stage = make("div", {
      class: "smartlab-stage", tabindex: 0, role: "slider", "aria-label": name, "aria-valuemin": 0,
      "aria-valuemax": shape[through] - 1, "aria-orientation": "vertical", "data-plane": plane, "data-panel": number,
    }, picture, lines);
    stage.style.aspectRatio = `${width * spacing[across]} / ${height * spacing[up]}`;
    const count = make("span", { class: "smartlab-count" });
    const parts = [make("b", {}, panel.title || (flat ? "" : plane)), panel.title && many ? ` ${plane}` : ""];
    const share = panel.hidden === null ? null : make("span", {}, `${(panel.hidden * 100).toFixed(0)}% hidden`);
    const slider = flat ? null : make("input", {
      type: "range", min: 0, max: shape[through] - 1, class: "smartlab-slice", "aria-label": name,
      oninput: (event) => this.move(through, Number(event.target.value)),
    });
    const cell = { number, plane, through, picture, lines, stage, slider, count };
    cell.context = picture.getContext("2d");
    cell.pixels = cell.context.createImageData(width, height);
    this.listen(cell);
    this.sizes.observe(stage);
    this.cells.push(cell);
    return make("figure", {}, make("figcaption", {}, ...parts, count, share), stage, slider);
  }

  draw() {
    const { state, painter } = this;
    const look = { ...state, top: state.shown.has("attention") ? painter.top(state.head) : 1 };
    for (const cell of this.cells) {
      const index = state.cursor[cell.through];
      painter.paint(cell.number, cell.plane, index, look, cell.pixels.data);
      cell.context.putImageData(cell.pixels, 0, 0);
      if (cell.slider) cell.slider.value = index;
      if (!this.meta.flat) cell.count.textContent = ` ${index * this.meta.step} / ${(this.meta.shape[cell.through] - 1) * this.meta.step}`;
      cell.stage.setAttribute("aria-valuenow", index);
    }
    this.lines();
    this.tell(this.cells[0].number, state.cursor);
  }

  lines() {
    for (const { lines, stage, number, plane } of this.cells) {
      const scale = globalThis.devicePixelRatio || 1;
      const [width, height] = [Math.round(stage.clientWidth * scale), Math.round(stage.clientHeight * scale)];
      if (!width) continue;
      if (lines.width !== width || lines.height !== height) Object.assign(lines, { width, height });
      this.painter.lines(lines.getContext("2d"), number, plane, this.state.cursor, this.state, width, height);
    }
  }

  // ---- moving ----

  listen(cell) {
    const { stage, through, plane } = cell;
    const [across, up] = AXES[plane];
    const voxel = (event) => {
      const box = stage.getBoundingClientRect();
      const [columns, rows] = this.painter.size(plane);
      const clamp = (value, n) => Math.min(n - 1, Math.max(0, Math.floor(value)));
      const place = [...this.state.cursor];
      place[across] = columns - 1 - clamp(((event.clientX - box.left) / box.width) * columns, columns);
      place[up] = rows - 1 - clamp(((event.clientY - box.top) / box.height) * rows, rows);
      return place;
    };
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      const turn = event.deltaY * (event.deltaMode ? 30 : 1);
      this.wheel = Math.sign(turn) === Math.sign(this.wheel) ? this.wheel + turn : turn;
      if (Math.abs(this.wheel) < 30) return; // touch pads send many small turns
      this.move(through, this.state.cursor[through] - Math.sign(this.wheel));
      this.wheel = 0;
      this.tell(cell.number, voxel(event));
    }, { passive: false });
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      stage.setPointerCapture(event.pointerId);
      this.set({ cursor: voxel(event) });
      this.tell(cell.number, this.state.cursor);
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) this.set({ cursor: voxel(event) });
      this.tell(cell.number, voxel(event));
    });
    stage.addEventListener("pointerleave", () => this.tell(cell.number, this.state.cursor));
  }

  move(axis, index) {
    const cursor = [...this.state.cursor];
    cursor[axis] = Math.min(this.meta.shape[axis] - 1, Math.max(0, index));
    if (cursor[axis] !== this.state.cursor[axis]) this.set({ cursor });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const cell = this.cells.find((c) => c.stage === event.target);
    const overlay = Object.keys(KEYS).find((name) => KEYS[name] === event.key);
    const preset = this.meta.windows[Number(event.key) - 1];
    if (cell && this.stepKey(cell, event)) void 0;
    else if (event.target.tagName === "SELECT") return;
    else if (overlay) this.toggle(overlay);
    else if (preset) this.set({ window: preset.slice(1) });
    else if (event.key === "h" && this.meta.heads) this.set({ head: this.state.head + 1 < this.meta.heads ? this.state.head + 1 : -1 });
    else if (event.key === "p" && !this.meta.flat) this.set({ plane: [...PLANES, "all"][([...PLANES, "all"].indexOf(this.state.plane) + 1) % 4] });
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  stepKey(cell, event) {
    const [across, up] = AXES[cell.plane];
    const at = this.state.cursor;
    if (event.shiftKey) {
      const steps = { ArrowLeft: [across, 1], ArrowRight: [across, -1], ArrowUp: [up, 1], ArrowDown: [up, -1] }[event.key];
      if (steps) this.move(steps[0], at[steps[0]] + steps[1]);
      return Boolean(steps);
    }
    const jump = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
    if (jump === undefined || this.meta.flat) return false;
    this.move(cell.through, at[cell.through] + jump);
    return true;
  }

  // ---- what is there ----

  tell(number, voxel) {
    const found = this.painter.at(number, voxel, this.state.head);
    const { flat, step, value, labels, shape } = this.meta;
    const signed = (v, [plus, minus]) => `${v < 0 ? minus : plus} ${Math.abs(v).toFixed(1)}`;
    const shown = voxel.map((v) => v * step);
    const facts = flat
      ? [["position", `row ${(shape[1] - 1 - voxel[1]) * step}, column ${(shape[0] - 1 - voxel[0]) * step}`]]
      : [["position", `${["RL", "AP", "SI"].map((pair, i) => signed(found.world[i], pair)).join("  ")} mm`], ["voxel", shown.join(", ")]];
    facts.push([value === "HU" ? "HU" : "value", asText(found.value)]);
    if (found.guess !== undefined) facts.push(["reconstructed", asText(found.guess)], ["error", asText(Math.abs(found.guess - found.value))]);
    if (found.unit) facts.push(["unit", `${(flat ? [found.unit[1], found.unit[0]] : found.unit).join(", ")}${found.hidden === undefined ? "" : found.hidden ? " hidden" : " visible"}`]);
    if (found.attention !== undefined) facts.push(["attention", `${(found.attention * this.painter.units).toFixed(2)} × even share`]);
    if (found.label) facts.push(["label", labels[found.label]]);
    this.readout.replaceChildren(...facts.map(([name, text]) => make("span", { "data-fact": name }, make("small", {}, name), ` ${text}`)));
    Object.assign(this.readout.dataset, { value: found.value, voxel: voxel.join(","), world: found.world.join(","), attention: found.attention ?? "" });
    const text = facts.map(([name, fact]) => `${name} ${fact}`).join(", ");
    for (const cell of this.cells) cell.stage.setAttribute("aria-valuetext", `slice ${this.state.cursor[cell.through] * step}, ${text}`);
  }

  explain() {
    const { state, meta } = this;
    const { cividis, magma, colours } = this.painter.arrays;
    const parts = [];
    const scale = (map, name, from, to) => {
      const stops = Array.from({ length: 9 }, (_, i) => `rgb(${map.data.slice(Math.round((i * 255) / 8) * 3, Math.round((i * 255) / 8) * 3 + 3)})`);
      const bar = make("i", { class: "smartlab-scale" });
      bar.style.background = `linear-gradient(to right, ${stops})`;
      parts.push(make("span", {}, `${name} ${from} `, bar, ` ${to}`));
    };
    const swatch = (rgb, text) => {
      const box = make("i", { class: "smartlab-swatch" });
      box.style.background = `rgb(${rgb})`;
      parts.push(make("span", {}, box, text));
    };
    const on = (name) => state.shown.has(name) && meta.overlays.includes(name);
    if (on("mask")) swatch(HIDDEN, "hidden from the student");
    if (on("attention")) scale(cividis, "attention", "0", `${(this.painter.top(state.head) * this.painter.units).toFixed(1)} × even share`);
    if (on("error")) scale(magma, "error", "0", `${asText((state.window[1] - state.window[0]) / 2)} ${meta.value === "HU" ? "HU" : ""}`);
    if (on("labels")) for (const [v, text] of Object.entries(meta.labels)) swatch(colours.data.slice(((v - 1) % 24) * 3, ((v - 1) % 24) * 3 + 3), text);
    this.legend.replaceChildren(...parts);
  }

  // All visible slices as one picture, as large as on the screen at twice its resolution.
  save() {
    const box = this.grid.getBoundingClientRect();
    const page = make("canvas", { width: Math.ceil(box.width * 2), height: Math.ceil(box.height * 2) });
    const context = page.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, page.width, page.height);
    context.fillStyle = "black";
    context.font = "24px sans-serif";
    for (const cell of this.cells) {
      const at = cell.stage.getBoundingClientRect();
      const place = [(at.left - box.left) * 2, (at.top - box.top) * 2, at.width * 2, at.height * 2];
      context.drawImage(cell.picture, ...place);
      context.drawImage(cell.lines, ...place);
      context.fillText(cell.stage.previousElementSibling.textContent, place[0], place[1] - 10);
    }
    page.toBlob((blob) => {
      const name = (this.meta.title || "slices").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
      const link = make("a", { href: URL.createObjectURL(blob), download: `${name}.png` });
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
}

function asText(value) {
  return Number.isInteger(value) ? String(value).replace("-", "−") : value.toPrecision(4).replace("-", "−");
}

// Where the static picture of the same state stands until the widget is drawn.
function hideStill(name, hide) {
  for (const still of document.getElementsByClassName(`smartlab-still-${name}`)) {
    (still.closest(".jp-OutputArea-child") || still).style.display = hide ? "none" : "";
  }
}

function renderSlices({ model, el }) {
  const meta = model.get("meta");
  const read = (name) => (name === "shown" ? new Set(model.get(name)) : structuredClone(model.get(name)));
  const names = ["cursor", "window", "plane", "shown", "opacity", "head"];
  const state = Object.fromEntries(names.map((name) => [name, read(name)]));
  const root = make("div", {}, make("div", { role: "status" }, "Loading the image…"));
  el.append(root);
  let view = null, timer = null, own = false;
  const late = setTimeout(() => {
    if (!view) root.replaceChildren(make("div", { role: "status" }, "No kernel answers: run this cell again to look around."));
  }, PATIENCE);
  const changed = (change) => {
    own = true;
    for (const [name, value] of Object.entries(change)) model.set(name, name === "shown" ? [...value] : value);
    own = false;
    clearTimeout(timer);
    timer = setTimeout(() => model.save_changes(), 150); // Python follows when the hand rests
  };
  const arrive = async (message, buffers) => {
    if (message.kind !== "arrays" || view) return;
    const arrays = await unpack(message, buffers);
    if (view || !root.isConnected) return;
    view = new SliceView(root, meta, arrays, state, changed);
    hideStill(meta.name, true);
  };
  const follow = names.map((name) => [`change:${name}`, () => {
    if (own || !view) return;
    Object.assign(state, { [name]: read(name) });
    if (name === "window") view.painter.setWindow(state.window);
    if (name === "plane") view.layOut();
    else view.draw();
    view.refresh();
    view.explain();
  }]);
  model.on("msg:custom", arrive);
  for (const [event, act] of follow) model.on(event, act);
  model.send({ kind: "load" });
  return () => {
    clearTimeout(late);
    model.off("msg:custom", arrive);
    for (const [event, act] of follow) model.off(event, act);
    if (view) view.close();
    hideStill(meta.name, false);
  };
}
