// The adapter products for elements of type T, by matrix instructions where there are any.
#pragma once

#include <ATen/ops/addmm.h>

#include "checks.h"
#include "few_rows.h"
#include "outer.h"
#include "panel.h"

namespace fastlora {

// For a p and a seed that `Operands::dropout` has seen
inline Dropout dropout_of(double p, const OptionalTensor& seed) {
  return p == 0.0 ? Dropout() : Dropout(p, seed->item<int64_t>());
}

constexpr int64_t FEW_ROWS = 16;  // fewer do not fill a matrix instruction

template <typename T>
bool by_matrix_instructions(int64_t M) {
  return std::is_same_v<T, at::BFloat16> && M >= FEW_ROWS && bf16::available();
}

// What several adapters make of x, in one read of it where matrix instructions do it.
template <typename T>
void shrink(const Tensor& x, const std::vector<Shrink>& adapters, const std::vector<Tensor>& out) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(x.size(0)))
      return bf16::shrink(x, adapters, [&](int64_t n, int64_t m0, int64_t rows, const float* block, int64_t ld) {
        write_rows(block, ld, m0, rows, out[n]);
      });
  for (size_t n = 0; n < out.size(); ++n) {
    const auto& [b, s, dropout] = adapters[n];
    to_tensor(vector::shrink<T>(x, b, s, dropout), out[n]);
  }
}

// y[M, N] = init + sum of the adapters' parts
template <typename T, typename Init>
void expand(const Init& init, const std::vector<Adapter>& adapters, T* y, int64_t M, int64_t N) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(M)) return bf16::expand(init, adapters, y, M, N);
  vector::expand<T>(init, adapters, y, M, N);
}

template <typename Operand>
std::vector<Operand> operands_of(at::TensorList w) {
  return std::vector<Operand>(w.begin(), w.end());
}

// The most rows that are multiplied without making a panel of the weight, 4-bit and multiplied in fp32
constexpr int64_t FEW_IN_FLOAT = vector::LANES == 8 ? 8 : 15;
// The same, multiplied in integers. Where matrix instructions multiply bf16 fast, they make up for the panel from about
// 20 rows on (by counting instructions; not measured there).
inline int64_t few_in_integers() {
  return bf16::available() ? 20 : 31;
}
// The same for a dense weight, and the fewest rows for which a panel of it is faster than torch's product
#ifdef __AVX512BF16__
constexpr int64_t FEW_DENSE = 31, LEAST_PANEL = 32;
#else
constexpr int64_t FEW_DENSE = vector::LANES == 8 ? 23 : 31, LEAST_PANEL = vector::LANES == 8 ? 2 : 8;
#endif

// y[M, N] = scale * (sum of x[M, K] @ w[N, K]^T + init + sum of the adapters' parts), if there is a faster way to it
// than `expand` and torch's GEMMs; otherwise does nothing and returns false.
template <typename T, typename Init>
bool tail(
    at::TensorList x, at::TensorList w, const Init& init, const std::vector<Adapter>& adapters,
    const ColumnScale& column_scale, T* y) {
  const int64_t M = x[0].size(0), N = w[0].size(0);
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const bool fast = bf16::available();
    if (x.size() == 1 && M <= (fast ? FEW_ROWS - 1 : FEW_DENSE) && DenseRows::fits(w[0])) {
      multiply_few<DenseInFloat>(with_rows(x[0]), DenseRows(w[0]), init, adapters, column_scale, y);
      return true;
    }
    if (by_matrix_instructions<T>(M) && bf16::prefers_tail(x, w)) {
      bf16::tail(x.vec(), operands_of<bf16::DenseOperand>(w), init, adapters, column_scale, y, M, N);
      return true;
    }
    if (fast) return false;
  }
  // Converted to fp32, where torch multiplies 16-bit numbers at half its speed or less
  const auto by_lines = [](const Tensor& t) { return t.stride(0) == 1 || t.stride(1) == 1; };
  if constexpr (sizeof(T) == 2 && (vector::LANES == 8 || std::is_same_v<T, at::BFloat16>)) {
    if (M < LEAST_PANEL || !std::all_of(w.begin(), w.end(), by_lines)) return false;
    vector::multiply(with_rows(x), operands_of<DenseOperand<T>>(w), init, adapters, column_scale, y, M, N);
    return true;
  }
  return false;
}

// multiply(init), where init fills rows of A with the bias: what a product adds to. Without a bias it is nullptr.
template <typename A, typename Multiply>
void onto_bias(const OptionalTensor& bias, const Multiply& multiply) {
  if (!bias.has_value()) return multiply(nullptr);
  const Tile<A> row = to_tile<A>(bias->unsqueeze(0));
  multiply([&](int64_t, int64_t n0, int64_t cols, A* out) { std::copy_n(row.row(0) + n0, cols, out); });
}

// y[M, N] = scale * (sum of x[i] w[i]^T + bias + the adapters' parts): by `tail`, or by torch's GEMMs, which add to
// what the adapters wrote. y is contiguous and has elements.
inline void matmul_into(
    at::TensorList x, at::TensorList w, const OptionalTensor& bias, const std::vector<Adapter>& adapters,
    const OptionalTensor& scale, const Tensor& y) {
  const int64_t M = y.size(0), N = y.size(1);
  const ColumnScale column_scale(scale);
  bool complete = false;  // with the base products
  FASTLORA_DISPATCH(y.scalar_type(), [&] {
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    onto_bias<Wide<scalar_t>>(bias, [&](const auto& init) {
      complete = tail<scalar_t>(x, w, init, adapters, column_scale, to);
      if (!complete) expand<scalar_t>(init, adapters, to, M, N);
    });
  });
  for (size_t i = 0; !complete && i < x.size(); ++i)
    if (x[i].size(1) > 0) y.addmm_(x[i], w[i].t());
  if (!complete && scale.has_value()) y.mul_(*scale);
}

// The same for 4-bit weights, of which every way decodes a part at a time. Rows of x have unit stride.
template <typename T, typename Init>
void multiply_4bit(
    const std::vector<Tensor>& x, const std::vector<FourBitOperand>& w, const Init& init,
    const std::vector<Adapter>& adapters, const ColumnScale& column_scale, T* y, int64_t M, int64_t N) {
  if (x.size() == 1 && w[0].by_columns && in_chunks(*w[0].w)) {
#ifdef __AVX512VNNI__
    if constexpr (std::is_same_v<T, at::BFloat16>)
      if (M <= few_in_integers() && InIntegers::takes(x[0]))
        return multiply_few<InIntegers>(x[0], *w[0].w, init, adapters, column_scale, y);
#endif
    if (M <= FEW_IN_FLOAT) return multiply_few<InFloat>(x[0], *w[0].w, init, adapters, column_scale, y);
  }
  for (const FourBitOperand& each : w) each.w->decode_scales();
  const auto in_pairs = [](const FourBitOperand& each) { return each.depth() % 2 == 0; };
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    if (by_matrix_instructions<T>(M) && std::all_of(w.begin(), w.end(), in_pairs)) {
      const std::vector<bf16::DecodedOperand> decoded(w.begin(), w.end());
      return bf16::tail(x, decoded, init, adapters, column_scale, y, M, N);
    }
  }
  vector::multiply(x, w, init, adapters, column_scale, y, M, N);
}

// dxa = s * dy @ b, da = dxa^T @ drop(x) and db = dy^T @ xa; none without its operands, which are then undefined
template <typename T>
void lora_grad(
    const Tensor& dy, const Tensor& x, const Tensor& b, const Tensor& xa, double s, const Dropout& dropout,
    const Tensor& dxa, const Tensor& da, const Tensor& db) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(dy.size(0))) return bf16::lora_grad(dy, x, b, xa, s, dropout, dxa, da, db);
  if (b.defined()) {
    auto tile = vector::shrink<T>(dy, b, s, Dropout());
    to_tensor(tile, dxa);
    scale(tile, dropout.scale());
    if (x.defined()) vector::outer<T>(tile, x, dropout, da, false);
  }
  if (xa.defined()) vector::outer<T>(to_tile<Wide<T>>(xa), dy, Dropout(), db, true);
}

// da = dxa^T @ drop(x)
template <typename T>
void lora_grad_a(const Tensor& dxa, const Tensor& x, const Dropout& dropout, const Tensor& da) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(x.size(0))) return bf16::lora_grad_a(dxa, x, dropout, da);
  auto tile = to_tile<Wide<T>>(dxa);
  scale(tile, dropout.scale());
  vector::outer<T>(tile, x, dropout, da, false);
}

}  // namespace fastlora
