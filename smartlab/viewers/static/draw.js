// Slices as pixels, without any page around them: the rule is that of render.py.
//
// Voxels lie in memory as (Z, Y, X), units as (d, h, w). A slice is drawn as radiologists see it:
// columns run against the first of its axes, rows against the second.

const AXES = { axial: [0, 1, 2], coronal: [0, 2, 1], sagittal: [1, 2, 0] }; // across, up, through
const LETTERS = { axial: "RLAP", coronal: "RLSI", sagittal: "APSI" }; // left, right, top, bottom edge
const HIDDEN = [86, 180, 233];
const COVER = [59, 74, 90]; // a hidden unit as the student gets it
const TYPES = { int16: Int16Array, uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array, bits: Uint8Array };

async function inflate(buffer) {
  const stream = new Blob([buffer]).stream().pipeThrough(new DecompressionStream("deflate"));
  return await new Response(stream).arrayBuffer();
}

// A message of sending.py into `arrays`, { name: { data, shape, scale, offset } }: small ones whole, voxels where they belong.
async function unpack(message, buffers, arrays = {}) {
  const parts = await Promise.all(message.arrays.map(async (part, i) => ({ ...part, data: new TYPES[part.type](await inflate(buffers[i])) })));
  for (const name of message.gone ?? []) delete arrays[name];
  for (const part of parts) {
    if (part.first !== undefined || part.axis !== undefined) put(arrays, part, message.shape);
    else arrays[part.name] = part.type === "bits" ? { ...part, data: bitsOf(part) } : part;
  }
  for (const [name, other] of Object.entries(message.same)) arrays[name] = arrays[other];
  return arrays;
}

function bitsOf({ data, shape }) {
  const all = new Uint8Array(shape.reduce((a, b) => a * b));
  for (let i = 0; i < all.length; i++) all[i] = (data[i >> 3] >> (i & 7)) & 1;
  return all;
}

// Some rows, or one plane, of a volume to their place in it.
function put(arrays, part, [x, y, z]) {
  if (part.data.length === x * y * z) return void (arrays[part.name] = part);
  const volume = (arrays[part.name] ??= { ...part, data: new TYPES[part.type](x * y * z).fill(part.type === "int16" ? -32768 : 0) });
  const { data, axis, at } = part;
  if (part.first !== undefined) volume.data.set(data, part.first * x);
  else if (axis === 2) volume.data.set(data, at * x * y);
  else if (axis === 1) for (let k = 0; k < z; k++) volume.data.set(data.subarray(k * x, (k + 1) * x), (k * y + at) * x);
  else for (let row = 0; row < y * z; row++) volume.data[row * x + at] = data[row];
}

// A box of a volume, `fill` where it reaches beyond.
function cut({ data, ...more }, [wide, high, deep], [left, low, first], [x, y, z], fill) {
  const box = new TYPES[more.type](x * y * z).fill(fill);
  const [a, b] = [Math.max(0, -left), Math.min(x, wide - left)];
  for (let k = Math.max(0, -first); a < b && k < Math.min(z, deep - first); k++) {
    for (let j = Math.max(0, -low); j < Math.min(y, high - low); j++) {
      const row = ((k + first) * high + j + low) * wide + left;
      box.set(data.subarray(row + a, row + b), (k * y + j) * x + a);
    }
  }
  return { ...more, data: box };
}

class Painter {
  constructor(meta, arrays) {
    Object.assign(this, { meta, arrays, shape: meta.shape, tables: new Map() });
    this.strides = [1, meta.shape[0], meta.shape[0] * meta.shape[1]];
    this.setGrid();
  }

  setGrid() {
    if (!this.meta.grid) return;
    const [, h, w] = this.meta.grid;
    this.units = this.meta.grid[0] * h * w;
    const strides = [h * w, w, 1];
    this.unitPlace = this.meta.unit_of.map((of, axis) => Int32Array.from(of, (u) => u * strides[axis]));
  }

  setWindow([low, high]) {
    this.window = [low, high];
    this.tables.clear();
  }

  // Raw 16-bit value + 32768 -> grey, unrounded; `pixel` the same as a grey pixel.
  table(array) {
    const key = `${array.scale} ${array.offset}`;
    if (!this.tables.has(key)) {
      const [low, high] = this.window;
      const [grey, pixel] = [new Float32Array(65536), new Uint32Array(65536)];
      for (let raw = -32768; raw < 32768; raw++) {
        const value = Math.min(255, Math.max(0, ((raw * array.scale + array.offset - low) / (high - low)) * 255));
        grey[raw + 32768] = value;
        pixel[raw + 32768] = 0xff000000 | (Math.round(value) * 0x10101);
      }
      this.tables.set(key, { grey, pixel });
    }
    return this.tables.get(key);
  }

  size(plane) {
    return [this.shape[AXES[plane][0]], this.shape[AXES[plane][1]]];
  }

  // Where the colours of attention begin and end, as multiples of an even share.
  span(look) {
    return look.span.length ? look.span : this.meta.spans[look.head + 1] ?? this.meta.spans[0];
  }

  // How a panel's hidden units are drawn: "" not at all. Under attention a tint would be one more colour of it.
  style(number, look) {
    if (!look.shown.has("mask") || !this.arrays[`mask${number}`]) return "";
    const crowded = look.hidden === "tint" && look.shown.has("attention") && this.arrays[`attention${number}`];
    return crowded ? "outline" : look.hidden;
  }

  // Draw one slice of one panel into `out`, a pixel of 32 bits each.
  paint(number, plane, index, look, out) {
    const { image, labels } = this.arrays;
    const on = (name, array) => (look.shown.has(name) && array ? array : null);
    const guess = this.arrays[`reconstruction${number}`];
    const style = this.style(number, look);
    const layers = {
      rebuilt: on("reconstruction", guess), named: on("labels", labels), wrong: on("error", guess),
      attention: on("attention", this.arrays[`attention${number}`]),
      mask: style === "tint" || style === "opaque" ? this.arrays[`mask${number}`] : null,
    };
    if (Object.values(layers).some(Boolean)) this.overlaid(plane, index, look, out, layers, style);
    else this.plain(plane, index, out, image);
  }

  plain(plane, index, out, image) {
    const [across, up, through] = AXES[plane];
    const [width, height] = this.size(plane);
    const { pixel } = this.table(image);
    const { data } = image;
    const step = this.strides[across];
    for (let row = 0, o = 0; row < height; row++) {
      let at = index * this.strides[through] + (height - 1 - row) * this.strides[up] + (width - 1) * step;
      for (let column = 0; column < width; column++, at -= step) out[o++] = pixel[data[at] + 32768];
    }
  }

  overlaid(plane, index, look, out, { rebuilt, named, wrong, attention, mask }, style) {
    const [across, up, through] = AXES[plane];
    const [width, height] = this.size(plane);
    const { image, heat, viridis, colours } = this.arrays;
    const [ramp, errors, hues] = [heat.data, viridis.data, colours.data];
    const { grey } = this.table(image);
    const rebuiltGrey = rebuilt && this.table(rebuilt).grey;
    const part = look.opacity;
    const [stepAcross, stepUp] = [this.strides[across], this.strides[up]];
    const half = (this.window[1] - this.window[0]) / 2;
    const head = (look.head + 1) * (this.units || 0);
    const [low, high] = attention ? this.span(look) : [0, 1];
    const reach = Math.max(high - low, 1e-6);
    const [flat, cover] = style === "opaque" ? [COVER, 1] : [HIDDEN, part.mask];
    const cells = attention || mask ? this.unitPlace : null;
    let heatPart = 0, heatAt = 0, maskPart = 0;
    for (let row = 0, o = 0; row < height; row++) {
      const rise = height - 1 - row;
      const line = index * this.strides[through] + rise * stepUp;
      const place = cells ? cells[through][index] + cells[up][rise] : 0;
      let last = -1;
      for (let column = width - 1; column >= 0; column--) {
        const at = line + column * stepAcross;
        const raw = image.data[at];
        let r = grey[raw + 32768];
        if (rebuilt) r += (rebuiltGrey[rebuilt.data[at] + 32768] - r) * part.reconstruction;
        let g = r, b = r;
        if (named && named.data[at]) {
          const v = named.data[at];
          const edge = look.contours && (
            (column > 0 && named.data[at - stepAcross] !== v) || (column < width - 1 && named.data[at + stepAcross] !== v) ||
            (rise > 0 && named.data[at - stepUp] !== v) || (rise < height - 1 && named.data[at + stepUp] !== v));
          const [hue, share] = [((v - 1) % 24) * 3, edge ? 1 : part.labels];
          r += (hues[hue] - r) * share;
          g += (hues[hue + 1] - g) * share;
          b += (hues[hue + 2] - b) * share;
        }
        if (cells) {
          const cell = place + cells[across][column];
          if (cell !== last) { // what lies on a unit is the same for all its voxels
            last = cell;
            maskPart = mask && mask.data[cell] ? cover : 0;
            const share = attention ? attention.data[head + cell] * this.units : -1;
            const level = Math.min(1, Math.max(0, (share - low) / reach));
            heatPart = attention && share >= low ? part.attention * (0.4 + 0.6 * level) : 0;
            heatAt = Math.round(level * 255) * 3;
          }
          if (heatPart) {
            r += (ramp[heatAt] - r) * heatPart;
            g += (ramp[heatAt + 1] - g) * heatPart;
            b += (ramp[heatAt + 2] - b) * heatPart;
          }
        }
        if (wrong) {
          const off = Math.abs(wrong.data[at] * wrong.scale + wrong.offset - raw * image.scale - image.offset) / half;
          const hue = Math.round(Math.min(1, off) * 255) * 3;
          r += (errors[hue] - r) * part.error;
          g += (errors[hue + 1] - g) * part.error;
          b += (errors[hue + 2] - b) * part.error;
        }
        if (maskPart) {
          r += (flat[0] - r) * maskPart;
          g += (flat[1] - g) * maskPart;
          b += (flat[2] - b) * maskPart;
        }
        out[o++] = 0xff000000 | ((b + 0.5) << 16) | ((g + 0.5) << 8) | (r + 0.5);
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

  // ---- lines over the picture, which lies at box = [left, top, width, height] of the canvas ----

  lines(context, number, plane, cursor, look, box, ratio) {
    const [across, up, through] = AXES[plane];
    const [columns, rows] = this.size(plane);
    const { width, height } = context.canvas;
    const [left, top] = box;
    const [dx, dy] = [box[2] / columns, box[3] / rows];
    context.clearRect(0, 0, width, height);
    const style = this.style(number, look);
    if (style === "tint" || style === "outline") {
      context.save();
      context.translate(left, top);
      this.outline(context, this.arrays[`mask${number}`].data, plane, cursor[through], dx, dy, style === "outline", ratio);
      context.restore();
    }
    context.lineWidth = ratio;
    context.strokeStyle = "rgba(255, 255, 255, 0.55)";
    const [x, y] = [left + (columns - 0.5 - cursor[across]) * dx, top + (rows - 0.5 - cursor[up]) * dy];
    const gap = 0.03 * width; // the cursor leaves what it points at uncovered
    context.beginPath();
    for (const [a, b] of [[0, x - gap], [x + gap, width]]) if (b > a) context.moveTo(a, y), context.lineTo(b, y);
    for (const [a, b] of [[0, y - gap], [y + gap, height]]) if (b > a) context.moveTo(x, a), context.lineTo(x, b);
    context.stroke();
    const size = Math.round(Math.min(20 * ratio, Math.max(11 * ratio, width / 26)));
    if (!this.meta.flat) {
      const edge = 0.8 * size;
      const places = [[edge, height / 2], [width - edge, height / 2], [width / 2, edge], [width / 2, height - edge]];
      places.forEach((place, i) => say(context, LETTERS[plane][i], ...place, size));
    }
    this.bar(context, box[2] / (columns * this.meta.spacing[across]), Math.round(0.8 * size), ratio);
  }

  // A length at the lower right.
  bar(context, scale, size, ratio) {
    const { width, height } = context.canvas;
    const long = [500, 200, 100, 50, 20, 10, 5, 2, 1, 0.5].find((n) => n * scale <= width / 4);
    if (!long || this.meta.length !== "mm") return;
    const [right, low] = [width - 8 * ratio, height - 8 * ratio];
    for (const [wide, colour] of [[4, "rgba(0, 0, 0, 0.6)"], [2, "rgba(255, 255, 255, 0.9)"]]) {
      Object.assign(context, { lineWidth: wide * ratio, strokeStyle: colour });
      context.beginPath();
      context.moveTo(right - long * scale, low);
      context.lineTo(right, low);
      context.stroke();
    }
    say(context, `${long} mm`, right, low - 0.9 * size, size, "right");
  }

  // Borders between hidden and visible units; a stroke through each hidden one where it has no tint.
  outline(context, mask, plane, index, dx, dy, hatched, ratio) {
    const [across, up, through] = AXES[plane];
    const [columns, rows] = this.size(plane);
    const hidden = (a, u) => mask[this.unitPlace[across][a] + this.unitPlace[up][u] + this.unitPlace[through][index]];
    const starts = (axis) => this.meta.unit_of[axis].map((u, i, all) => i === 0 || u !== all[i - 1] ? i : -1).filter((i) => i >= 0);
    const [lefts, bottoms] = [starts(across), starts(up)];
    const [edges, strokes] = [new Path2D(), new Path2D()];
    const line = (path, ...[a, b, c, d]) => (path.moveTo(a, b), path.lineTo(c, d));
    lefts.forEach((a, i) => {
      const after = lefts[i + 1] ?? columns;
      bottoms.forEach((u, j) => {
        const above = bottoms[j + 1] ?? rows;
        const [x0, x1, y0, y1] = [(columns - after) * dx, (columns - a) * dx, (rows - above) * dy, (rows - u) * dy];
        const here = hidden(a, u);
        if (i && here !== hidden(lefts[i - 1], u)) line(edges, x1, y0, x1, y1);
        if (j && here !== hidden(a, bottoms[j - 1])) line(edges, x0, y1, x1, y1);
        if (!hatched || !here) return;
        const [xm, ym] = [(x0 + x1) / 2, (y0 + y1) / 2];
        line(strokes, x0, y1, x1, y0);
        if (x1 - x0 > 20 * ratio) line(strokes, x0, ym, xm, y0), line(strokes, xm, y1, x1, ym);
      });
    });
    context.strokeStyle = `rgb(${HIDDEN})`;
    context.lineWidth = (hatched ? 1.6 : 1) * ratio;
    context.stroke(edges);
    context.strokeStyle = `rgba(${HIDDEN}, 0.85)`;
    context.lineWidth = ratio;
    context.stroke(strokes);
  }
}

// Text that is read on black and on white.
function say(context, text, x, y, size, align = "center") {
  Object.assign(context, { font: `600 ${size}px sans-serif`, textAlign: align, textBaseline: "middle", lineWidth: size / 5 });
  context.strokeStyle = "rgba(0, 0, 0, 0.6)";
  context.strokeText(text, x, y);
  context.fillStyle = "rgba(255, 255, 255, 0.9)";
  context.fillText(text, x, y);
}
