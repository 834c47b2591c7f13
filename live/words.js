/* SmolLM2's tokenizer: text to tokens and back, so that any question can be typed.
 *
 * Byte-level pairs: a text is cut into words, a word into bytes (each written as a letter), and the
 * two neighbours whose pair came first in training are joined until no pair is known. In this
 * vocabulary pairs are numbered as they were learnt, so a token's number is its rank.
 */
"use strict";

const SPECIAL = 16; // tokens up to this number are marks, not text
const CUT = /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

class Words {
  // vocabulary: the tokens in the order of their numbers, spelled as in tokenizer.json
  constructor(vocabulary) {
    this.vocabulary = vocabulary;
    this.number = new Map(vocabulary.map((token, id) => [token, id]));
    let next = 256; // bytes that are no printable letters get the letters from here on
    this.letters = Array.from({ length: 256 }, (_, byte) => {
      const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      return String.fromCodePoint(printable ? byte : next++);
    });
    this.bytes = new Map(this.letters.map((letter, byte) => [letter, byte]));
  }

  encode(text) {
    const ids = [];
    for (const [word] of text.matchAll(CUT)) {
      const bytes = [...new TextEncoder().encode(word)];
      ids.push(...this.joined(bytes.map((byte) => this.letters[byte])));
    }
    return ids;
  }

  joined(parts) {
    for (;;) {
      let rank = Infinity;
      let at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const id = this.number.get(parts[i] + parts[i + 1]);
        if (id < rank) [rank, at] = [id, i];
      }
      if (at < 0) return parts.map((part) => this.number.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  decode(ids) {
    const text = ids.filter((id) => id > SPECIAL).map((id) => this.vocabulary[id]);
    const bytes = [...text.join("")].map((letter) => this.bytes.get(letter));
    return new TextDecoder().decode(new Uint8Array(bytes));
  }

  // The chat around a picture (16 marks) and a question
  prompt(question) {
    const [start, end] = [1, 2];
    const picture = Array(PICTURE_TOKENS).fill(PICTURE_MARK);
    return [
      start, ...this.encode("user\n"), ...picture, ...this.encode(question), end,
      ...this.encode("\n"), start, ...this.encode("assistant\n"),
    ];
  }
}
