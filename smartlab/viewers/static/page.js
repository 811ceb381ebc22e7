// A page of its own: stands in for the notebook's side of the widget, with all voxels in the page.

class Page {
  constructor({ state, message, buffers }) {
    Object.assign(this, { state, message, listeners: {} });
    this.buffers = buffers.map((text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
  }

  get(name) {
    return this.state[name];
  }

  set(name, value) {
    this.state[name] = value;
    this.tell(`change:${name}`);
  }

  on(event, act) {
    (this.listeners[event] ??= []).push(act);
  }

  off(event, act) {
    this.listeners[event] = (this.listeners[event] ?? []).filter((other) => other !== act);
  }

  tell(event, ...what) {
    for (const act of this.listeners[event] ?? []) act(...what);
  }

  save_changes() {}

  send({ kind }) {
    if (kind === "load") this.tell("msg:custom", this.message, this.buffers);
  }
}

const pageData = () => JSON.parse(document.getElementById("smartlab-data").textContent);
