/* What the language model gets of a picture: 16 vectors, from EfficientNet-Lite0 and the connector.
 *
 * The map of an early block and of the last one are pooled to 8 x 8 cells and joined; each 2 x 2
 * cells become one of 16 tokens; the connector maps each from 1440 numbers to 576. Batch norms are
 * folded into the convolutions (tools/live.py).
 */
"use strict";

const CELLS = 8; // a side of the pooled maps
const TOKEN_WIDTH = 1440;

// rgba: the canvas's values 0 to 255, row by row -> (16, 576)
function see(model, rgba) {
  const { kernels, weights, manifest } = model;
  let [map, next] = [model.mapA, model.mapB];
  let side = SIDE / 2;
  firstPatches(model.floats(next, 27 * side * side), rgba, side);
  kernels.pointwise(next, weights["conv.0.w"], weights["conv.0.b"], 27, 32, side * side, 1, map);
  const tokens = new Float32Array(TOKEN_WIDTH * PICTURE_TOKENS);
  let channel = 0;
  let entering = null; // what enters a block, where the block adds it to its output
  for (const [n, c] of manifest.convolutions.entries()) {
    if (n === 0) continue; // the first convolution, done above
    const [w, b] = [weights[`conv.${n}.w`], weights[`conv.${n}.b`]];
    if (c.opens) entering = model.floats(map, c.inputs * side * side).slice();
    if (c.depthwise) {
      kernels.depthwise(map, w, b, c.outputs, side, c.size, c.stride, model.padded, next);
      side = Math.ceil(side / c.stride);
    } else {
      kernels.pointwise(map, w, b, c.inputs, c.outputs, side * side, c.cut, next);
    }
    [map, next] = [next, map];
    if (c.block === undefined) continue; // inside a block
    const output = model.floats(map, c.outputs * side * side);
    if (c.residual) entering.forEach((value, i) => { output[i] += value; });
    if (manifest.taps.includes(c.block)) {
      takeTokens(tokens, channel, pooled(output, c.outputs, side), c.outputs);
      channel += c.outputs;
    }
  }
  standardise(tokens, model);
  return connect(model, tokens);
}

// The pictures' 3 x 3 neighbourhoods at every second pixel, padded as TensorFlow does: (27, pixels)
function firstPatches(patches, rgba, side) {
  patches.fill(0);
  for (let c = 0; c < 3; c++) {
    for (let k = 0; k < 9; k++) {
      const row = (c * 9 + k) * side * side;
      for (let i = 0; i < side * side; i++) {
        const y = 2 * Math.floor(i / side) + Math.floor(k / 3);
        const x = 2 * (i % side) + (k % 3);
        if (y < SIDE && x < SIDE) patches[row + i] = (rgba[(y * SIDE + x) * 4 + c] - 127) / 128;
      }
    }
  }
}

// The mean over each of 8 x 8 cells of a map (channels, side, side)
function pooled(map, channels, side) {
  const step = side / CELLS;
  const means = new Float32Array(channels * CELLS * CELLS);
  for (let i = 0; i < channels * side * side; i++) {
    const [c, y, x] = [Math.floor(i / (side * side)), Math.floor(i / side) % side, i % side];
    const cell = Math.floor(y / step) * CELLS + Math.floor(x / step);
    means[c * CELLS * CELLS + cell] += map[i] / (step * step);
  }
  return means;
}

// Each 2 x 2 cells of a channel become four numbers of one token
function takeTokens(tokens, firstChannel, cells, channels) {
  for (let c = 0; c < channels; c++) {
    for (let part = 0; part < 4; part++) {
      for (let t = 0; t < PICTURE_TOKENS; t++) {
        const y = 2 * (t >> 2) + (part >> 1);
        const x = 2 * (t & 3) + (part & 1);
        const to = ((firstChannel + c) * 4 + part) * PICTURE_TOKENS + t;
        tokens[to] = cells[c * CELLS * CELLS + y * CELLS + x];
      }
    }
  }
}

function standardise(tokens, model) {
  const mean = model.floats(model.weights["tower.mean"], TOKEN_WIDTH);
  const std = model.floats(model.weights["tower.std"], TOKEN_WIDTH);
  for (let i = 0; i < tokens.length; i++) {
    const channel = Math.floor(i / PICTURE_TOKENS);
    tokens[i] = (tokens[i] - mean[channel]) / std[channel];
  }
}

// The connector: a matrix, GELU, a matrix; tokens (1440, 16) -> (16, 576)
function connect(model, tokens) {
  const { kernels, weights, mapA: from, mapB: to } = model;
  const layer = (n, inputs, x, out) => {
    const [w, b] = [weights[`connector.linear_${n}.weight`], weights[`connector.linear_${n}.bias`]];
    kernels.pointwise(x, w, b, inputs, WIDTH, PICTURE_TOKENS, 0, out);
  };
  model.floats(from, tokens.length).set(tokens);
  layer(1, TOKEN_WIDTH, from, to);
  const hidden = model.floats(to, WIDTH * PICTURE_TOKENS);
  hidden.forEach((x, i) => { hidden[i] = x * 0.5 * (1 + erf(x / Math.SQRT2)); });
  layer(2, WIDTH, to, from);
  const output = model.floats(from, WIDTH * PICTURE_TOKENS);
  const vectors = new Float32Array(PICTURE_TOKENS * WIDTH);
  vectors.forEach((_, i) => {
    const [t, channel] = [Math.floor(i / WIDTH), i % WIDTH];
    vectors[i] = output[channel * PICTURE_TOKENS + t];
  });
  return vectors;
}

// The error function after Abramowitz and Stegun, 7.1.26: absolute error below 1.5e-7
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const factors = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const sum = factors.reduce((total, factor) => total * t + factor, 0) * t;
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}
