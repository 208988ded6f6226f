// The grid of all heads, layers across and heads down: their mean span, their groups, and which one is picked.

const MARKS = [
  { bit: LOCAL, name: "local", symbol: "down", size: 0.24 },
  { bit: GLOBAL, name: "global", symbol: "up", size: 0.24 },
  { bit: RECEIVER, name: "receiver", symbol: "ring", size: 0.42 },
];

// Pick a head, so that its own scores can be shown; -1 for none.
async function pickHead(head) {
  const { entry } = state;
  pickHead.last = head;
  if (head >= 0) await entry.heads.unpack();
  // Another may have been picked, or another entry opened, while this one was unpacked.
  if (pickHead.last !== head || state.entry !== entry) return;
  entry.headScores = head < 0 ? [] : scoresOfHead(entry, head);
  const current = entry.score(state.score) || { isInfluence: state.score === "head-fai" };
  const score = head >= 0
    ? (current.isInfluence ? "head-fai" : "head-waad")
    : (state.score.startsWith("head-") ? (current.isInfluence ? "fai" : "waad") : state.score);
  update({ head, score });
}

function describeHead(heads, head) {
  const groups = heads.groupNames(head);
  const parts = [
    `mean span ${formatScore(heads.span[head])} tokens`,
    groups.length ? groups.join(", ") : "in no group",
  ];
  if (heads.kurtosis) parts.push(`receiver kurtosis ${formatScore(heads.kurtosis[head])}`);
  if (heads.gini) parts.push(`receiver Gini coefficient ${formatScore(heads.gini[head])}`);
  if (heads.first) parts.push(`${formatShare(heads.first[head])} of its attention on the first token`);
  return parts;
}

function headLine(heads, head) {
  const [layer, number] = [heads.layers[Math.floor(head / heads.count)], head % heads.count];
  const bits = heads.data.waad.bits;
  const told = `${heads.name(head)} (layer ${layer}, head ${number}): ${describeHead(heads, head).join("; ")}.`;
  return `${told} Its WAAD and FAI are rounded to ${bits} bits (≈).`;
}

class HeadGrid {
  constructor(container) {
    this.container = container;
    this.canvas = element("canvas", { tabindex: "0", role: "application", "aria-label": "All heads; arrows pick one" });
    this.legend = element("div", { class: "legend" });
    container.append(this.canvas, this.legend);
    this.canvas.addEventListener("pointermove", (event) => this.pointed(event));
    this.canvas.addEventListener("pointerleave", hideTooltip);
    this.canvas.addEventListener("click", (event) => this.at(event) >= 0 && pickHead(this.at(event)));
    this.canvas.addEventListener("keydown", (event) => this.pressed(event));
    onWidth(container, () => this.draw());
  }

  open(entry) {
    this.heads = entry.heads;
    this.draw();
  }

  // A head's place in the picture: its column is the layer's index, its line the head.
  corner(head) {
    return [LEFT + Math.floor(head / this.heads.count) * this.cell, 4 + (head % this.heads.count) * this.cell];
  }

  at(event) {
    const layer = Math.floor((event.offsetX - LEFT) / this.cell), head = Math.floor((event.offsetY - 4) / this.cell);
    const inside = layer >= 0 && layer < this.heads.layers.length && head >= 0 && head < this.heads.count;
    return inside && !Number.isNaN(this.heads.span[layer * this.heads.count + head]) ? layer * this.heads.count + head : -1;
  }

  draw() {
    if (!this.heads || !this.container.clientWidth) return;
    const { heads } = this, width = widthOf(this.container);
    this.cell = Math.min(26, (width - LEFT - RIGHT) / heads.layers.length, Math.max(9, 520 / heads.count));
    const context = sized(this.canvas, LEFT + this.cell * heads.layers.length + RIGHT, this.cell * heads.count + 44);
    this.canvas.style.width = `${LEFT + this.cell * heads.layers.length + RIGHT}px`;
    const most = heads.span.reduce((high, span) => (span > high ? span : high), 1);
    const gap = this.cell > 12 ? 1 : 0.5;
    for (let head = 0; head < heads.size; head++) {
      if (Number.isNaN(heads.span[head])) continue;
      const [x, y] = this.corner(head);
      context.fillStyle = cssColour(mixed("span", heads.span[head] / most));
      context.fillRect(x, y, this.cell - gap, this.cell - gap);
    }
    for (const mark of MARKS) this.drawMarks(context, mark);
    this.drawPicked(context);
    this.drawAxes(context);
    this.showLegend(most);
  }

  drawMarks(context, mark) {
    for (let head = 0; head < this.heads.size; head++) {
      if (!(this.heads.groups[head] & mark.bit)) continue;
      const [x, y] = this.corner(head);
      drawMark(context, mark, x + (this.cell - 1) / 2, y + (this.cell - 1) / 2, this.cell);
    }
  }

  drawPicked(context) {
    if (state.head < 0) return;
    const [x, y] = this.corner(state.head);
    context.lineWidth = 2.5;
    context.strokeStyle = pageColour("--focus");
    context.strokeRect(x - 1.5, y - 1.5, this.cell + 2, this.cell + 2);
  }

  drawAxes(context) {
    const { heads, cell } = this;
    context.font = FONT;
    context.fillStyle = pageColour("--soft");
    context.textAlign = "center";
    context.textBaseline = "top";
    const bottom = 4 + cell * heads.count;
    const every = Math.ceil(22 / cell);
    heads.layers.forEach((layer, k) => {
      if (k % every === 0) context.fillText(layer, LEFT + (k + 0.5) * cell, bottom + 3);
    });
    context.fillText("layer", LEFT + (cell * heads.layers.length) / 2, bottom + 20);
    context.textAlign = "right";
    context.textBaseline = "middle";
    const down = Math.ceil(15 / cell);
    for (let head = 0; head < heads.count; head += down) context.fillText(head, LEFT - 5, 4 + (head + 0.5) * cell);
    context.save();
    context.translate(10, 4 + (cell * heads.count) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    if (cell * heads.count > 40) context.fillText("head", 0, 0);
    context.restore();
  }

  showLegend(most) {
    const ramp = element("span", { class: "ramp" });
    ramp.style.background = gradientOf("span");
    const scale = element("span", { class: "scale" }, "span 0", ramp, `${formatScore(most)} tokens`);
    const kinds = MARKS.map((mark) => {
      const count = this.heads.groups.reduce((sum, group) => sum + (group & mark.bit ? 1 : 0), 0);
      if (!count) return "";
      const sample = element("canvas", { "aria-hidden": "true" });
      const context = sized(sample, 18, 18);
      sample.style.width = "18px";
      context.fillStyle = cssColour(mixed("span", 0.5));
      context.fillRect(0, 0, 18, 18);
      drawMark(context, mark, 9, 9, 18);
      return element("span", { class: "kind" }, sample, ` ${mark.name} (${count})`);
    });
    this.legend.replaceChildren(scale, ...kinds);
  }

  pointed(event) {
    const head = this.at(event);
    if (head < 0) hideTooltip();
    else showTooltip(event, [this.heads.name(head), ...describeHead(this.heads, head)]);
  }

  pressed(event) {
    const by = { ArrowLeft: -this.heads.count, ArrowRight: this.heads.count, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const current = state.head < 0 ? 0 : state.head, next = current + by;
    const layerOf = (head) => Math.floor(head / this.heads.count);
    // Up and down stay in the layer, left and right in the grid.
    const isThere = event.key === "ArrowUp" || event.key === "ArrowDown"
      ? layerOf(next) === layerOf(current)
      : next >= 0 && next < this.heads.size;
    if (state.head < 0) pickHead(0);
    else if (isThere) pickHead(next);
  }
}

// A mark of a group: dark inside a light rim, so that it shows on every tone of the ramp.
function drawMark(context, mark, x, y, cell) {
  const size = Math.max(2.2, mark.size * cell);
  symbol(context, mark.symbol, x, y, size);
  context.lineJoin = "round";
  if (mark.symbol === "ring") {
    context.strokeStyle = "#ffffff";
    context.lineWidth = Math.max(2.2, cell * 0.17);
    context.stroke();
    context.strokeStyle = "#000000";
    context.lineWidth = Math.max(1, cell * 0.075);
    context.stroke();
    return;
  }
  context.strokeStyle = mark.bit === LOCAL ? "#000000" : "#ffffff";
  context.fillStyle = mark.bit === LOCAL ? "#ffffff" : "#000000";
  context.lineWidth = Math.max(1, cell * 0.1);
  context.stroke();
  context.fill();
}
