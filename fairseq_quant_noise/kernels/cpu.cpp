// The two inner loops on a CPU: the nearest centroid of each block, and a product with a weight in codes.
//
// Compiled by cpu.py on the machine that runs it. Vectors are GCC's and Clang's own, so that one source serves every
// instruction set. Shapes: n points, d numbers of a block, K centroids, padded to a multiple of 16.

#include <cstdint>
#include <cstring>
#include <limits>

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
void nearest(const T* points, int64_t n, int64_t d, const T* slope, const T* bias, int64_t k, int64_t* out) {
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
    case 4: return nearest<T, 4>(points, n, d, slope, bias, k, out);
    case 8: return nearest<T, 8>(points, n, d, slope, bias, k, out);
    case 9: return nearest<T, 9>(points, n, d, slope, bias, k, out);
    case 16: return nearest<T, 16>(points, n, d, slope, bias, k, out);
    default: return nearest<T, 0>(points, n, d, slope, bias, k, out);
  }
}

}  // namespace

extern "C" {

void nearest_float(const float* points, int64_t n, int64_t d, const float* slope, const float* bias, int64_t k,
                   int64_t* out) {
  dispatch(points, n, d, slope, bias, k, out);
}

void nearest_double(const double* points, int64_t n, int64_t d, const double* slope, const double* bias, int64_t k,
                    int64_t* out) {
  dispatch(points, n, d, slope, bias, k, out);
}

// out[r] += sum_j table[j][codes[j][r]] for rows [0, rows), where row j of `codes` begins `stride` after the one before.
// table: (blocks, 256); one table is 1 KB, which stays in the nearest cache while it is used.
void lookup_sum(const float* table, const uint8_t* codes, int64_t stride, int64_t blocks, int64_t rows, float* out) {
  constexpr int64_t tile = 1024;
  for (int64_t first = 0; first < rows; first += tile) {
    const int64_t count = rows - first < tile ? rows - first : tile;
    float* __restrict__ sums = out + first;
    for (int64_t j = 0; j + 4 <= blocks; j += 4) {
      const float* __restrict__ t = table + j * 256;
      const uint8_t* __restrict__ c = codes + j * stride + first;
      for (int64_t r = 0; r < count; ++r) {
        sums[r] += (t[c[r]] + t[256 + c[stride + r]]) + (t[512 + c[2 * stride + r]] + t[768 + c[3 * stride + r]]);
      }
    }
    for (int64_t j = blocks - blocks % 4; j < blocks; ++j) {
      const float* __restrict__ t = table + j * 256;
      const uint8_t* __restrict__ c = codes + j * stride + first;
      for (int64_t r = 0; r < count; ++r) sums[r] += t[c[r]];
    }
  }
}
}
