// The table of preplans and their anchors, each with a few tokens of context.

const BEFORE = 3, AFTER = 2;
const pairsSection = document.getElementById("pairs");

// A long table is made when it comes into view.
const FEW_PAIRS = 100;
let pairsWaiting = null;

function preparePairs(entry) {
  pairsWaiting = entry;
  if (entry.preplanOf.reduce((sum, preplan) => sum + (preplan >= 0), 0) <= FEW_PAIRS) makePairs();
  else pairsSection.querySelector("table").replaceChildren();
}

function makePairs() {
  if (pairsWaiting === null) return;
  showPairs(pairsWaiting);
  pairsWaiting = null;
  markPairs(state.token);
}

const pairsObserver = new IntersectionObserver((seen) => seen.some((each) => each.isIntersecting) && makePairs());
pairsObserver.observe(pairsSection);

function showPairs(entry) {
  const anchors = Array.from(entry.preplanOf.keys()).filter((i) => entry.preplanOf[i] >= 0);
  const about = pairsSection.querySelector(".about");
  const { lookback } = entry.data, near = `within ${plural(lookback, "token")}`;
  pairsSection.querySelector(".scrolled").hidden = anchors.length === 0;
  about.textContent = anchors.length
    ? `Every anchor that coincides with a preplan or follows one ${near}. A distance of 0 means that the same token is both.`
    : `This response has no anchor at a preplan or ${near} after one.`;
  const titles = ["column", "preplan", "WAAD", "column", "anchor", "FAI", "distance", "dominated", "intro"];
  const kind = (title) => (["column", "WAAD", "FAI", "distance"].includes(title) ? "number" : "");
  const head = titles.map((title) => element("th", { scope: "col", class: kind(title) }, title));
  const rows = anchors.map((anchor) => pairRow(entry, entry.preplanOf[anchor], anchor));
  pairsSection.querySelector("table").replaceChildren(
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows));
}

function pairRow(entry, preplan, anchor) {
  const number = (text) => element("td", { class: "number" }, text);
  const waad = entry.score("waad"), fai = entry.score("fai"), intro = entry.introOf[anchor];
  const few = fai.isFew(anchor) ? element("small", {}, ` mean over ${plural(entry.rows[anchor], "row")}`) : "";
  return element("tr", { "data-preplan": String(preplan), "data-anchor": String(anchor), class: few ? "few" : "" },
    number(String(entry.columns[preplan])), context(entry, preplan, "preplan"), number(formatScore(waad.values[preplan])),
    number(String(entry.columns[anchor])), context(entry, anchor, "anchor"),
    element("td", { class: "number" }, formatScore(fai.values[anchor]), few),
    number(String(entry.columns[anchor] - entry.columns[preplan])),
    element("td", {}, entry.has(anchor, DOMINATED) ? "yes" : "no"),
    element("td", {}, ...(intro < 0 ? ["–"] : [`${entry.columns[intro]} `, tokenButton(entry, intro)])),
  );
}

function context(entry, i, role) {
  const part = (first, last) => {
    let text = "";
    for (let k = Math.max(0, first); k <= Math.min(entry.count - 1, last); k++) text += oneLine(entry.texts[k]);
    return text;
  };
  return element("td", { class: "context" }, element("bdi", {},
    part(i - BEFORE, i - 1), tokenButton(entry, i, role), part(i + 1, i + AFTER)));
}

function markPairs(token) {
  for (const row of pairsSection.querySelectorAll("tr.selected")) row.classList.remove("selected");
  if (token < 0) return;
  const own = `tr[data-preplan="${token}"], tr[data-anchor="${token}"]`;
  for (const row of pairsSection.querySelectorAll(own)) row.classList.add("selected");
}
