// Where the selected token looks, and what looks back: arcs over the text, and the same as two lists.

const SVG = "http://www.w3.org/2000/svg";

// All links of a token in a group: its reads, then its readers.
function linksOf(entry, i, group) {
  if (entry.reads === null || i < 0) return [];
  return ["reads", "readers"].flatMap((kind) =>
    entry.reads.of(group, kind, i).map((link) => ({ ...link, kind, from: i })));
}

// Draw the arcs of the selected token over a pane; each ends at a dot on the other token.
function drawArcs(pane, links) {
  const flow = pane.flow;
  flow.querySelector("svg")?.remove();
  if (!links.length) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "arcs");
  svg.setAttribute("aria-hidden", "true");
  const origin = flow.getBoundingClientRect();
  const topOf = (i) => {
    const box = pane.tokens[i].getClientRects()[0] || pane.tokens[i].getBoundingClientRect();
    return [(box.left + box.right) / 2 - origin.left, box.top - origin.top + 2];
  };
  const largest = Math.max(...links.map((link) => link.share));
  for (const link of links) {
    const weight = Math.sqrt(link.share / largest);
    const path = svgElement("path", {
      d: arc(topOf(link.from), topOf(link.token)), class: link.kind, "stroke-width": (0.7 + 1.7 * weight).toFixed(2),
      "stroke-opacity": (0.25 + 0.55 * weight).toFixed(2), "data-token": link.token,
    });
    const [x, y] = topOf(link.token);
    svg.append(path, svgElement("circle", { cx: x, cy: y, r: (1.8 + 1.8 * weight).toFixed(2), class: link.kind }));
  }
  flow.append(svg);
}

function arc([x1, y1], [x2, y2]) {
  const wide = Math.abs(x2 - x1), high = Math.abs(y2 - y1);
  const lift = high < 4 ? Math.min(26, 6 + wide / 10) : 14;
  const top1 = y1 - lift, top2 = y2 - lift;
  return high < 4
    ? `M ${x1} ${y1} C ${x1} ${top1}, ${x2} ${top2}, ${x2} ${y2}`
    : `M ${x1} ${y1} C ${x1} ${top1}, ${(x1 + 3 * x2) / 4} ${top2}, ${x2} ${y2}`;
}

function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// The shares of a token's attention, in words: "x% to the prompt (y% to the first token), z% to itself", as far as
// they are known.
function sharesLine(entry, i, group) {
  const { prompt, first, self, isRest } = entry.reads[group];
  const known = (values) => values !== null && !Number.isNaN(values[i]);
  const parts = [];
  // Older maps know only what is left of a row: on the prompt, between the turns, or in a sink.
  const where = isRest ? "outside the response (to the prompt, or a sink)" : "to the prompt";
  const onFirst = known(first) ? `${formatShare(first[i])} to the first token` : "";
  // The first token is part of the prompt: the two shares do not add up.
  if (known(prompt)) parts.push(`${formatShare(prompt[i])} ${where}${onFirst ? ` (${onFirst})` : ""}`);
  else if (onFirst) parts.push(onFirst);
  if (known(self)) parts.push(`${formatShare(self[i])} to itself`);
  return parts.length ? `${parts.join(", ")}.` : "The maps do not hold this token.";
}

// The panel of links in the details.
function linksPanel(entry, i) {
  if (entry.reads === null) {
    const how = "This report was made without maps. To see where a token looks, and what looks back, pass "
      + "Report(..., maps): group_maps makes them.";
    return [element("p", { class: "soft" }, how)];
  }
  const choice = element("div", { class: "choice", role: "radiogroup", "aria-label": "Whose reads" });
  for (const group of ["global", "local"]) {
    choice.append(element("button", {
      type: "button", role: "radio", "aria-checked": String(state.group === group), "data-group": group,
      onclick: () => update({ group }),
    }, `${group} heads`));
  }
  const { group } = state;
  const lists = element("div", { class: "links" });
  for (const [kind, title] of [["reads", "It reads"], ["readers", "Read by"]]) {
    const links = entry.reads.of(group, kind, i);
    const rows = links.map((link) => {
      const bar = element("span", { class: `bar-of ${kind}`, "aria-hidden": "true" });
      bar.style.width = `${Math.round(100 * link.share / links[0].share)}%`;
      const share = element("span", { class: "share" }, formatShare(link.share));
      return element("li", {}, tokenButton(entry, link.token), share, bar);
    });
    const list = rows.length ? element("ol", { class: kind }, ...rows) : element("p", { class: "soft" }, "none");
    lists.append(element("div", {}, element("h3", { class: kind }, title), list));
  }
  return [choice, element("p", { class: "shares" }, sharesLine(entry, i, group)), lists];
}
