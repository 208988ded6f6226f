// The alignment of two answers: a longest common subsequence of their tokens, in memory linear in their length.

// Pairs of places [a, b] that belong together, in order: `same(a, b)` says which may.
function align(first, second) {
  const pairs = [];
  // Hirschberg's method: the best split of the second for each half of the first, found from both ends.
  const solve = (a0, a1, b0, b1) => {
    while (a0 < a1 && b0 < b1 && first[a0] === second[b0]) pairs.push([a0++, b0++]);
    const tail = [];
    while (a0 < a1 && b0 < b1 && first[a1 - 1] === second[b1 - 1]) tail.push([--a1, --b1]);
    if (a1 - a0 === 1) {
      const found = second.indexOf(first[a0], b0);
      if (found >= 0 && found < b1) pairs.push([a0, found]);
    } else if (a1 > a0 && b1 > b0) {
      const middle = (a0 + a1) >> 1;
      const before = lengthsForward(first, a0, middle, second, b0, b1);
      const after = lengthsBackward(first, middle, a1, second, b0, b1);
      let best = 0;
      for (let k = 1; k <= b1 - b0; k++) if (before[k] + after[k] > before[best] + after[best]) best = k;
      solve(a0, middle, b0, b0 + best);
      solve(middle, a1, b0 + best, b1);
    }
    for (let k = tail.length - 1; k >= 0; k--) pairs.push(tail[k]);
  };
  solve(0, first.length, 0, second.length);
  return pairs;
}

// The length of the common subsequence of first[a0, a1) and second[b0, b0 + k), for each k.
function lengthsForward(first, a0, a1, second, b0, b1) {
  const width = b1 - b0, lengths = new Int32Array(width + 1);
  for (let a = a0; a < a1; a++) {
    let diagonal = 0;
    for (let k = 1; k <= width; k++) {
      const above = lengths[k];
      if (first[a] === second[b0 + k - 1]) lengths[k] = diagonal + 1;
      else if (lengths[k - 1] > above) lengths[k] = lengths[k - 1];
      diagonal = above;
    }
  }
  return lengths;
}

// The same for first[a0, a1) and second[b0 + k, b1), from the end.
function lengthsBackward(first, a0, a1, second, b0, b1) {
  const width = b1 - b0, lengths = new Int32Array(width + 1);
  for (let a = a1 - 1; a >= a0; a--) {
    let diagonal = 0;
    for (let k = width - 1; k >= 0; k--) {
      const below = lengths[k];
      if (first[a] === second[b0 + k]) lengths[k] = diagonal + 1;
      else if (lengths[k + 1] > below) lengths[k] = lengths[k + 1];
      diagonal = below;
    }
  }
  return lengths;
}

// What stands for each token when two answers are aligned: ids, unless one id means two things, as it does with
// two tokenizers; then texts.
function alignmentKeys(a, b) {
  const meaning = new Map();
  const agree = [a, b].every((entry) => entry.texts.every((text, i) => {
    if (text === "") return true;
    const known = meaning.get(entry.ids[i]);
    if (known === undefined) meaning.set(entry.ids[i], text);
    return known === undefined || known.trim() === text.trim();
  }));
  return agree ? [a.ids, b.ids] : [a.texts, b.texts];
}
