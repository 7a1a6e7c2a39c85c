// What the page needs besides onnxruntime: the tokenizer, and the loop that writes a text word by word. No DOM here, so
// that node runs it too (tests/deployment/test_browser.py).

const SPACE = "\u2581"; // SentencePiece's mark of a space
const END = 2; // fairseq's number of </s>, which begins and ends a text
const UNKNOWN = 3;
const SPECIAL = 4; // <s> <pad> </s> <unk>

// A SentencePiece model of type BPE with fairseq's numbers.
export class Pieces {
  // words: of fairseq's dictionary, by number, the four special ones included; ranks: when the tokenizer's training made
  // each piece, the earliest the least.
  constructor({ words, ranks }) {
    this.words = words;
    this.numbers = new Map(words.map((word, number) => [word, number]));
    this.ranks = new Map(Object.entries(ranks));
  }

  // The pieces of a text: of all neighbours that make a piece together, those of the earliest piece are joined first.
  split(text) {
    const spaced = text.normalize("NFKC").replace(/\s+/g, " ").trim();
    if (!spaced) return [];
    const parts = [...(SPACE + spaced.replaceAll(" ", SPACE))];
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  encode(text) {
    return this.split(text).map((piece) => this.numbers.get(piece) ?? UNKNOWN);
  }

  decode(numbers) {
    const pieces = numbers.filter((number) => number >= SPECIAL).map((number) => this.words[number]);
    return pieces.join("").replaceAll(SPACE, " ").replace(/^ /, "");
  }
}

// The number of the likeliest next word, of the scores of all; never a special one, except the end.
export function likeliest(scores) {
  let best = END;
  for (let number = SPECIAL; number < scores.length; number++) {
    if (scores[number] > scores[best]) best = number;
  }
  return best;
}

// Writes on from a text: yields the text each time a word has come, until the network ends it or `most` have come.
//   score   from numbers (those of the text, </s> first) to the scores of the next word, awaited
export async function* complete(pieces, text, most, score) {
  const numbers = [END, ...pieces.encode(text)];
  for (let i = 0; i < most; i++) {
    const next = likeliest(await score(numbers));
    if (next === END) return;
    numbers.push(next);
    yield pieces.decode(numbers);
  }
}
