// The CPU kernels of torch.ops.fastlora: shrink, lora_matmul, lora_grad, and those of groups.
//
// The adapter's products read their large operand once, in its own dtype, and accumulate in fp32: nothing is converted,
// transposed or scaled by a pass of its own. The base product is `tail`'s where that is faster, else torch's (oneDNN,
// MKL), accumulating into what the adapter wrote.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "products.h"

namespace fastlora {
namespace {

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
  FASTLORA_DISPATCH(x.scalar_type(), [&] { shrink<scalar_t>(with_rows(x), adapters, out); });
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
  std::vector<Adapter> adapters;
  for (size_t i = 0; i < x.size(); ++i) {
    const Dropout dropout = dropout_of(p[i], seed[i]);
    adapters.push_back({xa[i], dropout.scale(), b[i].t(), dropout});
  }
  FASTLORA_DISPATCH(y.scalar_type(), [&] {
    using A = Wide<scalar_t>;
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

Tensor lora_grad_a_op(const Tensor& dxa, const Tensor& x, double p, const OptionalTensor& seed) {
  check(dxa.size(0) == x.size(0), "lora_grad_a");
  const Tensor da = at::empty({dxa.size(1), x.size(1)}, dxa.options());
  const Dropout dropout = dropout_of(p, seed);
  FASTLORA_DISPATCH(x.scalar_type(), [&] { lora_grad_a<scalar_t>(with_rows(dxa), with_rows(x), dropout, da); });
  return da;
}

std::tuple<Tensor, Tensor, Tensor> lora_grad_op(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& xa, double s, double p,
    const OptionalTensor& seed) {
  TORCH_CHECK(b.has_value() || xa.has_value(), "fastlora: lora_grad needs b or xa");
  const int64_t M = dy.size(0), N = dy.size(1);
  check(!b.has_value() || b->size(0) == N, "lora_grad");
  check((!x.has_value() || x->size(0) == M) && (!xa.has_value() || xa->size(0) == M), "lora_grad");
  const Tensor& like = b.has_value() ? *b : *xa;
  const int64_t r = like.size(1);
  const bool need_da = x.has_value() && b.has_value();
  const Tensor dxa = at::empty({b.has_value() ? M : 0, r}, like.options());
  const Tensor da = need_da ? at::empty({r, x->size(1)}, like.options()) : at::empty({0}, like.options());
  const Tensor db = xa.has_value() ? at::empty({N, xa->size(1)}, xa->options()) : at::empty({0}, like.options());
  const Dropout dropout = need_da ? dropout_of(p, seed) : Dropout();
  FASTLORA_DISPATCH(dy.scalar_type(), [&] {
    lora_grad<scalar_t>(
        with_rows(dy), need_da ? with_rows(*x) : Tensor(), b.value_or(Tensor()), xa ? with_rows(*xa) : Tensor(), s,
        dropout, dxa, da, db);
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
