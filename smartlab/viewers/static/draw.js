// Slices as pixels, without any page around them: the rule is that of render.py.
//
// Arrays lie in memory as (X, Y, Z), the last axis fastest. A slice is drawn as radiologists see it:
// columns run against the first of its axes, rows against the second.

const AXES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] }; // across, up, through
const LETTERS = { axial: "RLAP", coronal: "RLSI", sagittal: "APSI" }; // left, right, top, bottom edge
const HIDDEN = [86, 180, 233];
const TYPES = { int16: Int16Array, uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };

async function inflate(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("deflate"));
  return await new Response(stream).arrayBuffer();
}

// The message of `packed` in slices.py -> { name: { data, shape, scale, offset } }.
async function unpack(message, buffers) {
  const arrays = {};
  const parts = message.arrays.map(async (part, i) => {
    arrays[part.name] = { ...part, data: new TYPES[part.type](await inflate(buffers[i])) };
  });
  await Promise.all(parts);
  for (const [name, other] of Object.entries(message.same)) arrays[name] = arrays[other];
  return arrays;
}

class Painter {
  constructor(meta, arrays) {
    Object.assign(this, { meta, arrays, shape: meta.shape, tables: new Map() });
    this.strides = [meta.shape[1] * meta.shape[2], meta.shape[2], 1];
    if (meta.grid) {
      const [, h, w] = meta.grid;
      this.unitStrides = [h * w, w, 1];
      this.units = meta.grid[0] * h * w;
      this.unitPlace = meta.unit_of.map((of, axis) => Int32Array.from(of, (u) => u * this.unitStrides[axis]));
    }
  }

  setWindow([low, high]) {
    this.window = [low, high];
    this.tables.clear();
  }

  // Raw 16-bit value + 32768 -> grey, unrounded.
  table(array) {
    const key = `${array.scale} ${array.offset}`;
    if (!this.tables.has(key)) {
      const [low, high] = this.window;
      const grey = new Float64Array(65536);
      for (let raw = -32768; raw < 32768; raw++) {
        const value = ((raw * array.scale + array.offset - low) / (high - low)) * 255;
        grey[raw + 32768] = Math.min(255, Math.max(0, value));
      }
      this.tables.set(key, grey);
    }
    return this.tables.get(key);
  }

  // Largest attention of a head over all panels: the end of their common colour scale.
  top(head) {
    let most = 0;
    this.meta.panels.forEach((_, number) => {
      const attention = this.arrays[`attention${number}`];
      if (!attention) return;
      const start = (head + 1) * this.units;
      for (let i = start; i < start + this.units; i++) most = Math.max(most, attention.data[i]);
    });
    return most || 1;
  }

  size(plane) {
    return [this.shape[AXES[plane][0]], this.shape[AXES[plane][1]]];
  }

  // Draw one slice of one panel into `pixels` (RGBA). state: { shown: Set, opacity, head, top }.
  paint(number, plane, index, state, pixels) {
    const [across, up, through] = AXES[plane];
    const [width, height] = this.size(plane);
    const on = (name, array) => (state.shown.has(name) && array ? array : null);
    const { image, labels, cividis, magma, colours } = this.arrays;
    const guess = this.arrays[`reconstruction${number}`];
    const grey = this.table(image);
    const rebuilt = on("reconstruction", guess);
    const rebuiltGrey = rebuilt && this.table(rebuilt);
    const named = on("labels", labels);
    const attention = on("attention", this.arrays[`attention${number}`]);
    const wrong = on("error", guess);
    const mask = on("mask", this.arrays[`mask${number}`]);
    const part = state.opacity;
    const half = (this.window[1] - this.window[0]) / 2;
    const head = (state.head + 1) * (this.units || 0);
    let r, g, b;
    const lay = (map, at, share) => {
      r = r * (1 - share) + map[at] * share;
      g = g * (1 - share) + map[at + 1] * share;
      b = b * (1 - share) + map[at + 2] * share;
    };
    let out = 0;
    for (let row = 0; row < height; row++) {
      const high = height - 1 - row;
      const line = index * this.strides[through] + high * this.strides[up];
      const cells = this.units ? this.unitPlace[through][index] + this.unitPlace[up][high] : 0;
      for (let column = width - 1; column >= 0; column--, out += 4) {
        const at = line + column * this.strides[across];
        const raw = image.data[at];
        r = grey[raw + 32768];
        if (rebuilt) r = r * (1 - part.reconstruction) + rebuiltGrey[rebuilt.data[at] + 32768] * part.reconstruction;
        g = b = r;
        if (named && named.data[at]) lay(colours.data, ((named.data[at] - 1) % 24) * 3, part.labels);
        const cell = cells + (this.units ? this.unitPlace[across][column] : 0);
        if (attention) {
          const share = Math.min(1, attention.data[head + cell] / state.top);
          lay(cividis.data, Math.round(share * 255) * 3, part.attention);
        }
        if (wrong) {
          const off = wrong.data[at] * wrong.scale + wrong.offset - (raw * image.scale + image.offset);
          lay(magma.data, Math.round(Math.min(1, Math.abs(off) / half) * 255) * 3, part.error);
        }
        if (mask && mask.data[cell]) lay(HIDDEN, 0, part.mask);
        pixels[out] = r;
        pixels[out + 1] = g;
        pixels[out + 2] = b;
        pixels[out + 3] = 255;
      }
    }
  }

  // What lies at a voxel of a panel, for the read-out.
  at(number, voxel, head) {
    const place = voxel.reduce((sum, v, axis) => sum + v * this.strides[axis], 0);
    const value = (array) => array.data[place] * array.scale + array.offset;
    const world = this.meta.affine.slice(0, 3).map((row) => row[3] + voxel.reduce((s, v, i) => s + v * row[i], 0));
    const found = { value: value(this.arrays.image), world };
    const guess = this.arrays[`reconstruction${number}`];
    if (guess) found.guess = value(guess);
    if (this.arrays.labels) found.label = this.arrays.labels.data[place];
    if (this.units) {
      const cell = voxel.reduce((sum, v, axis) => sum + this.unitPlace[axis][v], 0);
      const [mask, attention] = [this.arrays[`mask${number}`], this.arrays[`attention${number}`]];
      found.unit = voxel.map((v, axis) => this.meta.unit_of[axis][v]);
      if (mask) found.hidden = mask.data[cell] === 1;
      if (attention) found.attention = attention.data[(head + 1) * this.units + cell];
    }
    return found;
  }

  // Lines over the picture, in its own pixels: outline of hidden units, cursor, orientation.
  lines(context, number, plane, cursor, state, width, height) {
    const [across, up, through] = AXES[plane];
    const [columns, rows] = this.size(plane);
    const [dx, dy] = [width / columns, height / rows];
    context.clearRect(0, 0, width, height);
    const mask = state.shown.has("mask") && this.arrays[`mask${number}`];
    if (mask) this.outline(context, mask.data, plane, cursor[through], dx, dy);
    context.lineWidth = Math.max(1, width / 400);
    context.strokeStyle = "rgba(255, 255, 255, 0.55)";
    const [x, y] = [(columns - 0.5 - cursor[across]) * dx, (rows - 0.5 - cursor[up]) * dy];
    const gap = 0.03 * width; // the cursor leaves what it points at uncovered
    context.beginPath();
    for (const [a, b] of [[0, x - gap], [x + gap, width]]) if (b > a) context.moveTo(a, y), context.lineTo(b, y);
    for (const [a, b] of [[0, y - gap], [y + gap, height]]) if (b > a) context.moveTo(x, a), context.lineTo(x, b);
    context.stroke();
    if (this.meta.flat) return;
    context.font = `600 ${Math.round(Math.max(11, width / 26))}px sans-serif`;
    Object.assign(context, { textAlign: "center", textBaseline: "middle", lineWidth: 3 });
    const edge = 0.045 * width;
    const places = [[edge, height / 2], [width - edge, height / 2], [width / 2, edge], [width / 2, height - edge]];
    places.forEach(([left, top], i) => {
      context.strokeStyle = "rgba(0, 0, 0, 0.6)";
      context.strokeText(LETTERS[plane][i], left, top);
      context.fillStyle = "rgba(255, 255, 255, 0.9)";
      context.fillText(LETTERS[plane][i], left, top);
    });
  }

  outline(context, mask, plane, index, dx, dy) {
    const [across, up, through] = AXES[plane];
    const [columns, rows] = this.size(plane);
    const hidden = (a, u) => mask[this.unitPlace[across][a] + this.unitPlace[up][u] + this.unitPlace[through][index]];
    const starts = (axis) => this.meta.unit_of[axis].map((u, i, all) => i === 0 || u !== all[i - 1] ? i : -1).filter((i) => i >= 0);
    const [lefts, bottoms] = [starts(across), starts(up)];
    context.beginPath();
    lefts.forEach((a, i) => {
      const after = lefts[i + 1] ?? columns;
      bottoms.forEach((u, j) => {
        const above = bottoms[j + 1] ?? rows;
        const [x0, x1, y0, y1] = [(columns - after) * dx, (columns - a) * dx, (rows - above) * dy, (rows - u) * dy];
        const here = hidden(a, u);
        if (i && here !== hidden(lefts[i - 1], u)) context.moveTo(x1, y0), context.lineTo(x1, y1);
        if (j && here !== hidden(a, bottoms[j - 1])) context.moveTo(x0, y1), context.lineTo(x1, y1);
      });
    });
    context.lineWidth = Math.max(1, (dx * columns) / 300);
    context.strokeStyle = `rgb(${HIDDEN})`;
    context.stroke();
  }
}
