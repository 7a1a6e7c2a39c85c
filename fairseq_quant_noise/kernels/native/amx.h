// The products of dot.h for many inputs, on processors with AMX: 16 x 16 sums of 64 products an instruction.

#pragma once

#include "dot.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__) && defined(__linux__)
#define KERNELS_AMX
#include <sys/syscall.h>
#include <unistd.h>

namespace kernels {

constexpr int tile = 16, tall_tiles = 2 * tile;  // rows of a tile, and of two

// Whether this process may use the tiles; Linux wants to be asked.
inline bool have_tiles() {
  constexpr long ask = 0x1023, tile_data = 18;
  static const bool granted = syscall(SYS_arch_prctl, ask, tile_data) == 0;
  return granted;
}

// Sets the tiles' sizes for inputs of `tall` rows, at most `tall_tiles`: 0 to 3 are sums, 4 and 5 inputs, 6 and 7
// weights.
inline void shape_tiles(int64_t tall) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  const uint8_t first = static_cast<uint8_t>(tall < tile ? tall : tile), rest = static_cast<uint8_t>(tall - first);
  const uint8_t rows[8] = {first, first, rest, rest, first, rest, tile, tile};
  for (int t = 0; t < 8; ++t) {
    shapes.rows[t] = rows[t] == 0 ? 1 : rows[t];  // a tile without rows must not be touched
    shapes.row_bytes[t] = 64;
  }
  _tile_loadconfig(&shapes);
}

// out (tall, width) = inputs (tall, 4 * quads) times the panel, whose quads are a multiple of 16.
inline void multiply_tiles(const int8_t* inputs, int64_t tall, int64_t pitch, const uint8_t* panel, int64_t quads,
                           int32_t* out) {
  const int64_t group = quads * lanes * 4;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* w = panel + 2 * half * group;
    int32_t* to = out + half * 2 * lanes;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t q = 0; q < quads; q += 16) {
      _tile_loadd(4, inputs + q * 4, pitch);
      _tile_loadd(6, w + q * lanes * 4, 64);
      _tile_loadd(7, w + group + q * lanes * 4, 64);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (tall > tile) {
        _tile_loadd(5, inputs + tile * pitch + q * 4, pitch);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, to, width * 4);
    _tile_stored(1, to + lanes, width * 4);
    if (tall > tile) {
      _tile_stored(2, to + tile * width, width * 4);
      _tile_stored(3, to + tile * width + lanes, width * 4);
    }
  }
}

}  // namespace kernels
#endif
