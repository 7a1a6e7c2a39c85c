// A product in whole numbers, as integer.cpp computes it.

#pragma once

#include <cstdint>

#include "rounded.h"

namespace kernels {

// A weight (rows, inner) in 8 bits.
struct Weight8 {
  int64_t rows;
  int64_t d;                 // numbers of a centroid; 0 where each number has its code
  int64_t channels;          // 1, or a range for each row
  const uint8_t* codes;      // (rows, inner); of centroids (inner / d, rows)
  const uint8_t* centroids;  // (256, d), or none
  const float* affine;       // (2, channels): scales and zero points
  const float* bias;         // (rows), or none
};

// out (n, rows) = the weight times x (n, inner), plus the bias.
void multiply_integers(const Inputs8& x, const Weight8& weight, float* out, int64_t threads);

}  // namespace kernels
