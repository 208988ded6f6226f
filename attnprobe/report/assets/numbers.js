// Numbers as the page writes them: three digits, exactly as Python's format(value, ".3g") does.

// The digits "d.dd" and the power of ten of a positive number, rounded to three digits.
function threeDigits(value) {
  const [digits, power] = value.toExponential(2).split("e");
  const [exact, exactPower] = value.toExponential(60).split("e");
  // At a tie, JavaScript rounds up and Python to the even digit.
  const isTie = /^\d\.\d\d50*$/.test(exact);
  if (isTie && Number(exact[3]) % 2 === 0) return [exact.slice(0, 4), Number(exactPower)];
  return [digits, Number(power)];
}

function withoutZeros(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function formatScore(value) {
  if (Number.isNaN(value)) return "undefined";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  if (value === 0) return Object.is(value, -0) ? "-0" : "0";
  const sign = value < 0 ? "-" : "";
  const [digits, power] = threeDigits(Math.abs(value));
  if (power < -4 || power >= 3) {
    const size = String(Math.abs(power)).padStart(2, "0");
    return `${sign}${withoutZeros(digits)}e${power < 0 ? "-" : "+"}${size}`;
  }
  return sign + withoutZeros(Number(`${digits}e${power}`).toFixed(Math.max(0, 2 - power)));
}

// A share of attention; a rounded zero would be a lie.
function formatShare(share) {
  if (Number.isNaN(share)) return "–";
  const percent = 100 * share;
  if (percent === 0) return "0%";
  if (percent < 0.1) return "<0.1%";
  return `${percent < 9.95 ? percent.toFixed(1) : Math.round(percent)}%`;
}

function plural(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}
