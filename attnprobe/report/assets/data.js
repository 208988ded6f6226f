// The entries of the page: each is a block of JSON, parsed when it is opened; its numbers are base64.

const PREPLAN = 1, ANCHOR = 2, DOMINATED = 4, INTRO = 8;
const LOCAL = 1, GLOBAL = 2, RECEIVER = 4;

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const ARRAYS = { f4: Float32Array, i4: Int32Array, u4: Uint32Array, u2: Uint16Array, u1: Uint8Array };

// Numbers of a type; null where a page does not have them.
function numbersOf(base64, type) {
  return base64 === null ? null : new ARRAYS[type](bytesOf(base64).buffer);
}

async function inflated(base64) {
  const stream = new Blob([bytesOf(base64)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function jsonOf(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

class Entry {
  constructor(number) {
    const data = jsonOf(`entry-${number}`);
    this.number = number;
    this.data = data;
    this.texts = data.texts;
    this.count = data.texts.length;
    this.columns = numbersOf(data.columns, "i4");
    this.ids = numbersOf(data.ids, "i4");
    this.rows = numbersOf(data.rows, "i4");
    this.flags = numbersOf(data.flags, "u1");
    this.preplanOf = numbersOf(data.preplanOf, "i4");
    this.introOf = numbersOf(data.introOf, "i4");
    this.places = new Map(Array.from(this.columns, (column, i) => [column, i]));
    this.scores = data.scores.map((score) => new Score(this, score));
    this.heads = new Heads(data.heads, this.count);
    this.headScores = [];
    this.reads = data.reads === null ? null : new Reads(data.reads);
    this.unpackedMaps = null;
  }

  has(i, flag) {
    return (this.flags[i] & flag) !== 0;
  }

  // Whether the FAI of a token is a mean over too few rows to say much about the token.
  isFew(i) {
    return this.rows !== null && this.rows[i] > 0 && this.rows[i] < this.data.enoughRows;
  }

  isAfterGap(i) {
    return i > 0 && this.columns[i] !== this.columns[i - 1] + 1;
  }

  // The text of a token on one line, with what cannot be seen made visible.
  label(i) {
    const mark = this.data.marks[i];
    if (mark !== undefined) return mark;
    if (this.texts[i] === "") return "(empty)";
    return oneLine(this.texts[i]).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
  }

  score(key) {
    return [...this.scores, ...this.headScores].find((score) => score.key === key) || null;
  }

  // The maps: their sizes, and a code for each cell of both lower triangles.
  async maps() {
    const maps = this.data.maps;
    if (maps !== null && this.unpackedMaps === null) {
      const [local, global] = await Promise.all([inflated(maps.local), inflated(maps.global)]);
      this.unpackedMaps = { ...maps, tokens: numbersOf(maps.tokens, "i4"), local, global };
    }
    return this.unpackedMaps;
  }
}

function oneLine(text) {
  return text.replace(/\r\n|\r|\n/g, "↵").replace(/\t/g, "⇥");
}

// What is known about every head. A head is the number `layer index * count + head`.
class Heads {
  constructor(data, tokenCount) {
    this.data = data;
    this.layers = data.layers;
    this.count = data.count;
    this.size = data.layers.length * data.count;
    this.span = numbersOf(data.span, "f4");
    this.kurtosis = numbersOf(data.kurtosis, "f4");
    this.gini = numbersOf(data.gini, "f4");
    this.first = numbersOf(data.first, "f4");
    this.groups = numbersOf(data.groups, "u1");
    this.tokenCount = tokenCount;
    this.codes = null;
  }

  name(head) {
    return `L${this.layers[Math.floor(head / this.count)]}H${head % this.count}`;
  }

  // The head that a name means; -1 if there is none.
  byName(name) {
    const found = /^\s*L?\s*(\d+)\s*[H.,: ]\s*(\d+)\s*$/i.exec(name);
    if (!found) return -1;
    const layer = this.layers.indexOf(Number(found[1])), head = Number(found[2]);
    return layer < 0 || head >= this.count ? -1 : layer * this.count + head;
  }

  groupNames(head) {
    const names = [[LOCAL, "local"], [GLOBAL, "global"], [RECEIVER, "receiver"]];
    return names.filter(([bit]) => this.groups[head] & bit).map(([, name]) => name);
  }

  // Unpack the scores of all heads; once, when the first is asked for.
  async unpack() {
    if (this.codes !== null) return;
    const { waad, fai } = this.data;
    const [waadCodes, faiCodes] = await Promise.all([inflated(waad.codes), inflated(fai.codes)]);
    this.codes = { waad: waadCodes, fai: faiCodes };
  }

  // The rounded scores of a head; `unpack` must have ended.
  values(head, name) {
    const { bits, isRoot, low, high } = this.data[name];
    const codes = this.codes[name], width = bits === 4 ? Math.ceil(this.tokenCount / 2) : this.tokenCount;
    const lowest = numbersOf(low, "f4")[head], highest = numbersOf(high, "f4")[head];
    const undefinedCode = 2 ** bits - 1, values = new Float32Array(this.tokenCount);
    for (let i = 0; i < this.tokenCount; i++) {
      let code = codes[head * width + (bits === 4 ? i >> 1 : i)];
      if (bits === 4) code = i % 2 ? code >> 4 : code & 15;
      const value = lowest + ((highest - lowest) * code) / (undefinedCode - 1);
      values[i] = code === undefinedCode ? NaN : isRoot ? value * value : value;
    }
    return values;
  }
}

// The strongest reads and readers of each token, in both groups.
class Reads {
  constructor(data) {
    this.count = data.count;
    for (const group of ["local", "global"]) {
      const of = data[group];
      this[group] = {
        reads: this.links(of.reads),
        readers: this.links(of.readers),
        self: numbersOf(of.self, "f4"),
        prompt: numbersOf(of.prompt, "f4"),
        first: numbersOf(of.first, "f4"),
        isRest: of.isRest,
      };
    }
  }

  links({ dtype, token, share }) {
    return { token: numbersOf(token, dtype), share: numbersOf(share, "f4") };
  }

  // The reads or readers of a token, the strongest first: [{token, share}].
  of(group, kind, i) {
    const { token, share } = this[group][kind], found = [];
    for (let k = i * this.count; k < (i + 1) * this.count; k++) {
      if (!Number.isNaN(share[k])) found.push({ token: token[k], share: share[k] });
    }
    return found;
  }
}
