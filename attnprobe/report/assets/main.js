// The page as a whole: opens entries, tells every view what has changed, and listens to the keyboard.

const settings = jsonOf("settings");
const comparedAtFirst = settings.compare ? [...settings.compare, "waad"].join() : "";
const byId = (id) => document.getElementById(id);
const opened = new Map();
const entryButtons = Array.from(document.querySelectorAll("#entries button"));

function entryOf(number) {
  if (!opened.has(number)) opened.set(number, new Entry(number));
  return opened.get(number);
}

const panes = [new TextPane(newPane(), { isMain: true, label: "The answer" })];
const curves = new Curves(byId("curves-figure"));
const grid = new HeadGrid(byId("heads-figure"));
const maps = new Maps(byId("maps"));
const comparison = compareSection ? new Comparison(openEntry) : null;

// ---- opening an entry ---------------------------------------------------------------------------------

function openEntry(number) {
  const entry = entryOf(number);
  if (state.entry === entry) return;
  clearSelection();
  Object.assign(state, { entry, token: -1, hover: -1, head: -1 });
  if (!entry.score(state.score)) state.score = "waad";
  entry.headScores = [];
  entryButtons.forEach((button, k) => button.setAttribute("aria-current", String(k === number)));
  showFacts(entry);
  for (const pane of panes) pane.open(entry);
  fillBeside();
  showColours();
  curves.open(entry);
  showDetails();
  showMatches();
  // What lies below the first screen waits until that can be used.
  setTimeout(() => {
    if (state.entry !== entry) return;
    preparePairs(entry);
    grid.open(entry);
    maps.open(entry).then(() => maps.show(state.token));
    showHeadTable();
  });
  writeAddress();
}

function showFacts(entry) {
  const { data } = entry;
  byId("line").textContent = data.line;
  byId("notes").textContent = data.notes;
  byId("notes").hidden = !data.notes;
  if (!settings.isCollection) document.title = data.title;
  byId("prompt").hidden = !data.prompt;
  byId("prompt").querySelector("div").textContent = data.prompt;
  byId("facts").querySelector("dl").replaceChildren(
    ...data.facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  const [low, high] = data.horizon, { bits } = data.heads.waad;
  const values = {
    window: data.window, lookback: data.lookback, enoughRows: `${data.enoughRows}`,
    horizon: high === null ? `${low} or more` : `${low} to ${high}`,
    rounding: `Scores of single heads are rounded to ${bits} bits, and marked “≈”.`,
  };
  for (const place of document.querySelectorAll("[data-fact]")) place.textContent = values[place.dataset.fact];
  if (!data.hasTexts) byId("line").textContent += " · the batch has no texts, so token ids are shown";
}

// ---- colours ------------------------------------------------------------------------------------------

function showColours() {
  const { entry } = state;
  const score = entry.score(state.score) || entry.score("waad");
  panes[0].colour(score);
  if (panes[1]) panes[1].colour(entry.score(state.beside) || score);
  const scores = [...entry.scores, ...entry.headScores];
  const hadFocus = byId("scores").contains(document.activeElement);
  byId("scores").replaceChildren(...scores.map((each) => element("button", {
    type: "button", role: "radio", "data-score": each.key, "aria-checked": String(each === score),
    tabindex: each === score ? "0" : "-1", title: each.about, onclick: () => update({ score: each.key }),
  }, each.name)));
  if (hadFocus) byId("scores").querySelector('[aria-checked="true"]').focus();
}

function fillBeside() {
  const options = [["", "nothing"], ...state.entry.scores.map((score) => [score.key, score.name])];
  byId("beside").replaceChildren(...options.map(([value, name]) => element("option", { value }, name)));
  if (!state.entry.score(state.beside)) state.beside = "";
  byId("beside").value = state.beside;
  placePanes();
}

function newPane() {
  return byId("panes").appendChild(element("div", { class: "pane" }));
}

// A second text beside the first, where one is wanted.
function placePanes() {
  if (state.beside && panes.length === 1) {
    panes.push(new TextPane(newPane(), { isMain: false, label: "The answer again" }));
    panes[1].open(state.entry);
    panes[1].mark(state.token, true);
    showMatches();
  } else if (!state.beside && panes.length === 2) {
    panes.pop().container.remove();
  }
  byId("panes").classList.toggle("two", panes.length === 2);
}

function redraw() {
  if (!state.entry) return;
  showColours();
  curves.draw();
  grid.draw();
  maps.draw();
  showArcs();
  if (comparison && comparison.a && !compareSection.hidden) comparison.show();
}

function showArcs() {
  drawArcs(panes[0], linksOf(state.entry, state.token, state.group));
}

// ---- what follows a change ----------------------------------------------------------------------------

let shownToken = -1, shownHover = -1;

listeners.push((changed) => {
  const { entry, token } = state;
  if (changed.has("beside")) placePanes();
  if (["score", "scale", "beside", "head"].some((name) => changed.has(name))) showColours();
  if (["score", "head"].some((name) => changed.has(name))) curves.draw();
  if (changed.has("token")) {
    for (const pane of panes) pane.show(shownToken, token);
    shownToken = token;
    curves.show(token);
    maps.show(token);
    markPairs(token);
    tellMatch();
  }
  if (["token", "group", "head"].some((name) => changed.has(name))) showDetails();
  if (["token", "group"].some((name) => changed.has(name))) showArcs();
  if (changed.has("head")) {
    grid.draw();
    showHeadTable();
    byId("head").value = state.head < 0 ? "" : entry.heads.name(state.head);
    byId("head-line").hidden = state.head < 0;
    byId("head-line").textContent = state.head < 0 ? "" : headLine(entry.heads, state.head);
  }
  if (changed.has("hover")) {
    for (const pane of panes) {
      pane.tokens[shownHover]?.classList.remove("hovered");
      pane.tokens[state.hover]?.classList.add("hovered");
    }
    shownHover = state.hover;
    curves.drawTop();
  }
});

// ---- controls and keys --------------------------------------------------------------------------------

byId("scale").addEventListener("change", (event) => update({ scale: event.target.value }));
byId("beside").addEventListener("change", (event) => update({ beside: event.target.value }));
byId("head-clear").addEventListener("click", () => pickHead(-1));
byId("head").addEventListener("change", (event) => {
  const text = event.target.value.trim(), head = state.entry.heads.byName(text);
  const isKnown = !text || (head >= 0 && !Number.isNaN(state.entry.heads.span[head]));
  event.target.setAttribute("aria-invalid", String(!isKnown));
  event.target.title = isKnown ? "" : "There is no such head: write it as L11H1";
  if (isKnown) pickHead(head);
});
entryButtons.forEach((button, number) => button.addEventListener("click", () => openEntry(number)));

function clearSelection() {
  if (state.entry && state.head >= 0) pickHead(-1);
  if (state.entry) select(-1);
}

const KEYS = {
  ArrowLeft: () => step(-1), ArrowRight: () => step(1),
  Home: () => select(0), End: () => select(state.entry.count - 1),
  Escape: () => clearSelection(), "/": () => byId("find").focus(),
  p: () => goToPeak(PREPLAN, 1), P: () => goToPeak(PREPLAN, -1),
  a: () => goToPeak(ANCHOR, 1), A: () => goToPeak(ANCHOR, -1),
};

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, key)) return;
  if (target.matches("input, select, textarea")) {
    if (key === "Escape") target.blur();
    return;
  }
  if (target.matches('[role="radio"]') && key.startsWith("Arrow")) {
    const all = Array.from(target.parentElement.children);
    all.at((all.indexOf(target) + (key === "ArrowLeft" ? -1 : 1)) % all.length).click();
    event.preventDefault();
    return;
  }
  // Elsewhere these two scroll the page.
  if ((key === "Home" || key === "End") && !target.closest(".text, .over")) return;
  event.preventDefault();
  KEYS[key]();
});

darkScheme.addEventListener("change", redraw);
// Tokens move when the text gets another width, and when chunks of it are laid out.
panes[0].onMove = () => state.entry && showArcs();

// ---- the address --------------------------------------------------------------------------------------

function restore() {
  const asked = readAddress(), number = Number(asked.get("e") || 0);
  openEntry(entryButtons[number] ? number : 0);
  const { entry } = state, scale = asked.get("scale");
  if (scale === "rank" || scale === "linear") byId("scale").value = scale;
  const place = entry.places.get(Number(asked.get("t")));
  update({
    token: asked.has("t") && place !== undefined ? place : -1,
    scale: byId("scale").value,
    score: entry.score(asked.get("score")) ? asked.get("score") : state.score,
    beside: entry.score(asked.get("beside")) ? asked.get("beside") : "",
  });
  byId("beside").value = state.beside;
  if (comparison && asked.has("compare")) {
    const [a, b, score] = asked.get("compare").split(",");
    if (entryButtons[a] && entryButtons[b]) comparison.start(Number(a), Number(b), score);
  }
  const wanted = asked.get("score"), head = asked.has("head") ? entry.heads.byName(asked.get("head")) : -1;
  if (head !== state.head) {
    pickHead(head).then(() => wanted && entry.score(wanted) && update({ score: wanted }));
  }
}

addEventListener("hashchange", restore);
restore();
if (settings.compare && !state.compare) comparison.start(...settings.compare, "waad");
if (onPaper.matches) startPrint();
performance.mark("attnprobe-ready");
