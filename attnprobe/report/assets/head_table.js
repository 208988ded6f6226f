// All heads as a table that can be sorted, made when it is first opened.

const headTable = document.getElementById("head-table");
let headOrder = { key: "head", isDescending: false };

function headColumns(heads) {
  const columns = [
    { key: "head", title: "head", value: (head) => head },
    { key: "span", title: "span (tokens)", values: heads.span },
    { key: "kurtosis", title: "receiver kurtosis", values: heads.kurtosis },
    { key: "gini", title: "Gini coefficient", values: heads.gini },
    { key: "first", title: "on the first token", values: heads.first, written: formatShare },
    { key: "group", title: "group", value: (head) => -heads.groups[head] || Infinity },
  ];
  return columns.filter((column) => column.value || column.values)
    .map((column) => ({ value: (head) => column.values[head], written: formatScore, ...column }));
}

function showHeadTable() {
  if (!headTable.open || state.entry === null) return;
  const { heads } = state.entry, columns = headColumns(heads);
  const sorted = columns.find((column) => column.key === headOrder.key) || columns[0];
  const order = [];
  for (let head = 0; head < heads.size; head++) if (!Number.isNaN(heads.span[head])) order.push(head);
  const sign = headOrder.isDescending ? -1 : 1;
  // What is undefined stands last in both orders.
  order.sort((a, b) => {
    const first = sorted.value(a), second = sorted.value(b);
    if (Number.isNaN(first) || Number.isNaN(second)) return Number.isNaN(first) - Number.isNaN(second) || a - b;
    return (first === second ? 0 : first < second ? -1 : 1) * sign || a - b;
  });
  const titles = columns.map((column) => element("th", {
    scope: "col", class: column.values ? "number" : "",
    "aria-sort": column.key === sorted.key ? (headOrder.isDescending ? "descending" : "ascending") : "none",
  }, element("button", { type: "button", "data-sort": column.key, onclick: () => sortHeads(column.key) }, column.title)));
  const rows = order.map((head) => element("tr", { "data-head": String(head), class: head === state.head ? "selected" : "" },
    ...columns.map((column) => headCell(heads, head, column))));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...rows));
  headTable.querySelector(".scrolled").replaceChildren(table);
}

function headCell(heads, head, column) {
  if (column.key === "head") {
    const attributes = { type: "button", class: "token-button", onclick: () => pickHead(head) };
    return element("td", {}, element("button", attributes, heads.name(head)));
  }
  if (column.key === "group") return element("td", {}, heads.groupNames(head).join(", ") || "–");
  return element("td", { class: "number" }, column.written(column.values[head]));
}

function sortHeads(key) {
  // Numbers are first asked for from the top.
  const startsDescending = !["head", "group"].includes(key);
  headOrder = { key, isDescending: headOrder.key === key ? !headOrder.isDescending : startsDescending };
  showHeadTable();
  headTable.querySelector(`[data-sort="${key}"]`).focus();
}

headTable.addEventListener("toggle", showHeadTable);
