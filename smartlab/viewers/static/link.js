// Between the widget's state and the view: voxels as they arrive, changes in both directions.

const PATIENCE = 8000; // ms to wait for the kernel before saying so
const AHEAD = 2; // blocks asked for at a time

// Where the static picture of the same state stands until the widget is drawn.
function hideStill(name, hide) {
  for (const still of document.getElementsByClassName(`smartlab-still-${name}`)) {
    (still.closest(".jp-OutputArea-child") || still).style.display = hide ? "none" : "";
  }
}

// Asks for a large scan block by block, nearest the cursor first.
class Loader {
  constructor(view, ask) {
    Object.assign(this, { view, ask, rows: 0, have: [], asked: new Set() });
  }

  begin({ block, arrays, shape }) {
    if (!block) return;
    Object.assign(this, { rows: block, have: Array(Math.ceil((shape[1] * shape[2]) / block)).fill(false) });
    for (const { first } of arrays) if (first !== undefined) this.have[first / block] = true;
    this.asked.clear();
    this.tell();
    this.next();
  }

  arrived(first) {
    this.have[first / this.rows] = true;
    this.asked.delete(first / this.rows);
    this.tell();
    this.next();
  }

  tell() {
    const share = this.have.filter(Boolean).length / this.have.length;
    this.view.loading = share < 1 ? `loading, ${Math.floor(share * 100)} %` : "";
    this.view.root.dataset.loaded = share;
    this.view.replace({});
  }

  next() {
    const { cursor } = this.view.state;
    const at = ((cursor[2] + 0.5) * this.view.meta.shape[1]) / this.rows - 0.5;
    const order = [...this.have.keys()].filter((n) => !this.have[n] && !this.asked.has(n)).sort((a, b) => Math.abs(a - at) - Math.abs(b - at));
    while (order.length && this.asked.size < AHEAD) {
      const n = order.shift();
      this.asked.add(n);
      this.ask({ kind: "block", at: n * this.rows, rows: this.rows });
    }
  }
}

function renderSlices({ model, el }) {
  const meta = model.get("meta");
  const read = (name) => (name === "shown" ? new Set(model.get(name)) : structuredClone(model.get(name)));
  const names = ["cursor", "window", "plane", "only", "shown", "opacity", "head", "span", "hidden", "contours"];
  const state = Object.fromEntries(names.map((name) => [name, read(name)]));
  const root = make("div", {}, make("div", { role: "status" }, "Loading the image…"));
  el.append(root);
  let view = null, loader = null, timer = null, own = false, queue = Promise.resolve();
  const late = setTimeout(() => {
    if (!view) root.replaceChildren(make("div", { role: "status" }, "The kernel is at work, or gone: then run this cell again to look around."));
  }, PATIENCE);
  const save = () => model.save_changes();
  const changed = (change) => {
    own = true;
    for (const [name, value] of Object.entries(change)) model.set(name, name === "shown" ? [...value] : value);
    own = false;
    clearTimeout(timer);
    if (change.picked) save();
    else timer = setTimeout(save, 150); // Python follows when the hand rests
  };
  const arrive = async (message, buffers) => {
    if (message.kind === "arrays" && !view) {
      const arrays = await unpack(message, buffers);
      if (!root.isConnected) return;
      view = new SliceView(root, meta, arrays, state, changed);
      loader = new Loader(view, (what) => model.send(what));
      loader.begin(message);
      hideStill(meta.name, true);
    } else if (message.kind === "update") {
      Object.assign(meta, message.meta); // what a view of the same widget that comes later begins with
      if (!view) return;
      view.replace(await unpack(message, buffers, view.painter.arrays), message.meta);
      loader.begin(message);
    } else if (message.kind === "block" && view) {
      await unpack(message, buffers, view.painter.arrays);
      loader.arrived(message.at);
    }
  };
  const receive = (message, buffers) => { queue = queue.then(() => arrive(message, buffers)); }; // in the order sent
  const follow = names.map((name) => [`change:${name}`, () => { if (!own && view) view.show({ [name]: read(name) }); }]);
  model.on("msg:custom", receive);
  for (const [event, act] of follow) model.on(event, act);
  model.send({ kind: "load" });
  return () => {
    clearTimeout(late);
    model.off("msg:custom", receive);
    for (const [event, act] of follow) model.off(event, act);
    if (view) view.close();
    hideStill(meta.name, false);
  };
}
