// What the drawn figures share: canvases that are sharp on every screen and follow their size.

// Give a canvas its size in CSS pixels; returns its context, scaled for the screen or for paper.
function sized(canvas, width, height) {
  const ratio = isPrinting ? 2 : Math.max(1, devicePixelRatio || 1);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// The width of an element's content; on paper, what fits on a page.
const PAPER_WIDTH = 680;
function widthOf(container) {
  return isPrinting ? Math.min(PAPER_WIDTH, Math.max(320, container.clientWidth)) : container.clientWidth;
}

// Draw again when an element has changed its width.
function onWidth(container, draw) {
  let known = 0;
  new ResizeObserver(() => {
    const width = container.clientWidth;
    if (width !== known && !isPrinting) {
      known = width;
      draw();
    }
  }).observe(container);
}

// Round numbers between two ends, about as many as asked for.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step + 0);
  return found;
}

// A symbol around a point; shapes differ, not only colours.
function symbol(context, name, x, y, size) {
  context.beginPath();
  if (name === "down") polygon(context, [[x - size, y - size * 0.8], [x + size, y - size * 0.8], [x, y + size]]);
  else if (name === "up") polygon(context, [[x - size, y + size * 0.8], [x + size, y + size * 0.8], [x, y - size]]);
  else if (name === "diamond") polygon(context, [[x - size, y], [x, y - size * 1.25], [x + size, y], [x, y + size * 1.25]]);
  else context.arc(x, y, size, 0, 2 * Math.PI);
}

function polygon(context, points) {
  points.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
}

// Hatch a rectangle, as the text hatches tokens.
function hatch(context, x, y, width, height, colour) {
  if (width <= 0) return;
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = colour;
  context.lineWidth = 1;
  context.beginPath();
  for (let start = x - height; start < x + width; start += 6) {
    context.moveTo(start, y + height);
    context.lineTo(start + height, y);
  }
  context.stroke();
  context.restore();
}

const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
