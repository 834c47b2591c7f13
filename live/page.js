/* The page: compose a picture, ask, steer, leave blocks out, read the lens.
 *
 * LIVE (data.js) holds what the page needs before the model: the atlas of sprites, scenes, the
 * words of the world, the kernels, the manifest of the pack and the worker's source. Everything
 * that comes from data is written as text, never as HTML.
 */
"use strict";

const DESCRIBE = "Describe the picture.";
const PRESETS = {
  "Woman and keys": { place: "sand", time: "day", things: ["woman standing 0", "red key 72", "red key 72"] },
  "Zombie on the sand": { place: "sand", time: "night", things: ["zombie walking 0", "cactus 72"] },
  "Frog in the snow": { place: "snow", time: "dusk", things: ["frog", "yellow flag 72"] },
};
const SPOTS = [30, 118, 184, 74, 150]; // where the next thing is put, from the left
const FACTORS = { place: "ground", colour: "colour", time: "time of day", answer: "yes or no", own: "your own" };

const $ = (name) => document.getElementById(`live-${name}`);
const scene = { place: "sand", time: "day", things: [] };
let atlas = null;
let own = null; // rgba of the reader's own picture
let chosen = null; // the thing that buttons and keys move
let client = null;
let ready = false;
let turn = 0;
let said = []; // { word, milliseconds, multiplications, column } of the answer

// ---- the picture ----

const rgba = () => own ?? compose(atlas, scene);

function draw() {
  const context = $("canvas").getContext("2d", { willReadFrequently: true });
  context.putImageData(new ImageData(rgba(), SIDE, SIDE), 0, 0);
  const names = scene.things.map(nameOf);
  const ground = `on ${scene.place}, ${scene.time}`;
  const content = own ? "a picture of yours" : `${names.join(", ") || "nothing"}; ${ground}`;
  $("canvas").setAttribute("aria-label", `The picture: ${content}`);
  $("things").replaceChildren(...names.map((name, n) => new Option(name, n)));
  $("things").value = scene.things.indexOf(chosen);
  $("place").value = scene.place;
  $("time").value = scene.time;
}

function nameOf({ sprite }) {
  const { subject, action, item, colour } = LIVE.stage.kinds[sprite]?.shows ?? { item: sprite };
  return [colour, subject ?? item, action].filter(Boolean).join(" ");
}

function add(sprite, x = null) {
  const [, , width, height] = atlas.sprites[sprite];
  const { lift, shows } = LIVE.stage.kinds[sprite];
  const left = x ?? SPOTS[scene.things.length % SPOTS.length] - width / 2;
  const y = LIVE.stage.floor - height - lift;
  chosen = { sprite, x: Math.round(left), y, flip: false, shows };
  scene.things.push(chosen);
  own = null;
}

function show({ place, time, things }) {
  own = null;
  chosen = null;
  Object.assign(scene, { place, time, things: [] });
  for (const thing of things) {
    if (typeof thing === "string") add(thing, scene.things.length ? 20 + 66 * (scene.things.length - 1) : 150);
    else scene.things.push({ ...thing, shows: LIVE.stage.kinds[thing.sprite]?.shows });
  }
  chosen = scene.things.at(-1) ?? null;
}

function changed() {
  note("picture-note", "");
  draw();
  ask();
}

function move(dx, dy) {
  if (!chosen) return;
  chosen.x = Math.max(-60, Math.min(SIDE - 20, chosen.x + dx));
  chosen.y = Math.max(-60, Math.min(SIDE - 20, chosen.y + dy));
  changed();
}

function removeChosen() {
  scene.things = scene.things.filter((thing) => thing !== chosen);
  chosen = scene.things.at(-1) ?? null;
  changed();
}

// A picture of the reader's own, as a square of 256 pixels
async function takeFile(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff";
    context.fillRect(0, 0, SIDE, SIDE);
    context.drawImage(bitmap, 0, 0, SIDE, SIDE);
    own = context.getImageData(0, 0, SIDE, SIDE).data;
    changed();
    note("picture-note", "Your picture was resized to 256 x 256 pixels. The model learnt from drawn scenes only: it will describe yours as if it were one of them.");
  } catch {
    note("picture-note", `${file.name} cannot be read as a picture. PNG, JPEG and WebP can.`);
  }
}

// ---- the model ----

function cannot(reason) {
  note("missing", `${reason} Below is a picture of the page at work.`);
  $("recorded").hidden = false;
  $("load").disabled = true;
}

function note(name, text) {
  $(name).textContent = text;
  $(name).hidden = !text;
}

function load() {
  $("load").disabled = true;
  $("progress").hidden = false;
  note("state", "Loading the model ...");
  client = new Client($("load").closest(".live").dataset.folder, replies);
}

const replies = {
  progress({ share }) {
    $("progress").value = share;
    note("state", `Loading the model: ${Math.round(100 * share)} % of ${megabytes()} MB`);
  },
  ready({ milliseconds, bytes }) {
    ready = true;
    $("progress").hidden = true;
    $("load").hidden = true;
    const [seconds, size] = [(milliseconds / 1000).toFixed(1), Math.round(bytes / 1e6)];
    $("load").dataset.loaded = `${seconds} ${size}`; // for benchmarks/live.py
    note("state", `The model is here: loaded in ${seconds} s, ${size} MB of memory. It runs in this page and sends nothing.`);
    for (const name of ["ask", "to-a", "to-b", "forget"]) $(name).disabled = false;
    ask();
  },
  word(data) {
    if (data.turn !== turn) return;
    $("answer").textContent = data.text;
    said.push(data);
    showCost();
  },
  done({ turn: which, text, ended, milliseconds }) {
    if (which !== turn) return;
    $("answer").textContent = text || "(no word)";
    showTruth(text);
    note("broken", complaint(text, ended));
    const rate = (1000 * said.length) / milliseconds;
    note("state", `First word after ${said[0]?.milliseconds.toFixed(0) ?? 0} ms; ${rate.toFixed(0)} words a second in all.`);
    $("answer").dataset.done = which;
  },
  lens({ turn: which, n, column, last }) {
    if (which !== turn) return;
    said[n].column = column;
    showLens();
    if (last) $("lens").dataset.done = which;
  },
  collected({ side, pictures, text }) {
    const other = side === "A" ? "B" : "A";
    $("own").dataset[side] = pictures;
    const counts = ["A", "B"].map((name) => `pictures in ${name}: ${$("own").dataset[name] ?? 0}`);
    note("own", `${counts.join(", ")}. Last to ${side}: "${text}"`);
    if ($("own").dataset[other]) choose("factor", "own");
    ask();
  },
  failed({ text, loading, turn: which }) {
    if (loading) {
      $("progress").hidden = true;
      const memory = /memory/i.test(text) ? " Close other tabs, or use a device with more memory." : "";
      cannot(`The model cannot be loaded: ${text}.${memory} Reload the page to try again.`);
    } else if (which === undefined || which === turn) {
      note("broken", `${text[0].toUpperCase()}${text.slice(1)}.`);
    }
  },
};

function choose(name, value) {
  $(name).value = value;
  $(name).dispatchEvent(new Event("change"));
}

function ask() {
  if (!ready) return;
  const question = $("question").value.trim();
  if (!question) {
    note("broken", "The question is empty: type one, such as \"What colour is the key?\".");
    return;
  }
  turn++;
  said = [];
  note("broken", "");
  const strength = Number($("strength").value);
  const step = { source: $("source").value, target: $("target").value, layer: Number($("layer").value), strength };
  const skip = [...$("blocks").querySelectorAll("input:not(:checked)")].map((box) => Number(box.value));
  client.send({ kind: "ask", turn, rgba: rgba(), question, steer: strength ? [step] : [], skip });
}

function collect(side) {
  client.send({ kind: "collect", side, rgba: rgba(), question: DESCRIBE });
}

// ---- what is shown ----

function showTruth(text) {
  const isCaption = $("question").value.trim() === DESCRIBE && !own;
  $("truth").hidden = !isCaption;
  if (!isCaption) return;
  const result = judge(text, truthOf(scene), LIVE.stage.forms);
  for (const [kind, values] of Object.entries(result)) $(kind).textContent = values.join(", ") || "nothing";
}

// What is wrong with an answer of a model that was changed; empty where nothing is
function complaint(text, ended) {
  const changes = Number($("strength").value) !== 0 || $("blocks").querySelector("input:not(:checked)");
  if (!changes) return "";
  const all = text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  const known = new Set(LIVE.stage.language);
  const strange = all.filter((word) => !known.has(word)).length;
  if (ended && strange <= all.length / 4 && all.length) return "";
  const length = ended ? "" : " It did not come to an end.";
  return `This is no language of the world any more: ${strange} of ${all.length} words are in none of its sentences.${length} The strength is too large, or a block that was left out is needed.`;
}

function cell(tag, text, scope = null) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (scope) element.scope = scope;
  return element;
}

function row(...cells) {
  const element = document.createElement("tr");
  element.append(...cells);
  return element;
}

function showLens() {
  const columns = said.filter(({ column }) => column);
  const head = document.createElement("thead");
  head.append(row(cell("th", "layer", "col"), ...columns.map(({ word }) => cell("th", word, "col"))));
  const body = document.createElement("tbody");
  for (let layer = columns[0].column.length - 1; layer >= 0; layer--) {
    const cells = columns.map(({ word, column }) => {
      const { word: read, probability } = column[layer];
      const element = cell("td", read);
      element.style.setProperty("--likely", probability.toFixed(3));
      const detail = `Layer ${layer} reads "${read.trim()}". It holds "${word.trim()}", which was said, for ${(100 * probability).toFixed(1)} % likely.`;
      element.title = detail;
      element.onclick = () => { $("lens-detail").textContent = detail; };
      return element;
    });
    body.append(row(cell("th", layer, "row"), ...cells));
  }
  $("lens").replaceChildren(head, body);
}

function showCost() {
  const head = document.createElement("thead");
  const titles = ["word", "milliseconds", "million multiplications"];
  head.append(row(...titles.map((title) => cell("th", title, "col"))));
  const body = document.createElement("tbody");
  for (const { word, milliseconds, multiplications } of said) {
    const numbers = [milliseconds.toFixed(0), (multiplications / 1e6).toFixed(0)];
    body.append(row(cell("th", word, "row"), ...numbers.map((number) => cell("td", number))));
  }
  $("cost").replaceChildren(head, body);
}

// ---- controls ----

function fillPalette() {
  const people = Object.values(LIVE.stage.kinds).filter(({ shows }) => shows.action).map(({ shows }) => shows);
  const actions = [...new Set(people.map(({ action }) => action))];
  $("action").replaceChildren(...actions.map((action) => new Option(action)));
  for (const [sprite, { shows }] of Object.entries(LIVE.stage.kinds)) {
    const isPerson = Boolean(shows.action);
    if (isPerson ? sprite !== `${shows.subject} standing 0` : shows.item && !sprite.endsWith(" 72")) continue;
    const button = document.createElement("button");
    button.type = "button";
    const label = isPerson ? shows.subject : nameOf({ sprite });
    button.title = label;
    button.setAttribute("aria-label", `Add ${label}`);
    button.append(thumbnail(sprite));
    button.onclick = () => {
      add(isPerson ? `${shows.subject} ${$("action").value} 0` : sprite);
      changed();
    };
    $("palette").append(button);
  }
}

function thumbnail(sprite) {
  const [left, top, width, height] = atlas.sprites[sprite];
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  canvas.style.objectFit = "contain";
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const from = ((top + Math.floor(i / width)) * atlas.width + left + (i % width)) * 4;
    image.data.set(atlas.pixels.subarray(from, from + 3), 4 * i);
    image.data[4 * i + 3] = atlas.pixels[from + 2 * atlas.width];
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function fillDirections() {
  const means = Object.keys(LIVE.manifest.tensors).filter((name) => name.startsWith("mean."));
  $("factor").replaceChildren(...Object.entries(FACTORS).map(([factor, label]) => new Option(label, factor)));
  $("factor").onchange = () => {
    const factor = $("factor").value;
    const names = means.map((name) => name.slice(5)).filter((name) => name.startsWith(`${factor}.`));
    const values = factor === "own" ? ["A", "B"] : names;
    for (const side of ["source", "target"]) {
      $(side).replaceChildren(...values.map((value) => new Option(value.split(".").pop(), value)));
    }
    const usual = { place: ["place.sand", "place.snow"], answer: ["answer.yes", "answer.no"] };
    [$("source").value, $("target").value] = usual[factor] ?? [values[0], values.at(-1)];
    if (Number($("strength").value)) ask();
  };
  $("factor").onchange();
  for (const side of ["source", "target"]) $(side).onchange = ask;
  for (const name of ["strength", "layer"]) {
    $(name).oninput = () => {
      $(`${name}-value`).value = $(name).value;
      if (name === "strength" || Number($("strength").value)) ask();
    };
  }
}

function fillBlocks() {
  for (let block = 1; block <= 30; block++) {
    const label = document.createElement("label");
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", checked: true, value: block });
    label.append(box, ` ${block}`);
    $("blocks").append(label);
  }
  const count = () => {
    const n = $("blocks").querySelectorAll("input:checked").length;
    $("blocks-count").textContent = n === 30 ? "all 30 run" : `${n} of 30 run`;
    ask();
  };
  $("blocks").onchange = count;
  $("blocks-all").onclick = () => {
    for (const box of $("blocks").querySelectorAll("input")) box.checked = true;
    count();
  };
}

function listenToCanvas() {
  const canvas = $("canvas");
  const at = ({ offsetX, offsetY }) => [(offsetX * SIDE) / canvas.clientWidth, (offsetY * SIDE) / canvas.clientHeight];
  let grip = null;
  canvas.onpointerdown = (event) => {
    const [x, y] = at(event);
    const thing = own ? null : thingAt(atlas, scene.things, x, y);
    if (!thing) return;
    chosen = thing;
    grip = [x - thing.x, y - thing.y];
    canvas.setPointerCapture(event.pointerId);
    draw();
  };
  canvas.onpointermove = (event) => {
    if (!grip) return;
    const [x, y] = at(event);
    [chosen.x, chosen.y] = [Math.round(x - grip[0]), Math.round(y - grip[1])];
    draw();
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (grip) changed();
    grip = null;
  };
  const keys = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] };
  canvas.onkeydown = (event) => {
    if (keys[event.key]) move(...keys[event.key]);
    else if (event.key === "Delete" || event.key === "Backspace") removeChosen();
    else if (event.key.toLowerCase() === "f") flip();
    else return;
    event.preventDefault();
  };
}

function flip() {
  if (!chosen) return;
  chosen.flip = !chosen.flip;
  changed();
}

function listenToButtons() {
  const { stage } = LIVE;
  $("place").replaceChildren(...stage.places.map((place) => new Option(place)));
  $("time").replaceChildren(...stage.times.map((time) => new Option(time)));
  for (const name of ["place", "time"]) {
    $(name).onchange = () => {
      own = null;
      scene[name] = $(name).value;
      changed();
    };
  }
  $("things").onchange = () => { chosen = scene.things[Number($("things").value)]; };
  for (const button of document.querySelectorAll(".live [data-move]")) {
    button.onclick = () => move(...button.dataset.move.split(" ").map(Number));
  }
  $("flip").onclick = flip;
  $("remove").onclick = removeChosen;
  for (const [name, preset] of Object.entries(PRESETS)) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: name });
    button.onclick = () => { show(preset); changed(); };
    $("presets").prepend(button);
  }
  $("surprise").onclick = () => {
    show(stage.scenes[Math.floor(Math.random() * stage.scenes.length)]);
    changed();
    note("picture-note", "A scene that the model never saw in training.");
  };
  $("empty").onclick = () => { show({ ...scene, things: [] }); changed(); };
  $("file").onchange = () => { if ($("file").files[0]) takeFile($("file").files[0]); };
  $("load").onclick = load;
  $("ask").onclick = ask;
  $("question").onkeydown = (event) => { if (event.key === "Enter") ask(); };
  $("to-a").onclick = () => collect("A");
  $("to-b").onclick = () => collect("B");
  $("forget").onclick = () => {
    client.send({ kind: "forget" });
    for (const side of ["A", "B"]) delete $("own").dataset[side];
    note("own", "A: no picture. B: no picture.");
  };
}

async function start() {
  const reason = obstacle();
  if (reason) cannot(reason);
  if (typeof LIVE === "undefined" || !LIVE.stage) {
    $("columns").hidden = true;
    return;
  }
  atlas = await decodedAtlas(LIVE.stage.atlas);
  fillPalette();
  listenToButtons();
  listenToCanvas();
  fillBlocks();
  if (LIVE.manifest) {
    fillDirections();
    $("load").textContent = `Load the model (${megabytes()} MB)`;
  }
  show(PRESETS["Woman and keys"]);
  draw();
}

start();
