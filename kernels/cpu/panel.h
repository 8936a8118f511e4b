// Products with a weight that is not in fp32: a panel of it at a time becomes fp32 on its way into the second-level
// cache, decoded or converted, and all rows of x are multiplied with it there by vector instructions.
#pragma once

#include "fourbit.h"
#include "tile.h"

namespace fastlora {

// A dense right operand w[N, K]^T, one of whose strides is 1; see FourBitOperand.
template <typename T>
struct DenseOperand {
  explicit DenseOperand(const Tensor& w)
      : from(w.const_data_ptr<T>()), K(w.size(1)), by_columns(w.stride(1) == 1), ld(w.stride(by_columns ? 0 : 1)) {
  }
  void read(int64_t line, int64_t first, int64_t n, float* to) const {
    at::vec::convert(from + line * ld + first, to, n);
  }
  int64_t depth() const {
    return K;
  }
  const T* from;
  int64_t K;
  bool by_columns;
  int64_t ld;
};

namespace vector {

constexpr int64_t LANES = at::vec::Vectorized<float>::size();
constexpr int64_t MICRO_M = LANES == 8 ? 6 : 12;  // rows and columns that are summed up in registers
constexpr int64_t MICRO_N = 2 * LANES;
constexpr int64_t PANEL_K = 256;         // terms of a sum until it joins the rest
constexpr int64_t PANEL_N = 256;         // columns of a panel: 256 KB in all
constexpr int64_t LEAST_N = 64;          // columns for which converting x is still cheap beside the product
constexpr int64_t BLOCK_M = 96;          // rows of x that are in fp32 at a time
constexpr int64_t PASS_M = 1024;         // rows that a panel is made for; for more it is made again
constexpr int64_t LD_X = PANEL_K + PAD;  // so that rows do not fall on the same lines of the cache

// c[I, MICRO_N] += a[I, depth] @ b[depth, MICRO_N]
template <int I>
inline void multiply_micro(float* c, int64_t ldc, const float* a, const float* b, int64_t depth) {
  using Vec = at::vec::Vectorized<float>;
  for (int64_t l = 0; l < depth;) {
    Vec sum[I][2];
    for (int i = 0; i < I; ++i) sum[i][0] = sum[i][1] = Vec(0.0f);
    for (const int64_t end = std::min(depth, l + RUN); l < end; ++l) {
      const Vec first = Vec::loadu(b + l * MICRO_N), second = Vec::loadu(b + l * MICRO_N + LANES);
      for (int i = 0; i < I; ++i) {
        const Vec factor(a[i * LD_X + l]);
        sum[i][0] = at::vec::fmadd(factor, first, sum[i][0]);
        sum[i][1] = at::vec::fmadd(factor, second, sum[i][1]);
      }
    }
    for (int i = 0; i < I; ++i) {
      float* to = c + i * ldc;
      (Vec::loadu(to) + sum[i][0]).store(to);
      (Vec::loadu(to + LANES) + sum[i][1]).store(to + LANES);
    }
  }
}

// The same for up to I rows
template <int I>
inline void multiply_rows(int64_t rows, float* c, int64_t ldc, const float* a, const float* b, int64_t depth) {
  if (rows == I) return multiply_micro<I>(c, ldc, a, b, depth);
  if constexpr (I > 1) multiply_rows<I - 1>(rows, c, ldc, a, b, depth);
}

// Columns n0 and rows k0 on of an operand, MICRO_N columns at a time, padded with zeros.
template <typename Operand>
void pack(const Operand& w, int64_t n0, int64_t cols, int64_t k0, int64_t depth, float* lines, float* to) {
  if (w.by_columns) {
    for (int64_t n = 0; n < cols; n += MICRO_N, to += PANEL_K * MICRO_N) {
      const int64_t width = std::min(MICRO_N, cols - n);
      for (int64_t i = 0; i < width; ++i) w.read(n0 + n + i, k0, depth, lines + i * PANEL_K);
      std::fill(lines + width * PANEL_K, lines + MICRO_N * PANEL_K, 0.0f);
      for (int64_t k = 0; k < depth; k += LANES)
        for (int64_t i = 0; i < MICRO_N; i += LANES)
          at::vec::transpose_mxn<float, LANES, LANES>(lines + i * PANEL_K + k, PANEL_K, to + k * MICRO_N + i, MICRO_N);
    }
  } else {
    std::fill(lines + cols, lines + round_up(cols, MICRO_N), 0.0f);
    for (int64_t l = 0; l < depth; ++l, to += MICRO_N) {
      w.read(k0 + l, n0, cols, lines);
      for (int64_t n = 0; n < cols; n += MICRO_N) std::copy_n(lines + n, MICRO_N, to + n * PANEL_K);
    }
  }
}

// y[M, N] = scale * (sum of x[i] @ w[i] + init + the adapters' parts), all in fp32, rounded once. Rows of x have unit
// stride.
template <typename T, typename Operand, typename Init>
void multiply(
    const std::vector<Tensor>& x, const std::vector<Operand>& w, const Init& init, const std::vector<Adapter>& adapters,
    const ColumnScale& column_scale, T* y, int64_t M, int64_t N) {
  const int64_t threads = at::get_num_threads();
  const auto divided = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const int64_t share = divided(N, round_up(std::max<int64_t>(1, divided(N, PANEL_N)), threads));
  const int64_t width = std::min(PANEL_N, round_up(std::max(share, LEAST_N), MICRO_N));
  const int64_t panels = divided(N, width), groups = divided(threads, std::max<int64_t>(1, panels));
  const int64_t height = std::min(PASS_M, round_up(divided(std::max<int64_t>(1, M), groups), MICRO_M));
  const int64_t passes = divided(M, height);
  const std::vector<AdapterProduct<float>> products(adapters.begin(), adapters.end());
  at::parallel_for(0, panels * passes, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> tile(height, PANEL_N), scratch(need_scratch<Init>(adapters) ? height : 0, PANEL_N);
    const Buffer<float> panel(PANEL_N, PANEL_K), lines(MICRO_N, PANEL_K), block(BLOCK_M, LD_X);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task / passes * width, cols = std::min(width, N - n0);
      const int64_t m0 = task % passes * height, rows = std::min(height, M - m0);
      const auto product = [&](size_t i, float* to, bool add) {
        products[i].onto(to, PANEL_N, add, m0, rows, n0, round_up(cols, PAD));
      };
      sum_adapters(init, adapters, m0, rows, n0, cols, tile.row(0), scratch.row(0), PANEL_N, product);
      for (size_t i = 0; i < x.size(); ++i) {
        const T* from = x[i].template const_data_ptr<T>() + m0 * x[i].stride(0);
        for (int64_t k0 = 0; k0 < w[i].depth(); k0 += PANEL_K) {
          const int64_t depth = std::min(PANEL_K, w[i].depth() - k0);
          pack(w[i], n0, cols, k0, depth, lines.row(0), panel.row(0));
          for (int64_t m = 0; m < rows; m += BLOCK_M) {
            const int64_t high = std::min(BLOCK_M, rows - m);
            for (int64_t j = 0; j < high; ++j)
              at::vec::convert(from + (m + j) * x[i].stride(0) + k0, block.row(j), depth);
            for (int64_t n = 0; n < cols; n += MICRO_N)
              for (int64_t j = 0; j < high; j += MICRO_M)
                multiply_rows<MICRO_M>(
                    std::min(MICRO_M, high - j), tile.row(m + j) + n, PANEL_N, block.row(j), panel.row(n), depth);
          }
        }
      }
      for (int64_t i = 0; i < rows; ++i) {
        column_scale.apply(tile.row(i), n0, cols);
        at::vec::convert(tile.row(i), y + (m0 + i) * N + n0, cols);
      }
    }
  });
}

}  // namespace vector
}  // namespace fastlora
