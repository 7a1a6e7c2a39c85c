// Inputs of a product in 8 bits: rows of x, each rounded on its own.
//
// An input a, from 0 to 255, is kept as a - 128, a signed byte, in rows of `pitch` numbers, a multiple of 64 with zeros
// at the end.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "threads.h"

namespace kernels {

// How the rows of x are kept. `zero` is za - 128.
struct Inputs8 {
  int64_t n, inner, pitch;
  const int8_t* numbers;
  const float* scale;
  const int32_t *zero, *sums;
};

struct alignas(64) Line {
  uint8_t bytes[64];
};

// A row of x in codes of the range from its least to its largest number, 0 included, as Affine.of_range (affine.py); or
// of a range that is given: scale and zero point. A row that has no range, or holds NaN, gets the scale NaN.
inline void quantize_row(const float* x, int64_t inner, const float* given, int8_t* to, int64_t pitch, float* scale,
                         int32_t* zero, int32_t* sum) {
  float step, offset;
  if (given != nullptr) {
    step = given[0], offset = given[1];
  } else {
    float low = 0, most = 0, wrong = 0;  // x - x is 0, or NaN where x is not finite
#pragma omp simd reduction(min : low) reduction(max : most) reduction(+ : wrong)
    for (int64_t k = 0; k < inner; ++k) {
      low = x[k] < low ? x[k] : low, most = x[k] > most ? x[k] : most;
      wrong += x[k] - x[k];
    }
    step = most / 255 - low / 255;
    step = wrong != 0 ? std::numeric_limits<float>::quiet_NaN() : step > 0 ? std::max(step, 0x1p-100f) : 1;
    offset = wrong != 0 ? 0 : std::min(std::nearbyint(-low / step), 255.0f);
  }
  constexpr float whole = 3 << 22;  // a small number added to this is rounded to a whole one, halves to even
  const float inverse = 1 / step, least = -offset, largest = 255 - offset, middle = whole + 128 - offset;
  int32_t total = 0, missing = 0;
#pragma omp simd reduction(+ : total, missing)
  for (int64_t k = 0; k < inner; ++k) {
    float code = x[k] * inverse;
    missing += code != code;
    code = code > least ? code : least;  // NaN too
    code = code < largest ? code : largest;
    const int32_t a = static_cast<int32_t>((code + whole) - middle);
    to[k] = static_cast<int8_t>(a);
    total += a;
  }
  std::memset(to + inner, 0, pitch - inner);
  if (missing != 0) step = std::numeric_limits<float>::quiet_NaN();
  *scale = step, *zero = static_cast<int32_t>(offset) - 128, *sum = total;
}

// The rows of x (n, inner) in 8 bits; by the range `given`, scale and zero point, or by one for each row.
struct Rounded {
  std::unique_ptr<Line[]> numbers;
  std::vector<float> scale;
  std::vector<int32_t> zero, sums;
  Inputs8 inputs;

  // Rows that are still to be filled, each by `row`.
  Rounded(int64_t n, int64_t inner) : scale(n), zero(n), sums(n) {
    const int64_t pitch = parts(inner, 64) * 64;
    numbers.reset(new Line[n * pitch / 64]);
    inputs = {n, inner, pitch, reinterpret_cast<int8_t*>(numbers.get()), scale.data(), zero.data(), sums.data()};
  }

  Rounded(const float* x, int64_t n, int64_t inner, const float* given, int64_t threads) : Rounded(n, inner) {
    constexpr int64_t together = 8;
    parallel(parts(n, together), n * inner < 1 << 15 ? 1 : threads, [&](int64_t part) {
      for (int64_t i = part * together; i < std::min(n, (part + 1) * together); ++i) row(i, x + i * inner, given);
    });
  }

  void row(int64_t i, const float* x, const float* given) {
    int8_t* const to = reinterpret_cast<int8_t*>(numbers.get()) + i * inputs.pitch;
    quantize_row(x, inputs.inner, given, to, inputs.pitch, &scale[i], &zero[i], &sums[i]);
  }
};

}  // namespace kernels
