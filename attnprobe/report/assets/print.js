// The page on paper: always in the light colours, with figures of the paper's width, and with the prompt.

let openedForPrint = [];

function startPrint() {
  if (isPrinting) return;
  isPrinting = true;
  openedForPrint = Array.from(document.querySelectorAll("#prompt:not([open])"));
  for (const details of openedForPrint) details.open = true;
  makePairs();
  redraw();
}

function endPrint() {
  if (!isPrinting) return;
  isPrinting = false;
  for (const details of openedForPrint) details.open = false;
  redraw();
}

addEventListener("beforeprint", startPrint);
addEventListener("afterprint", endPrint);
// Some browsers, and every test of one, show the printed page without these two events.
const onPaper = matchMedia("print");
onPaper.addEventListener("change", () => (onPaper.matches ? startPrint() : endPrint()));
