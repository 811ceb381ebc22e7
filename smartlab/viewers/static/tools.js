// What stands round the slices: the tools above, what the colours mean below, and both in a saved picture.

class Tools {
  constructor(view) {
    this.view = view;
    this.bar = make("div", { class: "smartlab-bar", role: "toolbar", "aria-label": "Viewer" });
    this.legend = make("div", { class: "smartlab-legend" });
    this.build();
  }

  build() {
    const { view } = this;
    const { meta } = view;
    this.buttons = [];
    this.kept = []; // (state -> void), each of which brings a tool in step with the state
    const group = (name, ...inside) => make("div", { class: "smartlab-group", role: "group", "aria-label": name }, ...inside);
    this.numbers = make("span", { class: "smartlab-numbers", title: "drag with the right button to change" });
    const windows = this.select("Window", "keys 1 to 9", [...meta.windows.map(([name], i) => [i, name]), ["", "by hand"]],
      ({ window }) => meta.windows.findIndex(([, ...b]) => b[0] === window[0] && b[1] === window[1]), (i) => i !== "" && view.set({ window: meta.windows[i].slice(1) }));
    const planes = meta.flat ? [] : [...PLANES, "all"].map((plane) =>
      this.button(plane === "all" ? "all three" : plane, null, (state) => state.plane === plane, () => view.set({ plane })));
    const size = group("Size",
      this.button("−", "-", null, () => view.hand.act("-"), "Smaller"), this.button("+", "+", null, () => view.hand.act("+"), "Larger"),
      this.button("reset", "0", null, () => view.reset()), this.button("full screen", "f", () => document.fullscreenElement === view.root, () => this.fullscreen()));
    const more = group("Tools", this.button("ruler", "d", () => view.hand.ruler.on, () => view.hand.ruler.toggle()),
      meta.flat ? null : this.button("play", "c", () => view.hand.cine !== null, () => view.hand.play()));
    const save = this.button("save PNG", null, null, () => this.save(), "Save PNG");
    const keys = HELP.flatMap(([what, how]) => [make("dt", {}, what), make("dd", {}, how)]);
    const help = make("details", { class: "smartlab-help" }, make("summary", {}, "Keys"), make("dl", {}, ...keys));
    this.bar.replaceChildren(...[
      group("Window", windows, this.numbers), planes.length ? group("Plane", ...planes) : null,
      ...meta.overlays.map((name) => group(NAMES[name], ...this.overlay(name))), size, more, save, help,
    ].filter(Boolean));
  }

  button(text, key, pressed, click, name = null) {
    const one = make("button", { type: "button", onclick: click, title: key ? `key ${key}` : null, "aria-label": name, "aria-keyshortcuts": key || null }, text);
    if (pressed) this.kept.push((state) => one.setAttribute("aria-pressed", String(pressed(state))));
    return one;
  }

  // options: [value, text]; read: state -> value; write: value -> void.
  select(name, key, options, read, write) {
    const one = make("select", { "aria-label": name, title: key, onchange: (event) => write(event.target.value) },
      ...options.map(([value, text]) => make("option", { value }, text)));
    this.kept.push((state) => { const value = String(read(state)); one.value = options.some(([v]) => String(v) === value) ? value : ""; });
    return one;
  }

  // attributes beside, read and write as for `select`, in numbers.
  slider(name, attributes, read, write, enabled) {
    const one = make("input", { type: "range", "aria-label": name, title: name, ...attributes, oninput: (event) => write(Number(event.target.value)) });
    this.kept.push((state) => { one.value = read(state); one.disabled = !enabled(state); });
    return one;
  }

  overlay(name) {
    const { view } = this;
    const { meta } = view;
    const on = (state) => state.shown.has(name);
    const toggle = this.button(NAMES[name], KEYS[name], on, () => this.toggle(name));
    toggle.dataset.overlay = name;
    const opacity = this.slider(`Opacity of ${NAMES[name].toLowerCase()}`, { min: 0, max: 100, "data-overlay": name },
      (state) => Math.round((state.opacity[name] ?? 1) * 100), (v) => view.set({ opacity: { ...view.state.opacity, [name]: v / 100 } }), on);
    const more = {
      mask: () => [this.select("Hidden units as", "key s", [["tint", "tint"], ["opaque", "student's view"], ["outline", "outline"]], (state) => state.hidden, (hidden) => view.set({ hidden }))],
      attention: () => [
        this.select("Attention head", "key h", [[-1, "mean of heads"], ...Array.from({ length: meta.heads }, (_, i) => [i, `head ${i + 1}`])], (state) => state.head, (v) => view.set({ head: Number(v) })),
        ...["from", "to"].map((word, end) => this.slider(`Colours of attention ${word}, × even share`, { min: 0, max: 100, step: 0.5, "data-span": word },
          (state) => this.notch(view.painter.span(state)[end]), (v) => view.set({ span: this.spanned(end, v) }), on)),
      ],
      labels: () => [this.button("contours", "o", (state) => state.contours, () => view.set({ contours: !view.state.contours }))],
    }[name]?.() ?? [];
    return [toggle, opacity, ...more];
  }

  // A handle's place (0 to 100) for a multiple of an even share, and back: finer where most units lie.
  notch(share) {
    return Math.sqrt(share / this.most()) * 100;
  }

  most() {
    const { meta, state } = this.view;
    return meta.spans[state.head + 1]?.[2] ?? 2;
  }

  spanned(end, notch) {
    const span = [...this.view.painter.span(this.view.state)].slice(0, 2);
    span[end] = (notch / 100) ** 2 * this.most();
    if (span[0] >= span[1]) span[1 - end] = end ? Math.max(0, span[1] - 0.1) : span[0] + 0.1;
    return span;
  }

  toggle(name) {
    const { view } = this;
    if (!view.meta.overlays.includes(name)) return;
    const shown = new Set(view.state.shown);
    if (!shown.delete(name)) shown.add(name);
    view.set({ shown });
  }

  fullscreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.view.root.requestFullscreen?.();
  }

  refresh() {
    const { state } = this.view;
    for (const bring of this.kept) bring(state);
    const [low, high] = state.window;
    this.numbers.textContent = `C ${asText((low + high) / 2)} W ${asText(high - low)}`;
  }

  // ---- what the colours mean ----

  entries() {
    const { state, meta, painter } = this.view;
    const { heat, viridis, colours } = painter.arrays;
    const over = (rgb, part, grey = 128) => `rgb(${[...rgb].map((v) => Math.round(v * part + grey * (1 - part)))})`;
    const ramp = (map, part) => Array.from({ length: 17 }, (_, i) => over(map.data.slice(Math.round(i * 15.9375) * 3, Math.round(i * 15.9375) * 3 + 3), part(i / 16)));
    const on = (name) => state.shown.has(name) && meta.overlays.includes(name);
    const unit = meta.value === "HU" ? " HU" : "";
    const [low, high] = state.window;
    const found = [{ text: `window ${asText(low)} to ${asText(high)}${unit}` }];
    const styles = new Set(meta.panels.map((_, number) => painter.style(number, state)));
    if (styles.has("tint")) found.push({ swatch: over(HIDDEN, state.opacity.mask), text: "hidden from the student" });
    if (styles.has("opaque")) found.push({ swatch: over(COVER, 1), text: "hidden from the student" });
    if (styles.has("outline")) found.push({ swatch: `rgb(${HIDDEN})`, hatched: true, text: "hidden from the student" });
    if (on("attention")) {
      const [from, to] = painter.span(state);
      const name = state.head < 0 ? "mean attention" : `attention of head ${state.head + 1}`;
      found.push({ name, from: `${from.toFixed(1)}`, stops: ramp(heat, (t) => state.opacity.attention * (0.4 + 0.6 * t)), to: `${to.toFixed(1)} × even share and more; none below` });
    }
    if (on("error")) found.push({ name: "absolute error", from: "0", stops: ramp(viridis, () => state.opacity.error), to: `${asText((high - low) / 2)}${unit}` });
    if (on("labels")) {
      for (const [v, [text, mean]] of Object.entries(meta.labels)) {
        const grey = Math.min(255, Math.max(0, ((mean - low) / (high - low)) * 255));
        found.push({ swatch: over(colours.data.slice(((v - 1) % 24) * 3, ((v - 1) % 24) * 3 + 3), state.contours ? 1 : state.opacity.labels, grey), text });
      }
    }
    return found;
  }

  explain() {
    this.legend.replaceChildren(...this.entries().map(({ text, swatch, hatched, name, from, stops, to }) => {
      if (stops) {
        const bar = make("i", { class: "smartlab-scale" });
        bar.style.background = `linear-gradient(to right, ${stops})`;
        return make("span", { "data-scale": name }, `${name} ${from} `, bar, ` ${to}`);
      }
      if (!swatch) return make("span", { "data-window": "" }, text);
      const box = make("i", { class: "smartlab-swatch" });
      box.style.background = hatched ? `repeating-linear-gradient(135deg, ${swatch} 0 2px, transparent 2px 5px)` : swatch;
      return make("span", { "data-label": text }, box, text);
    }));
  }

  // All slices as one picture at twice the size on the screen, with title, legend and scale.
  save() {
    const { view } = this;
    const box = view.grid.getBoundingClientRect();
    const [edge, line] = [24, 34];
    const context = make("canvas", { width: 10, height: 10 }).getContext("2d");
    const wide = Math.max(900, Math.ceil(box.width * 2)) + 2 * edge;
    const lines = this.wrapped(context, wide - 2 * edge);
    const head = view.meta.title ? 64 : edge;
    const tall = head + Math.ceil(box.height * 2) + lines.length * line + edge;
    Object.assign(context.canvas, { width: wide, height: tall });
    context.fillStyle = "white";
    context.fillRect(0, 0, wide, tall);
    context.fillStyle = "black";
    context.font = "600 32px sans-serif";
    if (view.meta.title) context.fillText(view.meta.title, edge, 44);
    for (const cell of view.cells) {
      const at = cell.stage.getBoundingClientRect();
      const [x, y, w, h] = [edge + (at.left - box.left) * 2, head + (at.top - box.top) * 2, at.width * 2, at.height * 2];
      context.save();
      context.beginPath();
      context.rect(x, y, w, h);
      context.clip();
      const [left, top, full, high] = view.box(cell).map((v) => v * 2);
      context.drawImage(cell.picture, x + left, y + top, full, high);
      context.drawImage(cell.lines, x, y, w, h);
      context.restore();
      context.font = "24px sans-serif";
      const words = [...cell.head.childNodes, cell.note].map((node) => node.textContent.trim()).filter(Boolean);
      context.fillText(words.join(" · "), x, y - 10, w);
    }
    lines.forEach((entries, i) => this.write(context, entries, edge, tall - (lines.length - i) * line));
    context.canvas.toBlob((blob) => {
      const name = (view.meta.title || "slices").toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-");
      const link = make("a", { href: URL.createObjectURL(blob), download: `${name}.png` });
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  // The legend's entries as lines of a picture: [[width, entry], …] each.
  wrapped(context, room) {
    context.font = "22px sans-serif";
    const lines = [[]];
    let used = 0;
    for (const entry of this.entries()) {
      const text = entry.stops ? `${entry.name} ${entry.from}  ${entry.to}` : entry.text;
      const width = context.measureText(text).width + (entry.stops ? 250 : 60);
      if (used && used + width > room) lines.push([]), used = 0;
      lines.at(-1).push([width, entry]);
      used += width;
    }
    return lines;
  }

  write(context, entries, x, y) {
    context.font = "22px sans-serif";
    for (const [width, { text, swatch, name, from, stops, to }] of entries) {
      let at = x;
      const word = (what) => (context.fillStyle = "black", context.fillText(what, at, y + 8), at += context.measureText(what).width + 8);
      if (swatch) context.fillStyle = swatch, context.fillRect(at, y - 10, 20, 20), at += 28;
      if (!stops) word(text);
      else {
        word(`${name} ${from}`);
        stops.forEach((stop, i) => (context.fillStyle = stop, context.fillRect(at + i * 12, y - 10, 12.5, 20)));
        at += stops.length * 12 + 8;
        word(to);
      }
      x += width;
    }
  }
}
