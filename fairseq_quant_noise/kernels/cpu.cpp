// The inner loops on a CPU: the nearest centroid of each block, a weight out of its codes, a product with it in codes.
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

// Left to itself, GCC gathers the eight entries into a vector, which takes twice as long on many processors.
#if defined(__GNUC__) && !defined(__clang__)
#define SCALAR __attribute__((noinline, optimize("no-tree-vectorize")))
#else
#define SCALAR
#endif

// out[r] += the entries of four tables that the codes of row r name; eight codes are one load.
SCALAR void add_four(const float (*table)[256], const uint8_t* codes, int64_t stride, int64_t rows, float* out) {
  const uint8_t *c0 = codes, *c1 = c0 + stride, *c2 = c1 + stride, *c3 = c2 + stride;
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    uint64_t w0, w1, w2, w3;
    std::memcpy(&w0, c0 + r, 8), std::memcpy(&w1, c1 + r, 8), std::memcpy(&w2, c2 + r, 8), std::memcpy(&w3, c3 + r, 8);
    for (int l = 0; l < 8; ++l) {
      out[r + l] += (table[0][w0 & 255] + table[1][w1 & 255]) + (table[2][w2 & 255] + table[3][w3 & 255]);
      w0 >>= 8, w1 >>= 8, w2 >>= 8, w3 >>= 8;
    }
  }
  for (; r < rows; ++r) {
    out[r] += (table[0][c0[r]] + table[1][c1[r]]) + (table[2][c2[r]] + table[3][c3[r]]);
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

// out[r] += sum_j < x[j], centroids[codes[j][r]] > for the rows [0, rows) of a weight, by tables of 256 products, four
// blocks j at a time, so that their tables stay in the nearest cache.
//   x          (blocks, d)
//   centroids  (d, 256): a column for each
//   codes      row j begins `stride` after the one before
void lookup(const float* x, int64_t blocks, int64_t d, const float* centroids, const uint8_t* codes, int64_t stride,
            int64_t rows, float* __restrict__ out) {
  alignas(32) float table[4][256];
  for (int64_t first = 0; first < blocks; first += 4) {
    const int64_t count = blocks - first < 4 ? blocks - first : 4;
    for (int64_t b = 0; b < count; ++b) {
      const float* point = x + (first + b) * d;
      float* __restrict__ sums = table[b];
      for (int k = 0; k < 256; ++k) sums[k] = point[0] * centroids[k];
      for (int64_t j = 1; j < d; ++j) {
        const float value = point[j];
        const float* row = centroids + j * 256;
        for (int k = 0; k < 256; ++k) sums[k] += value * row[k];
      }
    }
    const uint8_t* c = codes + first * stride;
    if (count == 4) {
      add_four(table, c, stride, rows, out);
    } else {
      for (int64_t b = 0; b < count; ++b, c += stride) {
        for (int64_t r = 0; r < rows; ++r) out[r] += table[b][c[r]];
      }
    }
  }
}

// out (rows, blocks * d) = the centroids (K, d) of the codes, whose strides are those of rows and of blocks.
void decode(const uint8_t* codes, int64_t row_stride, int64_t block_stride, const float* centroids, int64_t d,
            int64_t rows, int64_t blocks, float* out) {
  constexpr int64_t tile = 32;
  for (int64_t first = 0; first < rows; first += tile) {
    const int64_t end = rows - first < tile ? rows : first + tile;
    for (int64_t j = 0; j < blocks; ++j) {
      for (int64_t r = first; r < end; ++r) {
        const float* from = centroids + codes[r * row_stride + j * block_stride] * d;
        float* to = out + (r * blocks + j) * d;
        switch (d) {
          case 4: std::memcpy(to, from, 4 * sizeof(float)); break;
          case 8: std::memcpy(to, from, 8 * sizeof(float)); break;
          case 16: std::memcpy(to, from, 16 * sizeof(float)); break;
          default: std::memcpy(to, from, d * sizeof(float));
        }
      }
    }
  }
}
}
