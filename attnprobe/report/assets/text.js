// The answer as text: each token's background coloured by a score (Fig. 9 of arXiv 2510.13554v2).
//
// Tokens lie in chunks that end at line breaks, and the browser lays out only the chunks that are visible. One
// token is a tab stop, and the arrow keys go on from there.

const CHUNK = 96;

class TextPane {
  constructor(container, { isMain, label }) {
    this.container = container;
    this.isMain = isMain;
    this.legend = element("div", { class: "legend" });
    this.box = element("div", { class: "text", role: "listbox", "aria-label": label, dir: "auto" });
    container.append(this.legend, this.box);
    this.tokens = [];
    this.tabStop = 0;
    this.box.addEventListener("pointermove", (event) => this.pointed(event));
    this.box.addEventListener("pointerleave", () => this.left());
    this.box.addEventListener("click", (event) => this.clicked(event));
    this.box.addEventListener("focusin", (event) => this.focused(event));
    this.box.addEventListener("keydown", (event) => this.pressed(event));
  }

  open(entry) {
    this.entry = entry;
    this.tokens = [];
    this.flow = element("div", { class: "flow", role: "presentation" });
    let chunk = null, length = 0;
    const close = () => {
      // About as high as it will be, so that the scroll bar stays where it is.
      if (chunk) chunk.style.containIntrinsicBlockSize = `auto ${1.75 * Math.ceil(length / 100 + 1)}rem`;
    };
    for (let i = 0; i < entry.count; i++) {
      const isBreak = i > 0 && /[\r\n]$/.test(entry.texts[i - 1]) && chunk.childElementCount >= CHUNK;
      if (chunk === null || isBreak) {
        close();
        length = 0;
        chunk = element("div", { class: "chunk", role: "presentation" });
        this.flow.append(chunk);
      }
      length += entry.texts[i].length + (/[\r\n]/.test(entry.texts[i]) ? 60 : 0);
      if (entry.isAfterGap(i)) chunk.append(element("span", { class: "gap", "aria-hidden": "true" }, "\n⋯\n"));
      this.tokens.push(tokenElement(entry, i));
      chunk.append(this.tokens[i]);
    }
    close();
    this.box.replaceChildren(this.flow);
    this.observer?.disconnect();
    this.observer = new ResizeObserver(() => this.onMove());
    this.observer.observe(this.flow);
    this.box.scrollTop = 0;
    this.setTabStop(0);
  }

  // Called when tokens may have moved; what is drawn over them has to follow.
  onMove() {}

  setTabStop(i) {
    if (this.tokens[this.tabStop]) this.tokens[this.tabStop].tabIndex = -1;
    this.tabStop = i;
    if (this.isMain && this.tokens[i]) this.tokens[i].tabIndex = 0;
  }

  colour(score) {
    const strength = score.strength(state.scale);
    const styles = rampStyles(score.ramp);
    for (let i = 0; i < this.tokens.length; i++) {
      const style = this.tokens[i].style;
      const chosen = Number.isNaN(strength[i]) ? null : styles[Math.round(64 * strength[i])];
      style.backgroundColor = chosen ? chosen.background : "";
      style.color = chosen ? chosen.ink : "";
      this.tokens[i].classList.toggle("few", score.isFew(i));
      this.tokens[i].classList.toggle("undefined", Number.isNaN(score.values[i]));
    }
    this.box.setAttribute("aria-label", `The answer, coloured by ${score.name}`);
    this.showLegend(score);
  }

  showLegend(score) {
    const [low, high] = score.range;
    const told = element("span", {}, element("b", {}, score.name), `: ${score.about}`);
    this.legend.replaceChildren(told);
    if (Number.isNaN(low)) {
      const some = Array.from(score.values).some((value) => !Number.isNaN(value));
      const rows = plural(this.entry.data.enoughRows, "row");
      const why = some ? `No token has ${score.name} over ${rows} or more.` : `No token has a defined ${score.name}.`;
      this.legend.append(element("span", { class: "none" }, why));
      return;
    }
    const ramp = element("span", { class: "ramp" });
    ramp.style.background = gradientOf(score.ramp);
    const ends = state.scale === "rank" ? ["lowest", "highest"] : [`≤ ${formatScore(low)}`, `≥ ${formatScore(high)}`];
    const unit = score.unit && state.scale !== "rank" ? ` ${score.unit}` : "";
    const note = score.isRounded ? element("span", {}, "≈ rounded") : "";
    this.legend.append(element("span", { class: "scale" }, ends[0], ramp, ends[1] + unit), note);
  }

  mark(token, isSelected) {
    const span = this.tokens[token];
    if (!span) return;
    span.classList.toggle("selected", isSelected);
    span.setAttribute("aria-selected", String(isSelected));
  }

  // Bring a token into view in its own box: the page itself stays where it is.
  reveal(i) {
    const box = this.box.getBoundingClientRect(), token = this.tokens[i].getBoundingClientRect();
    if (token.top < box.top + 4) this.box.scrollTop += token.top - box.top - box.height / 3;
    else if (token.bottom > box.bottom - 4) this.box.scrollTop += token.bottom - box.bottom + box.height / 3;
  }

  show(before, after) {
    this.mark(before, false);
    if (after < 0) return;
    this.mark(after, true);
    const hadFocus = this.box.contains(document.activeElement);
    this.setTabStop(after);
    this.reveal(after);
    if (this.isMain && hadFocus) this.tokens[after].focus({ preventScroll: true });
  }

  placeOf(target) {
    const span = target.closest ? target.closest(".token") : null;
    return span && this.box.contains(span) ? span.place : -1;
  }

  pointed(event) {
    const i = this.placeOf(event.target);
    hover(i);
    if (i < 0) hideTooltip();
    else showTooltip(event, describeToken(this.entry, i));
  }

  left() {
    hover(-1);
    hideTooltip();
  }

  clicked(event) {
    const i = this.placeOf(event.target);
    if (i >= 0) {
      select(i);
      if (this.isMain) this.tokens[i].focus({ preventScroll: true });
    }
  }

  focused(event) {
    const i = this.placeOf(event.target);
    if (i >= 0) select(i);
  }

  pressed(event) {
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      event.preventDefault();
      select(this.acrossLines(Math.max(0, state.token), event.key === "ArrowUp" ? -1 : 1));
    }
  }

  // The token above or below: of the nearest other line, the one closest to the same place.
  acrossLines(from, direction) {
    const middleOf = (i) => {
      const { left, right, top, bottom } = this.tokens[i].getClientRects()[0] || this.tokens[i].getBoundingClientRect();
      return { x: (left + right) / 2, top, bottom };
    };
    const start = middleOf(from);
    let best = from, line = null;
    for (let i = from + direction; i >= 0 && i < this.tokens.length; i += direction) {
      const middle = middleOf(i);
      if (Math.abs(middle.top - start.top) < 4) continue;
      if (line === null) line = middle.top;
      if (Math.abs(middle.top - line) >= 4) break;
      if (best === from || Math.abs(middle.x - start.x) < Math.abs(middleOf(best).x - start.x)) best = i;
    }
    return best;
  }
}

function tokenElement(entry, i) {
  const text = entry.texts[i];
  const span = document.createElement("span");
  span.className = ["token", ...roleNames(entry, i)].join(" ");
  span.place = i;
  span.tabIndex = -1;
  span.setAttribute("role", "option");
  span.dataset.column = entry.columns[i];
  if (text === "") {
    span.classList.add("empty");
    span.dataset.mark = entry.data.marks[i] || "·";
    span.setAttribute("aria-label", entry.label(i));
  } else if (/[\r\n]/.test(text)) {
    for (const part of text.split(/(\r\n|\r|\n)/)) {
      if (/^[\r\n]/.test(part)) span.append(element("span", { class: "break" }, part));
      else if (part) span.append(part);
    }
  } else {
    span.textContent = text;
  }
  return span;
}
