// The inner loops on a CPU: the nearest centroid of each block, a weight out of its codes, a product with it in codes.
//
// Compiled by cpu.py on the machine that runs it. Vectors are GCC's and Clang's own, so that one source serves every
// instruction set. Shapes: n points, d numbers of a block, K centroids, padded to a multiple of 16.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// torch's own OpenMP threads, which wait for work without sleeping; cpu.py says where they are. Without them one thread
// does it all.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
Team team = nullptr;

// each(i) for i in [0, count): by as many threads, in any order.
template <typename F>
void parallel(int64_t count, int64_t threads, const F& each) {
  if (threads > count) threads = count;
  if (team == nullptr || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) each(i);
    return;
  }
  struct Work {
    const F& each;
    int64_t count;
    std::atomic<int64_t> next;
  } work{each, count, {0}};
  const auto member = [](void* data) {
    Work& mine = *static_cast<Work*>(data);
    for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) mine.each(i);
  };
  team(member, &work, static_cast<unsigned>(threads), 0);
}

int64_t parts(int64_t size, int64_t part) { return (size + part - 1) / part; }

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

// out[r] += the entries of four tables that the codes of row r name.
#ifdef __AVX512F__
void add_four(const float (*table)[256], const uint8_t* codes, int64_t stride, int64_t rows, float* out) {
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16) {
    __m512 sum = _mm512_loadu_ps(out + r);
    for (int b = 0; b < 4; ++b) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + b * stride + r));
      sum = _mm512_add_ps(sum, _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), table[b], 4));
    }
    _mm512_storeu_ps(out + r, sum);
  }
  for (; r < rows; ++r) {
    for (int b = 0; b < 4; ++b) out[r] += table[b][codes[b * stride + r]];
  }
}
#else
// Eight codes are one load. Left to itself, GCC gathers the eight entries into a vector, which takes twice as long on many
// processors.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((noinline, optimize("no-tree-vectorize")))
#endif
void add_four(const float (*table)[256], const uint8_t* codes, int64_t stride, int64_t rows, float* out) {
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
#endif

// out[r] += sum_j < x[j], centroids[codes[j][r]] > by tables of 256 products, four blocks j at a time, so that their tables
// stay in the nearest cache.
template <int D>
void lookup(const float* x, int64_t blocks, int64_t d, const float* centroids, const uint8_t* codes, int64_t stride,
            int64_t rows, float* __restrict__ out) {
  const int64_t dims = D ? D : d;
  alignas(64) float table[4][256];
  for (int64_t first = 0; first < blocks; first += 4) {
    const int64_t count = blocks - first < 4 ? blocks - first : 4;
    for (int64_t b = 0; b < count; ++b) {
      const float* point = x + (first + b) * dims;
      for (int64_t k = 0; k < 256; k += 32) {
        float sums[32] = {};
        for (int64_t j = 0; j < dims; ++j) {
          for (int64_t l = 0; l < 32; ++l) sums[l] += point[j] * centroids[j * 256 + k + l];
        }
        std::memcpy(table[b] + k, sums, sizeof sums);
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

// out (rows, blocks * d), the rows `pitch` numbers apart = the centroids (256, d) of the codes, for eight rows or fewer.
// Writes go along a row; the codes, mostly laid out the other way, are read eight by eight.
template <int D>
void decode_rows(const uint8_t* codes, int64_t by_row, int64_t by_block, const float* centroids, int64_t d, int64_t rows,
                 int64_t blocks, float* out, int64_t pitch) {
  const int64_t dims = D ? D : d;
  for (int64_t first = 0; first < blocks; first += 8) {
    const int64_t count = blocks - first < 8 ? blocks - first : 8;
    uint8_t square[8][8];  // of a block, a row
    for (int64_t b = 0; b < count; ++b) {
      const uint8_t* from = codes + (first + b) * by_block;
      if (by_row == 1 && rows == 8) {
        std::memcpy(square[b], from, 8);
      } else {
        for (int64_t r = 0; r < rows; ++r) square[b][r] = from[r * by_row];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + r * pitch + first * dims;
      for (int64_t b = 0; b < count; ++b, to += dims) {
        std::memcpy(to, centroids + square[b][r] * dims, dims * sizeof(float));
      }
    }
  }
}

}  // namespace

extern "C" {

void set_team(Team parallel) { team = parallel; }

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

// out (n, rows) = x (n, blocks * d) times the weight of the codes (blocks, rows), transposed, plus the bias (rows), if any.
//   centroids  (d, 256): a column for each
// In parts whose bounds do not depend on the threads, and are added up in one order.
void linear(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids, const uint8_t* codes,
            int64_t rows, const float* bias, float* out, int64_t threads) {
  constexpr int64_t tile = 1 << 12, lookups = 1 << 16;  // a tile of the sums fits the nearest cache
  const int64_t tiles = parts(rows, tile);
  int64_t splits = parts(rows * blocks, lookups) / tiles;  // of the blocks, where there are few rows
  if (splits > 8) splits = 8;
  if (tiles >= 8 || splits < 1) splits = 1;
  const int64_t share = parts(parts(blocks, splits), 4) * 4;
  splits = parts(blocks, share);
  std::vector<float> sums((splits - 1) * n * rows);
  parallel(tiles * splits * n, threads, [&](int64_t task) {
    const int64_t i = task / (tiles * splits), split = task / tiles % splits, row = task % tiles * tile;
    const int64_t first = split * share, count = blocks - first < share ? blocks - first : share;
    float* to = split == 0 ? out + i * rows + row : sums.data() + ((split - 1) * n + i) * rows + row;
    const int64_t width = rows - row < tile ? rows - row : tile;
    if (split == 0 && bias != nullptr) std::memcpy(to, bias + row, width * sizeof(float));
    if (split == 0 && bias == nullptr) std::memset(to, 0, width * sizeof(float));
    const auto run = d == 4 ? lookup<4> : d == 8 ? lookup<8> : lookup<0>;
    run(x + (i * blocks + first) * d, count, d, centroids, codes + first * rows + row, rows, width, to);
  });
  for (int64_t split = 1; split < splits; ++split) {
    const float* from = sums.data() + (split - 1) * n * rows;
    for (int64_t i = 0; i < n * rows; ++i) out[i] += from[i];
  }
}

// out (rows, blocks * d), the rows `pitch` numbers apart = the centroids (256, d) of the codes, whose strides are those of rows
// and of blocks.
void decode(const uint8_t* codes, int64_t by_row, int64_t by_block, const float* centroids, int64_t d, int64_t rows,
            int64_t blocks, float* out, int64_t pitch, int64_t threads) {
  const auto run = d == 4 ? decode_rows<4> : d == 8 ? decode_rows<8> : d == 16 ? decode_rows<16> : decode_rows<0>;
  constexpr int64_t tile = 8, part = 4;  // rows of a call, calls of a part
  const int64_t calls = parts(rows, tile);
  parallel(parts(calls, part), threads, [&](int64_t i) {
    for (int64_t call = i * part; call < calls && call < (i + 1) * part; ++call) {
      const int64_t row = call * tile;
      run(codes + row * by_row, by_row, by_block, centroids, d, rows - row < tile ? rows - row : tile, blocks,
          out + row * pitch, pitch);
    }
  });
}
}
