// A weight in codes, and the forms of a product with it. Shapes: x (n, blocks * d), out (n, rows), bias (rows) or none.

#pragma once

#include <cstdint>

namespace kernels {

struct Weight {             // as kernels/cpu.py writes it
  const void* codes;        // (blocks, rows); of 32 bits where there are more than 256 centroids
  int64_t blocks, d, rows;  // d numbers in a block
  int64_t wide;             // whether codes have 32 bits
  const float* centroids;   // (256, d), or (4096, d)
  const float* columns;     // (d, 256)
  const float *now, *seen;  // (count): centroids as they are, and as they were when the tables above were made
  int64_t count;            // 0 where nobody needs to look
  const uint16_t* panel;    // the decoded weight in float16 (panel.cpp), or nullptr
  int64_t fits_panel;       // whether there may be one
};

// Whether the decoded weight is faster for n rows of x than any form that reads the codes.
bool wants_panel(const Weight& weight, int64_t n);
void linear_by_panel(const float* x, int64_t n, const Weight& weight, const float* bias, float* out, int64_t threads);

}  // namespace kernels

extern "C" {
int64_t takes_rows(int64_t n, int64_t blocks, int64_t d, int64_t rows);
void linear_by_rows(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids, const uint8_t* codes,
                    int64_t rows, const float* bias, float* out, int64_t threads);
void linear_by_tables(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                      const uint8_t* codes, int64_t rows, const float* bias, float* out, int64_t threads);
void linear_by_pieces(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                      const uint8_t* codes, int64_t rows, const float* bias, float* out, int64_t threads);
void linear_by_wide_pieces(const float* x, int64_t n, int64_t blocks, int64_t d, const float* centroids,
                           const int32_t* codes, int64_t rows, const float* bias, float* out, int64_t threads);
extern const double rows_by_tables;
}
