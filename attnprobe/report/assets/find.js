// Finding tokens: by their text, which may run over several tokens, and from peak to peak.

const findInput = document.getElementById("find");
const foundOutput = document.getElementById("found");
const fewInput = document.getElementById("few");
let matches = []; // the first and last token of each match

// All matches of a text in the answer, upper and lower case alike: [[first token, last token]].
function matchesOf(entry, text) {
  const wanted = text.toLowerCase();
  if (!wanted) return [];
  const starts = [];
  let whole = "";
  for (const part of entry.texts) {
    starts.push(whole.length);
    whole += part.toLowerCase();
  }
  const found = [];
  let place = whole.indexOf(wanted), token = 0;
  while (place >= 0) {
    while (token + 1 < starts.length && starts[token + 1] <= place) token++;
    // Tokens without text begin where the one before them ends: the match is in the last that has some.
    while (token > 0 && entry.texts[token] === "") token--;
    let last = token;
    while (last + 1 < starts.length && starts[last + 1] < place + wanted.length) last++;
    found.push([token, last]);
    place = whole.indexOf(wanted, place + wanted.length);
  }
  return found;
}

function showMatches() {
  const { entry } = state;
  matches = matchesOf(entry, findInput.value);
  const marked = new Set();
  for (const [first, last] of matches) for (let i = first; i <= last; i++) marked.add(i);
  for (const pane of panes) pane.tokens.forEach((span, i) => span.classList.toggle("found", marked.has(i)));
  tellMatch();
}

function tellMatch() {
  if (!findInput.value) {
    foundOutput.textContent = "";
    return;
  }
  const current = matches.findIndex(([first, last]) => first <= state.token && state.token <= last);
  foundOutput.textContent = current >= 0 ? `${current + 1} of ${matches.length}` : `${matches.length} found`;
}

function goToMatch(direction) {
  const firsts = matches.map(([first]) => first);
  goAmong(firsts, direction);
}

// Select the next or previous of some tokens, from the selected one on, and around the end.
function goAmong(tokens, direction) {
  if (!tokens.length) return;
  const after = direction > 0
    ? tokens.find((i) => i > state.token)
    : tokens.findLast((i) => state.token < 0 || i < state.token);
  select(after === undefined ? tokens.at(direction > 0 ? 0 : -1) : after);
}

// The peaks of a kind; anchors over few rows only if they are asked for.
function peaksOf(entry, flag) {
  const isOffered = (i) => entry.has(i, flag) && (flag !== ANCHOR || fewInput.checked || !entry.isFew(i));
  return Array.from(entry.flags.keys()).filter(isOffered);
}

function goToPeak(flag, direction) {
  goAmong(peaksOf(state.entry, flag), direction);
}

findInput.addEventListener("input", () => {
  showMatches();
  if (matches.length && !matches.some(([first, last]) => first <= state.token && state.token <= last)) goToMatch(1);
});
findInput.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  goToMatch(event.shiftKey ? -1 : 1);
});
for (const [id, act] of [
  ["find-next", () => goToMatch(1)], ["find-previous", () => goToMatch(-1)],
  ["preplan-next", () => goToPeak(PREPLAN, 1)], ["preplan-previous", () => goToPeak(PREPLAN, -1)],
  ["anchor-next", () => goToPeak(ANCHOR, 1)], ["anchor-previous", () => goToPeak(ANCHOR, -1)],
]) document.getElementById(id).addEventListener("click", act);
