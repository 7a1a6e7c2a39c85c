// A product of inputs in 8 bits with a weight in at most 8 bits, summed in 32 bits.
//
//   x = (a - za) sx, a range for each row of x;   w = (q - zw) sw, a range for each row of the weight
//   sum_k x_k w_k = sx sw (sum a q - za sum q - zw (sum a - K za))
//
// Shapes: x (n, inner), the weight (rows, inner), out (n, rows).
#include "integer.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "amx.h"
#include "dot.h"

namespace kernels {

extern "C" void linear_by_tables(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                                 const uint8_t* codes, int64_t rows, const float* bias, float* out, int64_t threads);

namespace {

// The numbers that belong to the 64 rows of a panel.
struct alignas(64) Rows {
  float scale[width], bias[width];
  int32_t zero[width], sums[width];
};

// out (tall, wide), its rows a pitch apart, from the sums of products (tall, width).
void finish(const Inputs8& x, int64_t first, int64_t tall, const Rows& rows, const int32_t* products, int64_t wide,
            float* out, int64_t pitch) {
  for (int64_t i = 0; i < tall; ++i, products += width, out += pitch) {
    const float scale = x.scale[first + i];
    const int32_t zero = x.zero[first + i];
    const int32_t rest = x.sums[first + i] - static_cast<int32_t>(x.inner) * zero;
    float some[width], *const __restrict to = wide == width ? out : some;
    for (int r = 0; r < width; ++r) {
      const int32_t sum = products[r] - zero * rows.sums[r] - rows.zero[r] * rest;
      to[r] = static_cast<float>(sum) * (scale * rows.scale[r]) + rows.bias[r];
    }
    if (to == some) std::memcpy(out, some, wide * sizeof(float));
  }
}

void multiply_bytes_of(int64_t tall, const int8_t* inputs, int64_t pitch, const uint8_t* panel, int64_t quads,
                       int32_t* out) {
  switch (tall) {
    case 1: return multiply_bytes<1>(inputs, pitch, panel, quads, out);
    case 2: return multiply_bytes<2>(inputs, pitch, panel, quads, out);
    case 3: return multiply_bytes<3>(inputs, pitch, panel, quads, out);
    case 4: return multiply_bytes<4>(inputs, pitch, panel, quads, out);
    case 5: return multiply_bytes<std::min(5, high)>(inputs, pitch, panel, quads, out);
    default: return multiply_bytes<high>(inputs, pitch, panel, quads, out);
  }
}

// Each panel is filled by fill(first row, panel, Rows), and multiplied with all rows of x while it is in the cache.
template <typename Fill>
void multiply(const Inputs8& x, int64_t rows, float* out, int64_t threads, const Fill& fill) {
  const int64_t quads = x.pitch / 4, size = width * x.pitch, panels = parts(rows, width);
#ifdef KERNELS_AMX
  const bool tiles = x.n > 4 && have_tiles();
#else
  constexpr bool tiles = false;
#endif
  // Of a task: as many panels as half a MiB holds, for they are read again with each tile of x; but some tasks a
  // thread.
  const int64_t together = std::max<int64_t>(1, std::min((1 << 19) / size, panels / (4 * threads)));
  const int64_t tasks = parts(panels, together);
  // Where there are fewer tasks than threads, the rows of x are split too, at multiples of 96 = lcm(6, 32).
  const int64_t split = std::max<int64_t>(1, std::min(parts(threads, tasks), x.n / 96));
  const int64_t share = parts(parts(x.n, split), 96) * 96;
  std::vector<int8_t> ones(x.pitch, 1);
  parallel(tasks * split, threads, [&](int64_t task) {
    static thread_local std::vector<Line> memory;
    memory.resize(std::max<int64_t>(memory.size(), together * size / 64));
    static thread_local std::vector<Rows> of;
    of.resize(together);
    const int64_t first = task % tasks * together, count = std::min(together, panels - first);
    alignas(64) int32_t products[32 * width];
    for (int64_t p = 0; p < count; ++p) {
      uint8_t* const panel = memory[p * size / 64].bytes;
      fill((first + p) * width, panel, of[p]);
      multiply_bytes<1>(ones.data(), x.pitch, panel, quads, of[p].sums);
    }
    const int64_t end = std::min((task / tasks + 1) * share, x.n);
    [[maybe_unused]] int64_t shaped = 0;
    for (int64_t i = task / tasks * share; i < end;) {
      const int64_t tall = std::min<int64_t>(end - i, tiles ? 32 : high);
#ifdef KERNELS_AMX
      if (tiles && tall != shaped) shape_tiles(shaped = tall);
#endif
      for (int64_t p = 0; p < count; ++p) {
        const uint8_t* const panel = memory[p * size / 64].bytes;
        const int8_t* const inputs = x.numbers + i * x.pitch;
#ifdef KERNELS_AMX
        if (tiles) {
          multiply_tiles(inputs, tall, x.pitch, panel, quads, products);
        } else {
          multiply_bytes_of(tall, inputs, x.pitch, panel, quads, products);
        }
#else
        multiply_bytes_of(tall, inputs, x.pitch, panel, quads, products);
#endif
        const int64_t row = (first + p) * width;
        finish(x, i, tall, of[p], products, std::min<int64_t>(width, rows - row), out + i * rows + row, rows);
      }
      i += tall;
    }
#ifdef KERNELS_AMX
    if (shaped != 0) _tile_release();
#endif
  });
}

// to = four numbers of row l of a group, at quad q.
inline uint8_t* place(uint8_t* panel, int64_t quads, int64_t row, int64_t q) {
  return panel + (row / lanes * quads + q) * lanes * 4 + row % lanes * 4;
}

inline void shifted(uint8_t* bytes, int64_t count) {
  if (shift != 0) {
    for (int64_t i = 0; i < count; ++i) bytes[i] ^= 128;
  }
}

// A panel of `wide` rows of a weight's codes (rows, inner), and of zeros up to `height` rows.
void fill_from_codes(const uint8_t* codes, int64_t inner, int64_t wide, uint8_t* panel, int64_t quads,
                     int64_t height = width) {
  int64_t row = 0;
#ifdef __AVX512VNNI__
  const int64_t whole = inner / 4;
  for (; row + 16 <= wide && whole >= 16; row += 16) {  // sixteen quads of sixteen rows at a time
    uint8_t* const to = panel + row * quads * 4;
    for (int64_t q = 0; q<whole; q = q + 32> whole && q + 16 < whole ? whole - 16 : q + 16) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(codes + (row + i) * inner + q * 4);
      transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (q + i) * 64, r[i]);
    }
  }
  const int64_t done = row;
  if (whole >= 16) {  // what is left of the rows: quads beyond the whole ones
    for (int64_t r = 0; r < done; ++r) {
      for (int64_t q = whole; q < quads; ++q) {
        uint8_t* const to = place(panel, quads, r, q);
        std::memset(to, 0, 4);
        if (q * 4 < inner) std::memcpy(to, codes + r * inner + q * 4, inner - q * 4);
      }
    }
  }
#endif
  for (; row < height; ++row) {
    for (int64_t q = 0; q < quads; ++q) {
      uint8_t* const to = place(panel, quads, row, q);
      const int64_t here = row < wide ? std::min<int64_t>(4, std::max<int64_t>(inner - q * 4, 0)) : 0;
      std::memset(to + here, 0, 4 - here);
      if (here > 0) std::memcpy(to, codes + row * inner + q * 4, here);
      shifted(to, here);
    }
  }
}

// A panel of the centroids of `wide` rows of codes (blocks, rows).
//   centroids  (256, d);   turned  (d, 256)
void fill_from_centroids(const uint8_t* codes, int64_t stride, int64_t blocks, const uint8_t* centroids,
                         [[maybe_unused]] const uint8_t* turned, int64_t d, int64_t wide, uint8_t* panel,
                         int64_t quads) {
  uint8_t some[width] = {};
  for (int64_t b = 0; b < blocks; ++b, codes += stride) {
    const uint8_t* of = codes;
    __builtin_prefetch(codes + 24 * stride);  // a processor does not foresee so long a stride
    if (wide < width) std::memcpy(some, codes, wide), of = some;
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
    if (d % 4 == 0) {
      // A byte of each of 64 centroids is picked from registers. Four such bytes are interleaved, which takes rows 16
      // apart to one register, so the codes are put in that order first.
      alignas(64) static const uint8_t order[width] = {0,  1,  2,  3,  16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51,
                                                       4,  5,  6,  7,  20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55,
                                                       8,  9,  10, 11, 24, 25, 26, 27, 40, 41, 42, 43, 56, 57, 58, 59,
                                                       12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63};
      const __m512i code = _mm512_permutexvar_epi8(_mm512_load_si512(order), _mm512_loadu_si512(of));
      const __mmask64 upper = _mm512_movepi8_mask(code);
      for (int64_t j = 0; j < d; j += 4) {
        __m512i found[4];
        for (int t = 0; t < 4; ++t) {
          const uint8_t* table = turned + (j + t) * 256;
          const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), code, _mm512_loadu_si512(table + 64));
          const __m512i top =
              _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), code, _mm512_loadu_si512(table + 192));
          found[t] = _mm512_mask_blend_epi8(upper, low, top);
        }
        const __m512i a = _mm512_unpacklo_epi8(found[0], found[1]), b2 = _mm512_unpackhi_epi8(found[0], found[1]);
        const __m512i c = _mm512_unpacklo_epi8(found[2], found[3]), e = _mm512_unpackhi_epi8(found[2], found[3]);
        uint8_t* const to = panel + (b * d + j) / 4 * 64;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, c));
        _mm512_storeu_si512(to + quads * 64, _mm512_unpackhi_epi16(a, c));
        _mm512_storeu_si512(to + 2 * quads * 64, _mm512_unpacklo_epi16(b2, e));
        _mm512_storeu_si512(to + 3 * quads * 64, _mm512_unpackhi_epi16(b2, e));
      }
      continue;
    }
#endif
    for (int64_t row = 0; row < width; ++row) {
      const uint8_t* const from = centroids + of[row] * d;
      if (d % 4 == 0) {
        for (int64_t j = 0; j < d; j += 4) std::memcpy(place(panel, quads, row, (b * d + j) / 4), from + j, 4);
      } else {
        for (int64_t j = 0; j < d; ++j) place(panel, quads, row, (b * d + j) / 4)[(b * d + j) % 4] = from[j];
      }
    }
  }
  const int64_t inner = blocks * d;
  for (int64_t row = 0; row < width; ++row) {
    for (int64_t k = inner; k < quads * 4; ++k) place(panel, quads, row, k / 4)[k % 4] = 0;
  }
}

// The numbers of the weight that belong to a panel; `channels` is 1, or a range for each row.
void describe(const float* scale, const float* zero, bool channels, const float* bias, int64_t first, int64_t wide,
              Rows& of) {
  for (int64_t r = 0; r < width; ++r) {
    const int64_t row = first + (r < wide ? r : 0), range = channels ? row : 0;
    of.scale[r] = scale[range];
    of.zero[r] = static_cast<int32_t>(zero[range]) - shift;
    of.bias[r] = bias == nullptr ? 0 : bias[row];
  }
}

#ifdef KERNELS_AMX
// Whether `multiply_in_place` takes the product: whole tiles of the weight, and an x that stays in the cache.
bool takes_in_place(const Inputs8& x, int64_t rows) {
  return rows % width == 0 && x.inner == x.pitch && x.n * x.pitch <= 1 << 19 && have_tiles();
}

// As `multiply`, for codes (rows, inner) that are read once, where they lie: x takes the part of the panels.
template <typename Describe>
void multiply_in_place(const Inputs8& x, const uint8_t* codes, int64_t rows, float* out, int64_t threads,
                       const Describe& describe) {
  const int64_t quads = x.inner / 4, groups = parts(x.n, lanes), of_group = lanes * x.inner;
  std::unique_ptr<Line[]> memory(new Line[groups * of_group / 64]);
  uint8_t* const panels = memory[0].bytes;
  for (int64_t g = 0; g < groups; ++g) {
    fill_from_codes(reinterpret_cast<const uint8_t*>(x.numbers) + g * of_group, x.inner,
                    std::min<int64_t>(lanes, x.n - g * lanes), panels + g * of_group, quads, lanes);
  }
  parallel(rows / width, threads, [&](int64_t task) {
    const int64_t first = task * width;
    const uint8_t* const from = codes + first * x.inner;
    Rows of;
    describe(first, of);
    alignas(64) int32_t products[tall_tiles * width];
    shape_tiles(tall_tiles);
    for (int64_t g = 0; g < groups; g += 2) {
      const int64_t i = g * lanes;
      multiply_rows(from, x.inner, panels + g * of_group, g + 1 < groups, products);
      for (int r = 0; g == 0 && r < width; ++r) of.sums[r] = sum_of(from + r * x.inner, x.inner);
      finish(x, i, std::min<int64_t>(x.n - i, tall_tiles), of, products, width, out + i * rows + first, rows);
    }
    _tile_release();
  });
}
#endif

void multiply_codes(const Inputs8& x, const Weight8& of, float* out, int64_t threads) {
  const auto describes = [&](int64_t first, Rows& rows) {
    const int64_t wide = std::min<int64_t>(width, of.rows - first);
    describe(of.affine, of.affine + of.channels, of.channels > 1, of.bias, first, wide, rows);
    return wide;
  };
#ifdef KERNELS_AMX
  if (takes_in_place(x, of.rows)) return multiply_in_place(x, of.codes, of.rows, out, threads, describes);
#endif
  multiply(x, of.rows, out, threads, [&](int64_t first, uint8_t* panel, Rows& rows) {
    const int64_t wide = describes(first, rows);
    fill_from_codes(of.codes + first * x.inner, x.inner, wide, panel, x.pitch / 4);
  });
}

void multiply_centroids(const Inputs8& x, const Weight8& of, float* out, int64_t threads) {
  const int64_t d = of.d, blocks = x.inner / d, n = x.n;
  if (n * 4 <= d) {  // tables are faster
    std::vector<float> back(n * x.inner), columns(d * 256);
    for (int64_t i = 0; i < n * x.inner; ++i) {
      const int64_t row = i / x.inner;
      back[i] = static_cast<float>(x.numbers[row * x.pitch + i % x.inner] - x.zero[row]) * x.scale[row];
    }
    for (int64_t i = 0; i < d * 256; ++i) {
      columns[i] = (of.centroids[i % 256 * d + i / 256] - of.affine[1]) * of.affine[0];
    }
    return linear_by_tables(back.data(), n, blocks, d, columns.data(), of.codes, of.rows, of.bias, out, threads);
  }
  std::vector<uint8_t> in_panel(of.centroids, of.centroids + 256 * d), turned(256 * d);
  shifted(in_panel.data(), 256 * d);
  for (int64_t k = 0; k < 256; ++k) {
    for (int64_t j = 0; j < d; ++j) turned[j * 256 + k] = in_panel[k * d + j];
  }
  multiply(x, of.rows, out, threads, [&](int64_t first, uint8_t* panel, Rows& rows) {
    const int64_t wide = std::min<int64_t>(width, of.rows - first);
    fill_from_centroids(of.codes + first, of.rows, blocks, in_panel.data(), turned.data(), d, wide, panel, x.pitch / 4);
    describe(of.affine, of.affine + 1, false, of.bias, first, wide, rows);
  });
}

}  // namespace

void multiply_integers(const Inputs8& x, const Weight8& weight, float* out, int64_t threads) {
  return weight.d == 0 ? multiply_codes(x, weight, out, threads) : multiply_centroids(x, weight, out, threads);
}

extern "C" {

// out (n, rows) = x (n, inner) in 8 bits times the weight of the codes (rows, inner), transposed, plus the bias (rows),
// if any.
//   given   scale and zero point of x, or none
//   affine  (2, channels): scales and zero points of the weight
void linear_of_codes(const float* x, int64_t n, int64_t inner, const float* given, const uint8_t* codes, int64_t rows,
                     const float* affine, int64_t channels, const float* bias, float* out, int64_t threads) {
  const Rounded rounded(x, n, inner, given, threads);
  multiply_integers(rounded.inputs, {rows, 0, channels, codes, nullptr, affine, bias}, out, threads);
}

// The same for the codes (blocks, rows) of centroids (256, d) in 8 bits; their affine is (2, 1).
void linear_of_centroids(const float* x, int64_t n, int64_t blocks, int64_t d, const float* given, const uint8_t* codes,
                         int64_t rows, const uint8_t* centroids, const float* affine, const float* bias, float* out,
                         int64_t threads) {
  const Rounded rounded(x, n, blocks * d, given, threads);
  multiply_integers(rounded.inputs, {rows, d, 1, codes, centroids, affine, bias}, out, threads);
}
}

}  // namespace kernels
