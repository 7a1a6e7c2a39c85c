// The E-step of k-means: the nearest centroid of each block.
//
// Shapes: n points, d numbers of a block, K centroids, padded to a multiple of 16.

#include <cstring>
#include <limits>

#include "threads.h"

using kernels::parallel;
using kernels::parts;

namespace {

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int size = 8;
  typedef float values __attribute__((vector_size(32)));
  typedef int32_t numbers __attribute__((vector_size(32)));
};
template <>
struct Lanes<double> {
  static constexpr int size = 4;
  typedef double values __attribute__((vector_size(32)));
  typedef int64_t numbers __attribute__((vector_size(32)));
};

// out[i] = argmin_k bias[k] + sum_j points[i][j] * slope[j][k], the first one where several are least.
// D is d where it is known when compiled, else 0.
template <typename T, int D>
void least(const T* points, int64_t n, int64_t d, const T* slope, const T* bias, int64_t k, int64_t* out) {
  using V = typename Lanes<T>::values;
  using I = typename Lanes<T>::numbers;
  constexpr int size = Lanes<T>::size;
  const int64_t dims = D ? D : d;
  I lane;
  for (int i = 0; i < size; ++i) lane[i] = i;
  for (int64_t i = 0; i < n; ++i) {
    const T* point = points + i * dims;
    V best = V{} + std::numeric_limits<T>::infinity();
    I where = I{};
    for (int64_t first = 0; first < k; first += size) {
      V score, row;
      std::memcpy(&score, bias + first, sizeof score);
      for (int64_t j = 0; j < dims; ++j) {
        std::memcpy(&row, slope + j * k + first, sizeof row);
        score += row * point[j];
      }
      const I less = score < best;
      best = less ? score : best;
      where = less ? lane + static_cast<decltype(lane[0] + 0)>(first) : where;
    }
    T least = best[0];
    int64_t found = where[0];
    for (int l = 1; l < size; ++l) {
      if (best[l] < least || (best[l] == least && where[l] < found)) least = best[l], found = where[l];
    }
    out[i] = found;
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

#define LEAST(name, T)                                                                                               \
  void name(const T* points, int64_t n, int64_t d, const T* slope, const T* bias, int64_t k, int64_t* out,           \
            int64_t threads) {                                                                                       \
    constexpr int64_t part = 1 << 12;                                                                                \
    parallel(parts(n, part), threads, [&](int64_t i) {                                                               \
      const int64_t start = i * part, count = n - start < part ? n - start : part;                                   \
      dispatch(points + start * d, count, d, slope, bias, k, out + start);                                           \
    });                                                                                                              \
  }
LEAST(least_float, float)
LEAST(least_double, double)
}
