// A product with a weight in codes: which form is fastest, and what was prepared of the weight.

#include "product.h"

#include <cstring>

extern "C" {

// out = x times the weight, transposed, plus the bias.
// Returns 0 where centroids are no longer what they were, 2 where the weight wants a panel first, and 1 when it is
// done.
int64_t linear(const kernels::Weight* weight, const float* x, int64_t n, const float* bias, float* out,
               int64_t threads) {
  const auto& [codes, blocks, d, rows, wide, by_row, by_column, now, seen, count, panel, fits] = *weight;
  if (count > 0 && std::memcmp(now, seen, count * sizeof(float)) != 0) return 0;
  const auto* bytes = static_cast<const uint8_t*>(codes);
  if (wide) {
    linear_by_wide_pieces(x, n, blocks, d, by_row, static_cast<const int32_t*>(codes), rows, bias, out, threads);
  } else if (kernels::wants_panel(*weight, n)) {
    if (panel == nullptr) return 2;
    kernels::linear_by_panel(x, n, *weight, bias, out, threads);
  } else if (takes_rows(n, blocks, d, rows)) {
    linear_by_rows(x, n, blocks, d, by_row, bytes, rows, bias, out, threads);
  } else if (static_cast<double>(n) < rows_by_tables * static_cast<double>(d)) {
    linear_by_tables(x, n, blocks, d, by_column, bytes, rows, bias, out, threads);
  } else {
    linear_by_pieces(x, n, blocks, d, by_row, bytes, rows, bias, out, threads);
  }
  return 1;
}
}
