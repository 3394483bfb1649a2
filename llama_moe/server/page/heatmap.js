/** A picture of layers by experts; each cell can be asked for by pointing at it or with the arrow keys. */

export class Heatmap {
  #canvas;
  #readout;
  #spoken;
  #layers = []; // { layer, counts, tokens }
  #loads = [];
  #most = 1;
  #cell = null; // [row, column]
  #colors = [];

  constructor(canvas, readout, spoken) {
    this.#canvas = canvas;
    this.#readout = readout;
    this.#spoken = spoken;
    this.#readColors();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#readColors();
      this.#draw();
    });
    new ResizeObserver(() => this.#draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerdown", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#select(null));
    canvas.addEventListener("blur", () => this.#select(null));
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** The highest load that is shown, and whose it is: { load, layer, expert }. */
  get most() {
    let found = { load: 0, layer: 0, expert: 0 };
    this.#loads.forEach((loads, row) =>
      loads.forEach((load, expert) => {
        if (load > found.load) found = { load, layer: this.#layers[row].layer, expert };
      }),
    );
    return found;
  }

  /** @param layers for each layer with experts its number `layer`, and how often each expert was chosen, `counts` */
  show(layers) {
    this.#layers = layers;
    this.#loads = layers.map(({ counts }) => {
      const total = counts.reduce((sum, count) => sum + count, 0);
      return counts.map((count) => (total ? (count * counts.length) / total : 0));
    });
    this.#most = Math.max(2, this.most.load);
    if (this.#cell && (this.#cell[0] >= layers.length || this.#cell[1] >= layers[0].counts.length)) this.#cell = null;
    this.#canvas.setAttribute("aria-label", `${layers.length} layers by ${layers[0]?.counts.length ?? 0} experts`);
    this.#draw();
    this.#tell();
  }

  /** Draws the colours from load 0 over 1 in the middle to the highest that is shown, and returns that one. */
  drawScale(canvas) {
    const context = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; x++) {
      context.fillStyle = this.#colorAt(x / (canvas.width - 1));
      context.fillRect(x, 0, 1, canvas.height);
    }
    return this.#most;
  }

  #readColors() {
    const style = getComputedStyle(document.documentElement);
    this.#colors = ["--heat-low", "--heat-even", "--heat-high"].map((name) => {
      const hex = style.getPropertyValue(name).trim();
      return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    });
    this.#colors.push(style.getPropertyValue("--text").trim());
  }

  /** Even loads, which are 1, are in the middle; above it, each doubling is as long as the next. */
  #colorOf(load) {
    return this.#colorAt(load < 1 ? load / 2 : (1 + Math.log(load) / Math.log(this.#most)) / 2);
  }

  /** @param place 0, the lowest colour, to 1, the highest */
  #colorAt(place) {
    const [low, even, high] = this.#colors;
    const [from, to, share] = place < 0.5 ? [low, even, 2 * place] : [even, high, 2 * place - 1];
    return `rgb(${from.map((value, index) => Math.round(value + (to[index] - value) * share)).join(" ")})`;
  }

  #draw() {
    const rows = this.#layers.length;
    const columns = rows ? this.#layers[0].counts.length : 0;
    const width = this.#canvas.clientWidth;
    if (!columns || !width) return;
    const height = rows * Math.max(4, Math.min(18, Math.round(340 / rows)));
    const scale = devicePixelRatio || 1;
    this.#canvas.style.height = `${height}px`;
    this.#canvas.width = Math.round(width * scale);
    this.#canvas.height = Math.round(height * scale);
    const context = this.#canvas.getContext("2d");
    const x = (column) => Math.round((column * this.#canvas.width) / columns);
    const y = (row) => Math.round((row * this.#canvas.height) / rows);
    this.#loads.forEach((loads, row) =>
      loads.forEach((load, column) => {
        context.fillStyle = this.#colorOf(load);
        context.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
      }),
    );
    if (this.#cell) {
      const [row, column] = this.#cell;
      context.strokeStyle = this.#colors[3];
      context.lineWidth = 2 * scale;
      context.strokeRect(x(column), y(row), Math.max(x(column + 1) - x(column), 2), Math.max(y(row + 1) - y(row), 2));
    }
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    const at = (position, begin, size, count) => Math.max(0, Math.min(count - 1, Math.floor(((position - begin) / size) * count)));
    if (!this.#layers.length) return;
    this.#select([
      at(event.clientY, box.top, box.height, this.#layers.length),
      at(event.clientX, box.left, box.width, this.#layers[0].counts.length),
    ]);
  }

  #onKey(event) {
    const rows = this.#layers.length;
    if (!rows) return;
    const columns = this.#layers[0].counts.length;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -columns], End: [0, columns] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const [row, column] = this.#cell ?? [0, 0];
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.#select(this.#cell ? [clamp(row + step[0], rows), clamp(column + step[1], columns)] : [0, 0]);
    // Only what is asked for is spoken, not each change of a count.
    this.#spoken.textContent = this.#readout.textContent;
  }

  #select(cell) {
    this.#cell = cell;
    this.#draw();
    this.#tell();
  }

  #tell() {
    if (!this.#cell) {
      this.#readout.textContent = "";
      return;
    }
    const [row, expert] = this.#cell;
    const { layer, counts } = this.#layers[row];
    this.#readout.textContent = `Layer ${layer}, expert ${expert}: chosen ${counts[expert].toLocaleString("en")} times, load ${this.#loads[row][expert].toFixed(2)}`;
  }
}
