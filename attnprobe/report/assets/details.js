// The panel of the selected token: all its numbers, its roles, and its links.

const numbersPanel = document.getElementById("numbers");
const linksBox = document.getElementById("links");

function showDetails() {
  const { entry, token } = state;
  if (token < 0) {
    numbersPanel.replaceChildren(element("p", { class: "soft" },
      "Select a token in the text, the curves, a table or a map, and its numbers appear here, with arcs to the "
      + "tokens that it reads and that read it. Or press an arrow key."));
    linksBox.replaceChildren(element("div", { class: "links" },
      strongest(entry, "waad", PREPLAN, "Strongest preplans"), strongest(entry, "fai", ANCHOR, "Strongest anchors")));
    return;
  }
  const rows = [...entry.scores, ...entry.headScores].map((score) => scoreRow(score, token));
  numbersPanel.replaceChildren(
    element("p", { class: "chosen" }, tokenText(entry, token),
      element("span", { class: "soft" }, ` column ${entry.columns[token]}`)),
    element("dl", { class: "numbers" }, ...rows.flat()),
    ...rhythmLines(entry, token),
  );
  linksBox.replaceChildren(...linksPanel(entry, token));
}

const STRONGEST_SHOWN = 8;

// The strongest peaks, to begin with; those over few rows are not among them.
function strongest(entry, key, flag, title) {
  const score = entry.score(key);
  const peaks = Array.from(entry.flags.keys()).filter((i) => entry.has(i, flag) && score.isSound(i));
  peaks.sort((i, j) => score.values[j] - score.values[i] || i - j);
  const rows = peaks.slice(0, STRONGEST_SHOWN).map((i) =>
    element("li", {}, tokenButton(entry, i), element("span", { class: "share" }, formatScore(score.values[i]))));
  const list = rows.length ? element("ol", {}, ...rows) : element("p", { class: "soft" }, "none");
  return element("div", {}, element("h3", {}, title), list);
}

function scoreRow(score, token) {
  const unit = score.unit && !Number.isNaN(score.values[token]) ? ` ${score.unit}` : "";
  const value = `${score.isRounded && !Number.isNaN(score.values[token]) ? "≈ " : ""}${formatScore(score.values[token])}`;
  const note = () => element("span", { class: "few-note" }, ` mean over ${plural(score.entry.rows[token], "row")}`);
  const few = score.isFew(token) ? note() : "";
  return [
    element("dt", {}, score.name),
    element("dd", { "data-score": score.key }, element("b", {}, value), unit, few),
  ];
}

// What a token is in the rhythm, in sentences.
function rhythmLines(entry, token) {
  const lines = [];
  const roles = roleNames(entry, token);
  const told = element("p", { class: "roles" });
  const sample = (role) => element("span", { class: `sample ${role}` }, role);
  if (roles.length) told.append(...roles.flatMap((role, k) => [k ? " " : "", sample(role)]));
  else told.append(element("span", { class: "soft" }, "no peak"));
  const preplan = entry.preplanOf[token], intro = entry.introOf[token];
  const named = (i) => [tokenButton(entry, i), ` in column ${entry.columns[i]}`];
  if (preplan === token) told.append(" its own preplan");
  else if (preplan >= 0) told.append(" of the preplan ", ...named(preplan));
  if (intro >= 0) told.append("; its phrase was opened by ", ...named(intro));
  lines.push(told);
  if (entry.rows !== null) {
    const rows = entry.rows[token];
    const what = rows ? `FAI is a mean over ${plural(rows, "row")}.` : "No later token lies in the horizon of its FAI.";
    lines.push(element("p", { class: "soft" }, what));
  }
  return lines;
}
