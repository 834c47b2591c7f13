/* Inside the worker: the model, and what the page asks of it.
 *
 * Words are said as they are chosen. Their lens costs more than the words, so it comes after them,
 * from the states that were kept. Every reply carries the turn of its question, and what belongs
 * to an earlier turn is dropped as soon as a new question arrives.
 */
"use strict";

const CACHE = "pocket-llava";
const pending = new Map(); // shards that the page was asked for, where scripts must be loaded
const sides = { A: null, B: null }; // sums of states over words, for the reader's own direction
let model = null;
let words = null;
let latest = 0;
let queue = Promise.resolve();
let looked = { rgba: null, seen: null };

const tell = (kind, more = {}) => postMessage({ kind, ...more });
const pause = () => new Promise((resume) => setTimeout(resume));

onmessage = ({ data }) => {
  if (data.kind === "shard") {
    pending.get(data.k)(data.bytes);
    return;
  }
  if (data.turn) latest = data.turn;
  const work = { load, ask, collect, forget }[data.kind];
  queue = queue.then(() => work(data)).catch((error) => {
    tell("failed", { text: error.message, loading: model === null, turn: data.turn });
  });
};

async function load({ kernels, manifest, folder }) {
  const started = performance.now();
  const read = folder === null ? scriptShard : (k, again) => fetched(folder + manifest.shards[k].file, again);
  const share = (value) => tell("progress", { share: value });
  model = await PocketLlava.load(kernels, manifest, read, share);
  words = new Words(JSON.parse(new TextDecoder().decode(model.bytesOf("vocabulary"))));
  const bytes = model.memory.buffer.byteLength;
  tell("ready", { milliseconds: performance.now() - started, bytes });
}

// Opened from disk, a worker may fetch nothing: the page loads the shard as a script.
function scriptShard(k, again) {
  return new Promise((resolve) => {
    pending.set(k, resolve);
    tell("want", { k, again });
  });
}

// From the browser's cache where it is there; kept there otherwise, where a browser allows it
async function fetched(address, again) {
  const cache = self.caches ? await caches.open(CACHE).catch(() => null) : null;
  if (again) await cache?.delete(address);
  let response = await cache?.match(address);
  if (!response) {
    response = await fetch(address, { cache: again ? "reload" : "default" });
    if (!response.ok) throw new Error(`${address} cannot be fetched (${response.status})`);
    await cache?.put(address, response.clone()).catch(() => {});
  }
  return shardBytes(new Uint8Array(await response.arrayBuffer()));
}

// The picture's vectors, made anew only where the picture changed
function lookAt(rgba) {
  const same = looked.rgba && rgba.every((value, i) => value === looked.rgba[i]);
  if (!same) looked = { rgba, seen: see(model, rgba) };
  return looked.seen;
}

// { source, target, layer, strength } -> what the engine adds: the target's mean less the source's
function direction({ source, target, layer, strength }) {
  const mean = (name) => {
    if (!(name in sides)) {
      return model.floats(model.weights[`mean.${name}`] + layer * WIDTH * FLOAT, WIDTH);
    }
    const side = sides[name];
    if (side === null) throw new Error(`set ${name} has no picture yet`);
    return side.sum.subarray(layer * WIDTH, (layer + 1) * WIDTH).map((value) => value / side.n);
  };
  const [from, to] = [mean(source), mean(target)];
  return { layer, strength, vector: to.map((value, i) => value - from[i]) };
}

async function ask({ turn, rgba, question, steer, skip, lens = true }) {
  if (turn !== latest) return;
  const started = performance.now();
  const change = { steer: steer.map(direction), skip: new Set(skip) };
  const kept = [];
  let since = started;
  const each = async ({ id, ids, multiplications }) => {
    const milliseconds = performance.now() - since;
    if (lens) kept.push({ id, states: model.lastStates() });
    const [text, word] = [words.decode(ids), words.decode([id])];
    tell("word", { turn, text, word, milliseconds, multiplications });
    await pause(); // a new question may have come
    since = performance.now();
    return turn === latest;
  };
  const { ids, ended } = await model.answer(words.prompt(question), lookAt(rgba), change, each);
  if (turn !== latest) return;
  const milliseconds = performance.now() - started;
  tell("done", { turn, text: words.decode(ids).trim(), ended, milliseconds });
  if (!lens) return;
  for (const [n, { id, states }] of kept.entries()) {
    const column = model.column(states, id);
    const shown = column.map((row) => ({ ...row, word: words.decode([row.id]) }));
    tell("lens", { turn, n, column: shown, last: n + 1 === kept.length });
    await pause();
    if (turn !== latest) return;
  }
}

// Adds the states of a caption's words, layer by layer, to one side of the reader's own direction
async function collect({ side, rgba, question }) {
  const total = sides[side] ?? { sum: new Float32Array((BLOCKS + 1) * WIDTH), n: 0, pictures: 0 };
  let first = true; // the prompt's last position is no word
  const each = () => {
    if (!first) {
      model.lastStates().forEach((value, i) => { total.sum[i] += value; });
      total.n++;
    }
    first = false;
    return true;
  };
  const { ids } = await model.answer(words.prompt(question), lookAt(rgba), {}, each);
  total.pictures++;
  sides[side] = total;
  tell("collected", { side, pictures: total.pictures, text: words.decode(ids).trim() });
}

function forget() {
  sides.A = null;
  sides.B = null;
}
