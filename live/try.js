/* A small live model inside a chapter.
 *
 * A chapter has <div class="live-try live-steer"> where readers may steer, and "live-skip" where
 * they may leave blocks out. The div holds a sentence that leads to the page "Live", for readers
 * without this script. Nothing is loaded before the reader asks for it.
 */
"use strict";

const FOLDER = "../_static/live/";
const DESCRIBE = "Describe the picture.";
const PRESENCE = "Is there a woman in the picture?";
const DIRECTIONS = [
  { label: "sand to snow", source: "place.sand", target: "place.snow", layer: 24, question: DESCRIBE },
  { label: "day to night", source: "time.day", target: "time.night", layer: 24, question: DESCRIBE },
  { label: "yes to no", source: "answer.yes", target: "answer.no", layer: 27, question: PRESENCE },
];
const N_BLOCKS = 30;

// An element with properties, attributes in `aria`, and children
function make(tag, { aria = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children);
  return element;
}

function added(tag, properties, isThere) {
  return new Promise((resolve, reject) => {
    const element = make(tag, { ...properties, onload: resolve });
    element.onerror = () => reject(new Error(`${properties.src ?? properties.href} is missing`));
    if (isThere()) resolve();
    else document.head.append(element);
  });
}

class Trial {
  constructor(place) {
    this.place = place;
    this.isSteering = place.classList.contains("live-steer");
    this.turn = 0;
    this.number = 0;
    this.button = make("button", { type: "button", className: "live-primary", textContent: "Try it here" });
    this.state = make("p", { className: "live-small", role: "status" });
    this.state.textContent = "This loads the model of this book into the page, about 115 MB.";
    this.panel = make("div", { className: "live" }, this.button, this.state);
    this.button.onclick = () => this.load().catch((error) => this.failed(error));
    place.append(this.panel);
  }

  failed({ message }) {
    this.state.textContent = `${message[0].toUpperCase()}${message.slice(1)}.`;
  }

  async load() {
    this.button.disabled = true;
    await added("link", { rel: "stylesheet", href: `${FOLDER}live.css` }, () => false);
    await added("script", { src: `${FOLDER}data.js` }, () => typeof LIVE !== "undefined");
    const reason = obstacle();
    if (reason) {
      this.state.textContent = reason;
      return;
    }
    this.atlas = await decodedAtlas(LIVE.stage.atlas);
    this.client = new Client(FOLDER, {
      progress: ({ share }) => {
        this.state.textContent = `Loading the model: ${Math.round(100 * share)} % of ${megabytes()} MB`;
      },
      ready: () => this.begin(),
      word: (data) => this.word(data),
      done: (data) => this.done(data),
      failed: ({ text }) => this.failed({ message: text }),
    });
  }

  begin() {
    this.button.remove();
    this.canvas = make("canvas", { width: SIDE, height: SIDE, role: "img" });
    this.question = make("input", { type: "text", value: DESCRIBE, maxLength: 300, onchange: () => this.ask() });
    this.answer = make("p", { className: "live-answer", aria: { live: "polite" } });
    this.truth = make("p", { className: "live-small" });
    const another = make("button", { type: "button", textContent: "Another picture" });
    another.onclick = () => this.show(this.number + 1);
    const picture = make("div", {}, this.canvas, make("p", { className: "live-row" }, another));
    const asked = make("p", { className: "live-row" }, make("label", {}, "Ask ", this.question));
    const controls = this.isSteering ? this.dial() : this.switches();
    const model = make("div", {}, asked, ...controls, this.answer, this.truth);
    this.panel.prepend(make("div", { className: "live-columns" }, picture, model));
    this.show(0);
  }

  dial() {
    const options = DIRECTIONS.map(({ label }, number) => new Option(label, number));
    this.direction = make("select", {}, ...options);
    this.strength = this.slider("Strength", -2, 3, 0.25, 0);
    this.layer = this.slider("Layer", 1, N_BLOCKS, 1, DIRECTIONS[0].layer);
    this.direction.onchange = () => {
      const { layer, question } = DIRECTIONS[this.direction.value];
      this.layer.move(layer);
      this.question.value = question;
      this.ask();
    };
    const label = make("label", {}, "Direction ", this.direction);
    return [make("p", { className: "live-row" }, label), this.strength.row, this.layer.row];
  }

  slider(name, min, max, step, value) {
    const input = make("input", { type: "range", min, max, step, value });
    const output = make("output", { value });
    input.oninput = () => {
      output.value = input.value;
      this.ask();
    };
    const move = (where) => { input.value = output.value = where; };
    const row = make("p", { className: "live-row" }, make("label", {}, `${name} `, input, " ", output));
    return { row, move, value: () => Number(input.value) };
  }

  switches() {
    this.blocks = [];
    const group = make("div", { className: "live-blocks", role: "group", aria: { label: "Blocks that run" } });
    for (let block = 1; block <= N_BLOCKS; block++) {
      const box = make("input", { type: "checkbox", checked: true, value: block, onchange: () => this.ask() });
      this.blocks.push(box);
      group.append(make("label", {}, box, ` ${block}`));
    }
    const all = make("button", { type: "button", textContent: "All blocks run" });
    all.onclick = () => {
      for (const box of this.blocks) box.checked = true;
      this.ask();
    };
    return [group, make("p", { className: "live-row" }, all)];
  }

  show(number) {
    const { scenes, kinds } = LIVE.stage;
    this.number = number % scenes.length;
    const { place, time, things } = scenes[this.number];
    const shown = things.map((thing) => ({ ...thing, shows: kinds[thing.sprite]?.shows }));
    this.scene = { place, time, things: shown };
    this.rgba = compose(this.atlas, this.scene);
    this.canvas.getContext("2d").putImageData(new ImageData(this.rgba, SIDE, SIDE), 0, 0);
    const facts = Object.values(truthOf(this.scene)).flat().join(", ");
    this.canvas.setAttribute("aria-label", `A picture: ${facts}`);
    this.ask();
  }

  ask() {
    const question = this.question.value.trim();
    if (!question) {
      this.state.textContent = "The question is empty.";
      return;
    }
    this.turn++;
    this.cost = 0;
    const change = { steer: [], skip: [] };
    if (this.isSteering && this.strength.value()) {
      const { source, target } = DIRECTIONS[this.direction.value];
      change.steer.push({ source, target, layer: this.layer.value(), strength: this.strength.value() });
    }
    for (const box of this.blocks ?? []) {
      if (!box.checked) change.skip.push(Number(box.value));
    }
    const lens = false;
    this.client.send({ kind: "ask", turn: this.turn, rgba: this.rgba, question, lens, ...change });
  }

  word({ turn, text, multiplications }) {
    if (turn !== this.turn) return;
    this.cost += multiplications;
    this.answer.textContent = text;
  }

  done({ turn, text, ended }) {
    if (turn !== this.turn) return;
    this.answer.textContent = text || "(no word)";
    this.place.dataset.done = turn;
    const ending = ended ? "" : " The text did not come to an end.";
    this.state.textContent = `${(this.cost / 1e9).toFixed(1)} billion multiplications.${ending}`;
    this.truth.textContent = "";
    if (this.question.value.trim() !== DESCRIBE) return;
    const result = judge(text, truthOf(this.scene), LIVE.stage.forms);
    const parts = Object.entries(result).map(([kind, values]) => `${kind}: ${values.join(", ") || "nothing"}`);
    this.truth.textContent = `Against the picture, ${parts.join("; ")}.`;
  }
}

for (const place of document.querySelectorAll(".live-try")) new Trial(place);
