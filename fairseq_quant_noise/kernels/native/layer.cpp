// A layer of a Transformer encoder whose products are in whole numbers, in one call.
//
//   x' = norm(x + out(attention(q(x), k(x), v(x))));   y = norm(x' + fc2(f(fc1(x'))))
//
// With `first`, each norm is that of the input of its block, and not of the sum. Between the products everything is
// float32; a row goes through what lies between two products, and is rounded for the next, while it is in the cache.
//
// Shapes: x, y (batch * tokens, dim).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "attention.h"
#include "elementary.h"
#include "integer.h"
#include "threads.h"

namespace kernels {
namespace {

struct Product {
  Weight8 weight;
  int64_t inner;
  const float* given;  // scale and zero point of the input, or none
  // Centroids as they are now, and as they were when they were rounded to bytes: (count).
  const float *now, *then;
  int64_t count;
};

struct Norm {
  const float *scale, *shift;  // (dim), or none
  double eps;
};

enum Place { query, key, value, attended, widen, narrow, places };

}  // namespace

struct Layer {
  int64_t batch, tokens, dim, heads;
  int64_t first;        // norms come before the blocks
  int64_t gelu;         // f, else ReLU
  const uint8_t* seen;  // (batch, tokens): 0 for a key that nobody sees; or none
  const float* x;
  float* y;
  Norm norms[2];
  Product products[places];
};

namespace {

// The product's input, rounded once for all products with the same range.
class Source {
 public:
  Source(const float* x, int64_t n, const Product& next)
      : x_(x), given_(next.given), rounded_(new Rounded(n, next.inner)) {}

  void row(int64_t i) { rounded_->row(i, x_ + i * rounded_->inputs.inner, given_); }

  void multiply(const Product& by, float* out, int64_t threads) {
    if (by.given != given_) {
      given_ = by.given;
      rounded_.reset(new Rounded(x_, rounded_->inputs.n, by.inner, given_, threads));
    }
    multiply_integers(rounded_->inputs, by.weight, out, threads);
  }

 private:
  const float *x_, *given_;
  std::unique_ptr<Rounded> rounded_;
};

// each(i) for the rows, several of them at a time.
template <typename F>
void for_rows(int64_t n, int64_t threads, const F& each) {
  constexpr int64_t together = 4;
  parallel(parts(n, together), threads, [&](int64_t part) {
    for (int64_t i = part * together; i < std::min(n, (part + 1) * together); ++i) each(i);
  });
}

// out = x (dim) with mean 0 and variance 1, times the scale, plus the shift; out may be x.
void normalize(const float* x, const Norm& norm, int64_t dim, float* out) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < dim; ++j) sum += x[j];
  const float mean = sum / static_cast<float>(dim);
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < dim; ++j) squares += (x[j] - mean) * (x[j] - mean);
  const float inverse = 1 / std::sqrt(squares / static_cast<float>(dim) + static_cast<float>(norm.eps));
  for (int64_t j = 0; j < dim; ++j) out[j] = (x[j] - mean) * inverse;
  if (norm.scale != nullptr) {
    for (int64_t j = 0; j < dim; ++j) out[j] *= norm.scale[j];
  }
  if (norm.shift != nullptr) {
    for (int64_t j = 0; j < dim; ++j) out[j] += norm.shift[j];
  }
}

void add(float* to, const float* x, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) to[j] += x[j];
}

void activate(float* x, int64_t count, bool by_gelu) {
  if (by_gelu) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) x[j] = gelu(x[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) x[j] = x[j] < 0 ? 0 : x[j];  // NaN stays
  }
}

// Whether the bytes of all centroids are still those of their numbers.
bool settled(const Layer& layer) {
  return std::all_of(layer.products, layer.products + places, [](const Product& of) {
    return of.count == 0 || std::memcmp(of.now, of.then, of.count * sizeof(float)) == 0;
  });
}

// y (n, dim) = attention to q, k, v (n, dim), by pairs of a row of the batch and a head; where they are few, parts of
// their tokens too.
void attend_all(const Layer& of, const float* q, const float* k, const float* v, float* y, int64_t threads) {
  const int64_t pairs = of.batch * of.heads, d = of.dim / of.heads;
  const int64_t split = std::min(parts(2 * threads, pairs), parts(of.tokens, 64));
  const int64_t share = parts(parts(of.tokens, split), high) * high;
  parallel(pairs * split, threads, [&](int64_t task) {
    const int64_t pair = task / split, row = pair / of.heads, first = task % split * share;
    const int64_t at = row * of.tokens * of.dim + pair % of.heads * d;
    const uint8_t* const seen = of.seen == nullptr ? nullptr : of.seen + row * of.tokens;
    const Head head{q + at, k + at, v + at, of.tokens, d, of.dim, seen};
    if (first < of.tokens) attend(head, first, std::min(first + share, of.tokens), y + at);
  });
}

void run(const Layer& of, int64_t threads) {
  const int64_t n = of.batch * of.tokens, dim = of.dim, inner = of.products[widen].weight.rows;
  const Product* const products = of.products;
  // Six matrices like x, the first with some rows more, and one of the inner width.
  std::unique_ptr<float[]> memory(new float[(6 * n + high) * dim + n * inner]);
  float* const q = memory.get();
  float* const k = q + (n + high) * dim;
  float *const v = k + n * dim, *const y = v + n * dim, *const sum = y + n * dim;
  float *const normed = sum + n * dim, *const wide = normed + n * dim;
  std::fill_n(q + n * dim, high * dim, 0.0f);

  const float* const block = of.first ? normed : of.x;
  Source in(block, n, products[query]);
  for_rows(n, threads, [&](int64_t i) {
    if (of.first) normalize(of.x + i * dim, of.norms[0], dim, normed + i * dim);
    in.row(i);
  });
  in.multiply(products[query], q, threads);
  in.multiply(products[key], k, threads);
  in.multiply(products[value], v, threads);
  attend_all(of, q, k, v, y, threads);

  Source from_heads(y, n, products[attended]);
  for_rows(n, threads, [&](int64_t i) { from_heads.row(i); });
  from_heads.multiply(products[attended], sum, threads);

  float* const second = of.first ? normed : sum;
  Source feed(second, n, products[widen]);
  for_rows(n, threads, [&](int64_t i) {
    float* const row = sum + i * dim;
    add(row, of.x + i * dim, dim);
    normalize(row, of.norms[of.first], dim, second + i * dim);
    feed.row(i);
  });
  feed.multiply(products[widen], wide, threads);
  Source forward(wide, n, products[narrow]);
  for_rows(n, threads, [&](int64_t i) {
    activate(wide + i * inner, inner, of.gelu);
    forward.row(i);
  });
  forward.multiply(products[narrow], of.y, threads);
  for_rows(n, threads, [&](int64_t i) {
    float* const row = of.y + i * dim;
    add(row, sum + i * dim, dim);
    if (!of.first) normalize(row, of.norms[1], dim, row);
  });
}

}  // namespace

extern "C" {

// Whether it was done: it is not where centroids have changed since they were rounded to bytes.
// Of a large batch some rows at a time: what lies between the products then stays in the cache, and its memory is used
// again and not asked from the system.
int64_t encoder_layer(const Layer* layer, int64_t threads) {
  if (!settled(*layer)) return 0;
  const int64_t share = std::max<int64_t>(1, 512 / layer->tokens);
  for (int64_t row = 0; row < layer->batch; row += share) {
    Layer part = *layer;
    part.batch = std::min(share, layer->batch - row);
    part.x += row * layer->tokens * layer->dim;
    part.y += row * layer->tokens * layer->dim;
    if (part.seen != nullptr) part.seen += row * layer->tokens;
    run(part, threads);
  }
  return 1;
}
}

}  // namespace kernels
