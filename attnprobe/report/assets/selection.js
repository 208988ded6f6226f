// The one selection that every view shows and changes, and its place in the address of the page.
//
// A view calls `select` or `update`; all views hear of it through `listeners`. Nothing else passes between them.

const state = {
  entry: null, // the open Entry
  token: -1, // the selected token, as its place in the response
  hover: -1, // the token under the pointer
  head: -1,
  score: "waad",
  beside: "",
  scale: "linear",
  group: "global", // whose reads are shown
  compare: "", // what is compared: the numbers of A and B, and the score
};

const listeners = [];

// Tell every view what has changed: a set of names of the state above.
function update(changes) {
  const changed = new Set(Object.keys(changes).filter((name) => state[name] !== changes[name]));
  if (!changed.size) return;
  Object.assign(state, changes);
  for (const listener of listeners) listener(changed);
  if (changed.size > 1 || !changed.has("hover")) writeAddress();
}

function select(token) {
  const last = state.entry.count - 1;
  update({ token: token < 0 ? -1 : Math.min(token, last) });
}

function hover(token) {
  update({ hover: token });
}

// The next or previous token; the first or the last, if none is selected.
function step(by) {
  const { token, entry } = state;
  if (token < 0) select(by > 0 ? 0 : entry.count - 1);
  else select(Math.min(entry.count - 1, Math.max(0, token + by)));
}

function addressOf() {
  const parts = [];
  if (state.entry.number > 0) parts.push(`e=${state.entry.number}`);
  if (state.token >= 0) parts.push(`t=${state.entry.columns[state.token]}`);
  if (state.head >= 0) parts.push(`head=${state.entry.heads.name(state.head)}`);
  if (state.score !== "waad") parts.push(`score=${state.score}`);
  if (state.scale !== "linear") parts.push(`scale=${state.scale}`);
  if (state.beside) parts.push(`beside=${state.beside}`);
  if (state.compare && state.compare !== comparedAtFirst) parts.push(`compare=${state.compare}`);
  return parts.length ? `#${parts.join("&")}` : "";
}

function writeAddress() {
  try {
    history.replaceState(null, "", addressOf() || location.pathname + location.search);
  } catch {
    // In a notebook's frame the page has no address of its own.
  }
}

// What the address asks for, by name.
function readAddress() {
  return new URLSearchParams(location.hash.replace(/^#/, ""));
}
