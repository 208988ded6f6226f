// The scores of an entry: their values, which of them can be trusted, and how strong each is among them.

const CLIPPED_SHARE = 0.05;

class Score {
  constructor(entry, data) {
    this.entry = entry;
    this.key = data.key;
    this.name = data.name;
    this.about = data.about;
    this.unit = data.unit;
    this.isRounded = data.isRounded === true;
    this.values = data.values instanceof Float32Array ? data.values : numbersOf(data.values, "f4");
    this.isInfluence = ["fai", "receivers", "all", "head-fai"].includes(this.key);
    this.ramp = { "head-waad": "waad", "head-fai": "fai" }[this.key] || this.key.replace(/\d+$/, "");
    this.peak = { waad: PREPLAN, fai: ANCHOR }[this.key] || 0;
    this.strengths = {};
  }

  // Whether a value is there, but is a mean over only a few rows.
  isFew(i) {
    return this.isInfluence && !Number.isNaN(this.values[i]) && this.entry.isFew(i);
  }

  isSound(i) {
    return !Number.isNaN(this.values[i]) && !this.isFew(i);
  }

  get soundValues() {
    return this.values.filter((_, i) => this.isSound(i));
  }

  // The ends of the colours: the 5th and 95th percentile, or a single extreme would leave the rest pale.
  get range() {
    const sorted = this.soundValues.sort();
    const cut = Math.floor(CLIPPED_SHARE * sorted.length);
    return sorted.length ? [sorted[cut], sorted[sorted.length - 1 - cut]] : [NaN, NaN];
  }

  // How strong each token is, in [0, 1]; NaN where it is undefined, or a mean over few rows.
  strength(scale) {
    if (!(scale in this.strengths)) {
      this.strengths[scale] = scale === "rank" ? this.ranks() : this.shares();
    }
    return this.strengths[scale];
  }

  shares() {
    const [low, high] = this.range;
    return this.values.map((value, i) => {
      if (!this.isSound(i)) return NaN;
      return high === low ? 0.5 : Math.min(1, Math.max(0, (value - low) / (high - low)));
    });
  }

  ranks() {
    const sorted = this.soundValues.sort();
    const last = sorted.length - 1;
    return this.values.map((value, i) => {
      if (!this.isSound(i)) return NaN;
      return last === 0 ? 0.5 : (bisect(sorted, value, false) + bisect(sorted, value, true) - 1) / 2 / last;
    });
  }

  // A value as the page writes it, with its unit and what limits it.
  written(i) {
    const value = this.values[i];
    const number = `${this.isRounded && !Number.isNaN(value) ? "≈ " : ""}${formatScore(value)}`;
    return this.isFew(i) ? `${number} (mean over ${plural(this.entry.rows[i], "row")})` : number;
  }
}

// How many sorted values are below a value; with `isAfter`, also those that are equal.
function bisect(sorted, value, isAfter) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value || (isAfter && sorted[middle] === value)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The scores of a head, which are rounded.
function scoresOfHead(entry, head) {
  const name = entry.heads.name(head);
  return [
    new Score(entry, {
      key: "head-waad", name: `WAAD of ${name}`, about: `how far back ${name} looks`, unit: "tokens",
      isRounded: true, values: entry.heads.values(head, "waad"),
    }),
    new Score(entry, {
      key: "head-fai", name: `FAI of ${name}`, about: `how much later tokens read it through ${name}`,
      unit: entry.score("fai").unit, isRounded: true, values: entry.heads.values(head, "fai"),
    }),
  ];
}

// The roles of a token in the rhythm, in words.
function roleNames(entry, i) {
  const names = [[PREPLAN, "preplan"], [ANCHOR, "anchor"], [DOMINATED, "dominated"], [INTRO, "intro"]];
  return names.filter(([flag]) => entry.has(i, flag)).map(([, name]) => name);
}

// The lines that a tooltip shows of a token: its column and text, its scores, and its roles.
function describeToken(entry, i) {
  const lines = [`column ${entry.columns[i]}: “${entry.label(i)}”`];
  for (const score of [...entry.scores, ...entry.headScores]) lines.push(`${score.name}: ${score.written(i)}`);
  const roles = roleNames(entry, i);
  if (roles.length) lines.push(roles.join(", "));
  const preplan = entry.preplanOf[i];
  if (preplan >= 0 && preplan !== i) lines.push(`belongs to the preplan in column ${entry.columns[preplan]}`);
  return lines;
}
