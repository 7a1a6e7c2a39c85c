// A weight out of its codes.

#include <cstring>

#include "codes.h"
#include "threads.h"

namespace kernels {
namespace {

// out (rows, blocks * d) = the centroids of the codes, for eight rows or fewer.
// Writes go along a row; the codes, mostly laid out the other way, are read eight by eight.
template <int D, typename Code>
void decode_rows(const Code* codes, int64_t by_row, int64_t by_block, const float* centroids, int64_t d, int64_t rows,
                 int64_t blocks, float* out) {
  const int64_t dims = D ? D : d;
  for (int64_t first = 0; first < blocks; first += 8) {
    const int64_t count = blocks - first < 8 ? blocks - first : 8;
    Code square[8][8];  // of a block, a row
    for (int64_t b = 0; b < count; ++b) {
      const Code* from = codes + (first + b) * by_block;
      if (by_row == 1 && rows == 8) {
        std::memcpy(square[b], from, sizeof square[b]);
      } else {
        for (int64_t r = 0; r < rows; ++r) square[b][r] = from[r * by_row];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + (r * blocks + first) * dims;
      for (int64_t b = 0; b < count; ++b, to += dims) {
        std::memcpy(to, centroids + number(square[b][r]) * dims, dims * sizeof(float));
      }
    }
  }
}

// out (rows, blocks * d) = the centroids of the codes, whose strides are those of rows and of blocks.
template <typename Code>
void decode_all(const Code* codes, int64_t by_row, int64_t by_block, const float* centroids, int64_t d, int64_t rows,
                int64_t blocks, float* out, int64_t threads) {
  const auto run = d == 4    ? decode_rows<4, Code>
                   : d == 8  ? decode_rows<8, Code>
                   : d == 16 ? decode_rows<16, Code>
                             : decode_rows<0, Code>;
  constexpr int64_t tile = 8, part = 4;  // rows of a call, calls of a part
  const int64_t calls = parts(rows, tile);
  parallel(parts(calls, part), threads, [&](int64_t i) {
    for (int64_t call = i * part; call < calls && call < (i + 1) * part; ++call) {
      const int64_t row = call * tile;
      run(codes + row * by_row, by_row, by_block, centroids, d, rows - row < tile ? rows - row : tile, blocks,
          out + row * blocks * d);
    }
  });
}

}  // namespace

extern "C" {

// As decode_all.
//   centroids  (256, d)
void decode(const uint8_t* codes, int64_t by_row, int64_t by_block, const float* centroids, int64_t d, int64_t rows,
            int64_t blocks, float* out, int64_t threads) {
  decode_all(codes, by_row, by_block, centroids, d, rows, blocks, out, threads);
}

//   centroids  (4096, d)
void decode_wide(const int32_t* codes, int64_t by_row, int64_t by_block, const float* centroids, int64_t d,
                 int64_t rows, int64_t blocks, float* out, int64_t threads) {
  decode_all(codes, by_row, by_block, centroids, d, rows, blocks, out, threads);
}
}

}  // namespace kernels
