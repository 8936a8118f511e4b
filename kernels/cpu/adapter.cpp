// The CPU kernels of torch.ops.fastlora: shrink, lora_matmul and lora_grad.
//
// The adapter's products read their large operand once, in its own dtype, and accumulate in fp32: nothing is converted,
// transposed or scaled by a pass of its own. The base product is `tail`'s where that is faster, else torch's (oneDNN,
// MKL), accumulating into what the adapter wrote.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "products.h"

namespace fastlora {
namespace {

using OptionalTensor = std::optional<Tensor>;

Dropout dropout_of(double p, const OptionalTensor& seed) {
  if (p == 0.0) return Dropout();
  TORCH_CHECK(seed.has_value(), "fastlora: dropout needs a seed");
  return Dropout(p, seed->item<int64_t>());
}

// A tensor whose rows have unit stride: only a transposed or expanded one is copied.
Tensor with_rows(const Tensor& t) {
  return t.stride(1) == 1 || t.numel() == 0 ? t : t.contiguous();
}

Tensor shrink_op(const Tensor& x, const Tensor& a, double s, double p, const OptionalTensor& seed) {
  const Dropout dropout = dropout_of(p, seed);
  Tensor xa = at::empty({x.size(0), a.size(0)}, a.options());
  const Tensor rows = with_rows(x);
  FASTLORA_DISPATCH(
      x.scalar_type(), [&] { to_tensor(shrink<scalar_t>(rows, a.t(), s * dropout.scale(), dropout), xa); });
  return xa;
}

Tensor lora_matmul_op(
    const Tensor& x, const Tensor& w, const Tensor& xa, const Tensor& b, const OptionalTensor& bias, double p,
    const OptionalTensor& seed) {
  const Dropout dropout = dropout_of(p, seed);
  const int64_t N = w.size(0);
  Tensor y = at::empty({x.size(0), N}, x.options());
  const int64_t parts = dropout.active() ? 2 : bf16::parts_of(xa);
  bool complete = false;  // with the base product
  FASTLORA_DISPATCH(y.scalar_type(), [&] {
    using A = Wide<scalar_t>;
    Tile<A> left = to_tile<A>(xa);
    scale(left, dropout.scale());
    const Tile<A> row = bias.has_value() ? to_tile<A>(bias->unsqueeze(0)) : Tile<A>(0, 0);
    const A* from = bias.has_value() ? row.row(0) : nullptr;
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    complete = tail<scalar_t>(x, w, left, parts, b.t(), from, dropout, to);
    if (complete) return;
    if (from != nullptr) {
      const auto init = [&](int64_t, int64_t n0, int64_t cols, A* out) { std::copy_n(from + n0, cols, out); };
      expand<scalar_t>(left, parts, b.t(), init, dropout, to, N);
    } else {
      expand<scalar_t>(left, parts, b.t(), nullptr, dropout, to, N);
    }
  });
  if (!complete && x.size(1) > 0) y.addmm_(x, w.t());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> lora_grad_op(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& xa, double s, double p,
    const OptionalTensor& seed) {
  TORCH_CHECK(b.has_value() || xa.has_value(), "fastlora: lora_grad needs b or xa");
  const Tensor& like = b.has_value() ? *b : *xa;
  const int64_t r = like.size(1);
  const Tensor rows = with_rows(dy);
  Tensor dxa = at::empty({b.has_value() ? dy.size(0) : 0, r}, like.options());
  Tensor da = at::empty({0}, like.options()), db = at::empty({0}, like.options());
  FASTLORA_DISPATCH(dy.scalar_type(), [&] {
    if (b.has_value()) {
      auto tile = shrink<scalar_t>(rows, *b, s, Dropout());
      to_tensor(tile, dxa);
      if (x.has_value()) {
        const Dropout dropout = dropout_of(p, seed);
        scale(tile, dropout.scale());
        da = at::empty({r, x->size(1)}, like.options());
        outer<scalar_t>(tile, bf16::parts_of(*b), with_rows(*x), dropout, da, false);
      }
    }
    if (xa.has_value()) {
      db = at::empty({dy.size(1), r}, xa->options());
      outer<scalar_t>(to_tile<Wide<scalar_t>>(*xa), bf16::parts_of(*xa), rows, Dropout(), db, true);
    }
  });
  return {dxa, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("shrink", shrink_op);
  m.impl("lora_matmul", lora_matmul_op);
  m.impl("lora_grad", lora_grad_op);
}

}  // namespace fastlora
