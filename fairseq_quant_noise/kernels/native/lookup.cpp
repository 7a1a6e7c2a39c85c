// A product with a weight in codes, for few rows: by tables of the products of each block of a row with all centroids.

#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kernels {
namespace {

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
// Eight codes are one load. Left to itself, GCC gathers the eight entries into a vector, which takes twice as long on
// many processors.
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

// out[r] += sum_j < x[j], centroids[codes[j][r]] > by tables of 256 products, four blocks j at a time, so that their
// tables stay in the nearest cache.
template <int D>
void look_up_numbers(const float* x, int64_t blocks, int64_t d, const float* centroids, const uint8_t* codes,
                     int64_t stride, int64_t rows, float* __restrict__ out) {
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

#ifdef __AVX512VBMI__

// A processor that picks bytes from registers looks numbers up at more than twice the rate of its loads from a table.
// So the tables become numbers of 24 bits, a table for each of their three bytes, which are added up as whole numbers:
// the entries are those of one scale for `together` blocks, rounded at 2^-24 of the largest that there can be, as
// float32 rounds it.
constexpr int64_t together = 64;

struct Tables {
  alignas(64) uint8_t bytes[together][3][256];  // of a block, the lowest byte first
  float unit;                                   // what 1 stands for
};

constexpr int32_t middle = 1 << 23;  // a byte has no sign: this stands for 0

// Whether the products of these blocks have a scale: there is none for zeros, infinities and what is near them.
template <int D>
bool tabulate(const float* x, int64_t blocks, int64_t d, const float* centroids, Tables& tables) {
  const int64_t dims = D ? D : d;
  float squares[256] = {};
  for (int64_t j = 0; j < dims; ++j) {
    for (int k = 0; k < 256; ++k) squares[k] += centroids[j * 256 + k] * centroids[j * 256 + k];
  }
  bool ordinary = true;
  float longest[2] = {};  // of the centroids, of the blocks of x; squared
  const auto measure = [&](float square, float& most) {
    ordinary &= square < 1e36f;  // NaN is not
    most = square > most ? square : most;
  };
  for (const float square : squares) measure(square, longest[0]);
  for (int64_t b = 0; b < blocks; ++b) {
    float square = 0;
    for (int64_t j = 0; j < dims; ++j) square += x[b * dims + j] * x[b * dims + j];
    measure(square, longest[1]);
  }
  const float bound = std::sqrt(longest[0]) * std::sqrt(longest[1]);  // of any product, by Cauchy and Schwarz
  if (!ordinary || bound < 1e-18f || bound > 1e18f) return false;
  const float scale = 0.9999f * middle / bound;
  tables.unit = 1 / scale;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t k = 0; k < 256; k += 64) {
      __m512 products[4] = {};
      for (int64_t j = 0; j < dims; ++j) {
        const __m512 number = _mm512_set1_ps(x[b * dims + j] * scale);
        for (int q = 0; q < 4; ++q) {
          products[q] = _mm512_fmadd_ps(number, _mm512_loadu_ps(centroids + j * 256 + k + q * 16), products[q]);
        }
      }
      for (int q = 0; q < 4; ++q) {
        const __m512i entries = _mm512_add_epi32(_mm512_cvtps_epi32(products[q]), _mm512_set1_epi32(middle));
        for (int p = 0; p < 3; ++p) {
          const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(entries, 8 * p));
          _mm_store_si128(reinterpret_cast<__m128i*>(tables.bytes[b][p] + k + q * 16), bytes);
        }
      }
    }
  }
  return true;
}

// out[r] += the sum of the entries that the codes of row r name, for G times 64 rows; for fewer with G = 1.
template <int G>
void add_entries(const Tables& tables, const uint8_t* codes, int64_t stride, int64_t blocks, int64_t rows, float* out) {
  const __mmask64 here = rows >= 64 ? ~0ull : (1ull << rows) - 1;
  // Sums of bytes in 16 bits: of a pair of rows as one number, and of the odd row alone.
  __m512i pairs[G][3], odd[G][3];
  for (int g = 0; g < G; ++g) {
    for (int p = 0; p < 3; ++p) pairs[g][p] = odd[g][p] = _mm512_setzero_si512();
  }
  for (int64_t b = 0; b < blocks; ++b, codes += stride) {
    __m512i code[G];
    __mmask64 upper[G];  // codes from 128 on
    for (int g = 0; g < G; ++g) {
      code[g] = G == 1 ? _mm512_maskz_loadu_epi8(here, codes) : _mm512_loadu_si512(codes + g * 64);
      upper[g] = _mm512_movepi8_mask(code[g]);
    }
    for (int p = 0; p < 3; ++p) {
      __m512i table[4];
      for (int q = 0; q < 4; ++q) table[q] = _mm512_load_si512(tables.bytes[b][p] + q * 64);
      for (int g = 0; g < G; ++g) {
        const __m512i low = _mm512_permutex2var_epi8(table[0], code[g], table[1]);
        const __m512i high = _mm512_permutex2var_epi8(table[2], code[g], table[3]);
        const __m512i found = _mm512_mask_blend_epi8(upper[g], low, high);
        pairs[g][p] = _mm512_add_epi16(pairs[g][p], found);
        odd[g][p] = _mm512_add_epi16(odd[g][p], _mm512_srli_epi16(found, 8));
      }
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int g = 0; g < G; ++g) {
    __m512i of[2][2];  // half of the rows; even, odd
    for (auto& half : of) half[0] = half[1] = _mm512_set1_epi32(static_cast<int32_t>(-blocks * middle));
    for (int p = 0; p < 3; ++p) {
      const __m512i both[2] = {_mm512_sub_epi16(pairs[g][p], _mm512_slli_epi16(odd[g][p], 8)), odd[g][p]};
      for (int parity = 0; parity < 2; ++parity) {
        const __m512i halves[2] = {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both[parity])),
                                   _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both[parity], 1))};
        for (int h = 0; h < 2; ++h) {
          of[h][parity] = _mm512_add_epi32(of[h][parity], _mm512_slli_epi32(halves[h], 8 * p));
        }
      }
    }
    for (int q = 0; q < 4; ++q) {
      const __m512i sums = _mm512_permutex2var_epi32(of[q / 2][0], q % 2 ? second : first, of[q / 2][1]);
      const __mmask16 some = G == 1 ? static_cast<__mmask16>(here >> (q * 16)) : static_cast<__mmask16>(-1);
      float* to = out + g * 64 + q * 16;
      const __m512 before = _mm512_maskz_loadu_ps(some, to);
      _mm512_mask_storeu_ps(to, some, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(tables.unit), before));
    }
  }
}

// As `look_up_numbers`.
template <int D>
void look_up(const float* x, int64_t blocks, int64_t d, const float* centroids, const uint8_t* codes, int64_t stride,
             int64_t rows, float* out) {
  Tables tables;
  for (int64_t first = 0; first < blocks; first += together) {
    const int64_t count = blocks - first < together ? blocks - first : together;
    const uint8_t* c = codes + first * stride;
    if (!tabulate<D>(x + first * d, count, d, centroids, tables)) {
      look_up_numbers<D>(x + first * d, count, d, centroids, c, stride, rows, out);
      continue;
    }
    int64_t r = 0;
    for (; r + 128 <= rows; r += 128) add_entries<2>(tables, c + r, stride, count, 128, out + r);
    for (; r < rows; r += 64) add_entries<1>(tables, c + r, stride, count, rows - r, out + r);
  }
}

#else

template <int D>
constexpr auto look_up = look_up_numbers<D>;

#endif

}  // namespace

extern "C" {

// Tables are faster than `linear_by_pieces` for fewer rows of x than this times d.
#if defined(__AVX512VBMI__)
extern const double rows_by_tables = 1.5;
#elif defined(__AVX512F__)
extern const double rows_by_tables = 1;
#else
extern const double rows_by_tables = 0.75;
#endif

// out (n, rows) = x (n, blocks * d) times the weight of the codes (blocks, rows), transposed, plus the bias (rows), if
// any.
//   centroids  (d, 256): a column for each
// In parts whose bounds do not depend on the threads, and are added up in one order.
void linear_by_tables(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                      const uint8_t* codes, int64_t rows, const float* bias, float* out, int64_t threads) {
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
    const auto run = d == 4 ? look_up<4> : d == 8 ? look_up<8> : look_up<0>;
    run(x + (i * blocks + first) * d, count, d, centroids, codes + first * rows + row, rows, width, to);
  });
  for (int64_t split = 1; split < splits; ++split) {
    const float* from = sums.data() + (split - 1) * n * rows;
    for (int64_t i = 0; i < n * rows; ++i) out[i] += from[i];
  }
}
}

}  // namespace kernels
