// exp and erf of floats, in a form that a compiler turns into vectors.

#pragma once

#include <cstdint>
#include <cstring>

namespace kernels {

// e^x for x from -87 to 0, e^-87 below; NaN of NaN. Within 2e-7 of it, relatively.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  constexpr float whole = 3 << 22;  // a small number added to this is rounded to a whole one
  const float shifted = x * 1.44269504f + whole, n = shifted - whole;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  float sum = 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  int32_t bits, middle;
  std::memcpy(&bits, &shifted, 4);
  std::memcpy(&middle, &whole, 4);
  const int32_t power = (bits - middle + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return sum * scale;
}

// erf(x), within 5e-7 of it: x times a ratio of polynomials of x^2, fitted to the least largest error below 3.92, and 1
// from there on.
inline float error_function(float x) {
  const float t = x * x;
  float top = 2.04588349e-06f, bottom = 3.80836263e-05f;
  top = top * t + 0.00028555037f, bottom = bottom * t + 0.0011692172f;
  top = top * t + 0.0037925494f, bottom = bottom * t + 0.0150224935f;
  top = top * t + 0.0528304752f, bottom = bottom * t + 0.114365489f;
  top = top * t + 0.19102663f, bottom = bottom * t + 0.502625396f;
  top = top * t + 1.12837911f, bottom = bottom * t + 1.0f;
  const float found = x * top / bottom;
  return x > 3.92f ? 1.0f : x < -3.92f ? -1.0f : found;
}

inline float gelu(float x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }

}  // namespace kernels
