/* Pocket LLaVA in a page: the language model as the book writes it, over the kernels of kernels.c.
 *
 *   h_0 = embeddings of the words, with the picture's 16 vectors in place of its marks
 *   h   = h + attention(norm(h));  h = h + mlp(norm(h))        for each of the 30 blocks
 *   h_l = what leaves block l, before the final norm: layer l everywhere in the book
 *
 * What a reader changes is a line at the place where the chapters have it: `interveneAt` adds
 * strength * vector to a layer at all positions (interventions.add), and a block that is left out
 * is not computed (interventions.skip).
 *
 * A plain script: a page opened from disk may load no modules. live/check.js runs it in node.
 */
"use strict";

const BLOCKS = 30; // layers are numbered 0 to BLOCKS
const WIDTH = 576;
const HEADS = 9;
const KEYS = 192; // width of keys and of values
const HIDDEN = 1536; // width inside the MLP
const VOCABULARY = 49152;
const POSITIONS = 256; // of a prompt with its answer, MAX_POS of kernels.c
const PICTURE_TOKENS = 16;
const PICTURE_MARK = 4; // the token that stands where a vector of the picture goes
const END = 2; // the token that ends an answer
const FLOAT = 4; // bytes

class PocketLlava {
  /* kernels: bytes of kernels.wasm. manifest: what lies where in which shard (tools/live.py).
   * read(k, again): promise of the bytes of shard k; `again` is true where the first ones were not
   * those that were packed. progress(share): told after each shard. */
  static async load(kernels, manifest, read, progress = () => {}) {
    const model = new PocketLlava();
    const room = manifest.bytes + 92e6; // weights, and the buffers of `lay`
    const memory = new WebAssembly.Memory({ initial: Math.ceil(room / 65536), maximum: 16384 });
    const { instance } = await WebAssembly.instantiate(kernels, { env: { memory } });
    model.manifest = manifest;
    model.memory = memory;
    model.kernels = instance.exports;
    model.free = instance.exports.__heap_base.value;
    const start = model.reserve(manifest.bytes);
    let at = start;
    for (const [k, shard] of manifest.shards.entries()) {
      for (const again of [false, true]) {
        const bytes = await read(k, again);
        const fault = model.fault(bytes, at, shard);
        if (fault === null) break;
        if (again) throw new Error(`${shard.file} is damaged: ${fault}`);
      }
      at += shard.bytes;
      progress((k + 1) / manifest.shards.length);
    }
    model.lay(start);
    return model;
  }

  // Copies a shard to its place; says what is wrong with it, null if it is whole.
  fault(bytes, at, { bytes: size, sha256 }) {
    if (bytes.length !== size) return `${bytes.length} bytes instead of ${size}`;
    new Uint8Array(this.memory.buffer).set(bytes, at);
    const digest = this.reserve(32);
    this.kernels.sha256(at, size, digest);
    const words = [...new Uint32Array(this.memory.buffer, digest, 8)];
    const actual = words.map((word) => word.toString(16).padStart(8, "0")).join("");
    return actual === sha256 ? null : `sha256 ${actual} instead of ${sha256}`;
  }

  reserve(bytes) {
    const at = (this.free + 15) & ~15;
    this.free = at + bytes;
    return at;
  }

  floats(at, n) {
    return new Float32Array(this.memory.buffer, at, n);
  }

  // A tensor of the pack that is not computed with, such as the vocabulary: a copy of its bytes.
  bytesOf(name) {
    const { at, bytes } = this.manifest.tensors[name];
    return new Uint8Array(this.memory.buffer, this.start + at, bytes).slice();
  }

  // Addresses of weights and buffers, and the angles of the rotary positions.
  lay(start) {
    this.start = start;
    this.weights = {};
    for (const [name, { kind, at, shape }] of Object.entries(this.manifest.tensors)) {
      this.weights[name] = start + at;
      if (kind !== "F16") continue;
      const size = shape.reduce((a, b) => a * b, 1);
      this.weights[name] = this.reserve(FLOAT * size);
      this.kernels.widen(start + at, size, this.weights[name]);
    }
    const numbers = {
      h: POSITIONS * WIDTH, // the residual stream
      normed: POSITIONS * HIDDEN,
      left: POSITIONS * HIDDEN,
      right: POSITIONS * HIDDEN,
      integers: (POSITIONS * HIDDEN) / 2, // two of 16 bits in the room of a float
      scales: (POSITIONS * HIDDEN) / 16,
      cache: BLOCKS * 2 * POSITIONS * KEYS, // keys and values
      angles: POSITIONS * 64,
      vector: WIDTH,
      states: (BLOCKS + 1) * WIDTH, // of the last position, layer by layer
      logits: (BLOCKS + 1) * VOCABULARY,
      mapA: 96 * 128 * 128, // of the tower
      mapB: 96 * 128 * 128,
      padded: 300 * 300,
    };
    for (const [name, n] of Object.entries(numbers)) this[name] = this.reserve(FLOAT * n);
    const angles = this.floats(this.angles, POSITIONS * 64);
    for (let p = 0; p < POSITIONS; p++) {
      for (let i = 0; i < 32; i++) {
        const angle = p * this.manifest.theta ** (-i / 32);
        angles.set([Math.cos(angle), Math.sin(angle)], p * 64 + 2 * i);
      }
    }
  }

  // h_0: embeddings of tokens, with the picture's vectors in the place of their marks.
  embed(ids, picture = null) {
    const rowBytes = (WIDTH / 32) * 34;
    let seen = 0;
    for (const [t, id] of ids.entries()) {
      const to = this.h + t * WIDTH * FLOAT;
      if (picture && id === PICTURE_MARK) {
        this.floats(to, WIDTH).set(picture.subarray(seen * WIDTH, ++seen * WIDTH));
      } else {
        this.kernels.row8(this.weights.token_embd + id * rowBytes, WIDTH, to);
      }
    }
  }

  quantise(from, T, width) {
    this.kernels.quantise(from, T, width, this.integers, this.scales);
  }

  // to (T, rows) = what was quantised last (T, columns), times a matrix
  multiply(name, rows, columns, T, to) {
    const { integers, scales } = this;
    this.kernels.linear4(this.weights[name], rows, columns, integers, scales, T, to);
  }

  norm(name, T, from = this.h) {
    const { eps } = this.manifest;
    this.kernels.rms_norm(from, this.weights[name], T, WIDTH, eps, this.normed);
    this.quantise(this.normed, T, WIDTH);
  }

  // T positions from position p on, through all blocks
  forward(T, p, { steer = [], skip = new Set() } = {}) {
    this.interveneAt(0, T, steer);
    for (let l = 1; l <= BLOCKS; l++) {
      if (!skip.has(l)) {
        this.addAttention(l - 1, T, p); // h = h + attention(norm(h))
        this.addMlp(l - 1, T); // h = h + mlp(norm(h))
      }
      this.interveneAt(l, T, steer);
    }
  }

  addAttention(n, T, p) {
    const { kernels, left, right, normed } = this;
    const keys = this.cache + n * 2 * POSITIONS * KEYS * FLOAT;
    const values = keys + POSITIONS * KEYS * FLOAT;
    const here = p * KEYS * FLOAT; // what earlier positions left is kept
    const angles = this.angles + p * 64 * FLOAT;
    this.norm(`${n}.norm1`, T);
    this.multiply(`${n}.q`, WIDTH, WIDTH, T, left);
    this.multiply(`${n}.k`, KEYS, WIDTH, T, keys + here);
    this.multiply(`${n}.v`, KEYS, WIDTH, T, values + here);
    kernels.rotate(left, T, HEADS, angles);
    kernels.rotate(keys + here, T, 3, angles);
    kernels.attend(left, keys, values, T, p, HEADS, right);
    this.quantise(right, T, WIDTH);
    this.multiply(`${n}.o`, WIDTH, WIDTH, T, normed);
    kernels.add(this.h, normed, T * WIDTH, 1);
  }

  addMlp(n, T) {
    const { kernels, left, right, normed } = this;
    this.norm(`${n}.norm2`, T);
    this.multiply(`${n}.gate`, HIDDEN, WIDTH, T, left);
    this.multiply(`${n}.up`, HIDDEN, WIDTH, T, right);
    kernels.silu_gate(left, right, T * HIDDEN);
    this.quantise(left, T, HIDDEN);
    this.multiply(`${n}.down`, WIDTH, HIDDEN, T, normed);
    kernels.add(this.h, normed, T * WIDTH, 1);
  }

  // h = h + strength * vector at all positions of a layer; then the last position's state is kept
  interveneAt(layer, T, steer) {
    for (const { layer: wanted, vector, strength } of steer) {
      if (wanted !== layer) continue;
      this.floats(this.vector, WIDTH).set(vector);
      for (let t = 0; t < T; t++) {
        this.kernels.add(this.h + t * WIDTH * FLOAT, this.vector, WIDTH, strength);
      }
    }
    const last = this.floats(this.h + (T - 1) * WIDTH * FLOAT, WIDTH);
    this.floats(this.states + layer * WIDTH * FLOAT, WIDTH).set(last);
  }

  // A copy of the last position's states, (BLOCKS + 1, WIDTH)
  lastStates() {
    return this.floats(this.states, (BLOCKS + 1) * WIDTH).slice();
  }

  // The logit lens: final norm and embedding applied to the kept states of n layers -> (n, words)
  lens(from = BLOCKS, n = 1) {
    this.norm("output_norm", n, this.states + from * WIDTH * FLOAT);
    const { integers, scales, logits } = this;
    const table = this.weights.token_embd; // tied: embedding and unembedding are one matrix
    this.kernels.linear8(table, VOCABULARY, WIDTH, integers, scales, n, logits);
    return this.floats(logits, n * VOCABULARY);
  }

  /* What the lens reads at every layer of these states, and how likely each layer holds the word
   * that was said: [{ id, probability }] from layer 0 on. */
  column(states, said) {
    this.floats(this.states, states.length).set(states);
    const n = BLOCKS + 1;
    const logits = this.lens(0, n);
    this.kernels.largest(this.logits, n, VOCABULARY, this.scales);
    const best = this.floats(this.scales, 3 * n);
    const rows = [];
    for (let l = 0; l < n; l++) {
      const [id, top, sum] = best.subarray(3 * l, 3 * l + 3);
      rows.push({ id, probability: Math.exp(logits[l * VOCABULARY + said] - top) / sum });
    }
    return rows;
  }

  mostLikely() {
    this.lens();
    this.kernels.largest(this.logits, 1, VOCABULARY, this.scales);
    return this.floats(this.scales, 1)[0];
  }

  // Multiplications of a forward of T positions from position p on, and of reading off one word
  multiplications(T, p, skip = new Set()) {
    const matrices = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * HIDDEN;
    const attention = 2 * WIDTH * (p + (T + 1) / 2);
    return (BLOCKS - skip.size) * T * (matrices + attention) + WIDTH * VOCABULARY;
  }

  /* The most likely words after a prompt, one by one. each({ id, ids, multiplications }) is called
   * and awaited as a token is chosen; if it returns false, no more are made.
   * -> { ids, ended }: ended is false where the answer was cut after `limit` tokens. */
  async answer(prompt, picture, { steer, skip, limit = 32 } = {}, each = () => true) {
    const room = POSITIONS - limit;
    if (prompt.length > room) {
      throw new RangeError(`the question is too long: ${prompt.length} tokens, ${room} at most`);
    }
    const ids = [];
    let p = 0;
    let T = prompt.length;
    this.embed(prompt, picture);
    while (ids.length < limit) {
      this.forward(T, p, { steer, skip });
      const multiplications = this.multiplications(T, p, skip);
      p += T;
      const id = this.mostLikely();
      if (id === END) return { ids, ended: true };
      ids.push(id);
      if ((await each({ id, ids, multiplications })) === false) break;
      this.embed([id]);
      T = 1;
    }
    return { ids, ended: false };
  }
}

/* A shard is a script, liveShard(number, "bytes"), so that a page opened from disk may load it. In
 * the bytes four values are written as in any string: \" \\ \n \r. Here, from the file's bytes. */
function shardBytes(file) {
  const first = file.indexOf(34) + 1;
  const last = file.lastIndexOf(34);
  const bytes = new Uint8Array(Math.max(0, last - first));
  let n = 0;
  for (let i = first; i < last; i++) {
    let byte = file[i];
    if (byte === 92) {
      byte = file[++i];
      if (byte === 110) byte = 10;
      else if (byte === 114) byte = 13;
    }
    bytes[n++] = byte;
  }
  return bytes.subarray(0, n);
}
