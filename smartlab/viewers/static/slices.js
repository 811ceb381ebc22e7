// The viewer in the page: linked slices and what is read off them. Nothing here asks the kernel for a slice.

const PLANES = ["axial", "coronal", "sagittal"];
const NAMES = { mask: "Hidden units", attention: "Attention", reconstruction: "Reconstruction", error: "Absolute error", labels: "Labels" };
const TALLEST = { many: 460, one: 900 }; // px of a slice
const READABLE = 120; // px: a flat stack is drawn no lower, and then shows the part of it round the cursor
const START = { only: [], shown: new Set(), opacity: {}, head: -1, span: [], hidden: "tint", contours: false };

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
    for (const [name, value] of Object.entries(START)) state[name] ??= value;
    Object.assign(this, { root, meta, changed, state, cells: [], alone: null, drawing: 0, loading: "" });
    this.painter = new Painter(meta, arrays);
    this.painter.setWindow(state.window);
    this.zoom = 1;
    this.centre = this.middle();
    root.classList.add("smartlab-viewer");
    this.hand = new Hand(this);
    this.tools = new Tools(this);
    this.grid = make("div", { class: "smartlab-grid" });
    this.readout = make("output", { class: "smartlab-readout", "aria-live": "off" });
    const notes = meta.notes.map((text) => make("div", { class: "smartlab-note", role: "note" }, text));
    const title = meta.title ? make("div", { class: "smartlab-title" }, meta.title) : "";
    root.replaceChildren(title, ...notes, this.tools.bar, this.grid, this.readout, this.tools.legend);
    this.sizes = new ResizeObserver(() => this.lines());
    this.whole = () => this.layOut();
    root.addEventListener("fullscreenchange", this.whole);
    this.layOut();
    this.tools.explain();
  }

  middle() {
    return this.meta.shape.map((n) => (n - 1) / 2);
  }

  close() {
    this.hand.rest();
    this.sizes.disconnect();
  }

  // Change part of the state, draw, and let Python know.
  set(change) {
    this.show(change);
    this.changed(change);
  }

  // The same without telling anybody.
  show(change) {
    Object.assign(this.state, change);
    if (change.window) this.painter.setWindow(change.window);
    const moved = Object.keys(change).every((name) => name === "cursor");
    if (!moved) this.drawing++, this.tools.refresh();
    if (change.plane || change.only) this.alone = null, this.layOut();
    else this.draw();
    if (!moved) this.tools.explain();
  }

  // To a place of another crop of the scan: in sight, at the same zoom.
  go(cursor) {
    this.state.cursor = cursor;
    if (this.zoom > 1) this.centre = [...cursor];
  }

  // Other arrays in the place of some; what was to be said of the scene may have changed with them.
  replace(arrays, meta = {}) {
    Object.assign(this.painter.arrays, arrays);
    Object.assign(this.meta, meta);
    if (meta.unit_of) this.painter.setGrid();
    if (meta.overlays || meta.heads !== undefined) this.tools.build();
    if (meta.panels) for (const cell of this.cells) this.caption(cell);
    this.drawing++;
    this.draw();
    if (Object.keys(meta).length) this.tools.refresh(), this.tools.explain();
  }

  // ---- slices ----

  // Which slices stand on the page: those of the planes and panels chosen, or the one enlarged.
  standing() {
    if (this.alone) return [this.alone];
    const planes = this.state.plane === "all" ? PLANES : [this.state.plane];
    const numbers = this.meta.panels.map((_, number) => number).filter((n) => !this.state.only.length || this.state.only.includes(n));
    return numbers.flatMap((number) => planes.map((plane) => ({ number, plane })));
  }

  layOut() {
    const { meta } = this;
    const had = this.root.contains(document.activeElement) && this.hand.active;
    const mm = (axis) => meta.shape[axis] * meta.spacing[axis];
    this.sizes.disconnect();
    const standing = this.standing();
    const planes = [...new Set(standing.map(({ plane }) => plane))];
    const many = planes.length > 1;
    const columns = many ? planes.length : standing.length <= 4 ? standing.length : Math.ceil(standing.length / 2);
    const rows = Math.ceil(standing.length / columns);
    const widths = many ? planes.map((p) => mm(AXES[p][0])) : Array(columns).fill(mm(AXES[planes[0]][0]));
    const tallest = Math.max(...planes.map((p) => mm(AXES[p][1])));
    const total = widths.reduce((a, b) => a + b);
    const full = document.fullscreenElement === this.root;
    const notebook = this.root.closest(".jp-WindowedPanel-outer");
    const room = (notebook && !full ? notebook.clientHeight : innerHeight) - (full ? 110 : 170); // the tools stay in sight
    const limit = Math.min(standing.length > 1 ? TALLEST.many : Math.max(TALLEST.one, room), Math.max(160, room / rows - 55));
    const thick = many && mm(2) < 0.4 * Math.min(mm(0), mm(1)); // then the flat planes stand one above the other, twice as wide
    this.grid.style.gridTemplateColumns = (thick ? [1, 2] : widths.map((w) => w / total)).map((w) => `minmax(0, ${w}fr)`).join(" ");
    this.grid.style.maxWidth = `${Math.round((limit / tallest) * total) + 10 * columns}px`;
    this.cells = standing.map(({ number, plane }) => this.cell(number, plane));
    for (const cell of this.cells) cell.figure.style.gridRow = thick && cell.plane === "axial" ? "span 2" : "";
    this.grid.replaceChildren(...this.cells.map((cell) => cell.figure));
    this.hand.active = this.cells.find((c) => c.plane === had?.plane && c.number === had?.number) ?? this.cells[0];
    if (had) this.hand.active.stage.focus({ preventScroll: true });
    this.tools.refresh();
    this.drawing++;
    this.draw();
  }

  cell(number, plane) {
    const [across, up, through] = AXES[plane];
    const [width, height] = this.painter.size(plane);
    const { shape, spacing, flat, panels } = this.meta;
    const picture = make("canvas", { width, height, class: "smartlab-pixels" });
    const lines = make("canvas", { class: "smartlab-lines" });
    const name = [panels[number].title, flat ? "image" : `${plane} slice`].filter(Boolean).join(", ");
    const stage = make("div", {
      class: "smartlab-stage", tabindex: 0, role: "slider", "aria-label": name, "aria-valuemin": 0,
      "aria-valuemax": shape[through] - 1, "aria-orientation": "vertical", "data-plane": plane, "data-panel": number,
    }, picture, lines);
    const [wide, tall] = [width * spacing[across], height * spacing[up]];
    stage.style.aspectRatio = `${wide} / ${tall}`;
    if (tall < 0.4 * wide) stage.style.minHeight = `${READABLE}px`;
    const slider = flat ? null : make("input", {
      type: "range", min: 0, max: shape[through] - 1, class: "smartlab-slice", "aria-label": name,
      oninput: (event) => this.move(through, Number(event.target.value)),
    });
    const count = make("span", { class: "smartlab-count" });
    const cell = { number, plane, through, picture, lines, stage, slider, count, wide, tall, drawn: "" };
    cell.head = make("figcaption");
    cell.note = make("div", { class: "smartlab-panel-note" });
    this.caption(cell);
    cell.context = picture.getContext("2d");
    cell.image = cell.context.createImageData(width, height);
    cell.pixels = new Uint32Array(cell.image.data.buffer);
    cell.figure = make("figure", {}, cell.head, stage, slider, cell.note);
    this.hand.listen(cell);
    this.sizes.observe(stage);
    return cell;
  }

  caption(cell) {
    const { title, hidden, note } = this.meta.panels[cell.number];
    const plane = this.meta.flat ? "" : cell.plane;
    const share = hidden === null ? "" : make("span", {}, `${(hidden * 100).toFixed(0)}% hidden`);
    cell.head.replaceChildren(make("b", {}, title || plane), title && this.state.plane === "all" ? ` ${plane}` : "", cell.count, share);
    cell.note.textContent = note ?? "";
  }

  // Draw what has changed: all slices after anything but a move of the cursor, else those it has left.
  draw() {
    const { state, painter } = this;
    for (const cell of this.cells) {
      const index = state.cursor[cell.through];
      if (cell.drawn !== `${index} ${this.drawing}`) {
        painter.paint(cell.number, cell.plane, index, state, cell.pixels);
        cell.context.putImageData(cell.image, 0, 0);
        cell.drawn = `${index} ${this.drawing}`;
      }
      if (cell.slider) cell.slider.value = index;
      if (!this.meta.flat) cell.count.textContent = ` ${index} / ${this.meta.shape[cell.through] - 1}`;
      cell.stage.setAttribute("aria-valuenow", index);
    }
    this.lines();
    this.tell(this.cells[0].number, state.cursor);
  }

  // Every picture to its place in its stage, and the lines over it.
  lines() {
    const ratio = globalThis.devicePixelRatio || 1;
    for (const cell of this.cells) {
      const { lines, stage, picture, number, plane } = cell;
      const [width, height] = [Math.round(stage.clientWidth * ratio), Math.round(stage.clientHeight * ratio)];
      if (!width) continue;
      if (lines.width !== width || lines.height !== height) Object.assign(lines, { width, height });
      const [left, top, wide, tall] = this.box(cell);
      picture.style.transform = `matrix(${wide / picture.width}, 0, 0, ${tall / picture.height}, ${left}, ${top})`;
      const close = (wide / cell.wide) * Math.max(...this.meta.spacing) > 12;
      picture.style.imageRendering = close ? "pixelated" : "auto"; // close up, voxels are seen as such
      const context = lines.getContext("2d");
      this.painter.lines(context, number, plane, this.state.cursor, this.state, [left, top, wide, tall].map((v) => v * ratio), ratio);
      this.hand.ruler.draw(cell, context, ratio);
      if (this.loading) say(context, this.loading, 10 * ratio, height - 12 * ratio, 12 * ratio, "left");
    }
  }

  // ---- where a slice lies in its stage: [left, top, width, height] in px of the page ----

  box(cell) {
    const [width, height] = [cell.stage.clientWidth, cell.stage.clientHeight];
    const [across, up] = AXES[cell.plane];
    const scale = Math.max(width / cell.wide, height / cell.tall) * this.zoom; // px per mm
    const edge = (axis, n, room, long) => {
      const middle = (n - 0.5 - this.centre[axis]) * this.meta.spacing[axis] * scale;
      return Math.min(0, Math.max(room - long * scale, room / 2 - middle));
    };
    const [columns, rows] = this.painter.size(cell.plane);
    return [edge(across, columns, width, cell.wide), edge(up, rows, height, cell.tall), cell.wide * scale, cell.tall * scale];
  }

  // Make the slice lie there, as far as its edges allow.
  lay(cell, left, top) {
    const [across, up] = AXES[cell.plane];
    const [, , wide, tall] = this.box(cell);
    const [width, height] = [cell.stage.clientWidth, cell.stage.clientHeight];
    const centre = (axis, room, at, long) => {
      const inside = Math.min(0, Math.max(room - long, at));
      return this.meta.shape[axis] - 0.5 - ((room / 2 - inside) / long) * this.meta.shape[axis];
    };
    this.centre[across] = centre(across, width, left, wide);
    this.centre[up] = centre(up, height, top, tall);
    this.lines();
  }

  // Enlarge by a factor what is at (x, y) of the stage, which stays where it is.
  zoomAt(cell, x, y, factor) {
    const [left, top, wide] = this.box(cell);
    this.zoom = Math.min(40, Math.max(1, this.zoom * factor));
    const grown = this.box(cell)[2] / wide;
    this.lay(cell, x - (x - left) * grown, y - (y - top) * grown);
  }

  reset() {
    this.zoom = 1;
    this.centre = this.middle();
    this.set({ window: [...this.meta.bounds], span: [] });
  }

  // The slice of an axis; a plane that shows only a part of itself follows the cursor.
  move(axis, index) {
    const cursor = [...this.state.cursor];
    cursor[axis] = Math.min(this.meta.shape[axis] - 1, Math.max(0, index));
    if (cursor[axis] === this.state.cursor[axis]) return;
    for (const cell of this.cells) {
      const place = AXES[cell.plane].indexOf(axis);
      if (place > 1) continue;
      const box = this.box(cell);
      const at = box[place] + ((this.meta.shape[axis] - 0.5 - cursor[axis]) / this.meta.shape[axis]) * box[place + 2];
      const room = place ? cell.stage.clientHeight : cell.stage.clientWidth;
      if (room && (at < 0 || at > room)) this.centre[axis] = cursor[axis];
    }
    this.set({ cursor });
  }

  // One plane of one panel alone, or all again.
  enlarge(cell) {
    this.alone = this.alone ? null : { number: cell.number, plane: cell.plane };
    this.layOut();
  }

  // ---- what is there: always the same facts, so that nothing on the page moves ----

  tell(number, voxel) {
    const found = this.painter.at(number, voxel, this.state.head);
    const { flat, value, labels, shape, overlays } = this.meta;
    const signed = (v, [plus, minus]) => `${v < 0 ? minus : plus} ${Math.abs(v).toFixed(1)}`;
    const facts = flat
      ? [["position", `row ${shape[1] - 1 - voxel[1]}, column ${shape[0] - 1 - voxel[0]}`]]
      : [["position", `${["RL", "AP", "SI"].map((pair, i) => signed(found.world[i], pair)).join("  ")} mm`], ["voxel", voxel.join(", ")]];
    facts.push([value === "HU" ? "HU" : "value", asText(found.value)]);
    if (found.guess !== undefined) facts.push(["reconstructed", asText(found.guess)], ["error", asText(Math.abs(found.guess - found.value))]);
    if (found.unit) facts.push(["unit", `${(flat ? [found.unit[1], found.unit[0]] : found.unit).join(", ")}${found.hidden === undefined ? "" : found.hidden ? " hidden" : " visible"}`]);
    if (found.attention !== undefined) facts.push(["attention", `${(found.attention * this.painter.units).toFixed(2)} × even share`]);
    if (overlays.includes("labels")) facts.push(["label", found.label ? labels[found.label][0] : "–"]);
    this.readout.replaceChildren(...facts.map(([name, text]) => make("span", { "data-fact": name }, make("small", {}, name), ` ${text}`)));
    Object.assign(this.readout.dataset, { value: found.value, voxel: voxel.join(","), world: found.world.join(","), attention: found.attention ?? "" });
    const text = facts.map(([name, fact]) => `${name} ${fact}`).join(", ");
    for (const cell of this.cells) cell.stage.setAttribute("aria-valuetext", `slice ${this.state.cursor[cell.through]}, ${text}`);
  }
}

function asText(value) {
  return Number.isInteger(value) ? String(value).replace("-", "−") : value.toPrecision(4).replace("-", "−");
}
