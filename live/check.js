/* The engine without a browser: node check.js JOB gives answers as JSON on the standard output.
 *
 * JOB is a JSON file:
 *   kernels, manifest: files; folders: where the shards lie
 *   pictures: a file of pictures, 256 x 256 x 4 bytes each; vectors: a file of float32, 576 each
 *   asks: [{ picture, question, steer: [{ layer, strength, vector }], skip, states, answer }], with
 *         numbers into these files; states: true gives the last position's states of the prompt.
 *         An answer has its tokens as ids and its text, unless answer is false
 *   texts: texts to encode and decode; scenes: scenes to draw (scene.js) from `atlas`
 *   damage: a tensor whose blocks are changed after loading, to see that the check can fail
 *   spoil: "once" or "always": the second shard arrives changed
 */
"use strict";
const fs = require("fs");
const path = require("path");
const vm = require("vm");

// the page's scripts share one scope, as they do in the worker
const SCRIPTS = ["scene.js", "engine.js", "tower.js", "words.js"];
const source = SCRIPTS.map((name) => fs.readFileSync(path.join(__dirname, name), "utf8")).join("\n");
const names = "PocketLlava, shardBytes, see, Words, compose, WIDTH, SIDE";
const page = vm.runInThisContext(`(() => { ${source}\n return { ${names} }; })()`);

const PIXELS = page.SIDE * page.SIDE * 4;
const floats = (file) => new Float32Array(new Uint8Array(fs.readFileSync(file)).buffer);
const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

async function load(job) {
  const manifest = JSON.parse(fs.readFileSync(job.manifest, "utf8"));
  const fetched = [];
  const read = async (k, again) => {
    const { file } = manifest.shards[k];
    const folder = job.folders.find((each) => fs.existsSync(path.join(each, file)));
    const bytes = page.shardBytes(fs.readFileSync(path.join(folder, file)));
    fetched.push(k);
    if (k === 1 && (job.spoil === "always" || (job.spoil === "once" && !again))) bytes[100] ^= 1;
    return bytes;
  };
  const model = await page.PocketLlava.load(fs.readFileSync(job.kernels), manifest, read);
  if (job.damage) {
    const { bytes } = manifest.tensors[job.damage];
    const at = model.weights[job.damage];
    new Uint8Array(model.memory.buffer, at, bytes).reverse();
  }
  return { model, fetched };
}

async function answers(job, model, words) {
  const pictures = fs.readFileSync(job.pictures);
  const vectors = job.vectors ? floats(job.vectors) : null;
  const results = [];
  for (const ask of job.asks) {
    const { picture, question, steer = [], skip = [], states = false, answer = true } = ask;
    const seen = page.see(model, pictures.subarray(picture * PIXELS, (picture + 1) * PIXELS));
    const vector = (n) => vectors.subarray(n * page.WIDTH, (n + 1) * page.WIDTH);
    const change = {
      steer: steer.map((one) => ({ ...one, vector: vector(one.vector) })),
      skip: new Set(skip),
    };
    const result = {};
    if (states) {
      const prompt = words.prompt(question);
      model.embed(prompt, seen);
      model.forward(prompt.length, 0, change);
      Object.assign(result, { prompt, seen: base64(seen), states: base64(model.lastStates()) });
    }
    if (answer) {
      const { ids } = await model.answer(words.prompt(question), seen, change);
      Object.assign(result, { ids, text: words.decode(ids).trim() });
    }
    results.push(result);
  }
  return results;
}

async function main() {
  const job = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
  const output = {};
  if (job.scenes) {
    const atlas = { ...job.atlas, pixels: fs.readFileSync(job.atlas.file) };
    output.scenes = job.scenes.map((scene) => base64(page.compose(atlas, scene)));
  }
  if (job.manifest) {
    const { model, fetched } = await load(job);
    const vocabulary = new TextDecoder().decode(model.bytesOf("vocabulary"));
    const words = new page.Words(JSON.parse(vocabulary));
    output.fetched = fetched;
    output.tokens = (job.texts ?? []).map((text) => words.encode(text));
    output.texts = output.tokens.map((ids) => words.decode(ids));
    output.answers = await answers(job, model, words);
    output.memory = model.memory.buffer.byteLength;
  }
  fs.writeFileSync(1, JSON.stringify(output));
}

main().catch((error) => {
  fs.writeFileSync(2, `${error.stack}\n`);
  process.exitCode = 1;
});
