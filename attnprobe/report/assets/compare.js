// Two entries compared, B against A: aligned texts coloured by the difference of a score, peaks gained and lost,
// and heads that changed group.

const compareSection = document.getElementById("compare");

class Comparison {
  constructor(open) {
    this.openEntry = open;
    this.selects = ["a", "b", "score"].map((name) => document.getElementById(`compare-${name}`));
    this.text = document.getElementById("compare-text");
    const names = Array.from(document.querySelectorAll("#entries button"), (button) => button.textContent);
    for (const choice of this.selects.slice(0, 2)) {
      choice.append(...names.map((name, number) => element("option", { value: number }, name)));
      choice.addEventListener("change", () => this.show());
    }
    this.selects[2].addEventListener("change", () => this.show());
    document.getElementById("open-compare").addEventListener("click", () => {
      this.start(state.entry.number, state.entry.number ? 0 : 1);
      compareSection.scrollIntoView();
      this.selects[0].focus();
    });
    document.getElementById("compare-close").addEventListener("click", () => {
      compareSection.hidden = true;
      update({ compare: "" });
    });
    this.text.addEventListener("pointermove", (event) => this.pointed(event));
    this.text.addEventListener("pointerleave", hideTooltip);
    this.text.addEventListener("click", (event) => this.clicked(event));
  }

  start(a, b, score = this.selects[2].value) {
    compareSection.hidden = false;
    this.selects[0].value = a;
    this.selects[1].value = b;
    this.offerScores(entryOf(a), entryOf(b), score);
    this.show();
  }

  show() {
    if (compareSection.hidden) return;
    const [a, b] = this.selects.slice(0, 2).map((choice) => entryOf(Number(choice.value)));
    this.offerScores(a, b);
    if (this.a !== a || this.b !== b) {
      Object.assign(this, { a, b, pairs: align(...alignmentKeys(a, b)) });
      this.peaks = this.changedPeaks();
      this.showPeaks();
      this.showHeads();
    }
    this.showText(this.selects[2].value);
    // It would tell of what was compared before.
    hideTooltip();
    update({ compare: this.selects.map((choice) => choice.value).join() });
  }

  // Both must have a score, so that it can be compared.
  offerScores(a, b, chosen = this.selects[2].value) {
    const shared = a.scores.filter((score) => b.score(score.key)?.name === score.name);
    this.selects[2].replaceChildren(...shared.map((score) => element("option", { value: score.key }, score.name)));
    if (shared.some((score) => score.key === chosen)) this.selects[2].value = chosen;
  }

  showText(key) {
    const { a, b, pairs } = this, first = a.score(key), second = b.score(key);
    const isSound = ([i, j]) => first.isSound(i) && second.isSound(j);
    const differences = pairs.map((pair) => (isSound(pair) ? second.values[pair[1]] - first.values[pair[0]] : NaN));
    const sizes = differences.filter((value) => !Number.isNaN(value)).map(Math.abs).sort((x, y) => x - y);
    // As in the text of one answer, the strongest twentieth shares the strongest colour.
    const most = sizes.length ? sizes[sizes.length - 1 - Math.floor(CLIPPED_SHARE * sizes.length)] || 1 : NaN;
    const styles = rampStyles("difference"), parts = [];
    const changes = new Map(this.peaks.map((peak) => [peak.j, peak.change]));
    const only = (entry, from, to, side) => {
      for (let i = from; i < to; i++) parts.push(this.token(entry, i, `only-${side}`));
    };
    let i = 0, j = 0;
    pairs.forEach(([nextI, nextJ], k) => {
      only(a, i, nextI, "a");
      only(b, j, nextJ, "b");
      const span = this.token(b, nextJ, "both");
      if (changes.has(nextJ)) span.classList.add(changes.get(nextJ));
      span.pair = k;
      if (!Number.isNaN(differences[k])) {
        const style = styles[Math.round(32 * (1 + Math.max(-1, Math.min(1, differences[k] / most))))];
        span.style.backgroundColor = style.background;
        span.style.color = style.ink;
      }
      parts.push(span);
      [i, j] = [nextI + 1, nextJ + 1];
    });
    only(a, i, a.count, "a");
    only(b, j, b.count, "b");
    this.text.replaceChildren(...parts);
    this.differences = differences;
    this.key = key;
    this.showSummary(most, first);
  }

  token(entry, i, className) {
    const span = tokenElement(entry, i);
    span.removeAttribute("role");
    span.removeAttribute("tabindex");
    span.classList.add(className);
    span.entry = entry;
    return span;
  }

  showSummary(most, score) {
    const { a, b, pairs } = this;
    const summary = document.getElementById("compare-summary");
    const onlyA = a.count - pairs.length, onlyB = b.count - pairs.length;
    summary.textContent = `${plural(pairs.length, "token")} in both; ${onlyA} only in A, ${onlyB} only in B.`;
    const legend = document.getElementById("compare-legend");
    legend.replaceChildren();
    if (Number.isNaN(most)) {
      legend.textContent = `No token has ${score.name} in both.`;
      return;
    }
    const ramp = element("span", { class: "ramp" });
    ramp.style.background = gradientOf("difference");
    const size = formatScore(most);
    legend.append(element("span", { class: "scale" }, `lower in B: ≤ −${size}`, ramp, `≥ ${size}: higher in B`));
  }

  // Peaks that only one of the two has: of tokens in both, and of tokens in one.
  changedPeaks() {
    const { a, b, pairs } = this, found = [];
    const inA = new Map(pairs), inB = new Map(pairs.map(([i, j]) => [j, i]));
    for (const [flag, kind] of [[PREPLAN, "preplan"], [ANCHOR, "anchor"]]) {
      for (let j = 0; j < b.count; j++) {
        const i = inB.get(j);
        if (b.has(j, flag) && (i === undefined || !a.has(i, flag))) found.push({ change: "gained", kind, i, j });
      }
      for (let i = 0; i < a.count; i++) {
        const j = inA.get(i);
        if (a.has(i, flag) && (j === undefined || !b.has(j, flag))) found.push({ change: "lost", kind, i, j });
      }
    }
    return found;
  }

  showPeaks() {
    const { a, b } = this;
    const rows = this.peaks.map(({ change, kind, i, j }) => {
      const [entry, place] = j === undefined ? [a, i] : [b, j];
      const isFew = kind === "anchor" && ((i !== undefined && a.isFew(i)) || (j !== undefined && b.isFew(j)));
      return element("tr", { "data-change": change, "data-kind": kind },
        element("td", {}, change), element("td", {}, kind, isFew ? element("small", {}, " few rows") : ""),
        element("td", {}, tokenText(entry, place, kind)),
        element("td", { class: "number" }, i === undefined ? "–" : String(a.columns[i])),
        element("td", { class: "number" }, j === undefined ? "–" : String(b.columns[j])));
    });
    const titles = ["", "peak", "token", "column in A", "column in B"];
    fillTable("compare-peaks", titles, rows, "Both have the same peaks.");
  }

  showHeads() {
    const a = this.a.heads, b = this.b.heads;
    const isSame = a.count === b.count && a.layers.join() === b.layers.join();
    const rows = [];
    for (let head = 0; isSame && head < a.size; head++) {
      if (a.groups[head] === b.groups[head]) continue;
      const groups = [a, b].map((heads) => heads.groupNames(head).join(", ") || "none");
      rows.push(element("tr", { "data-head": String(head) }, element("td", {}, a.name(head)),
        ...groups.map((names) => element("td", {}, names)),
        ...[a, b].map((heads) => element("td", { class: "number" }, formatScore(heads.span[head])))));
    }
    const none = isSame
      ? "All heads are in the same groups."
      : "The two have other layers or numbers of heads, and their heads cannot be compared.";
    fillTable("compare-heads", ["head", "group in A", "group in B", "span in A", "span in B"], rows, none);
  }

  pointed(event) {
    const span = event.target.closest(".token");
    if (!span) return hideTooltip();
    const { a, b, key } = this, score = (entry) => entry.score(key);
    const lines = [`“${span.entry.label(span.place)}”`];
    if (span.pair === undefined) {
      lines.push(`only in ${span.entry === a ? "A" : "B"}, column ${span.entry.columns[span.place]}`);
      lines.push(`${score(span.entry).name}: ${score(span.entry).written(span.place)}`);
    } else {
      const [i, j] = this.pairs[span.pair];
      lines.push(`A, column ${a.columns[i]}: ${score(a).name} ${score(a).written(i)}`);
      lines.push(`B, column ${b.columns[j]}: ${score(b).name} ${score(b).written(j)}`);
      const difference = this.differences[span.pair];
      lines.push(`difference: ${Number.isNaN(difference) ? "not shown" : formatScore(difference)}`);
    }
    return showTooltip(event, lines);
  }

  clicked(event) {
    const span = event.target.closest(".token");
    if (!span) return;
    this.openEntry(span.entry.number);
    select(span.place);
  }
}

function fillTable(id, titles, rows, none) {
  const table = document.getElementById(id);
  if (!rows.length) {
    table.replaceChildren(element("tbody", {}, element("tr", {}, element("td", {}, none))));
    return;
  }
  const kind = (title) => (/column|span/.test(title) ? "number" : "");
  const head = titles.map((title) => element("th", { scope: "col", class: kind(title) }, title));
  table.replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}
