// The backward of a DoRA layer's scaling of its columns: one pass over dy and y.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "tile.h"

namespace fastlora {
namespace {

constexpr int64_t CHUNK = 256;  // elements of a row that are in fp32 at a time, in the first-level cache
constexpr int64_t BLOCK = 64;   // rows that one thread sums up. Sums do not depend on how many threads there are.

// Of y = scale * z: dz = scale * dy, and dscale[N] = sum of dy * z over rows, where z is y / scale
template <typename T>
void scale_backward(const Tensor& dy, const Tensor& y, const Tensor& scale, const Tensor& dz, const Tensor& dscale) {
  using A = Wide<T>;
  using Vec = at::vec::Vectorized<A>;
  const int64_t M = dy.size(0), N = dy.size(1), blocks = (M + BLOCK - 1) / BLOCK;
  const Tile<A> factors = to_tile<A>(scale.unsqueeze(0));
  const Tile<A> sums(blocks, N);
  const T *dy_from = dy.const_data_ptr<T>(), *y_from = y.const_data_ptr<T>();
  T* to = dz.mutable_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 16384 / (BLOCK * std::max<int64_t>(1, N)));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    alignas(64) A a[CHUNK], b[CHUNK];
    for (int64_t block = begin; block < end; ++block) {
      A* sum = sums.row(block);
      std::fill_n(sum, sums.stride, A(0));
      for (int64_t m = block * BLOCK; m < std::min(M, (block + 1) * BLOCK); ++m) {
        for (int64_t n0 = 0; n0 < N; n0 += CHUNK) {
          const int64_t n = std::min(CHUNK, N - n0), padded = round_up(n, PAD);
          at::vec::convert(dy_from + m * dy.stride(0) + n0, a, n);
          at::vec::convert(y_from + m * y.stride(0) + n0, b, n);
          std::fill(a + n, a + padded, A(0));
          std::fill(b + n, b + padded, A(0));
          for (int64_t i = 0; i < padded; i += Vec::size()) {
            const Vec of_dy = Vec::loadu(a + i);
            at::vec::fmadd(of_dy, Vec::loadu(b + i), Vec::loadu(sum + n0 + i)).store(sum + n0 + i);
            (of_dy * Vec::loadu(factors.row(0) + n0 + i)).store(a + i);
          }
          at::vec::convert(a, to + m * N + n0, n);
        }
      }
    }
  });
  A* out = dscale.mutable_data_ptr<A>();
  for (int64_t n = 0; n < N; ++n) {
    A sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums.row(block)[n];
    out[n] = sum / factors.row(0)[n];
  }
}

std::tuple<Tensor, Tensor> dora_grad_op(const Tensor& dy, const Tensor& y, const Tensor& scale) {
  const Operands operands{"dora_grad"};
  operands.matrix("dy", dy);
  operands.matrix("y", y, dy.size(0), dy.size(1), dy.scalar_type());
  operands.vector("scale", scale, dy.size(1));
  const auto wide = dy.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor dz = at::empty(dy.sizes(), dy.options()), dscale = at::empty({dy.size(1)}, dy.options().dtype(wide));
  if (dscale.numel() == 0) return {dz, dscale};
  FASTLORA_DISPATCH(
      dy.scalar_type(), [&] { scale_backward<scalar_t>(with_rows(dy), with_rows(y), scale, dz, dscale); });
  return {dz, dscale};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("dora_grad", dora_grad_op);
}

}  // namespace fastlora
