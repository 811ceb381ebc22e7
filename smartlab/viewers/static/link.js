// Between the widget's state and the view: voxels as they arrive, changes in both directions.

const PATIENCE = 8000; // ms to wait for the kernel before saying so
const AHEAD = 2; // blocks asked for at a time

// Where the static picture of the same state stands until the widget is drawn.
function hideStill(name, hide) {
  for (const still of document.getElementsByClassName(`smartlab-still-${name}`)) {
    (still.closest(".jp-OutputArea-child") || still).style.display = hide ? "none" : "";
  }
}

// Asks for a large scan block by block, nearest to a slice first.
class Loader {
  constructor(kind, ask, near, tell, ahead) {
    Object.assign(this, { kind, ask, near, tell, ahead, rows: 0, have: [], asked: new Set() });
  }

  begin({ block, arrays, shape }) {
    if (!block) return;
    Object.assign(this, { rows: block, height: shape[1], have: Array(Math.ceil((shape[1] * shape[2]) / block)).fill(false) });
    for (const { first } of arrays) if (first !== undefined) this.have[first / block] = true;
    this.asked.clear();
    this.go();
  }

  arrived(first) {
    this.have[first / this.rows] = true;
    this.asked.delete(first / this.rows);
    this.go();
  }

  get whole() {
    return this.have.length > 0 && this.have.every(Boolean);
  }

  go() {
    this.tell(this.have.filter(Boolean).length / this.have.length);
    const at = ((this.near() + 0.5) * this.height) / this.rows - 0.5;
    const order = [...this.have.keys()].filter((n) => !this.have[n] && !this.asked.has(n)).sort((a, b) => Math.abs(a - at) - Math.abs(b - at));
    while (order.length && this.asked.size < this.ahead) {
      const n = order.shift();
      this.asked.add(n);
      this.ask({ kind: this.kind, at: n * this.rows, rows: this.rows });
    }
  }
}

// What the kernel sends with a viewer, unasked: one that is at work by then does not hold back the first picture.
const early = new Map(); // name -> message and buffers, null once there is a view

function initialize({ model }) {
  const { name } = model.get("meta");
  model.on("msg:custom", (message, buffers) => {
    if (early.get(name) === null) return;
    if (message.kind === "arrays") early.set(name, [message, buffers]);
    if (message.kind === "update") early.delete(name); // no longer what there is
  });
}

function renderSlices({ model, el }) {
  const meta = model.get("meta");
  const read = (name) => (name === "shown" ? new Set(model.get(name)) : structuredClone(model.get(name)));
  const names = ["cursor", "window", "plane", "only", "shown", "opacity", "head", "span", "hidden", "contours"];
  const state = Object.fromEntries(names.map((name) => [name, read(name)]));
  const root = make("div", {}, make("div", { role: "status" }, "Loading the image…"));
  el.append(root);
  let view = null, loader = null, round = null, asked = null, timer = null, own = false, moving = false, queue = Promise.resolve();
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
  const ask = (what) => model.send(what);
  const tell = (share) => {
    view.loading = share < 1 ? `loading, ${Math.floor(share * 100)} %` : "";
    view.root.dataset.loaded = share;
    view.replace({});
  };
  const begin = (message, arrays) => {
    view = new SliceView(root, meta, arrays, state, changed);
    loader = new Loader("block", ask, () => view.state.cursor[2], tell, AHEAD);
    loader.begin(message);
    hideStill(meta.name, true);
    if (!message.round) return;
    const share = (part) => { root.dataset.round = part; };
    round = { ...message.round, arrays: {}, loader: new Loader("round", ask, () => round.start[2], share, 1) };
    round.later = setTimeout(() => round.loader.begin({ ...message.round, arrays: [] }), 500); // after what is in sight
  };
  // Another crop of the scan that lies round this one: cut here if it is there, else asked for.
  const move = (message, arrays) => {
    const { start, cursor, fill } = message.moved;
    round.start = start;
    if (!arrays.image && !round.loader.whole) {
      asked = message;
      return ask({ kind: "load" });
    }
    for (const [name, whole] of Object.entries(round.arrays)) arrays[name] ??= cut(whole, round.shape, start, meta.shape, name === "image" ? fill : 0);
    for (const name of message.gone) delete view.painter.arrays[name];
    view.go(cursor);
    view.replace(arrays, message.meta);
    moving = false;
  };
  const arrive = async (message, buffers) => {
    if (message.kind === "arrays" && !view) {
      const arrays = await unpack(message, buffers);
      if (root.isConnected) begin(message, arrays);
    } else if (message.kind === "arrays" && asked) {
      move(asked, await unpack(message, buffers));
      loader.begin(message);
      asked = null;
    } else if (message.kind === "update") {
      Object.assign(meta, message.meta); // what a view of the same widget that comes later begins with
      if (!view) return void (moving = false);
      if (message.moved) move(message, await unpack(message, buffers));
      else view.replace(await unpack(message, buffers, view.painter.arrays), message.meta);
      loader.begin(message);
    } else if (message.kind === "block" && view) {
      await unpack(message, buffers, view.painter.arrays);
      loader.arrived(message.at);
    } else if (message.kind === "round" && round) {
      await unpack(message, buffers, round.arrays);
      round.loader.arrived(message.at);
    }
  };
  const receive = (message, buffers) => {
    moving ||= Boolean(message.moved);
    queue = queue.then(() => arrive(message, buffers)); // in the order sent
  };
  const follow = names.map((name) => [`change:${name}`, () => {
    if (!own && view && !(moving && name === "cursor")) view.show({ [name]: read(name) }); // of a crop that is not there yet
  }]);
  model.on("msg:custom", receive);
  for (const [event, act] of follow) model.on(event, act);
  const sent = early.get(meta.name);
  early.set(meta.name, null);
  if (sent) receive(...sent);
  else ask({ kind: "load" });
  return () => {
    clearTimeout(late);
    clearTimeout(round?.later);
    model.off("msg:custom", receive);
    for (const [event, act] of follow) model.off(event, act);
    if (view) view.close();
    hideStill(meta.name, false);
  };
}
