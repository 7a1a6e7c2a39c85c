// Attention of every token to all of its sequence, a head at a time.
//
// Shapes: q, k, v and out (tokens, d), their rows a pitch apart; d numbers of one head.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elementary.h"
#include "gemm.h"
#include "threads.h"

namespace kernels {
namespace {

struct Head {
  const float *q, *k, *v;  // q has `high` - 1 rows more that may be read
  int64_t tokens, d, pitch;
  const uint8_t* seen;  // (tokens): 0 for a key that nobody sees; or none
};

// The widest panel of `count` rows: two vectors where three would leave one by itself.
int64_t panel_of(int64_t count) {
  const int64_t vectors = parts(count, lanes);
  return vectors % across == 1 && vectors > 1 ? 2 * lanes : panel;
}

// The width of the panel that begins at `first`.
int64_t width_at(int64_t count, int64_t first) {
  return std::min<int64_t>(parts(count - first, lanes) * lanes, panel_of(count));
}

// to: panels of keys, (d, width) each, the keys beyond the last one being the last one.
void pack_keys(const Head& of, float* to) {
  for (int64_t first = 0; first < of.tokens; first += panel_of(of.tokens)) {
    const int64_t width = width_at(of.tokens, first);
    const float* const from = of.k + first * of.pitch;
    int32_t order[panel];
    for (int r = 0; r < panel; ++r) order[r] = static_cast<int32_t>(std::min<int64_t>(r, of.tokens - 1 - first));
    int64_t j = 0;
#ifdef __AVX2__
    for (; j + 4 <= of.d; j += 4) {
      for (int64_t r = 0; r < width; r += lanes) transpose(from + j, of.pitch, order + r, to + j * width + r, width);
    }
#endif
    for (; j < of.d; ++j) {
      for (int64_t r = 0; r < width; ++r) to[j * width + r] = from[order[r] * of.pitch + j];
    }
    to += of.d * width;
  }
}

// to: panels of the values' numbers, (tokens, width) each, with zeros beyond the last one.
void pack_values(const Head& of, float* to) {
  for (int64_t first = 0; first < of.d; first += panel_of(of.d)) {
    const int64_t width = width_at(of.d, first), wide = std::min(width, of.d - first);
    for (int64_t s = 0; s < of.tokens; ++s, to += width) {
      std::memcpy(to, of.v + s * of.pitch + first, wide * sizeof(float));
      std::memset(to + wide, 0, (width - wide) * sizeof(float));
    }
  }
}

// Scores (count) to shares that sum up to 1, of e^(scale * score).
void softmax(float* scores, int64_t count, float scale, const uint8_t* seen) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  if (seen != nullptr) {
    for (int64_t s = 0; s < count; ++s) scores[s] = seen[s] ? scores[s] : none;
  }
  float most = none, sum = 0;
#pragma omp simd reduction(max : most)
  for (int64_t s = 0; s < count; ++s) most = scores[s] > most ? scores[s] : most;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < count; ++s) {
    scores[s] = exponential((scores[s] - most) * scale);
    sum += scores[s];
  }
  const float inverse = 1 / sum;
  for (int64_t s = 0; s < count; ++s) scores[s] *= inverse;
}

// out = softmax(q k^T / sqrt(d)) v, for the tokens from `first` to `end`; zeros where no key is seen.
void attend(const Head& of, int64_t first, int64_t end, float* out) {
  if (of.seen != nullptr && std::all_of(of.seen, of.seen + of.tokens, [](uint8_t seen) { return seen == 0; })) {
    for (int64_t i = first; i < end; ++i) std::memset(out + i * of.pitch, 0, of.d * sizeof(float));
    return;
  }
  const int64_t keys = parts(of.tokens, lanes) * lanes, numbers = parts(of.d, lanes) * lanes;
  static thread_local std::vector<float> memory;
  memory.resize(std::max<int64_t>(memory.size(), keys * of.d + of.tokens * numbers + high * keys + lanes));
  float* const packed_k = memory.data();
  float* const packed_v = packed_k + keys * of.d;
  float* const scores = packed_v + of.tokens * numbers;
  pack_keys(of, packed_k);
  pack_values(of, packed_v);
  std::memset(scores, 0, high * keys * sizeof(float));
  const float scale = 1 / std::sqrt(static_cast<float>(of.d));
  for (int64_t i = first; i < end; i += high) {
    const int64_t tall = std::min<int64_t>(end - i, high);
    for (int64_t s = 0; s < of.tokens; s += panel_of(of.tokens)) {
      const int64_t width = width_at(of.tokens, s);
      multiply_some(tall, std::min(width, of.tokens - s), width, of.q + i * of.pitch, of.pitch, packed_k + s * of.d,
                    of.d, nullptr, 0, scores + s, keys);
    }
    for (int64_t t = 0; t < tall; ++t) softmax(scores + t * keys, of.tokens, scale, of.seen);
    for (int64_t j = 0; j < of.d; j += panel_of(of.d)) {
      const int64_t width = width_at(of.d, j);
      multiply_some(tall, std::min(width, of.d - j), width, scores, keys, packed_v + j * of.tokens, of.tokens, nullptr,
                    0, out + i * of.pitch + j, of.pitch);
    }
  }
}

}  // namespace
}  // namespace kernels
