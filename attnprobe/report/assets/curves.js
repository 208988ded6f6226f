// The curves over the response, one below the other: scores, peaks, pairs, and which token is selected.
//
// The picture lies on one canvas; the lines of the pointer and of the selection on another above it, so that
// moving the pointer over thousands of tokens draws two lines and not all curves.

const LEFT = 50, RIGHT = 10, AXIS = 24, PANEL = 74, PANEL_GAP = 8;

class Curves {
  constructor(container) {
    this.container = container;
    this.base = element("canvas", { "aria-hidden": "true" });
    this.top = element("canvas", { class: "over", role: "slider", tabindex: "0", "aria-label": "Token, along the curves" });
    container.append(this.base, this.top);
    this.top.addEventListener("pointermove", (event) => this.pointed(event));
    this.top.addEventListener("pointerleave", () => this.left());
    this.top.addEventListener("pointerdown", (event) => this.down(event));
    this.top.addEventListener("pointerup", (event) => this.up(event));
    this.top.addEventListener("dblclick", () => this.zoom(0, this.entry.count - 1));
    document.getElementById("unzoom").addEventListener("click", () => this.zoom(0, this.entry.count - 1));
    onWidth(container, () => this.draw());
  }

  open(entry) {
    this.entry = entry;
    this.limits = new Map();
    this.first = 0;
    this.last = entry.count - 1;
    this.drag = null;
    for (const name of ["aria-valuemin", "aria-valuenow"]) this.top.setAttribute(name, entry.columns[0]);
    this.top.setAttribute("aria-valuemax", entry.columns[entry.count - 1]);
    document.getElementById("unzoom").hidden = true;
    this.draw();
  }

  // The scores that have a panel: those of the rhythm, of the picked head, and the one that colours the text.
  get panels() {
    const always = ["waad", "head-waad", "fai", "head-fai", "receivers", "entropy"];
    const keys = always.includes(state.score) ? always : [...always, state.score];
    return keys.map((key) => this.entry.score(key)).filter((score) => score !== null);
  }

  zoom(first, last) {
    const all = this.entry.count - 1;
    this.first = Math.max(0, Math.min(first, last));
    this.last = Math.min(all, Math.max(first, last));
    document.getElementById("unzoom").hidden = this.first === 0 && this.last === all;
    this.limits.clear();
    // Another token is under the pointer now.
    hover(-1);
    hideTooltip();
    this.draw();
  }

  x(i) {
    return LEFT + ((i - this.first + 0.5) / (this.last - this.first + 1)) * this.width;
  }

  // The token nearest to a place of the pointer; -1 beside the curves.
  at(event) {
    const x = event.clientX - this.top.getBoundingClientRect().left;
    if (x < LEFT || x > LEFT + this.width) return -1;
    const share = ((x - LEFT) / this.width) * (this.last - this.first + 1);
    return Math.min(this.last, this.first + Math.floor(share));
  }

  draw() {
    if (!this.entry || !this.container.clientWidth) return;
    const panels = this.panels, width = widthOf(this.container);
    const height = panels.length * (PANEL + PANEL_GAP) + AXIS;
    this.width = width - LEFT - RIGHT;
    this.height = height;
    const context = sized(this.base, width, height);
    this.colours = {
      ink: pageColour("--ink"), soft: pageColour("--soft"), grid: pageColour("--line"), band: pageColour("--band"),
      hatch: pageColour("--hatch"),
    };
    context.font = FONT;
    panels.forEach((score, k) => this.drawPanel(context, score, 4 + k * (PANEL + PANEL_GAP)));
    this.drawAxis(context, height - AXIS + 2);
    this.drawTop();
  }

  drawPanel(context, score, top) {
    const { entry, colours } = this, bottom = top + PANEL;
    const [low, high] = this.limitsOf(score);
    const y = (value) => bottom - ((value - low) / (high - low)) * PANEL;
    context.save();
    context.beginPath();
    context.rect(LEFT, top, this.width, PANEL);
    context.clip();
    this.drawBands(context, top);
    if (score.isInfluence) this.hatchFew(context, score, top);
    context.restore();
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.lineWidth = 1;
    for (const value of score.hasValues ? ticks(low, high, 2) : []) {
      context.strokeStyle = colours.grid;
      line(context, LEFT, y(value), LEFT + this.width, y(value));
      context.fillStyle = colours.soft;
      context.fillText(formatScore(value), LEFT - 6, y(value));
    }
    context.save();
    context.beginPath();
    context.rect(LEFT, top - 3, this.width, PANEL + 6);
    context.clip();
    this.drawLine(context, score, y);
    this.drawPeaks(context, score, y, top);
    context.restore();
    this.drawName(context, score, top);
    for (let i = Math.max(1, this.first); i <= this.last; i++) {
      if (!entry.isAfterGap(i)) continue;
      context.strokeStyle = colours.soft;
      context.setLineDash([2, 3]);
      line(context, (this.x(i) + this.x(i - 1)) / 2, top, (this.x(i) + this.x(i - 1)) / 2, bottom);
      context.setLineDash([]);
    }
  }

  drawName(context, score, top) {
    const text = score.name + (score.unit ? ` (${score.unit})` : "") + (score.isRounded ? " ≈" : "");
    const told = score.hasValues ? text : `${text}: no token has a defined value`;
    context.textAlign = "left";
    context.textBaseline = "top";
    const wide = context.measureText(told).width;
    context.fillStyle = pageColour("--veil");
    context.fillRect(LEFT + 2, top, wide + 8, 16);
    context.fillStyle = this.colours.ink;
    context.fillText(told, LEFT + 6, top + 2);
  }

  // The range of the vertical axis: that of the sound values in sight; those of few rows may leave it.
  limitsOf(score) {
    if (!this.limits.has(score)) {
      let low = Infinity, high = -Infinity, anyLow = Infinity, anyHigh = -Infinity;
      score.values.forEach((value, i) => {
        if (Number.isNaN(value) || i < this.first || i > this.last) return;
        anyLow = Math.min(anyLow, value);
        anyHigh = Math.max(anyHigh, value);
        if (score.isFew(i)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
      score.hasValues = anyLow <= anyHigh;
      if (low > high) [low, high] = score.hasValues ? [anyLow, anyHigh] : [0, 1];
      const room = 0.12 * (high - low) || 0.5 * Math.abs(high) || 0.5;
      // Above, there is room for the name too.
      this.limits.set(score, [low - room, high + 2.2 * room]);
    }
    return this.limits.get(score);
  }

  // Whether tokens are closer together than marks are wide.
  get isDense() {
    return this.last - this.first + 1 > this.width / 2;
  }

  drawBands(context, top) {
    if (this.isDense) return;
    context.fillStyle = this.colours.band;
    const half = Math.max(1, this.x(1) - this.x(0)) / 2;
    this.entry.preplanOf.forEach((preplan, anchor) => {
      if (preplan < 0 || anchor < this.first || preplan > this.last) return;
      context.fillRect(this.x(preplan) - half, top, this.x(anchor) - this.x(preplan) + 2 * half, PANEL);
    });
  }

  hatchFew(context, score, top) {
    const half = (this.x(1) - this.x(0)) / 2;
    for (let i = this.first; i <= this.last; i++) {
      if (!score.isFew(i)) continue;
      let end = i;
      while (end < this.last && score.isFew(end + 1)) end++;
      hatch(context, this.x(i) - half, top, this.x(end) - this.x(i) + 2 * half, PANEL, this.colours.hatch);
      i = end;
    }
  }

  // A solid line through sound values, and a dashed one through those of few rows; broken at gaps.
  drawLine(context, score, y) {
    const { entry } = this, colour = pageColour(`--${score.ramp}`);
    context.strokeStyle = colour;
    context.fillStyle = colour;
    context.lineJoin = "round";
    const isKnown = (i) => !Number.isNaN(score.values[i]);
    const joins = (i) => i > 0 && !entry.isAfterGap(i) && isKnown(i) && isKnown(i - 1);
    for (const isDashed of [false, true]) {
      context.setLineDash(isDashed ? [3, 3] : []);
      context.lineWidth = isDashed || this.isDense ? 1 : 1.5;
      context.beginPath();
      let isOpen = false;
      for (let i = Math.max(0, this.first - 1); i <= Math.min(entry.count - 1, this.last + 1); i++) {
        const isWanted = joins(i) && (score.isFew(i) || score.isFew(i - 1)) === isDashed;
        if (isWanted && !isOpen) context.moveTo(this.x(i - 1), y(score.values[i - 1]));
        if (isWanted) context.lineTo(this.x(i), y(score.values[i]));
        isOpen = isWanted;
        const isAlone = !isDashed && isKnown(i) && !joins(i) && !(i + 1 < entry.count && joins(i + 1));
        if (isAlone) context.fillRect(this.x(i) - 1.5, y(score.values[i]) - 1.5, 3, 3);
      }
      context.stroke();
    }
    context.setLineDash([]);
  }

  drawPeaks(context, score, y, top) {
    if (!score.peak) return;
    const colour = pageColour(`--${score.ramp}`), page = pageColour("--page");
    for (let i = this.first; i <= this.last; i++) {
      if (!this.entry.has(i, score.peak) || Number.isNaN(score.values[i])) continue;
      const height = Math.max(top + 3, y(score.values[i])), size = this.isDense ? 2.2 : 4;
      symbol(context, score.peak === PREPLAN ? "down" : "diamond", this.x(i), height, size);
      context.fillStyle = score.isFew(i) ? page : colour;
      context.strokeStyle = score.isFew(i) ? colour : page;
      context.lineWidth = this.isDense ? 0.5 : 1;
      context.fill();
      context.stroke();
    }
  }

  drawAxis(context, top) {
    context.fillStyle = this.colours.soft;
    context.textBaseline = "top";
    context.textAlign = "center";
    const { columns } = this.entry, count = Math.max(3, Math.floor(this.width / 90));
    const step = Math.max(1, ticks(0, this.last - this.first + 1, count)[1] || 1);
    let free = 0;
    for (let i = this.first; i <= this.last; i++) {
      if ((columns[i] % step && !this.entry.isAfterGap(i)) || this.x(i) < free) continue;
      context.fillText(columns[i], this.x(i), top);
      free = this.x(i) + 40;
    }
    context.textAlign = "right";
    if (free < LEFT + this.width - 60) context.fillText("column", LEFT + this.width, top);
  }

  // The lines of the selection and of the pointer.
  drawTop() {
    if (!this.entry || !this.height) return;
    const context = sized(this.top, this.width + LEFT + RIGHT, this.height);
    for (const [i, name] of [[state.hover, "--soft"], [state.token, "--focus"]]) {
      if (i < this.first || i > this.last) continue;
      context.strokeStyle = pageColour(name);
      context.lineWidth = name === "--focus" ? 1.5 : 1;
      line(context, this.x(i), 2, this.x(i), this.height - AXIS);
    }
    if (this.drag && Math.abs(this.drag.to - this.drag.from) > 6) {
      context.fillStyle = pageColour("--band");
      context.fillRect(this.drag.from, 0, this.drag.to - this.drag.from, this.height - AXIS);
    }
  }

  show(token) {
    const { entry, top } = this;
    if (token >= 0 && (token < this.first || token > this.last)) {
      const width = this.last - this.first;
      const first = Math.min(Math.max(0, token - (width >> 1)), entry.count - 1 - width);
      this.zoom(first, first + width);
    }
    const shown = Math.max(0, token);
    top.setAttribute("aria-valuenow", entry.columns[shown]);
    top.setAttribute("aria-valuetext", token < 0 ? "no token selected" : describeToken(entry, token).join(", "));
    this.drawTop();
  }

  pointed(event) {
    const i = this.at(event);
    if (this.drag) {
      this.drag.to = event.offsetX;
      this.drawTop();
    }
    hover(i);
    if (i < 0) hideTooltip();
    else showTooltip(event, describeToken(this.entry, i));
  }

  left() {
    hover(-1);
    hideTooltip();
  }

  down(event) {
    // A finger scrolls the page; only a mouse or a pen draws a range.
    if (event.button !== 0 || event.pointerType === "touch") return;
    this.drag = { from: event.offsetX, to: event.offsetX, start: this.at(event) };
  }

  up(event) {
    const i = this.at(event), drag = this.drag;
    this.drag = null;
    if (drag && Math.abs(event.offsetX - drag.from) > 6 && i >= 0 && drag.start >= 0) this.zoom(drag.start, i);
    else if (i >= 0) select(i);
  }
}

function line(context, x1, y1, x2, y2) {
  context.beginPath();
  context.moveTo(x1, y1);
  context.lineTo(x2, y2);
  context.stroke();
}
