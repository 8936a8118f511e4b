// The CPU kernels of torch.ops.fastlora: shrink, lora_matmul, lora_grad, and those of groups.
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

using Seeds = c10::List<OptionalTensor>;

void check(bool fits, const char* op) {
  TORCH_CHECK(fits, "fastlora: the shapes of the operands of ", op, " do not fit together");
}

std::vector<Tensor> shrink_group_op(
    const Tensor& x, at::TensorList a, at::ArrayRef<double> s, at::ArrayRef<double> p, const Seeds& seed) {
  std::vector<Shrink> adapters;
  std::vector<Tensor> out;
  for (size_t i = 0; i < a.size(); ++i) {
    check(a[i].size(1) == x.size(1), "shrink");
    const Dropout dropout = dropout_of(p[i], seed[i]);
    adapters.push_back({a[i].t(), s[i] * dropout.scale(), dropout});
    out.push_back(at::empty({x.size(0), a[i].size(0)}, a[i].options()));
  }
  const Tensor rows = with_rows(x);
  FASTLORA_DISPATCH(x.scalar_type(), [&] {
    const auto tiles = shrink<scalar_t>(rows, adapters);
    for (size_t i = 0; i < out.size(); ++i) to_tensor(tiles[i], out[i]);
  });
  return out;
}

Tensor shrink_op(const Tensor& x, const Tensor& a, double s, double p, const OptionalTensor& seed) {
  return shrink_group_op(x, a, s, p, Seeds({seed}))[0];
}

// The sum of x[i] w[i]^T + drop(xa[i] b[i]^T), and a bias.
Tensor matmul(
    at::TensorList x, at::TensorList w, at::TensorList xa, at::TensorList b, const OptionalTensor& bias,
    at::ArrayRef<double> p, const Seeds& seed) {
  const int64_t M = x[0].size(0), N = w[0].size(0);
  for (size_t i = 0; i < x.size(); ++i) {
    const bool base = x[i].size(0) == M && w[i].size(0) == N && x[i].size(1) == w[i].size(1);
    check(base && xa[i].size(0) == M && b[i].size(0) == N && xa[i].size(1) == b[i].size(1), "lora_matmul");
  }
  check(!bias.has_value() || bias->numel() == N, "lora_matmul");
  Tensor y = at::empty({M, N}, x[0].options());
  bool complete = false;  // with the base products
  FASTLORA_DISPATCH(y.scalar_type(), [&] {
    using A = Wide<scalar_t>;
    std::vector<Adapter<A>> adapters;
    for (size_t i = 0; i < x.size(); ++i) {
      const Dropout dropout = dropout_of(p[i], seed[i]);
      adapters.push_back({to_tile<A>(xa[i]), dropout.active() ? 2 : bf16::parts_of(xa[i]), b[i].t(), dropout});
      scale(adapters.back().p, dropout.scale());
    }
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    const auto multiply = [&](const auto& init) {
      complete = tail<scalar_t>(x, w, init, adapters, to);
      if (!complete) expand<scalar_t>(init, adapters, to, y.size(0), N);
    };
    if (!bias.has_value()) return multiply(nullptr);
    const Tile<A> row = to_tile<A>(bias->unsqueeze(0));
    multiply([&](int64_t, int64_t n0, int64_t cols, A* out) { std::copy_n(row.row(0) + n0, cols, out); });
  });
  for (size_t i = 0; !complete && i < x.size(); ++i)
    if (x[i].size(1) > 0) y.addmm_(x[i], w[i].t());
  return y;
}

Tensor lora_matmul_op(
    const Tensor& x, const Tensor& w, const Tensor& xa, const Tensor& b, const OptionalTensor& bias, double p,
    const OptionalTensor& seed) {
  return matmul(x, w, xa, b, bias, p, Seeds({seed}));
}

Tensor lora_matmul_group_op(
    at::TensorList x, at::TensorList w, at::TensorList xa, at::TensorList b, at::ArrayRef<double> p,
    const Seeds& seed) {
  return matmul(x, w, xa, b, std::nullopt, p, seed);
}

// da[r, K] = p[M, r]^T @ drop(x[M, K])
template <typename T>
Tensor grad_a(Tile<Wide<T>>& tile, int64_t parts, const Tensor& x, const Dropout& dropout, at::TensorOptions options) {
  scale(tile, dropout.scale());
  Tensor da = at::empty({tile.cols, x.size(1)}, options);
  outer<T>(tile, parts, with_rows(x), dropout, da, false);
  return da;
}

Tensor lora_grad_a_op(const Tensor& dxa, const Tensor& x, double p, const OptionalTensor& seed) {
  check(dxa.size(0) == x.size(0), "lora_grad_a");
  Tensor da;
  FASTLORA_DISPATCH(x.scalar_type(), [&] {
    auto tile = to_tile<Wide<scalar_t>>(dxa);
    const Dropout dropout = dropout_of(p, seed);
    da = grad_a<scalar_t>(tile, dropout.active() ? 2 : bf16::parts_of(dxa), x, dropout, dxa.options());
  });
  return da;
}

std::tuple<Tensor, Tensor, Tensor> lora_grad_op(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& xa, double s, double p,
    const OptionalTensor& seed) {
  TORCH_CHECK(b.has_value() || xa.has_value(), "fastlora: lora_grad needs b or xa");
  const int64_t M = dy.size(0);
  check(!b.has_value() || b->size(0) == dy.size(1), "lora_grad");
  check((!x.has_value() || x->size(0) == M) && (!xa.has_value() || xa->size(0) == M), "lora_grad");
  const Tensor& like = b.has_value() ? *b : *xa;
  const int64_t r = like.size(1);
  const Tensor rows = with_rows(dy);
  Tensor dxa = at::empty({b.has_value() ? dy.size(0) : 0, r}, like.options());
  Tensor da = at::empty({0}, like.options()), db = at::empty({0}, like.options());
  FASTLORA_DISPATCH(dy.scalar_type(), [&] {
    if (b.has_value()) {
      auto tile = std::move(shrink<scalar_t>(rows, {{*b, s, Dropout()}})[0]);
      to_tensor(tile, dxa);
      if (x.has_value()) da = grad_a<scalar_t>(tile, bf16::parts_of(*b), *x, dropout_of(p, seed), like.options());
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
  m.impl("shrink_group", shrink_group_op);
  m.impl("lora_matmul", lora_matmul_op);
  m.impl("lora_matmul_group", lora_matmul_group_op);
  m.impl("lora_grad", lora_grad_op);
  m.impl("lora_grad_a", lora_grad_a_op);
}

}  // namespace fastlora
