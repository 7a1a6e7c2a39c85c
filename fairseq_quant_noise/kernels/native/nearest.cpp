// The E-step of k-means: the nearest centroid of each block.
//
// Shapes: n points, d numbers of a block, K centroids, padded to a multiple of 16.

#include <cstring>
#include <limits>

#include "threads.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kernels {
namespace {

#ifdef __AVX512F__
constexpr int bytes = 64;
#else
constexpr int bytes = 32;
#endif

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float values __attribute__((vector_size(bytes)));
  typedef int32_t numbers __attribute__((vector_size(bytes)));
};
template <>
struct Lanes<double> {
  typedef double values __attribute__((vector_size(bytes)));
  typedef int64_t numbers __attribute__((vector_size(bytes)));
};

// The number beside the least value, the least number where several are.
#ifdef __AVX512F__
int64_t first_of_least(__m512 values, Lanes<float>::numbers numbers) {
  const __m512 least = _mm512_set1_ps(_mm512_reduce_min_ps(values));
  return _mm512_mask_reduce_min_epi32(_mm512_cmp_ps_mask(values, least, _CMP_EQ_OQ),
                                      reinterpret_cast<__m512i>(numbers));
}

int64_t first_of_least(__m512d values, Lanes<double>::numbers numbers) {
  const __m512d least = _mm512_set1_pd(_mm512_reduce_min_pd(values));
  return _mm512_mask_reduce_min_epi64(_mm512_cmp_pd_mask(values, least, _CMP_EQ_OQ),
                                      reinterpret_cast<__m512i>(numbers));
}
#else
template <typename V, typename I>
int64_t first_of_least(V values, I numbers) {
  int of = 0;
  for (int l = 1; l < static_cast<int>(sizeof(V) / sizeof(values[0])); ++l) {
    if (values[l] < values[of] || (values[l] == values[of] && numbers[l] < numbers[of])) of = l;
  }
  return numbers[of];
}
#endif

// out[i] = argmin_k bias[k] + sum_j points[i][j] * slope[j][k], the first one where several are least.
// D is d where it is known when compiled, else 0.
template <typename T, int D>
void least(const T* points, int64_t n, int64_t d, const T* slope, const T* bias, int64_t k, int64_t* out) {
  using V = typename Lanes<T>::values;
  using I = typename Lanes<T>::numbers;
  constexpr int size = bytes / sizeof(T);
  const int64_t dims = D ? D : d;
  using Number = decltype(I{}[0] + 0);
  I lane;
  for (int i = 0; i < size; ++i) lane[i] = i;
  for (int64_t i = 0; i < n; ++i) {
    const T* point = points + i * dims;
    V best = V{} + std::numeric_limits<T>::infinity();
    I where = I{}, numbers = lane;
    for (int64_t first = 0; first < k; first += size, numbers += static_cast<Number>(size)) {
      V score, row;
      std::memcpy(&score, bias + first, sizeof score);
      for (int64_t j = 0; j < dims; ++j) {
        std::memcpy(&row, slope + j * k + first, sizeof row);
        score += row * point[j];
      }
      const I less = score < best;
      best = less ? score : best;
      where = less ? numbers : where;
    }
    out[i] = first_of_least(best, where);
  }
}

template <typename T>
void dispatch(const T* points, int64_t n, int64_t d, const T* slope, const T* bias, int64_t k, int64_t* out) {
  switch (d) {
    case 4: return least<T, 4>(points, n, d, slope, bias, k, out);
    case 8: return least<T, 8>(points, n, d, slope, bias, k, out);
    case 9: return least<T, 9>(points, n, d, slope, bias, k, out);
    case 16: return least<T, 16>(points, n, d, slope, bias, k, out);
    case 18: return least<T, 18>(points, n, d, slope, bias, k, out);
    case 32: return least<T, 32>(points, n, d, slope, bias, k, out);
    default: return least<T, 0>(points, n, d, slope, bias, k, out);
  }
}

}  // namespace

extern "C" {

#define LEAST(name, T)                                                                                     \
  void name(const T* points, int64_t n, int64_t d, const T* slope, const T* bias, int64_t k, int64_t* out, \
            int64_t threads) {                                                                             \
    constexpr int64_t part = 1 << 12;                                                                      \
    parallel(parts(n, part), threads, [&](int64_t i) {                                                     \
      const int64_t start = i * part, count = n - start < part ? n - start : part;                         \
      dispatch(points + start * d, count, d, slope, bias, k, out + start);                                 \
    });                                                                                                    \
  }
LEAST(least_float, float)
LEAST(least_double, double)
}

}  // namespace kernels
