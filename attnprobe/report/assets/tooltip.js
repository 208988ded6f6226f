// The box beside the pointer that tells what is under it.

const tooltip = document.getElementById("tooltip");

function showTooltip(event, lines) {
  tooltip.replaceChildren(...lines.map((line) => {
    const row = document.createElement("div");
    const text = document.createElement("bdi");
    text.textContent = line;
    row.append(text);
    return row;
  }));
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const right = event.clientX + 14, below = event.clientY + 18;
  const left = right + width > innerWidth - 6 ? event.clientX - width - 10 : right;
  const top = below + height > innerHeight - 6 ? event.clientY - height - 12 : below;
  tooltip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

// Make an element with attributes and children; texts become texts, never markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name === "onclick") made.addEventListener("click", value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// A token's text in a sentence or a table, apart from the direction of what is around it.
function tokenText(entry, i, className = "") {
  return element("bdi", { class: `quoted ${className}`.trim() }, entry.label(i));
}

// A button that selects a token.
function tokenButton(entry, i, className = "") {
  return element(
    "button",
    {
      type: "button", class: "token-button", "data-token": String(i), title: `column ${entry.columns[i]}`,
      onclick: () => select(i),
    },
    tokenText(entry, i, className),
  );
}
