// A product of floats in registers, and the transposition that its second factor needs: for weights in codes
// (multiply.cpp) and for attention (attention.h).

#pragma once

#include <cstdint>
#include <cstring>

#include "codes.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace kernels {
namespace {  // each file compiles its own

// The sums of a tile, `high` rows of x by `across` vectors of rows of the weight, take 24 of AVX-512's 32 registers, 12
// of AVX2's 16.
#ifdef __AVX512F__
constexpr int lanes = 16, high = 8;
#else
constexpr int lanes = 8, high = 4;
#endif
constexpr int across = 3, panel = across * lanes;  // rows of the weight

typedef float Vector __attribute__((vector_size(4 * lanes)));
Vector load(const float* from) {
  Vector read;
  std::memcpy(&read, from, sizeof read);
  return read;
}

// out (high, A vectors) = start + x (high, k) times weight (k, A vectors); the rows of out, start and x are a pitch
// apart.
template <int A>
void multiply(const float* x, int64_t x_pitch, const float* weight, int64_t k, const float* start, int64_t start_pitch,
              float* out, int64_t pitch) {
  Vector sums[high][A] = {};
  for (int i = 0; i < high; ++i) {
    for (int a = 0; a < A; ++a) __builtin_prefetch(out + i * pitch + a * lanes, 1);
  }
  for (int64_t j = 0; j < k; ++j, ++x, weight += A * lanes) {
    Vector row[A];
    for (int a = 0; a < A; ++a) row[a] = load(weight + a * lanes);
    for (int i = 0; i < high; ++i) {
      for (int a = 0; a < A; ++a) sums[i][a] += row[a] * x[i * x_pitch];
    }
  }
  for (int i = 0; i < high; ++i) {
    for (int a = 0; a < A; ++a) {
      const Vector sum = load(start + i * start_pitch + a * lanes) + sums[i][a];
      std::memcpy(out + i * pitch + a * lanes, &sum, sizeof sum);
    }
  }
}

// The same for `tall` rows of x and `wide` rows of the weight, which is padded to `width`; x has all of the tile's
// rows.
void multiply_some(int64_t tall, int64_t wide, int64_t width, const float* x, int64_t x_pitch, const float* weight,
                   int64_t k, const float* start, int64_t start_pitch, float* out, int64_t pitch) {
  static const float zeros[panel] = {};
  const auto run = width == panel ? multiply<3> : width == 2 * lanes ? multiply<2> : multiply<1>;
  if (start == nullptr) start = zeros, start_pitch = 0;
  if (tall == high && wide == width) return run(x, x_pitch, weight, k, start, start_pitch, out, pitch);
  float whole[high * panel];
  run(x, x_pitch, weight, k, zeros, 0, whole, panel);
  for (int64_t i = 0; i < tall; ++i) {
    for (int64_t r = 0; r < wide; ++r) out[i * pitch + r] = start[i * start_pitch + r] + whole[i * panel + r];
  }
}

#ifdef __AVX2__

#ifdef __AVX512F__
#define VECTOR(operation) _mm512_##operation
#else
#define VECTOR(operation) _mm256_##operation
#endif

// Four numbers of the centroids of codes 0, 4, ...
template <typename Code>
Vector every_fourth(const float* centroids, int64_t d, const Code* codes) {
  const auto of = [&](int i) { return _mm_loadu_ps(centroids + number(codes[i]) * d); };
#ifdef __AVX512F__
  const __m512 one = _mm512_insertf32x4(_mm512_castps128_ps512(of(0)), of(4), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(one, of(8), 2), of(12), 3);
#else
  return _mm256_insertf128_ps(_mm256_castps128_ps256(of(0)), of(4), 1);
#endif
}

// to (4, lanes), its rows a pitch apart = four numbers of the centroids of these codes, transposed.
template <typename Code>
void transpose(const float* centroids, int64_t d, const Code* codes, float* to, int64_t pitch) {
  const Vector a = every_fourth(centroids, d, codes), b = every_fourth(centroids, d, codes + 1);
  const Vector c = every_fourth(centroids, d, codes + 2), e = every_fourth(centroids, d, codes + 3);
  const Vector low = VECTOR(unpacklo_ps)(a, b), high = VECTOR(unpackhi_ps)(a, b);
  const Vector low2 = VECTOR(unpacklo_ps)(c, e), high2 = VECTOR(unpackhi_ps)(c, e);
  VECTOR(storeu_ps)(to, VECTOR(shuffle_ps)(low, low2, 0x44));
  VECTOR(storeu_ps)(to + pitch, VECTOR(shuffle_ps)(low, low2, 0xee));
  VECTOR(storeu_ps)(to + 2 * pitch, VECTOR(shuffle_ps)(high, high2, 0x44));
  VECTOR(storeu_ps)(to + 3 * pitch, VECTOR(shuffle_ps)(high, high2, 0xee));
}

#endif

}  // namespace
}  // namespace kernels
