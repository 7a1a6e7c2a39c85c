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

// The sum of `count` bytes, a multiple of 64.
inline int32_t sum_of(const uint8_t* bytes, int64_t count) {
  Sums sums{};
  for (int64_t k = 0; k < count; k += 64) sums = dot(sums, read(bytes + k), _mm512_set1_epi8(1));
  return _mm512_reduce_add_epi32(sums);
}

// out (tall_tiles, width) = inputs times `width` rows of a weight (width, inner), which are the first factor here.
//   inputs  a group of 16 in a panel (quads, 16, 4), or, if `both`, two of them; without, half of out is left alone
inline void multiply_rows(const uint8_t* weight, int64_t inner, const uint8_t* inputs, bool both, int32_t* out) {
  const uint8_t* const second = inputs + tile * inner;
  alignas(64) int32_t found[4][tile * tile];
  for (int half = 0; half < 2; ++half, weight += tall_tiles * inner, out += tall_tiles) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inner; k += 64) {
      _tile_loadd(4, weight + k, inner);
      _tile_loadd(5, weight + tile * inner + k, inner);
      _tile_loadd(6, inputs + k * tile, 64);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 5, 6);
      if (both) {
        _tile_loadd(7, second + k * tile, 64);
        _tile_dpbusd(2, 4, 7);
        _tile_dpbusd(3, 5, 7);
      }
    }
    _tile_stored(0, found[0], 64);
    _tile_stored(1, found[1], 64);
    _tile_stored(2, found[2], 64);
    _tile_stored(3, found[3], 64);
    for (int t = 0; t < (both ? 4 : 2); ++t) {
      __m512i r[tile];
      std::memcpy(r, found[t], sizeof r);
      transpose(r);
      for (int i = 0; i < tile; ++i) _mm512_storeu_si512(out + (t / 2 * tile + i) * width + t % 2 * tile, r[i]);
    }
  }
}

}  // namespace kernels
#endif
