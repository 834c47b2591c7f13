/* The arithmetic of pocket LLaVA for WebAssembly, in plain 128-bit vectors.
 *
 * No library and no allocation: every buffer is handed in by engine.js. Weights stay as the GGUF
 * has them: in blocks of 32 values along the input, with four bits a value (Q4_1: w = d q + m) or
 * eight (Q8_0: w = d q). Activations become 16-bit integers with one scale for each 32 of them, so
 * that integer products are exact; the residual stream itself is float32.
 *
 * Plain vectors only (no relaxed SIMD, no threads): WebAssembly fixes the result of each of these
 * operations to the bit, whatever the processor.
 *
 * Build: see BUILD in tools/live_kernels.py; `make live-kernels` runs it.
 */
#include <wasm_simd128.h>

#define EXPORT __attribute__((visibility("default")))
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned u32;
typedef short i16;

enum {
  MAX_T = 256,    /* positions that go through a product at once */
  MAX_POS = 256,  /* positions of a prompt with its answer */
  HEAD = 64,      /* width of an attention head */
  KV = 192,       /* width of keys and of values: three heads */
  GROUP = 3,      /* heads of queries for each head of keys */
  BLOCK = 32      /* values that share a scale */
};

/* ---- small helpers ---- */

static inline float from_half(u16 bits) {
  union { u32 bits; float value; } v = {(u32)(bits & 0x7fff) << 13};
  v.value *= 0x1p112f; /* moves the exponent's bias from 15 to 127, subnormals included */
  v.bits |= (u32)(bits & 0x8000) << 16;
  return v.value;
}

static inline float sum4(v128_t v) {
  return wasm_f32x4_extract_lane(v, 0) + wasm_f32x4_extract_lane(v, 1) +
         wasm_f32x4_extract_lane(v, 2) + wasm_f32x4_extract_lane(v, 3);
}

static inline float dot(const float *a, const float *b, int n) {
  v128_t even = wasm_f32x4_splat(0), odd = even;
  for (int i = 0; i < n; i += 8) {
    even = wasm_f32x4_add(even, wasm_f32x4_mul(wasm_v128_load(a + i), wasm_v128_load(b + i)));
    odd = wasm_f32x4_add(odd, wasm_f32x4_mul(wasm_v128_load(a + i + 4), wasm_v128_load(b + i + 4)));
  }
  return sum4(wasm_f32x4_add(even, odd));
}

/* e^x by 2^k e^r with a polynomial for r; relative error below 2e-7 for -87 < x < 88. */
static inline float exponential(float x) {
  if (x < -87.0f) return 0;
  float k = __builtin_rintf(x * 1.44269504f);
  float r = x - k * 0.693145751953125f - k * 1.42860677e-6f;
  float p = 1.388888889e-3f;
  p = 8.333333333e-3f + r * p;
  p = 4.166666667e-2f + r * p;
  p = 1.666666667e-1f + r * p;
  p = 1 + r * (1 + r * (0.5f + r * p));
  union { u32 bits; float value; } v = {(u32)((int)k + 127) << 23};
  return p * v.value;
}

/* ---- the language model ---- */

/* Activations x (T, K) as 16-bit integers q (T, K), with scale and sum of each 32 (T, K / 32, 2). */
EXPORT void quantise(const float *x, int T, int K, i16 *q, float *scales) {
  for (int block = 0; block < T * K / BLOCK; block++, x += BLOCK, q += BLOCK, scales += 2) {
    float largest = 0, sum = 0;
    for (int i = 0; i < BLOCK; i++) {
      float size = __builtin_fabsf(x[i]);
      largest = size > largest ? size : largest;
      sum += x[i];
    }
    float factor = largest > 0 ? 32767.0f / largest : 0;
    for (int i = 0; i < BLOCK; i++) q[i] = (i16)__builtin_rintf(x[i] * factor);
    scales[0] = largest / 32767.0f;
    scales[1] = sum;
  }
}

/* One block of weights as four vectors of eight 16-bit integers. */
typedef struct { v128_t part[4]; } Weights;

static inline Weights four_bits(const u8 *block) { /* low nibbles: values 0 to 15; high: 16 to 31 */
  v128_t raw = wasm_v128_load(block + 4);
  v128_t low = wasm_v128_and(raw, wasm_i8x16_splat(15)), high = wasm_u8x16_shr(raw, 4);
  return (Weights){{wasm_u16x8_extend_low_u8x16(low), wasm_u16x8_extend_high_u8x16(low),
                    wasm_u16x8_extend_low_u8x16(high), wasm_u16x8_extend_high_u8x16(high)}};
}

static inline Weights eight_bits(const u8 *block) {
  v128_t low = wasm_v128_load(block + 2), high = wasm_v128_load(block + 18);
  return (Weights){{wasm_i16x8_extend_low_i8x16(low), wasm_i16x8_extend_high_i8x16(low),
                    wasm_i16x8_extend_low_i8x16(high), wasm_i16x8_extend_high_i8x16(high)}};
}

static inline v128_t products(const Weights *w, const i16 *x) {
  return wasm_i32x4_add(
      wasm_i32x4_add(wasm_i32x4_dot_i16x8(w->part[0], wasm_v128_load(x)),
                     wasm_i32x4_dot_i16x8(w->part[1], wasm_v128_load(x + 8))),
      wasm_i32x4_add(wasm_i32x4_dot_i16x8(w->part[2], wasm_v128_load(x + 16)),
                     wasm_i32x4_dot_i16x8(w->part[3], wasm_v128_load(x + 24))));
}

/* out (T, N) = x (T, K) times w (N, K), w in blocks of 20 bytes (Q4_1) or 34 (Q8_0).
 * sum of (d q + m) x = d (sum of q x) + m (sum of x): the minimum enters with the block's sum. */
static inline void multiply(const u8 *w, int bits, int N, int K, const i16 *q, const float *scales,
                            int T, float *out) {
  static v128_t total[MAX_T];
  static float rest[MAX_T];
  int blocks = K / BLOCK, size = bits == 4 ? 20 : 34;
  for (int n = 0; n < N; n++) {
    for (int t = 0; t < T; t++) total[t] = wasm_f32x4_splat(0), rest[t] = 0;
    for (int block = 0; block < blocks; block++, w += size) {
      Weights unpacked = bits == 4 ? four_bits(w) : eight_bits(w);
      float d = from_half(((const u16 *)w)[0]);
      float m = bits == 4 ? from_half(((const u16 *)w)[1]) : 0;
      const i16 *x = q + block * BLOCK;
      const float *scale = scales + block * 2;
      for (int t = 0; t < T; t++, x += K, scale += blocks * 2) {
        v128_t exact = wasm_f32x4_convert_i32x4(products(&unpacked, x));
        total[t] = wasm_f32x4_add(total[t], wasm_f32x4_mul(exact, wasm_f32x4_splat(d * scale[0])));
        rest[t] += m * scale[1];
      }
    }
    for (int t = 0; t < T; t++) out[t * N + n] = sum4(total[t]) + rest[t];
  }
}

EXPORT void linear4(const u8 *w, int N, int K, const i16 *q, const float *scales, int T, float *out) {
  multiply(w, 4, N, K, q, scales, T, out);
}

EXPORT void linear8(const u8 *w, int N, int K, const i16 *q, const float *scales, int T, float *out) {
  multiply(w, 8, N, K, q, scales, T, out);
}

/* One row of a matrix in eight bits: the embedding of a token. */
EXPORT void row8(const u8 *w, int K, float *out) {
  for (int block = 0; block < K / BLOCK; block++, w += 34)
    for (int i = 0; i < BLOCK; i++)
      *out++ = from_half(((const u16 *)w)[0]) * (float)((const signed char *)w)[2 + i];
}

/* out = x / sqrt(mean(x^2) + eps) * w, for each row of x (T, D). */
EXPORT void rms_norm(const float *x, const float *w, int T, int D, float eps, float *out) {
  for (int t = 0; t < T; t++, x += D, out += D) {
    float factor = 1 / __builtin_sqrtf(dot(x, x, D) / D + eps);
    for (int i = 0; i < D; i++) out[i] = x[i] * factor * w[i];
  }
}

/* Rotary positions, in place. llama.cpp orders the rows of q and k so that the two numbers that
 * turn together are neighbours. turn (T, 32, 2) holds cosine and sine. */
EXPORT void rotate(float *x, int T, int heads, const float *turn) {
  for (int t = 0; t < T; t++, turn += HEAD)
    for (int h = 0; h < heads; h++, x += HEAD)
      for (int i = 0; i < HEAD; i += 2) {
        float a = x[i], b = x[i + 1], cosine = turn[i], sine = turn[i + 1];
        x[i] = a * cosine - b * sine;
        x[i + 1] = a * sine + b * cosine;
      }
}

/* Causal attention of queries q (T, heads, 64) at positions p to p + T - 1 over keys and values
 * (p + T, 3, 64). */
EXPORT void attend(const float *q, const float *k, const float *v, int T, int p, int heads,
                   float *out) {
  static float weight[MAX_POS];
  for (int t = 0; t < T; t++)
    for (int h = 0; h < heads; h++, q += HEAD, out += HEAD) {
      int n = p + t + 1, at = h / GROUP * HEAD;
      float largest = -1e30f, sum = 0;
      for (int j = 0; j < n; j++) {
        weight[j] = dot(q, k + j * KV + at, HEAD) * 0.125f; /* 1 / sqrt(64) */
        largest = weight[j] > largest ? weight[j] : largest;
      }
      for (int j = 0; j < n; j++) sum += weight[j] = exponential(weight[j] - largest);
      for (int i = 0; i < HEAD; i += 4) {
        v128_t mix = wasm_f32x4_splat(0);
        for (int j = 0; j < n; j++)
          mix = wasm_f32x4_add(mix, wasm_f32x4_mul(wasm_f32x4_splat(weight[j]),
                                                   wasm_v128_load(v + j * KV + at + i)));
        wasm_v128_store(out + i, wasm_f32x4_mul(mix, wasm_f32x4_splat(1 / sum)));
      }
    }
}

/* The gate of the MLP, in place: g = up * g * sigmoid(g). */
EXPORT void silu_gate(float *g, const float *up, int n) {
  for (int i = 0; i < n; i++) g[i] *= up[i] / (1 + exponential(-g[i]));
}

/* x = x + factor * y. */
EXPORT void add(float *x, const float *y, int n, float factor) {
  for (int i = 0; i < n; i++) x[i] += factor * y[i];
}

/* For each of n rows of logits (n, V): number and value of the largest, and the sum of
 * exp(logit - largest). */
EXPORT void largest(const float *x, int n, int V, float *out) {
  for (int r = 0; r < n; r++, x += V, out += 3) {
    int at = 0;
    float sum = 0;
    for (int v = 1; v < V; v++)
      if (x[v] > x[at]) at = v;
    for (int v = 0; v < V; v++) sum += exponential(x[v] - x[at]);
    out[0] = at;
    out[1] = x[at];
    out[2] = sum;
  }
}

/* ---- the tower and the connector ---- */

static inline v128_t relu6(v128_t x) {
  return wasm_f32x4_min(wasm_f32x4_max(x, wasm_f32x4_splat(0)), wasm_f32x4_splat(6));
}

EXPORT void widen(const u16 *from, int n, float *to) { /* float16 to float32 */
  for (int i = 0; i < n; i++) to[i] = from_half(from[i]);
}

/* A convolution of one pixel: x (C, P), w (N, C), b (N), out (N, P); P a multiple of 8, N of 4. */
EXPORT void pointwise(const float *x, const float *w, const float *b, int C, int N, int P, int cap,
                      float *out) {
  for (int p = 0; p < P; p += 8)
    for (int n = 0; n < N; n += 4) {
      v128_t sum[4][2];
      for (int j = 0; j < 4; j++) sum[j][0] = sum[j][1] = wasm_f32x4_splat(b[n + j]);
      const float *pixels = x + p, *row = w + n * C;
      for (int c = 0; c < C; c++, pixels += P) {
        v128_t left = wasm_v128_load(pixels), right = wasm_v128_load(pixels + 4);
        for (int j = 0; j < 4; j++) {
          v128_t weight = wasm_v128_load32_splat(row + j * C + c);
          sum[j][0] = wasm_f32x4_add(sum[j][0], wasm_f32x4_mul(weight, left));
          sum[j][1] = wasm_f32x4_add(sum[j][1], wasm_f32x4_mul(weight, right));
        }
      }
      for (int j = 0; j < 4; j++)
        for (int i = 0; i < 2; i++)
          wasm_v128_store(out + (n + j) * P + p + i * 4, cap ? relu6(sum[j][i]) : sum[j][i]);
    }
}

/* A depthwise convolution k x k of stride s with TensorFlow's padding SAME, cut at 0 and 6:
 * x (C, H, H), w (C, k, k), b (C); pad has room for (H + k) (H + k + 3) numbers. */
EXPORT void depthwise(const float *x, const float *w, const float *b, int C, int H, int k, int s,
                      float *pad, float *out) {
  int O = (H + s - 1) / s, lacking = (O - 1) * s + k - H;
  int first = (lacking > 0 ? lacking : 0) / 2, W = H + k + 3;
  for (int i = 0; i < (H + k) * W; i++) pad[i] = 0;
  for (int c = 0; c < C; c++, w += k * k, x += H * H) {
    for (int y = 0; y < H; y++)
      for (int i = 0; i < H; i += 4)
        wasm_v128_store(pad + (y + first) * W + first + i, wasm_v128_load(x + y * H + i));
    for (int y = 0; y < O; y++)
      for (int i = 0; i < O; i += 4, out += 4) {
        v128_t sum = wasm_f32x4_splat(b[c]);
        for (int dy = 0; dy < k; dy++)
          for (int dx = 0; dx < k; dx++) {
            const float *at = pad + (y * s + dy) * W + i * s + dx;
            v128_t pixels = wasm_v128_load(at);
            if (s == 2) pixels = wasm_i32x4_shuffle(pixels, wasm_v128_load(at + 4), 0, 2, 4, 6);
            sum = wasm_f32x4_add(sum, wasm_f32x4_mul(wasm_f32x4_splat(w[dy * k + dx]), pixels));
          }
        wasm_v128_store(out, relu6(sum));
      }
  }
}

/* ---- is a shard whole? ---- */

static const u32 ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static inline u32 turn(u32 x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(u32 *state, const u8 *data) {
  u32 w[64], s[8];
  for (int i = 0; i < 16; i++) w[i] = __builtin_bswap32(((const u32 *)data)[i]);
  for (int i = 16; i < 64; i++) {
    u32 a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] +
           (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
  }
  for (int i = 0; i < 8; i++) s[i] = state[i];
  for (int i = 0; i < 64; i++) {
    u32 choice = (s[4] & s[5]) ^ (~s[4] & s[6]);
    u32 majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
    u32 one = s[7] + (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) + choice + ROUND[i] + w[i];
    u32 two = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) + majority;
    for (int j = 7; j > 0; j--) s[j] = s[j - 1];
    s[4] += one;
    s[0] = one + two;
  }
  for (int i = 0; i < 8; i++) state[i] += s[i];
}

/* SHA-256 of n bytes (n a multiple of 16, data aligned to 4) -> out (8), as big-endian words.
 * Browsers offer their own on https and localhost only. */
EXPORT void sha256(const u8 *data, u32 n, u32 *out) {
  static const u32 START[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                               0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  union { u8 bytes[128]; u32 words[32]; } tail;
  u32 whole = n / 64 * 64, rest = n - whole, end = rest < 56 ? 64 : 128;
  for (int i = 0; i < 8; i++) out[i] = START[i];
  for (u32 at = 0; at < whole; at += 64) sha256_block(out, data + at);
  for (u32 i = 0; i < 128; i++) tail.bytes[i] = i < rest ? data[whole + i] : i == rest ? 0x80 : 0;
  tail.words[end / 4 - 2] = __builtin_bswap32(n >> 29);
  tail.words[end / 4 - 1] = __builtin_bswap32(n << 3);
  sha256_block(out, tail.bytes);
  if (end == 128) sha256_block(out, tail.bytes + 64);
}
