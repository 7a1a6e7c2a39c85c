// Sums of products of bytes, for each processor: the inner loop of integer.cpp.
//
// A panel holds 64 rows of a weight in groups of `lanes` rows: (groups, quads, lanes, 4) bytes, where a quad is four
// numbers along the row. A product with it takes inputs (tall, 4 * quads) from -128 to 127.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace kernels {

constexpr int width = 64;  // rows of the weight in a panel

// A number q of the weight, from 0 to 255, lies in a panel as q - shift: an unsigned byte where shift is 0, else a
// signed one.
//
//   Weights  four numbers for each lane, from a panel      Inputs  four numbers, the same for each lane
//   Sums     lanes of 32 bits, to which `dot` adds the products of four numbers
#if defined(__AVX512VNNI__)
constexpr int lanes = 16, across = 4, high = 6, shift = 0;
using Sums = __m512i;
using Weights = __m512i;
using Inputs = __m512i;
inline Weights read(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Inputs spread(int32_t four) { return _mm512_set1_epi32(four); }
inline Sums dot(Sums sums, Weights w, Inputs x) { return _mm512_dpbusd_epi32(sums, w, x); }
inline void write(int32_t* to, Sums sums) { _mm512_storeu_si512(to, sums); }
#elif defined(__AVXVNNI__)
constexpr int lanes = 8, across = 2, high = 6, shift = 0;
using Sums = __m256i;
using Weights = __m256i;
using Inputs = __m256i;
inline Weights read(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Inputs spread(int32_t four) { return _mm256_set1_epi32(four); }
inline Sums dot(Sums sums, Weights w, Inputs x) { return _mm256_dpbusd_avx_epi32(sums, w, x); }
inline void write(int32_t* to, Sums sums) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums); }
#elif defined(__AVX2__)
// The products of bytes in 16 bits (maddubs) would saturate. So the even and the odd bytes become 16 bits first.
constexpr int lanes = 8, across = 2, high = 4, shift = 0;
using Sums = __m256i;
struct Weights {
  __m256i even, odd;
};
using Inputs = Weights;
inline Weights read(const uint8_t* from) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
}
inline Inputs spread(int32_t four) {
  const __m256i bytes = _mm256_set1_epi32(four);
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Sums dot(Sums sums, Weights w, Inputs x) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(w.even, x.even));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(w.odd, x.odd));
}
inline void write(int32_t* to, Sums sums) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int lanes = 4, across = 4, high = 5, shift = 128;
using Sums = int32x4_t;
using Weights = int8x16_t;
using Inputs = int8x16_t;
inline Weights read(const uint8_t* from) { return vld1q_s8(reinterpret_cast<const int8_t*>(from)); }
inline Inputs spread(int32_t four) { return vreinterpretq_s8_s32(vdupq_n_s32(four)); }
inline Sums dot(Sums sums, Weights w, Inputs x) { return vdotq_s32(sums, w, x); }
inline void write(int32_t* to, Sums sums) { vst1q_s32(to, sums); }
#else
constexpr int lanes = 8, across = 1, high = 4, shift = 0;
struct Sums {
  int32_t of[lanes];
};
struct Weights {
  uint8_t of[lanes * 4];
};
struct Inputs {
  int8_t of[4];
};
inline Weights read(const uint8_t* from) {
  Weights w;
  std::memcpy(w.of, from, sizeof w.of);
  return w;
}
inline Inputs spread(int32_t four) {
  Inputs x;
  std::memcpy(x.of, &four, sizeof x.of);
  return x;
}
inline Sums dot(Sums sums, const Weights& w, Inputs x) {
  for (int l = 0; l < lanes; ++l) {
    for (int t = 0; t < 4; ++t) sums.of[l] += w.of[l * 4 + t] * x.of[t];
  }
  return sums;
}
inline void write(int32_t* to, const Sums& sums) { std::memcpy(to, sums.of, sizeof sums.of); }
#endif

#if defined(__AVX512VNNI__)
// Rows and columns of 16 x 16 numbers of 32 bits exchanged: first of pairs, then of quads, then of lanes of 128 bits.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), odd = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  std::memcpy(r, t, sizeof t);
}
#endif

// out (Tall, width) = inputs times the panel.
template <int Tall>
void multiply_bytes(const int8_t* inputs, int64_t pitch, const uint8_t* panel, int64_t quads, int32_t* out) {
  const int64_t group = quads * lanes * 4;
  for (int g = 0; g < width / lanes; g += across) {
    Sums sums[Tall][across] = {};
    const uint8_t* w = panel + g * group;
    for (int64_t q = 0; q < quads; ++q, w += lanes * 4) {
      Weights of[across];
      for (int c = 0; c < across; ++c) of[c] = read(w + c * group);
      for (int i = 0; i < Tall; ++i) {
        int32_t four;
        std::memcpy(&four, inputs + i * pitch + q * 4, 4);
        const Inputs x = spread(four);
        for (int c = 0; c < across; ++c) sums[i][c] = dot(sums[i][c], of[c], x);
      }
    }
    for (int i = 0; i < Tall; ++i) {
      for (int c = 0; c < across; ++c) write(out + i * width + (g + c) * lanes, sums[i][c]);
    }
  }
}

}  // namespace kernels
