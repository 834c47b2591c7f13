/* Scenes of the world, drawn as xlvlms_tutorial.pocket.world.render draws them, to the pixel.
 *
 * A canvas blends half-transparent edges in its own way. Here the arithmetic is Pillow's, so that
 * the model sees what it would see in Python. Sprites come from one picture, the atlas, whose left
 * half holds colours and whose right half holds, as greys, how opaque each pixel is.
 */
"use strict";

const SIDE = 256; // pixels of a picture
const GROUND = 64; // height of the strip of ground

/* atlas: { width, pixels (rgba), sprites: { name: [x, y, width, height] }, tint: { time: rgb } }
 * scene: { place, time, things: [{ sprite, x, y, flip }] }, drawn in this order
 * -> rgba, 256 x 256 */
function compose(atlas, { place, time, things }) {
  const picture = new Uint8ClampedArray(SIDE * SIDE * 4);
  paste(picture, atlas, { sprite: `sky ${time}`, x: 0, y: 0 });
  for (let x = 0; x < SIDE; x += GROUND) {
    paste(picture, atlas, { sprite: `ground ${place}`, x, y: SIDE - GROUND });
  }
  for (const thing of things) paste(picture, atlas, thing);
  const tint = atlas.tint[time];
  for (let i = 0; i < picture.length; i += 4) {
    for (let c = 0; c < 3; c++) picture[i + c] = Math.floor((picture[i + c] * tint[c]) / 255);
    picture[i + 3] = 255;
  }
  return picture;
}

function paste(picture, atlas, { sprite, x, y, flip = false }) {
  const [left, top, width, height] = atlas.sprites[sprite];
  const half = atlas.width / 2;
  for (let v = Math.max(0, -y); v < Math.min(height, SIDE - y); v++) {
    for (let u = Math.max(0, -x); u < Math.min(width, SIDE - x); u++) {
      const from = ((top + v) * atlas.width + left + (flip ? width - 1 - u : u)) * 4;
      const opaque = atlas.pixels[from + half * 4];
      const to = ((y + v) * SIDE + x + u) * 4;
      for (let c = 0; c < 3; c++) {
        const mixed = atlas.pixels[from + c] * opaque + picture[to + c] * (255 - opaque);
        picture[to + c] = over255(mixed);
      }
    }
  }
}

// value / 255, rounded as Pillow does where it pastes
function over255(value) {
  const raised = value + 128;
  return ((raised >> 8) + raised) >> 8;
}

// The thing on top at a point of the picture, where it is not transparent; or undefined
function thingAt(atlas, things, x, y) {
  return things.findLast(({ sprite, x: left, y: top, flip }) => {
    const [atlasX, atlasY, width, height] = atlas.sprites[sprite];
    const [u, v] = [Math.floor(x - left), Math.floor(y - top)];
    if (u < 0 || v < 0 || u >= width || v >= height) return false;
    const column = atlasX + (flip ? width - 1 - u : u);
    return atlas.pixels[((atlasY + v) * atlas.width + column + atlas.width / 2) * 4] > 0;
  });
}

/* What is true of a scene, by factor: { subject: [...], action, item, colour, place, time }. A
 * thing says what it shows: { shows: { subject, action } } or { shows: { item, colour } }. */
function truthOf({ place, time, things }) {
  const truth = { subject: [], action: [], item: [], colour: [], place: [place], time: [time] };
  for (const { shows = {} } of things) {
    for (const [factor, value] of Object.entries(shows)) {
      if (value && !truth[factor].includes(value)) truth[factor].push(value);
    }
  }
  return truth;
}

/* Which facts a text names, misses and invents. forms: { factor: { value: [words] } }, the words
 * by which the package looks for a fact (text.forms). */
function judge(text, truth, forms) {
  const said = new Set(text.toLowerCase().match(/[a-z]+/g) ?? []);
  const result = { named: [], missed: [], invented: [] };
  for (const [factor, values] of Object.entries(forms)) {
    for (const [value, words] of Object.entries(values)) {
      const isNamed = words.some((word) => said.has(word));
      const isTrue = truth[factor].includes(value);
      if (isNamed && isTrue) result.named.push(value);
      else if (isTrue) result.missed.push(value);
      else if (isNamed) result.invented.push(value);
    }
  }
  return result;
}
