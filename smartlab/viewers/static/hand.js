// The reader's hand on the viewer: pointer, wheel and keys, the ruler and the cine.

const KEYS = { mask: "m", attention: "a", reconstruction: "r", error: "e", labels: "l" };
const STYLES = ["tint", "opaque", "outline"];
const HELP = [
  ["slice", "wheel, ↑ ↓ ← →; ten: Page ↑ ↓; ends: Home, End; play: c"],
  ["cursor", "click, drag, Shift + arrows"],
  ["zoom", "Ctrl + wheel, + and −; one plane: double click; whole screen: f"],
  ["move", "middle button or Space, and drag"],
  ["window", "right button and drag; presets: 1–9; all as at first: 0"],
  ["overlays", "m a r e l; head: h; hidden units as: s; contours: o"],
  ["plane", "p"],
  ["ruler", "d, then two clicks; away: Escape"],
];

class Hand {
  constructor(view) {
    Object.assign(this, { view, active: null, wheel: 0, space: false, cine: null });
    this.ruler = new Ruler(view);
    const { root } = view;
    // the notebook's own keys, m or a among them, are ours here; Ctrl+S and its like stay the notebook's
    const own = (event) => root.toggleAttribute("data-lm-suppress-shortcuts", !(event?.ctrlKey || event?.metaKey));
    for (const name of ["keydown", "keyup", "focusin"]) root.addEventListener(name, own);
    own();
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("keyup", (event) => { if (event.key === " ") this.space = false; });
    // a tool that was clicked gives the keys back to the slices
    root.addEventListener("click", (event) => { if (event.detail && event.target.closest("button")) this.back(); });
    root.addEventListener("pointerup", (event) => { if (event.target.type === "range") this.back(); });
    root.addEventListener("change", (event) => { if (event.target.tagName === "SELECT") this.back(); });
  }

  back() {
    this.active?.stage.focus({ preventScroll: true });
  }

  rest() {
    clearInterval(this.cine);
    this.cine = null;
  }

  // ---- pointer ----

  listen(cell) {
    const { view } = this;
    const { stage, through } = cell;
    const inside = (event) => {
      const box = stage.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    stage.addEventListener("focus", () => { this.active = cell; });
    stage.addEventListener("contextmenu", (event) => (event.preventDefault(), event.stopPropagation()));
    stage.addEventListener("wheel", (event) => {
      const turn = event.deltaY * (event.deltaMode ? 30 : 1);
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault();
        return view.zoomAt(cell, ...inside(event), Math.exp(-turn / 300));
      }
      const at = view.state.cursor[through];
      if (at === (turn > 0 ? 0 : view.meta.shape[through] - 1)) return; // beyond the last slice the page turns
      event.preventDefault();
      this.rest();
      this.wheel = Math.sign(turn) === Math.sign(this.wheel) ? this.wheel + turn : turn;
      if (Math.abs(this.wheel) < 30) return; // touch pads send many small turns
      view.move(through, at - Math.sign(this.wheel));
      this.wheel = 0;
      view.tell(cell.number, this.voxel(cell, inside(event)));
    }, { passive: false });
    let drag = null;
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      this.active = cell;
      const place = inside(event);
      const pans = event.button === 1 || (event.button === 0 && this.space);
      if (event.button === 1) event.preventDefault(); // no scrolling by itself
      drag = { place, box: view.box(cell), window: [...view.state.window], kind: pans ? "pan" : event.button === 2 ? "window" : "cursor" };
      if (drag.kind !== "cursor") return;
      if (this.ruler.on) return void (drag = null), this.ruler.add(cell, this.point(cell, place));
      this.pointAt(cell, place);
    });
    stage.addEventListener("pointermove", (event) => {
      const place = inside(event);
      const [dx, dy] = drag ? [place[0] - drag.place[0], place[1] - drag.place[1]] : [0, 0];
      if (drag?.kind === "pan") view.lay(cell, drag.box[0] + dx, drag.box[1] + dy);
      else if (drag?.kind === "window") view.set({ window: this.turned(drag.window, dx, dy) });
      else if (drag) return this.pointAt(cell, place);
      view.tell(cell.number, this.voxel(cell, place));
    });
    for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, () => { drag = null; });
    stage.addEventListener("pointerleave", () => view.tell(cell.number, view.state.cursor));
    stage.addEventListener("dblclick", (event) => {
      if (this.ruler.on) return;
      if (view.meta.pick) view.changed({ picked: this.voxel(cell, inside(event)) });
      else view.enlarge(cell);
    });
  }

  pointAt(cell, place) {
    const cursor = this.voxel(cell, place);
    this.view.set({ cursor });
    this.view.tell(cell.number, cursor);
  }

  // A window after a drag: to the right it widens, up its centre rises.
  turned([low, high], dx, dy) {
    const width = (high - low) * Math.exp(dx / 200);
    const centre = (low + high) / 2 - (dy * (high - low)) / 300;
    const whole = this.view.meta.value === "HU" ? Math.round : (v) => Number(v.toPrecision(5));
    const [from, to] = [whole(centre - width / 2), whole(centre + width / 2)];
    return to > from ? [from, to] : [from, from + 1];
  }

  // The voxel, in fractions, at (x, y) of a stage; the axis through keeps that of the cursor.
  point(cell, [x, y]) {
    const [across, up] = AXES[cell.plane];
    const [left, top, wide, tall] = this.view.box(cell);
    const place = [...this.view.state.cursor];
    place[across] = this.view.meta.shape[across] * (1 - (x - left) / wide) - 0.5;
    place[up] = this.view.meta.shape[up] * (1 - (y - top) / tall) - 0.5;
    return place;
  }

  voxel(cell, place) {
    return this.point(cell, place).map((v, axis) => Math.min(this.view.meta.shape[axis] - 1, Math.max(0, Math.floor(v + 0.5))));
  }

  // ---- keys ----

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { view } = this;
    const field = ["SELECT", "INPUT"].includes(event.target.tagName);
    const button = event.target.tagName === "BUTTON" && [" ", "Enter"].includes(event.key);
    if (button || event.target.tagName === "SUMMARY") return;
    if (!field && this.step(this.active ?? view.cells[0], event)) void 0;
    else if (event.target.tagName === "SELECT" || !this.act(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
  }

  act(key) {
    const { view } = this;
    const { state, meta } = view;
    const cell = this.active ?? view.cells[0];
    const middle = [cell.stage.clientWidth / 2, cell.stage.clientHeight / 2];
    const overlay = Object.keys(KEYS).find((name) => KEYS[name] === key);
    const preset = meta.windows[Number(key) - 1];
    const order = [...PLANES, "all"];
    const actions = {
      "+": () => view.zoomAt(cell, ...middle, 1.25), "=": () => view.zoomAt(cell, ...middle, 1.25),
      "-": () => view.zoomAt(cell, ...middle, 0.8), "0": () => view.reset(),
      " ": () => { this.space = true; },
      h: () => meta.heads && view.set({ head: state.head + 1 < meta.heads ? state.head + 1 : -1 }),
      p: () => !meta.flat && view.set({ plane: order[(order.indexOf(state.plane) + 1) % 4] }),
      s: () => view.set({ hidden: STYLES[(STYLES.indexOf(state.hidden) + 1) % 3] }),
      o: () => view.set({ contours: !state.contours }),
      d: () => this.ruler.toggle(), Escape: () => (this.ruler.clear(), this.rest(), view.tools.refresh()),
      c: () => this.play(), f: () => view.tools.fullscreen(),
    };
    if (overlay) view.tools.toggle(overlay);
    else if (preset) view.set({ window: preset.slice(1) });
    else if (actions[key]) actions[key]();
    else return false;
    return true;
  }

  step(cell, event) {
    const { view } = this;
    const [across, up, through] = AXES[cell.plane];
    const at = view.state.cursor;
    if (event.shiftKey) {
      const steps = { ArrowLeft: [across, 1], ArrowRight: [across, -1], ArrowUp: [up, 1], ArrowDown: [up, -1] }[event.key];
      if (steps) view.move(steps[0], at[steps[0]] + steps[1]);
      return Boolean(steps);
    }
    const jump = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
    if (jump === undefined || view.meta.flat) return false;
    this.rest();
    view.move(through, at[through] + jump);
    return true;
  }

  // Turn the slices by itself, from the last on again from the first.
  play() {
    const { view } = this;
    const turn = () => {
      if (!view.root.isConnected) return this.rest();
      const { through } = this.active ?? view.cells[0];
      view.move(through, (view.state.cursor[through] + 1) % view.meta.shape[through]);
    };
    if (this.cine) this.rest();
    else if (!view.meta.flat) this.cine = setInterval(turn, 1000 / 15);
    view.tools.refresh();
  }
}

// A distance between two clicks, which stays on its slice.
class Ruler {
  constructor(view) {
    Object.assign(this, { view, on: false, points: [], plane: "", number: 0 });
  }

  toggle() {
    this.on = !this.on;
    this.points = [];
    this.view.tools.refresh();
    this.view.lines();
  }

  clear() {
    if (this.on) this.toggle();
  }

  add(cell, point) {
    const other = this.points.length === 2 || this.points[0]?.[cell.through] !== point[cell.through] || this.plane !== cell.plane || this.number !== cell.number;
    Object.assign(this, { plane: cell.plane, number: cell.number, points: other ? [point] : [...this.points, point] });
    this.view.lines();
  }

  get length() {
    const [a, b] = this.points;
    return b ? Math.hypot(...a.map((v, axis) => (v - b[axis]) * this.view.meta.spacing[axis])) : null;
  }

  draw(cell, context, ratio) {
    const { view, points } = this;
    const here = this.plane === cell.plane && this.number === cell.number && points.length;
    if (!here || points[0][cell.through] !== view.state.cursor[cell.through]) return;
    const [across, up] = AXES[cell.plane];
    const [left, top, wide, tall] = view.box(cell).map((v) => v * ratio);
    const at = (p) => [left + (1 - (p[across] + 0.5) / view.meta.shape[across]) * wide, top + (1 - (p[up] + 0.5) / view.meta.shape[up]) * tall];
    const ends = points.map(at);
    for (const [wideLine, colour] of [[4, "rgba(0, 0, 0, 0.6)"], [2, "#f0e442"]]) {
      Object.assign(context, { lineWidth: wideLine * ratio, strokeStyle: colour });
      context.beginPath();
      for (const [x, y] of ends) context.moveTo(x + 4 * ratio, y), context.arc(x, y, 4 * ratio, 0, 7);
      if (ends[1]) context.moveTo(...ends[0]), context.lineTo(...ends[1]);
      context.stroke();
    }
    if (!ends[1]) return;
    const text = `${this.length.toFixed(1)} ${view.meta.length}`;
    say(context, text, (ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2 - 14 * ratio, 13 * ratio);
    cell.stage.dataset.distance = this.length;
  }
}
