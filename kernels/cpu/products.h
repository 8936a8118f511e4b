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

// What several adapters make of x, in one read of it where matrix instructions do it.
template <typename T>
std::vector<Tile<Wide<T>>> shrink(const Tensor& x, const std::vector<Shrink>& adapters) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(x.size(0))) return bf16::shrink(x, adapters);
  std::vector<Tile<Wide<T>>> out;
  for (const auto& [b, s, dropout] : adapters) out.push_back(vector::shrink<T>(x, b, s, dropout));
  return out;
}

// y[M, N] = init + sum of the adapters' parts
template <typename T, typename Init>
void expand(const Init& init, const std::vector<Adapter<Wide<T>>>& adapters, T* y, int64_t M, int64_t N) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(M)) return bf16::expand(init, adapters, y, M, N);
  vector::expand<T>(init, adapters, y, M, N);
}

// y[M, N] = sum of x[M, K] @ w[N, K]^T + init + sum of the adapters' parts, if there is a faster way to it than
// `expand` and torch's GEMMs; otherwise does nothing and returns false.
template <typename T, typename Init>
bool tail(at::TensorList x, at::TensorList w, const Init& init, const std::vector<Adapter<Wide<T>>>& adapters, T* y) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (by_matrix_instructions<T>(x[0].size(0)) && bf16::prefers_tail(x, w)) {
      bf16::tail(x, w, init, adapters, y);
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
