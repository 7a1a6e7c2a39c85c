// A product with a weight in codes, for a few rows of x: a row of the weight is read, centroid by centroid, as the
// product needs it. Where the dense weight would fit a cache, tables (lookup.cpp) and pieces (multiply.cpp) take
// longer.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kernels {
namespace {

constexpr int64_t lanes = 16, group = 4, task_rows = 64, most = 6;  // rows of the weight at a time, of a task; of x

#ifdef __AVX512F__

// Sixteen numbers of a row of the weight: of 16 / D centroids, whose codes are byte r of each of `codes`.
template <int D>
__m512 weight_of(const float* centroids, const uint32_t* codes, int r) {
  const auto at = [&](int b) { return centroids + (codes[b] >> 8 * r & 255) * D; };
  if constexpr (D == 16) {
    return _mm512_loadu_ps(at(0));
  } else if constexpr (D == 8) {
    const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_loadu_ps(at(0))));
    return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(_mm256_loadu_ps(at(1))), 1));
  } else {
    const __m512 one = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(at(0))), _mm_loadu_ps(at(1)), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(one, _mm_loadu_ps(at(2)), 2), _mm_loadu_ps(at(3)), 3);
  }
}

// The sums of the numbers of each of four vectors.
inline __m128 sums_of(const __m512 (&of)[group]) {
  const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
  const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
  const __m512d a = _mm512_castps_pd(first), b = _mm512_castps_pd(second);
  const __m512 all =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  const __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(all), 1);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(upper));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// out (N, group), its rows `rows` apart = x (N, blocks * D) times four rows of the weight, plus their bias.
template <int D, int N>
void multiply_rows(const float* x, int64_t blocks, const float* centroids, const uint8_t* codes, int64_t rows,
                   const float* bias, float* out) {
  __m512 sums[N][group] = {};
  for (int64_t k = 0; k < blocks * D; k += lanes, codes += lanes / D * rows) {
    uint32_t of[lanes / D];  // the codes of four rows
    for (int b = 0; b < lanes / D; ++b) std::memcpy(&of[b], codes + b * rows, group);
    __m512 numbers[N];
    for (int i = 0; i < N; ++i) numbers[i] = _mm512_loadu_ps(x + i * blocks * D + k);
    for (int r = 0; r < group; ++r) {
      const __m512 weight = weight_of<D>(centroids, of, r);
      for (int i = 0; i < N; ++i) sums[i][r] = _mm512_fmadd_ps(weight, numbers[i], sums[i][r]);
    }
  }
  const __m128 added = bias == nullptr ? _mm_setzero_ps() : _mm_loadu_ps(bias);
  for (int i = 0; i < N; ++i) _mm_storeu_ps(out + i * rows, _mm_add_ps(sums_of(sums[i]), added));
}

// The same for n rows of x.
template <int D>
void multiply_some(int64_t n, const float* x, int64_t blocks, const float* centroids, const uint8_t* codes,
                   int64_t rows, const float* bias, float* out) {
  constexpr decltype(&multiply_rows<D, 1>) forms[] = {multiply_rows<D, 1>, multiply_rows<D, 2>, multiply_rows<D, 3>,
                                                      multiply_rows<D, 4>, multiply_rows<D, 5>, multiply_rows<D, 6>};
  const int64_t share = parts(n, parts(n, most));  // 7 rows are 4 and 3
  for (int64_t i = 0; i < n; i += share) {
    const int64_t some = std::min(share, n - i);
    forms[some - 1](x + i * blocks * D, blocks, centroids, codes, rows, bias, out + i * rows);
  }
}

#endif

}  // namespace

extern "C" {

// Whether `linear_by_rows` takes these sizes, and faster than tables and pieces.
int64_t takes_rows([[maybe_unused]] int64_t n, [[maybe_unused]] int64_t blocks, [[maybe_unused]] int64_t d,
                   [[maybe_unused]] int64_t rows) {
#ifdef __AVX512F__
  const bool fits = (d == 4 || d == 8 || d == 16) && blocks * d % lanes == 0 && rows % group == 0;
  return fits && rows * d <= 1 << 13 && n >= 3 && n <= (d == 4 ? most : 2 * most);
#else
  return 0;
#endif
}

// out (n, rows) = x (n, blocks * d) times the weight of the codes (blocks, rows), transposed, plus the bias (rows), if
// any.
//   centroids  (256, d)
void linear_by_rows([[maybe_unused]] const float* x, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t blocks,
                    [[maybe_unused]] int64_t d, [[maybe_unused]] const float* centroids,
                    [[maybe_unused]] const uint8_t* codes, [[maybe_unused]] int64_t rows,
                    [[maybe_unused]] const float* bias, [[maybe_unused]] float* out, [[maybe_unused]] int64_t threads) {
#ifdef __AVX512F__
  const auto run = d == 4 ? multiply_some<4> : d == 8 ? multiply_some<8> : multiply_some<16>;
  parallel(parts(rows, task_rows), threads, [&](int64_t task) {
    for (int64_t row = task * task_rows; row < std::min(rows, (task + 1) * task_rows); row += group) {
      run(n, x, blocks, centroids, codes + row, rows, bias == nullptr ? nullptr : bias + row, out + row);
    }
  });
#endif
}
}

}  // namespace kernels
