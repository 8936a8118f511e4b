// The three adapter products for elements of type T, by matrix instructions where there are any.
//
// `parts` of an operand is 1 if it is exact in bf16, 2 if not.
#pragma once

#include "bf16.h"
#include "tile.h"

namespace fastlora {

constexpr int64_t FEW_ROWS = 16;  // fewer do not fill a matrix instruction

template <typename T>
bool by_matrix_instructions(int64_t M) {
  return std::is_same_v<T, at::BFloat16> && M >= FEW_ROWS && bf16::available();
}

// s * drop(x[M, K]) @ b[K, r]
template <typename T>
Tile<Wide<T>> shrink(const Tensor& x, const Tensor& b, double s, const Dropout& dropout) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(x.size(0))) return bf16::shrink(x, b, s, dropout);
  return vector::shrink<T>(x, b, s, dropout);
}

// y[M, N] = drop(init + p[M, r] @ b[r, N]). init(m, n0, cols, row) fills in a part of row m; nullptr stands for zero.
template <typename T, typename Init>
void expand(
    const Tile<Wide<T>>& p, int64_t parts, const Tensor& b, const Init& init, const Dropout& dropout, T* y, int64_t N) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(p.rows)) return bf16::expand(p, parts, b, init, dropout, y, N);
  vector::expand<T>(p, b, init, dropout, y, N);
}

// y[M, N] = x[M, K] @ w[N, K]^T + drop(bias + p[M, r] @ b[r, N]), if there is a faster way to it than `expand` and
// torch's GEMM; otherwise does nothing and returns false.
template <typename T>
bool tail(
    const Tensor& x, const Tensor& w, const Tile<Wide<T>>& p, int64_t parts, const Tensor& b, const Wide<T>* bias,
    const Dropout& dropout, T* y) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(x.size(0)) && bf16::prefers_tail(x, w)) {
      bf16::tail(x, w, p, parts, b, bias, dropout, y);
      return true;
    }
  return false;
}

// out = p[M, r]^T @ drop(q[M, C]), as [r, C] or transposed to [C, r]
template <typename T>
void outer(
    const Tile<Wide<T>>& p, int64_t parts, const Tensor& q, const Dropout& dropout, const Tensor& out,
    bool transposed) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(p.rows)) return bf16::outer(p, parts, q, dropout, out, transposed);
  vector::outer<T>(p, q, dropout, out, transposed);
}

}  // namespace fastlora
