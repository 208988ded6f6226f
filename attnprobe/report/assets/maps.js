// The mean maps of the local and the global heads: queries down, keys across, in logarithmic colours.

const MAP_LEFT = 44, MAP_BOTTOM = 36;

class MapPicture {
  constructor(container, group) {
    this.group = group;
    this.figure = element("figure", { class: "map" }, element("figcaption", {}, `${group} heads`));
    this.place = element("div", { class: "figure" });
    this.base = element("canvas", { "aria-hidden": "true" });
    this.top = element("canvas", {
      class: "over", role: "slider", tabindex: "0", "aria-label": `Token, in the map of the ${group} heads`,
    });
    this.place.append(this.base, this.top);
    this.figure.append(this.place);
    container.append(this.figure);
    this.top.addEventListener("pointermove", (event) => this.pointed(event));
    this.top.addEventListener("pointerleave", () => { hover(-1); hideTooltip(); });
    this.top.addEventListener("click", (event) => this.clicked(event));
    onWidth(this.place, () => this.draw());
  }

  open(entry, maps) {
    this.entry = entry;
    this.maps = maps;
    this.codes = maps[this.group];
    this.rowOf = new Map(Array.from(maps.tokens, (token, row) => [token, row]));
    for (const name of ["aria-valuemin", "aria-valuenow"]) this.top.setAttribute(name, entry.columns[0]);
    this.top.setAttribute("aria-valuemax", entry.columns[entry.count - 1]);
    this.draw();
  }

  code(query, key) {
    return this.codes[(query * (query + 1)) / 2 + key];
  }

  // A cell's attention; NaN where it is less than what is stored.
  value(code) {
    const { high, decades } = this.maps;
    return code === 0 ? NaN : high * 10 ** (decades * ((code - 1) / 254 - 1));
  }

  draw() {
    const width = isPrinting ? 330 : this.place.clientWidth;
    if (!this.maps || !width) return;
    this.size = width - MAP_LEFT - 4;
    const context = sized(this.base, width, this.size + MAP_BOTTOM + 2);
    context.imageSmoothingEnabled = this.size < this.maps.cells;
    context.drawImage(this.picture(), MAP_LEFT, 2, this.size, this.size);
    context.strokeStyle = pageColour("--line");
    context.strokeRect(MAP_LEFT + 0.5, 2.5, this.size - 1, this.size - 1);
    this.drawAxes(context);
    this.drawTop();
  }

  picture() {
    const { cells } = this.maps;
    const picture = document.createElement("canvas");
    picture.width = picture.height = cells;
    const context = picture.getContext("2d"), image = context.createImageData(cells, cells);
    const tones = Array.from({ length: 256 }, (_, code) => mixed("map", Math.max(0, code - 1) / 254));
    let place = 0;
    for (let query = 0; query < cells; query++) {
      for (let key = 0; key <= query; key++) {
        const [red, green, blue] = tones[this.codes[place++]], pixel = 4 * (query * cells + key);
        image.data[pixel] = red;
        image.data[pixel + 1] = green;
        image.data[pixel + 2] = blue;
        image.data[pixel + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    return picture;
  }

  drawAxes(context) {
    const { cells, block, tokens } = this.maps, { columns } = this.entry;
    context.font = FONT;
    context.fillStyle = pageColour("--soft");
    const step = Math.max(1, Math.ceil(cells / Math.max(2, Math.floor(this.size / 64))));
    for (let cell = 0; cell < cells; cell += step) {
      const column = columns[tokens[cell * block]], place = ((cell + 0.5) / cells) * this.size;
      context.textAlign = "center";
      context.textBaseline = "top";
      context.fillText(column, MAP_LEFT + place, this.size + 5);
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(column, MAP_LEFT - 4, Math.max(8, 2 + place));
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    context.fillText("key: column that is read", MAP_LEFT + this.size / 2, this.size + 20);
    context.save();
    context.translate(2, 2 + this.size / 2);
    context.rotate(-Math.PI / 2);
    context.fillText("query: column that reads", 0, 0);
    context.restore();
  }

  // The selected token's row, which it reads, and its column, which reads it.
  drawTop() {
    if (!this.maps || !this.size) return;
    const context = sized(this.top, this.size + MAP_LEFT + 4, this.size + MAP_BOTTOM + 2);
    const row = this.rowOf.get(state.token);
    if (row === undefined) return;
    const cell = this.size / this.maps.cells, place = Math.floor(row / this.maps.block) * cell;
    context.strokeStyle = pageColour("--focus");
    context.lineWidth = 1.5;
    context.strokeRect(MAP_LEFT, 2 + place, place + cell, cell);
    context.strokeRect(MAP_LEFT + place, 2 + place, cell, this.size - place);
  }

  show(token) {
    this.top.setAttribute("aria-valuenow", this.entry ? this.entry.columns[Math.max(0, token)] : 0);
    this.drawTop();
  }

  // The cell under the pointer: [query, key], or null.
  at(event) {
    if (!this.maps) return null;
    const box = this.top.getBoundingClientRect(), { cells } = this.maps;
    const key = Math.floor(((event.clientX - box.left - MAP_LEFT) / this.size) * cells);
    const query = Math.floor(((event.clientY - box.top - 2) / this.size) * cells);
    return key >= 0 && query < cells && key <= query ? [query, key] : null;
  }

  // The first token of a cell, and how the cell is called.
  tokenOf(cell) {
    return this.maps.tokens[cell * this.maps.block];
  }

  nameOf(cell) {
    const { tokens, block } = this.maps, { entry } = this;
    const first = cell * block, last = Math.min(tokens.length, first + block) - 1;
    let text = "";
    for (let row = first; row <= last && text.length < 40; row++) text += entry.label(tokens[row]);
    const [begin, end] = [first, last].map((row) => entry.columns[tokens[row]]);
    const columns = first === last ? `column ${begin}` : `columns ${begin}–${end}`;
    return `${columns} “${text.length > 40 ? `${text.slice(0, 40)}…` : text}”`;
  }

  pointed(event) {
    const cell = this.at(event);
    if (cell === null) {
      hover(-1);
      hideTooltip();
      return;
    }
    const [query, key] = cell, value = this.value(this.code(query, key));
    const low = this.maps.high * 10 ** -this.maps.decades;
    const told = Number.isNaN(value) ? `less than ${formatScore(low)}` : `≈ ${formatScore(value)}`;
    hover(this.tokenOf(query));
    showTooltip(event, [
      `query: ${this.nameOf(query)}`, `key: ${this.nameOf(key)}`,
      `attention ${told}${this.maps.block > 1 ? ", the largest of the cell" : ""}`,
    ]);
  }

  clicked(event) {
    const cell = this.at(event);
    if (cell !== null) select(this.tokenOf(cell[0]));
  }
}

class Maps {
  constructor(section) {
    [this.about, this.missing, this.pooled] = [".about", ".missing", ".pooled"].map((name) => section.querySelector(name));
    this.container = document.getElementById("maps-figure");
    this.pictures = ["local", "global"].map((group) => new MapPicture(this.container, group));
    this.legend = element("div", { class: "legend" });
    this.container.after(this.legend);
  }

  async open(entry) {
    const has = entry.data.maps !== null;
    this.container.hidden = this.legend.hidden = this.about.hidden = !has;
    this.missing.hidden = has;
    if (!has) {
      for (const picture of this.pictures) picture.maps = picture.entry = null;
      return;
    }
    const { block } = entry.data.maps;
    this.pooled.textContent = block > 1
      ? `The response is long: each cell covers ${block} × ${block} tokens and shows the largest attention among them.`
      : "";
    const maps = await entry.maps();
    if (state.entry !== entry) return;
    for (const picture of this.pictures) picture.open(entry, maps);
    this.showLegend(maps);
  }

  showLegend({ high, decades }) {
    const ramp = element("span", { class: "ramp" });
    ramp.style.background = gradientOf("map");
    const low = `attention ≤ ${formatScore(high * 10 ** -decades)}`;
    this.legend.replaceChildren(element("span", { class: "scale" }, low, ramp, `${formatScore(high)} (logarithmic)`));
  }

  draw() {
    for (const picture of this.pictures) picture.draw();
    if (this.pictures[0].maps) this.showLegend(this.pictures[0].maps);
  }

  show(token) {
    for (const picture of this.pictures) picture.show(token);
  }
}
