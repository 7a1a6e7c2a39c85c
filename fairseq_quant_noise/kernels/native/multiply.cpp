// A product with a weight in codes, for many rows: a piece of the weight at a time is decoded into the second-level
// cache, in the order in which the product reads it. A dense product copies its weight into such an order too.
//
// Shapes: x (n, blocks * d), the weight (rows, blocks * d), out (n, rows).

#include <algorithm>
#include <cstring>
#include <vector>

#include "codes.h"
#include "gemm.h"
#include "threads.h"

namespace kernels {
namespace {

constexpr int64_t depth = 512, panels = 8;  // of a piece: numbers of a row, and rows in panels

struct alignas(64) Line {
  float numbers[16];
};

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
