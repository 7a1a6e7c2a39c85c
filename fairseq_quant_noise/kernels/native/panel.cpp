// A product with a small weight that was decoded before: for a few rows of x nothing that reads codes is as fast as a
// dense weight in the second-level cache. Centroids of float16 stay exact in float16, in half of its space.
//
// The panel (rows / wide, blocks * d, wide): `wide` rows of the weight side by side, in the order in which they are
// read.

#include <algorithm>
#include <cstring>

#include "product.h"
#include "threads.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kernels {

#ifdef __AVX512F__

namespace {

constexpr int64_t wide = 64, lanes = 16, most = 6;  // rows of the weight, of a vector; rows of x at a time
constexpr int64_t ahead = 16;                       // steps of k: what is read is in the second-level cache

// out (N, wide), its rows a pitch apart = bias + x (N, inner) times a panel (inner, wide).
template <int N>
void multiply(const float* x, int64_t inner, const uint16_t* panel, const float* bias, float* out, int64_t pitch) {
  constexpr int across = wide / lanes;
  __m512 sums[N][across];
  for (int a = 0; a < across; ++a) {
    const __m512 start = bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(bias + a * lanes);
    for (int i = 0; i < N; ++i) sums[i][a] = start;
  }
  for (int64_t k = 0; k < inner; ++k, ++x, panel += wide) {
    __m512 weight[across];
    for (int a = 0; a < across; ++a) {
      const auto* halves = reinterpret_cast<const __m256i*>(panel + a * lanes);
      weight[a] = _mm512_cvtph_ps(_mm256_load_si256(halves));
    }
    __builtin_prefetch(panel + ahead * wide), __builtin_prefetch(panel + ahead * wide + wide / 2);
    for (int i = 0; i < N; ++i) {
      const __m512 number = _mm512_set1_ps(x[i * inner]);
      for (int a = 0; a < across; ++a) sums[i][a] = _mm512_fmadd_ps(weight[a], number, sums[i][a]);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int a = 0; a < across; ++a) _mm512_storeu_ps(out + i * pitch + a * lanes, sums[i][a]);
  }
}

}  // namespace

bool wants_panel(const Weight& weight, int64_t n) { return weight.fits_panel && n >= 2 && n <= 2 * most; }

void linear_by_panel(const float* x, int64_t n, const Weight& weight, const float* bias, float* out, int64_t threads) {
  constexpr decltype(&multiply<1>) forms[] = {multiply<1>, multiply<2>, multiply<3>,
                                              multiply<4>, multiply<5>, multiply<6>};
  const int64_t inner = weight.blocks * weight.d, rows = weight.rows, share = parts(n, parts(n, most));  // 7: 4 and 3
  parallel(rows / wide, threads, [&](int64_t task) {
    const int64_t row = task * wide;
    for (int64_t i = 0; i < n; i += share) {
      forms[std::min(share, n - i) - 1](x + i * inner, inner, weight.panel + row * inner,
                                        bias == nullptr ? nullptr : bias + row, out + i * rows + row, rows);
    }
  });
}

#else

bool wants_panel(const Weight&, int64_t) { return false; }
void linear_by_panel(const float*, int64_t, const Weight&, const float*, float*, int64_t) {}

#endif

}  // namespace kernels

// How many rows of the weight lie side by side in a panel; 0 where this processor has no use for one.
extern "C" int64_t panel_rows() {
#ifdef __AVX512F__
  return kernels::wide;
#else
  return 0;
#endif
}
