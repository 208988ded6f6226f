// Colours: a ramp for each score, for light and for dark, and ink that can be read on each tone.
//
// Every ramp has one hue, and its lightness alone carries the value, so that it can be read with any colour
// vision. The lowest tone is close to the page and the highest furthest from it: in the dark, too, the strongest
// score stands out most.

const RAMPS = {
  light: {
    waad: ["#fff8f0", "#fed9a8", "#fdae61", "#f17a22"],
    fai: ["#f3f8fe", "#c6dbef", "#82b8dc", "#4a94c8"],
    receivers: ["#f0faf6", "#b8e3d3", "#6cc5a6", "#2ba37f"],
    all: ["#f7f5fc", "#d9d0ec", "#b3a2d8", "#9377c7"],
    entropy: ["#f6f6f6", "#dadada", "#b8b8b8", "#939393"],
    gamma: ["#fdf4f8", "#f5c9df", "#e996bf", "#d966a2"],
    difference: ["#8a76c0", "#cdc4e4", "#f6f6f6", "#fdcb90", "#e6862a"],
    span: ["#eef6f5", "#a9d3cf", "#4d9c9c", "#0f5560"],
    map: ["#f1f3f5", "#c6dbef", "#6baed6", "#2171b5", "#08203f"],
  },
  dark: {
    waad: ["#241b12", "#5c3510", "#aa5d16", "#ffa04f"],
    fai: ["#15202b", "#1d4262", "#2f78ae", "#85c8ff"],
    receivers: ["#14231e", "#184c3d", "#2b8c6c", "#75e3bd"],
    all: ["#1f1a2a", "#423465", "#775bb3", "#c8afff"],
    entropy: ["#202325", "#474b4f", "#7d8389", "#e0e4e7"],
    gamma: ["#27171f", "#602548", "#aa417b", "#ffa3cf"],
    difference: ["#bdaaff", "#5b4d90", "#212427", "#7e4b14", "#ffae60"],
    span: ["#17211f", "#1e4c4c", "#3f9696", "#baf2e8"],
    map: ["#181c1f", "#183c5e", "#2b7ab7", "#90d0f7", "#f4fcff"],
  },
};

const INKS = ["#14171a", "#ffffff", "#000000"];
const darkScheme = matchMedia("(prefers-color-scheme: dark)");
let isPrinting = false;

function schemeName() {
  return darkScheme.matches && !isPrinting ? "dark" : "light";
}

function channelsOf(colour) {
  return [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
}

// The colour at a point of a ramp, 0 to 1, as [red, green, blue].
function mixed(ramp, share) {
  const stops = RAMPS[schemeName()][ramp];
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const index = Math.min(Math.floor(place), stops.length - 2);
  const low = channelsOf(stops[index]), high = channelsOf(stops[index + 1]);
  return low.map((channel, k) => Math.round(channel + (high[k] - channel) * (place - index)));
}

function cssColour([red, green, blue]) {
  return `rgb(${red}, ${green}, ${blue})`;
}

// Luminance and contrast as WCAG 2 defines them.
function luminance(channels) {
  const linear = channels.map((channel) => {
    const share = channel / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

function contrast(first, second) {
  const [low, high] = [luminance(first), luminance(second)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

// The ink with the best contrast; black, where the softer two do not reach 4.5 : 1.
function inkOn(channels) {
  const [soft, white, black] = INKS.map((ink) => contrast(channelsOf(ink), channels));
  if (white >= soft) return white >= 4.5 || white >= black ? INKS[1] : INKS[2];
  return soft >= 4.5 ? INKS[0] : INKS[2];
}

// The styles of a whole ramp in 64 steps: thousands of tokens share a few dozen of them.
function rampStyles(ramp) {
  return Array.from({ length: 65 }, (_, step) => {
    const channels = mixed(ramp, step / 64);
    return { background: cssColour(channels), ink: inkOn(channels) };
  });
}

function gradientOf(ramp) {
  return `linear-gradient(to right, ${RAMPS[schemeName()][ramp].join(", ")})`;
}

// A colour of the page's own, such as "--waad".
function pageColour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
