// The gradients of adapters for bf16 tensors: dxa in one read of dy, then every outer product (da, db) at once.
#pragma once

#include "bf16.h"

namespace fastlora::bf16 {

constexpr int64_t BLOCK_C = 128;  // columns of an outer product, four cache lines
constexpr int64_t BLOCK_L = 64;   // its depth
constexpr int64_t AHEAD = 16;     // rows: blocks of columns are too short for the hardware to see what comes next

// out = p[M, r]^T @ drop(q[M, C]), as [r, C] or transposed to [C, r]
struct Outer {
  Outer(const Tensor& q, int64_t r, int64_t parts, const Dropout& dropout, const Tensor& out, bool transposed)
      : p(q.size(0), r, parts, round_up(std::max<int64_t>(q.size(0), 1), BLOCK_L)),
        q(q),
        dropout(dropout),
        out(out),
        transposed(transposed) {
  }

  // Columns first to stop
  void columns(int64_t first, int64_t stop) const {
    const int64_t M = q.size(0), ld = q.stride(0), r = p.r, left_rows = p.parts * r;
    const uint16_t* from = reinterpret_cast<const uint16_t*>(q.const_data_ptr<BFloat16>());
    const Buffer<uint32_t> pairs(BLOCK_L / 2, BLOCK_C);
    const Buffer<uint16_t> copy(2, BLOCK_C);
    const Buffer<float> sum(left_rows, BLOCK_C);
    for (int64_t c0 = first; c0 < stop; c0 += BLOCK_C) {
      const int64_t cols = std::min(BLOCK_C, stop - c0), padded = round_up(cols, PAD);
      for (int64_t m0 = 0; m0 < p.stride; m0 += BLOCK_L) {
        for (int64_t i = 0; i < BLOCK_L; i += 2) {
          const int64_t m = m0 + i;
          const uint16_t* rows[2];
          for (int64_t k = 0; k < 2; ++k) {
            const uint16_t* row = from + (m + k) * ld + c0;
            for (int64_t c = 0; c < cols; c += 32) __builtin_prefetch(row + AHEAD * ld + c, 0, 2);
            rows[k] = row;
            if (m + k < M && !dropout.active()) continue;
            rows[k] = copy.row(k);
            if (m + k < M) {
              std::copy_n(row, cols, copy.row(k));
              dropout.apply(copy.row(k), m + k, c0, cols);
            } else {
              std::fill_n(copy.row(k), cols, uint16_t(0));
            }
          }
          interleave(rows[0], rows[1], cols, pairs.row(i / 2));
          std::fill(pairs.row(i / 2) + cols, pairs.row(i / 2) + padded, 0u);
        }
        multiply(
            left_rows, padded, BLOCK_L, p.stride, BLOCK_C, BLOCK_C, m0 > 0,
            reinterpret_cast<const BFloat16*>(p.row(0) + m0), as_bf16(pairs.row(0)), sum.row(0));
      }
      if (p.parts == 2)
        for (int64_t j = 0; j < r; ++j)
          for (int64_t c = 0; c < cols; ++c) sum.row(j)[c] += sum.row(r + j)[c];
      FASTLORA_DISPATCH(out.scalar_type(), [&] {
        write_columns(sum.row(0), sum.stride, r, c0, cols, out.mutable_data_ptr<scalar_t>(), q.size(1), transposed);
      });
    }
  }

  Transposed p;
  Tensor q;
  Dropout dropout;
  Tensor out;
  bool transposed;
};

// Every thread takes its share of the columns of each.
inline void compute(const std::vector<Outer>& products) {
  const auto units = [](const Outer& product) { return (product.q.size(1) + STEP - 1) / STEP; };
  int64_t most = 0;
  for (const Outer& product : products) most = std::max(most, units(product));
  at::parallel_for(0, most, 1, [&](int64_t begin, int64_t end) {
    for (const Outer& product : products) {
      const int64_t n = units(product), stop = end * n / most * STEP;
      product.columns(begin * n / most * STEP, std::min(product.q.size(1), stop));
    }
    cpublas::brgemm_release();
  });
}

// The op of that name; a tensor that is not asked for is undefined.
inline void lora_grad(
    const Tensor& dy, const Tensor& x, const Tensor& b, const Tensor& xa, double s, const Dropout& dropout,
    const Tensor& dxa, const Tensor& da, const Tensor& db) {
  std::vector<Outer> products;
  if (xa.defined()) products.emplace_back(dy, xa.size(1), parts_of(xa), Dropout(), db, true);
  if (x.defined()) products.emplace_back(x, b.size(1), parts_of(b), dropout, da, false);
  const auto put_xa = [&](int64_t m0, int64_t rows) {
    FASTLORA_DISPATCH(xa.scalar_type(), [&] {
      const int64_t ld = xa.stride(0);
      products[0].p.put(m0, rows, xa.const_data_ptr<scalar_t>() + m0 * ld, ld, 1.0f);
    });
  };
  if (b.defined()) {
    const float scale = static_cast<float>(dropout.scale());
    shrink(dy, {{b, s, Dropout()}}, [&](int64_t, int64_t m0, int64_t rows, const float* block, int64_t ld) {
      write_rows(block, ld, m0, rows, dxa);
      if (x.defined()) products.back().p.put(m0, rows, block, ld, scale);
      if (xa.defined()) put_xa(m0, rows);
    });
  } else {
    put_xa(0, dy.size(0));
  }
  compute(products);
}

inline void lora_grad_a(const Tensor& dxa, const Tensor& x, const Dropout& dropout, const Tensor& da) {
  const double scale = dropout.scale();
  std::vector<Outer> products;
  products.emplace_back(x, dxa.size(1), scale == 1.0 ? parts_of(dxa) : 2, dropout, da, false);
  FASTLORA_DISPATCH(dxa.scalar_type(), [&] {
    products[0].p.put(0, dxa.size(0), dxa.const_data_ptr<scalar_t>(), dxa.stride(0), static_cast<float>(scale));
  });
  compute(products);
}

}  // namespace fastlora::bf16
