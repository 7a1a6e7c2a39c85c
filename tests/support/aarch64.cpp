// Products by the kernels of whatever processor this is compiled for, beside the formula in double precision.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "product.h"
extern "C" {
void linear_of_codes(const float*, int64_t, int64_t, const float*, const uint8_t*, int64_t, const float*, int64_t,
                     const float*, float*, int64_t);
int64_t linear(const kernels::Weight*, const float*, int64_t, const float*, float*, int64_t);
}
float rnd() { return rand() / (float)RAND_MAX * 2 - 1; }
int main() {
  double worst = 0, worst2 = 0;
  for (int n : {1, 3, 4, 7, 33, 70})
    for (int inner : {5, 64, 70, 130, 257})
      for (int rows : {3, 50, 64, 129}) {
        std::vector<float> x(n * inner), out(n * rows), affine(2), bias(rows);
        std::vector<uint8_t> c(rows * inner);
        for (auto& v : x) v = rnd();
        for (auto& v : c) v = rand();
        for (auto& v : bias) v = rnd();
        affine = {0.01f, 121};
        float grid[2] = {0.01f, 128};
        linear_of_codes(x.data(), n, inner, grid, c.data(), rows, affine.data(), 1, bias.data(), out.data(), 1);
        for (int i = 0; i < n; i++)
          for (int r = 0; r < rows; r++) {
            double s = 0;
            for (int k = 0; k < inner; k++) {
              double q = std::nearbyint(x[i * inner + k] / grid[0]) + grid[1];
              q = std::min(255.0, std::max(0.0, q));
              s += (q - 128) * (c[r * inner + k] - 121);
            }
            s = s * 0.01f * 0.01f + bias[r];
            worst = std::max(worst, std::fabs(s - out[i * rows + r]));
          }
      }
  for (int d : {3, 4, 8, 16})
    for (int n : {1, 2, 6, 12, 40})
      for (int rows : {3, 64, 100}) {
        int blocks = 20, inner = blocks * d;
        std::vector<float> x(n * inner), out(n * rows), cen(256 * d), col(256 * d), bias(rows);
        std::vector<uint8_t> c(blocks * rows);
        for (auto& v : x) v = rnd();
        for (auto& v : c) v = rand();
        for (auto& v : bias) v = rnd();
        for (auto& v : cen) v = rnd();
        for (int k = 0; k < 256; k++)
          for (int j = 0; j < d; j++) col[j * 256 + k] = cen[k * d + j];
        kernels::Weight w{c.data(),   blocks,     d,          rows,    0,       cen.data(),
                          col.data(), cen.data(), cen.data(), 256 * d, nullptr, 0};
        if (linear(&w, x.data(), n, bias.data(), out.data(), 1) != 1) return 2;
        for (int i = 0; i < n; i++)
          for (int r = 0; r < rows; r++) {
            double s = bias[r];
            for (int b = 0; b < blocks; b++)
              for (int j = 0; j < d; j++) s += x[i * inner + b * d + j] * (double)cen[c[b * rows + r] * d + j];
            worst2 = std::max(worst2, std::fabs(s - out[i * rows + r]));
          }
      }
  printf("codes %g centroids %g\n", worst, worst2);
  return !(worst < 1e-2 && worst2 < 1e-3);
}
