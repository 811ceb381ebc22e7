// Points of an embedding; the crop of the chosen one beside them.

const DOT = 4; // px

class Scatter {
  constructor(root, meta, points, kinds, names, choose) {
    Object.assign(this, { meta, points, kinds, names, choose, chosen: -1, near: -1, off: new Set() });
    this.canvas = make("canvas", {
      class: "smartlab-scatter", tabindex: 0, role: "listbox", "aria-label": `${meta.count} points; arrow keys choose one`,
      onpointermove: (event) => this.hover(this.find(event)),
      onpointerleave: () => this.hover(-1),
      onclick: (event) => this.pick(this.find(event)),
      onkeydown: (event) => this.key(event),
    });
    this.tip = make("div", { class: "smartlab-tip", role: "status", "aria-live": "polite" });
    const legend = meta.kinds.map((kind, i) => make("button", {
      type: "button", "aria-pressed": "true", title: "show or hide",
      onclick: (event) => this.toggle(i, event.currentTarget),
    }, this.mark(i), kind));
    root.replaceChildren(
      meta.title ? make("div", { class: "smartlab-title" }, meta.title) : "",
      make("div", { class: "smartlab-frame" }, this.canvas), this.tip, make("div", { class: "smartlab-kinds" }, ...legend));
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < points.length; i += 2) {
      [x0, x1] = [Math.min(x0, points[i]), Math.max(x1, points[i])];
      [y0, y1] = [Math.min(y0, points[i + 1]), Math.max(y1, points[i + 1])];
    }
    this.bounds = [x0, x1 > x0 ? x1 : x0 + 1, y0, y1 > y0 ? y1 : y0 + 1];
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.canvas);
    this.hover(-1);
  }

  mark(i) {
    const small = make("canvas", { width: 24, height: 24, class: "smartlab-mark", "aria-hidden": "true" });
    const context = small.getContext("2d");
    context.scale(2, 2);
    this.shape(context, this.meta.marks[i], 6, 6, DOT);
    context.fillStyle = this.meta.colours[i];
    context.fill();
    return small;
  }

  shape(context, mark, x, y, r) {
    context.beginPath();
    if (mark === "square") context.rect(x - r * 0.85, y - r * 0.85, r * 1.7, r * 1.7);
    else if (mark === "circle") context.arc(x, y, r, 0, 2 * Math.PI);
    else {
      const turns = mark === "triangle" ? 3 : 4;
      for (let i = 0; i < turns; i++) {
        const angle = (2 * Math.PI * i) / turns - Math.PI / 2;
        context.lineTo(x + 1.15 * r * Math.cos(angle), y + 1.15 * r * Math.sin(angle));
      }
      context.closePath();
    }
  }

  // Where a point is, in px of the page from the canvas's corner.
  place(i) {
    const [x0, x1, y0, y1] = this.bounds;
    const [width, height, edge] = [this.canvas.clientWidth, this.canvas.clientHeight, 14];
    return [
      edge + ((this.points[2 * i] - x0) / (x1 - x0)) * (width - 2 * edge),
      height - edge - ((this.points[2 * i + 1] - y0) / (y1 - y0)) * (height - 2 * edge),
    ];
  }

  find(event) {
    const box = this.canvas.getBoundingClientRect();
    let [best, least] = [-1, 12 * 12];
    for (let i = 0; i < this.meta.count; i++) {
      if (this.off.has(this.kinds[i])) continue;
      const [x, y] = this.place(i);
      const far = (x - event.clientX + box.left) ** 2 + (y - event.clientY + box.top) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  hover(i) {
    this.near = i;
    const at = i >= 0 ? i : this.chosen;
    this.tip.textContent = at < 0 ? "Click a point to see its crop." : `${this.names[at]} · ${this.meta.kinds[this.kinds[at]]}`;
    this.canvas.style.cursor = i >= 0 ? "pointer" : "default";
    this.draw();
  }

  pick(i) {
    if (i < 0) return;
    this.chosen = i;
    this.hover(i);
    this.choose(i);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    let i = this.chosen;
    do i = (i + step + this.meta.count) % this.meta.count;
    while (this.off.has(this.kinds[i]) && i !== this.chosen);
    this.pick(i);
  }

  toggle(kind, button) {
    if (!this.off.delete(kind) && this.off.size < this.meta.kinds.length - 1) this.off.add(kind);
    button.setAttribute("aria-pressed", String(!this.off.has(kind)));
    this.draw();
  }

  draw() {
    const scale = globalThis.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width) return;
    Object.assign(this.canvas, { width: Math.round(width * scale), height: Math.round(height * scale) });
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    for (let i = 0; i < this.meta.count; i++) {
      if (this.off.has(this.kinds[i])) continue;
      this.shape(context, this.meta.marks[this.kinds[i]], ...this.place(i), DOT);
      context.fillStyle = this.meta.colours[this.kinds[i]];
      context.globalAlpha = 0.85;
      context.fill();
    }
    context.globalAlpha = 1;
    context.strokeStyle = getComputedStyle(this.canvas).color;
    for (const [i, wide] of [[this.near, 1], [this.chosen, 2]]) {
      if (i < 0) continue;
      context.lineWidth = wide;
      this.shape(context, "circle", ...this.place(i), DOT + 3.5);
      context.stroke();
    }
  }
}

function renderEmbedding({ model, el }) {
  const meta = model.get("meta");
  const [left, right] = [make("div", { class: "smartlab-points" }), make("div", { class: "smartlab-crop" })];
  left.append("Loading the points…");
  const root = make("div", { class: "smartlab-viewer smartlab-embedding", "data-lm-suppress-shortcuts": "true" }, left, right);
  el.append(root);
  let [scatter, view, kept] = [null, null, null];
  const say = (text) => right.replaceChildren(make("div", { class: "smartlab-empty", role: "status" }, text));
  say("The crop of the point you choose appears here.");
  const choose = (point) => {
    right.setAttribute("aria-busy", "true");
    model.set("chosen", point);
    model.save_changes();
    model.send({ kind: "crop", point });
  };
  const arrive = async (message, buffers) => {
    if (message.kind === "points" && !scatter) {
      const [points, kinds, names] = await Promise.all(buffers.map(inflate));
      scatter = new Scatter(left, meta, new Float32Array(points), new Uint16Array(kinds), new TextDecoder().decode(names).split("\n"), choose);
      hideStill(meta.name, true);
      if (model.get("chosen") >= 0) scatter.pick(model.get("chosen"));
    } else if (message.kind === "trouble" && message.point === scatter?.chosen) {
      say(`The crop cannot be shown: ${message.text}`);
    } else if (message.kind === "crop" && message.point === scatter?.chosen) {
      const arrays = await unpack(message, buffers);
      if (message.point !== scatter.chosen) return; // another point was chosen meanwhile
      if (view) view.close();
      const crop = make("div", { "data-point": message.point });
      const bounds = kept ?? message.meta.bounds;
      const state = { cursor: message.meta.shape.map((n) => n >> 1), window: bounds, plane: message.meta.flat ? "axial" : "all", shown: new Set(), opacity: {}, head: -1 };
      right.replaceChildren(crop);
      view = new SliceView(crop, message.meta, arrays, state, (change) => { kept = change.window ?? kept; });
      right.setAttribute("aria-busy", "false");
    }
  };
  const follow = () => {
    const point = model.get("chosen");
    if (scatter && point >= 0 && point !== scatter.chosen) scatter.pick(point);
  };
  model.on("msg:custom", arrive);
  model.on("change:chosen", follow);
  model.send({ kind: "points" });
  return () => {
    model.off("msg:custom", arrive);
    model.off("change:chosen", follow);
    if (view) view.close();
    if (scatter) scatter.sizes.disconnect();
    hideStill(meta.name, false);
  };
}
