// A product with a weight in codes, for many rows: a piece of the weight at a time is decoded into the second-level
// cache, in the order in which the product reads it. A dense product copies its weight into such an order too.
//
// Shapes: x (n, blocks * d), the weight (rows, blocks * d), out (n, rows).

#include <algorithm>
#include <cstring>
#include <vector>

#include "codes.h"
#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace kernels {
namespace {

// The sums of a tile, `high` rows of x by `across` vectors of rows of the weight, take 24 of AVX-512's 32 registers, 12
// of AVX2's 16.
#ifdef __AVX512F__
constexpr int lanes = 16, high = 8;
#else
constexpr int lanes = 8, high = 4;
#endif
constexpr int across = 3, panel = across * lanes;  // rows of the weight
constexpr int64_t depth = 512, panels = 8;         // of a piece: numbers of a row, and rows in panels

typedef float Vector __attribute__((vector_size(4 * lanes)));
struct alignas(64) Line {
  float numbers[16];
};

Vector load(const float* from) {
  Vector read;
  std::memcpy(&read, from, sizeof read);
  return read;
}

// out (high, A vectors) = start + x (high, k) times weight (k, A vectors); the rows of out, start and x are a pitch
// apart.
template <int A>
void multiply(const float* x, int64_t x_pitch, const float* weight, int64_t k, const float* start, int64_t start_pitch,
              float* out, int64_t pitch) {
  Vector sums[high][A] = {};
  for (int i = 0; i < high; ++i) {
    for (int a = 0; a < A; ++a) __builtin_prefetch(out + i * pitch + a * lanes, 1);
  }
  for (int64_t j = 0; j < k; ++j, ++x, weight += A * lanes) {
    Vector row[A];
    for (int a = 0; a < A; ++a) row[a] = load(weight + a * lanes);
    for (int i = 0; i < high; ++i) {
      for (int a = 0; a < A; ++a) sums[i][a] += row[a] * x[i * x_pitch];
    }
  }
  for (int i = 0; i < high; ++i) {
    for (int a = 0; a < A; ++a) {
      const Vector sum = load(start + i * start_pitch + a * lanes) + sums[i][a];
      std::memcpy(out + i * pitch + a * lanes, &sum, sizeof sum);
    }
  }
}

// The same for `tall` rows of x and `wide` rows of the weight, which is padded to `width`; x has all of the tile's
// rows.
void multiply_some(int64_t tall, int64_t wide, int64_t width, const float* x, int64_t x_pitch, const float* weight,
                   int64_t k, const float* start, int64_t start_pitch, float* out, int64_t pitch) {
  static const float zeros[panel] = {};
  const auto run = width == panel ? multiply<3> : width == 2 * lanes ? multiply<2> : multiply<1>;
  if (start == nullptr) start = zeros, start_pitch = 0;
  if (tall == high && wide == width) return run(x, x_pitch, weight, k, start, start_pitch, out, pitch);
  float whole[high * panel];
  run(x, x_pitch, weight, k, zeros, 0, whole, panel);
  for (int64_t i = 0; i < tall; ++i) {
    for (int64_t r = 0; r < wide; ++r) out[i * pitch + r] = start[i * start_pitch + r] + whole[i * panel + r];
  }
}

#ifdef __AVX2__

#ifdef __AVX512F__
#define VECTOR(operation) _mm512_##operation
#else
#define VECTOR(operation) _mm256_##operation
#endif

// Four numbers of the centroids of codes 0, 4, ...
template <typename Code>
Vector every_fourth(const float* centroids, int64_t d, const Code* codes) {
  const auto of = [&](int i) { return _mm_loadu_ps(centroids + number(codes[i]) * d); };
#ifdef __AVX512F__
  const __m512 one = _mm512_insertf32x4(_mm512_castps128_ps512(of(0)), of(4), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(one, of(8), 2), of(12), 3);
#else
  return _mm256_insertf128_ps(_mm256_castps128_ps256(of(0)), of(4), 1);
#endif
}

// to (4, lanes), its rows a pitch apart = four numbers of the centroids of these codes, transposed.
template <typename Code>
void transpose(const float* centroids, int64_t d, const Code* codes, float* to, int64_t pitch) {
  const Vector a = every_fourth(centroids, d, codes), b = every_fourth(centroids, d, codes + 1);
  const Vector c = every_fourth(centroids, d, codes + 2), e = every_fourth(centroids, d, codes + 3);
  const Vector low = VECTOR(unpacklo_ps)(a, b), high = VECTOR(unpackhi_ps)(a, b);
  const Vector low2 = VECTOR(unpacklo_ps)(c, e), high2 = VECTOR(unpackhi_ps)(c, e);
  VECTOR(storeu_ps)(to, VECTOR(shuffle_ps)(low, low2, 0x44));
  VECTOR(storeu_ps)(to + pitch, VECTOR(shuffle_ps)(low, low2, 0xee));
  VECTOR(storeu_ps)(to + 2 * pitch, VECTOR(shuffle_ps)(high, high2, 0x44));
  VECTOR(storeu_ps)(to + 3 * pitch, VECTOR(shuffle_ps)(high, high2, 0xee));
}

#endif

// out (blocks * d, width) = the centroids of the codes (blocks, count), transposed; the columns beyond count are any.
template <typename Code>
void decode_panel(const float* centroids, int64_t d, const Code* codes, int64_t stride, int64_t count, int64_t blocks,
                  float* out, int64_t width) {
  Code padded[panel] = {};
  for (int64_t b = 0; b < blocks; ++b, codes += stride, out += d * width) {
    const Code* of = codes;
    if (count < width) std::memcpy(padded, codes, count * sizeof(Code)), of = padded;
    int64_t j = 0;
#ifdef __AVX2__
    for (; j + 4 <= d; j += 4) {
      for (int64_t r = 0; r < width; r += lanes) transpose(centroids + j, d, of + r, out + j * width + r, width);
    }
#endif
    for (; j < d; ++j) {
      for (int64_t r = 0; r < width; ++r) out[j * width + r] = centroids[number(of[r]) * d + j];
    }
  }
}

// out (n, rows) = x times the weight of the codes (blocks, rows), transposed, plus the bias (rows), if any.
// Every sum is added up in one order, whatever the threads.
template <typename Code>
void multiply_pieces(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids, const Code* codes,
                     int64_t rows, const float* bias, float* out, int64_t threads) {
  const int64_t inner = blocks * d, share = std::max<int64_t>(depth / d, 1);  // blocks of a piece
  const int64_t groups = parts(rows, lanes);
  const int64_t tasks = std::min(parts(parts(groups, across * panels), threads) * threads, groups);
  parallel(tasks, threads, [&](int64_t task) {
    const int64_t first = task * groups / tasks * lanes;  // rows of the weight
    const int64_t count = std::min((task + 1) * groups / tasks * lanes, rows) - first;
    // For the piece, and for the rows of x of a tile that are less than high.
    static thread_local std::vector<Line> memory;
    memory.resize(std::max<int64_t>(memory.size(), parts((panels * panel + high) * share * d, 16)));
    float* const piece = memory[0].numbers;
    float* const last = piece + panels * panel * share * d;
    for (int64_t block = 0; block < blocks; block += share) {
      const int64_t some = std::min(share, blocks - block), k = some * d;
      const auto width = [&](int64_t row) { return std::min<int64_t>(parts(count - row, lanes) * lanes, panel); };
      for (int64_t row = 0; row < count; row += panel) {
        decode_panel(centroids, d, codes + block * rows + first + row, rows, std::min(width(row), count - row), some,
                     piece + row * k, width(row));
      }
      for (int64_t i = 0; i < n; i += high) {
        const int64_t tall = std::min<int64_t>(n - i, high);
        const float* rows_of_x = x + i * inner + block * d;
        if (tall < high) {
          for (int64_t l = 0; l < high; ++l) {
            std::memcpy(last + l * k, rows_of_x + std::min(l, tall - 1) * inner, k * sizeof(float));
          }
          rows_of_x = last;
        }
        for (int64_t row = 0; row < count; row += panel) {
          float* const to = out + i * rows + first + row;
          const float* const start = block > 0 ? to : bias != nullptr ? bias + first + row : nullptr;
          multiply_some(tall, std::min(width(row), count - row), width(row), rows_of_x, tall < high ? k : inner,
                        piece + row * k, k, start, block > 0 ? rows : 0, to, rows);
        }
      }
    }
  });
}

}  // namespace

extern "C" {

// As multiply_pieces.
//   centroids  (256, d)
void linear_by_pieces(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                      const uint8_t* codes, int64_t rows, const float* bias, float* out, int64_t threads) {
  multiply_pieces(x, n, blocks, d, centroids, codes, rows, bias, out, threads);
}

//   centroids  (4096, d)
void linear_by_wide_pieces(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                           const int32_t* codes, int64_t rows, const float* bias, float* out, int64_t threads) {
  multiply_pieces(x, n, blocks, d, centroids, codes, rows, bias, out, threads);
}
}

}  // namespace kernels
