// A saved explorer: its controls, each of whose choices was drawn before, as mask bits, and the viewer beside them.

class Saved {
  constructor(page, root, data) {
    Object.assign(this, { page, data, at: data.at, timer: null });
    this.told = make("div", { class: "smartlab-shares" });
    this.line = make("input", { class: "smartlab-line", readonly: true, "aria-label": "Settings" });
    const copy = make("button", { type: "button", class: "smartlab-save", onclick: () => this.copy() }, "Copy as settings");
    const knobs = make("div", { class: "smartlab-knobs", role: "group", "aria-label": "Masking" }, ...this.knobs());
    const viewer = make("div", {});
    root.classList.add("smartlab-viewer", "smartlab-saved");
    root.append(make("style", {}, data.css), knobs,
      make("div", {}, viewer, make("div", { class: "smartlab-copy" }, copy, this.line)));
    renderSlices({ model: page, el: viewer });
    this.tell();
  }

  knobs() {
    const { data, at } = this;
    const list = (text, name, options) => make("label", {}, text,
      make("select", { "data-knob": name, onchange: (event) => this.set({ [name]: Number(event.target.value) }) },
        ...options.map((option, i) => make("option", { value: i, selected: i === at[name] }, option))));
    const slide = (text, name, options) => {
      const shown = make("output", {}, options[at[name]]);
      return make("label", {}, text, make("input", { type: "range", min: 0, max: options.length - 1, value: at[name], "data-knob": name,
        oninput: (event) => { shown.textContent = options[event.target.value]; this.set({ [name]: Number(event.target.value) }); } }), shown);
    };
    const spell = (name) => name.replaceAll("_", " ");
    const play = make("button", { type: "button", class: "smartlab-save", "aria-pressed": "false", onclick: () => this.play(play) }, "play seeds");
    return [
      list("show", "shown", data.shown.map(([name]) => name)),
      ...at.strategies.map((_, panel) => make("label", {}, panel ? "beside it" : "strategy",
        make("select", { "data-knob": `strategy${panel}`, onchange: (event) => this.choose(panel, Number(event.target.value)) },
          panel ? make("option", { value: -1 }, "nothing") : null,
          ...data.strategies.map((name, i) => make("option", { value: i, selected: i === at.strategies[panel] }, spell(name)))))),
      slide("ratio", "ratio", data.ratios.map((r) => r.toFixed(2))),
      slide("seed", "seed", data.seeds.map(String)), play,
      data.looks.length > 1 ? list("teacher", "look", data.looks.map(({ name }) => name)) : "",
      this.told, make("small", {}, data.about),
    ].filter(Boolean);
  }

  choose(panel, strategy) {
    const { page } = this;
    this.set({ strategies: this.at.strategies.map((old, i) => (i === panel ? strategy : old)) });
    if (!panel) return;
    page.set("only", strategy < 0 ? [0] : []);
    if (!page.get("meta").flat) page.set("plane", strategy < 0 ? "all" : "axial");
  }

  // The strategies that stand there.
  get standing() {
    return this.at.strategies.filter((strategy) => strategy >= 0);
  }

  play(button) {
    const going = this.timer !== null;
    clearInterval(this.timer);
    this.timer = going ? null : setInterval(() => {
      const knob = document.querySelector("[data-knob=seed]");
      knob.value = (this.at.seed + 1) % this.data.seeds.length;
      knob.dispatchEvent(new Event("input"));
    }, 400);
    button.setAttribute("aria-pressed", String(!going));
  }

  // What the kernel would send: the mask of each panel, and attention where another look guides.
  set(change) {
    const { page, data } = this;
    Object.assign(this.at, change);
    if (change.look !== undefined) for (const [message, ...buffers] of data.looks[this.at.look].messages) page.tell("msg:custom", message, buffers.map(bytes));
    if (change.shown !== undefined) {
      const [, overlays, style] = data.shown[this.at.shown];
      page.set("hidden", style);
      page.set("shown", [...overlays, ...page.get("shown").filter((name) => name === "labels")]);
    }
    const panels = this.at.strategies.map((strategy) => ({ title: (data.strategies[strategy] ?? "").replaceAll("_", " "), note: "", hidden: data.chance[this.at.ratio] }));
    this.standing.forEach((strategy, panel) => {
      const part = { name: `mask${panel}`, type: "bits", shape: data.grid, scale: 1, offset: 0 };
      page.tell("msg:custom", { kind: "update", arrays: [part], same: {}, gone: [], block: 0, panel, meta: { panels } }, [bytes(this.mask(strategy))]);
    });
    this.tell();
  }

  mask(strategy) {
    const { at, data } = this;
    return data.masks[data.guided[strategy] ? at.look : 0][strategy][at.ratio][at.seed];
  }

  async tell() {
    const { at, data } = this;
    const names = this.standing.map((s) => data.strategies[s].replaceAll("_", " "));
    const masks = await Promise.all(this.standing.map(async (s) => bitsOf({ data: new Uint8Array(await inflate(bytes(this.mask(s)))), shape: data.grid })));
    const percent = (share) => `${Math.round(100 * share)}%`;
    const chance = percent(data.chance[at.ratio]);
    const row = (kind, cells) => make("tr", {}, ...cells.map((text) => make(kind, {}, text)));
    const part = (mask, share) => share.reduce((sum, s, i) => sum + s * mask[i], 0) / share.reduce((a, b) => a + b);
    const rows = Object.entries(data.shares).map(([region, share]) => row("td", [region, ...masks.map((mask) => percent(part(mask, share))), chance]));
    const facts = [...data.looks[at.look].facts];
    if (masks.length > 1) {
      const [first, second] = masks;
      facts.push(`of what ${names[0]} hides, ${names[1]} hides ${percent(part(second, [...first]))} (chance ${chance})`);
    }
    this.told.replaceChildren(make("table", {}, row("th", ["hidden", ...names, "chance"]), ...rows), make("div", {}, ...facts.map((text) => make("div", {}, text))));
    this.line.value = data.words[data.guided[at.strategies[0]] ? at.look : 0][at.strategies[0]].replace("{ratio}", data.ratios[at.ratio]);
  }

  copy() {
    this.line.select();
    navigator.clipboard?.writeText(this.line.value).catch(() => document.execCommand("copy")) ?? document.execCommand("copy");
  }
}

const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
