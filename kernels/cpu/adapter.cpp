// The CPU kernels of torch.ops.fastlora: shrink, lora_matmul, lora_grad, and those of groups.
//
// The adapter's products read their large operand once, in its own dtype, and accumulate in fp32: nothing is converted,
// transposed or scaled by a pass of its own. The base product is `tail`'s where that is faster, else torch's (oneDNN,
// MKL), accumulating into what the adapter wrote.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "products.h"

namespace fastlora {
namespace {

using Seeds = at::ArrayRef<OptionalTensor>;
using SeedList = c10::List<OptionalTensor>;  // as the dispatcher gives it

// Whether no element is to be written. An empty result may have 2^40 rows, so no loop should start to count them.
bool is_empty(const Tensor& t) {
  return t.numel() == 0;
}

std::vector<Tensor> shrink_all(
    const Tensor& x, at::TensorList a, at::ArrayRef<double> s, at::ArrayRef<double> p, Seeds seed) {
  const Operands operands{"shrink"};
  operands.matrix("x", x);
  operands.length("s", s.size(), a.size());
  operands.length("p", p.size(), a.size());
  operands.length("seed", seed.size(), a.size());
  std::vector<Shrink> adapters;
  std::vector<Tensor> out;
  for (size_t i = 0; i < a.size(); ++i) {
    operands.matrix("a", a[i], ANY, x.size(1));
    operands.scaling(s[i]);
    operands.dropout(p[i], seed[i]);
    const Dropout dropout = dropout_of(p[i], seed[i]);
    adapters.push_back({a[i].t(), s[i] * dropout.scale(), dropout});
    out.push_back(at::empty({x.size(0), a[i].size(0)}, a[i].options()));
  }
  if (!std::all_of(out.begin(), out.end(), is_empty))
    FASTLORA_DISPATCH(x.scalar_type(), [&] { shrink<scalar_t>(with_rows(x), adapters, out); });
  return out;
}

Tensor shrink_op(const Tensor& x, const Tensor& a, double s, double p, const OptionalTensor& seed) {
  return shrink_all(x, a, s, p, seed)[0];
}

std::vector<Tensor> shrink_group_op(
    const Tensor& x, at::TensorList a, at::ArrayRef<double> s, at::ArrayRef<double> p, const SeedList& seed) {
  return shrink_all(x, a, s, p, seed.vec());
}

// The sum of x[i] w[i]^T + drop(xa[i] b[i]^T), and a bias; its columns times `scale`.
Tensor matmul(
    at::TensorList x, at::TensorList w, at::TensorList xa, at::TensorList b, const OptionalTensor& bias,
    at::ArrayRef<double> p, Seeds seed, const OptionalTensor& scale) {
  const Operands operands{"lora_matmul"};
  TORCH_CHECK(!x.empty(), "fastlora: lora_matmul: a group must have at least one x");
  operands.length("w", w.size(), x.size());
  operands.length("xa", xa.size(), x.size());
  operands.length("b", b.size(), x.size());
  operands.length("p", p.size(), x.size());
  operands.length("seed", seed.size(), x.size());
  operands.matrix("x", x[0]);
  operands.matrix("w", w[0]);
  const int64_t M = x[0].size(0), N = w[0].size(0);
  const at::ScalarType dtype = x[0].scalar_type();
  std::vector<Adapter> adapters;
  for (size_t i = 0; i < x.size(); ++i) {
    operands.matrix("x", x[i], M, ANY, dtype);
    operands.matrix("w", w[i], N, x[i].size(1), dtype);
    operands.matrix("xa", xa[i], M);
    operands.matrix("b", b[i], N, xa[i].size(1));
    operands.dropout(p[i], seed[i]);
    const Dropout dropout = dropout_of(p[i], seed[i]);
    adapters.push_back({xa[i], dropout.scale(), b[i].t(), dropout});
  }
  if (bias.has_value()) operands.vector("bias", *bias, N);
  if (scale.has_value()) operands.vector("scale", *scale, N);
  Tensor y = at::empty({M, N}, x[0].options());
  if (is_empty(y)) return y;
  matmul_into(x, w, bias, adapters, scale, y);
  return y;
}

Tensor lora_matmul_op(
    const Tensor& x, const Tensor& w, const Tensor& xa, const Tensor& b, const OptionalTensor& bias, double p,
    const OptionalTensor& seed, const OptionalTensor& scale) {
  return matmul(x, w, xa, b, bias, p, seed, scale);
}

Tensor lora_matmul_group_op(
    at::TensorList x, at::TensorList w, at::TensorList xa, at::TensorList b, at::ArrayRef<double> p,
    const SeedList& seed) {
  return matmul(x, w, xa, b, std::nullopt, p, seed.vec(), std::nullopt);
}

Tensor lora_grad_a_op(const Tensor& dxa, const Tensor& x, double p, const OptionalTensor& seed) {
  const Operands operands{"lora_grad_a"};
  operands.matrix("x", x);
  operands.matrix("dxa", dxa, x.size(0));
  operands.dropout(p, seed);
  const Tensor da = at::empty({dxa.size(1), x.size(1)}, dxa.options());
  const Dropout dropout = dropout_of(p, seed);
  if (is_empty(da)) return da;
  FASTLORA_DISPATCH(x.scalar_type(), [&] { lora_grad_a<scalar_t>(with_rows(dxa), with_rows(x), dropout, da); });
  return da;
}

void check_lora_grad(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& xa, double s, double p,
    const OptionalTensor& seed) {
  const Operands operands{"lora_grad"};
  operands.matrix("dy", dy);
  TORCH_CHECK(b.has_value() || xa.has_value(), "fastlora: lora_grad: needs b or xa");
  if (x.has_value()) operands.matrix("x", *x, dy.size(0), ANY, dy.scalar_type());
  if (b.has_value()) operands.matrix("b", *b, dy.size(1));
  if (xa.has_value()) operands.matrix("xa", *xa, dy.size(0), b.has_value() ? b->size(1) : ANY);
  operands.scaling(s);
  operands.dropout(p, seed);
}

std::tuple<Tensor, Tensor, Tensor> lora_grad_op(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& b, const OptionalTensor& xa, double s, double p,
    const OptionalTensor& seed) {
  check_lora_grad(dy, x, b, xa, s, p, seed);
  const int64_t M = dy.size(0), N = dy.size(1);
  const Tensor& like = b.has_value() ? *b : *xa;
  const int64_t r = like.size(1);
  const bool need_da = x.has_value() && b.has_value();
  const Tensor dxa = at::empty({b.has_value() ? M : 0, r}, like.options());
  const Tensor da = need_da ? at::empty({r, x->size(1)}, like.options()) : at::empty({0}, like.options());
  const Tensor db = xa.has_value() ? at::empty({N, r}, xa->options()) : at::empty({0}, like.options());
  if (is_empty(dxa) && is_empty(da) && is_empty(db)) return {dxa, da, db};
  const Dropout dropout = need_da ? dropout_of(p, seed) : Dropout();
  FASTLORA_DISPATCH(dy.scalar_type(), [&] {
    lora_grad<scalar_t>(
        with_rows(dy), need_da ? with_rows(*x) : Tensor(), b.value_or(Tensor()), xa ? with_rows(*xa) : Tensor(), s,
        dropout, dxa, da, db);
  });
  return {dxa, da, db};
}

// What products of bf16 run on, which depends on the build and on the processor
std::string products_of_bf16() {
  if (bf16::available()) return bf16::amx() ? "AMX" : "AVX512-BF16";
  return vector::LANES == 8 ? "AVX2 in fp32" : "AVX-512 in fp32";
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastlora, m) {
  m.def("_products_of_bf16", products_of_bf16);
}

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("shrink", shrink_op);
  m.impl("shrink_group", shrink_group_op);
  m.impl("lora_matmul", lora_matmul_op);
  m.impl("lora_matmul_group", lora_matmul_group_op);
  m.impl("lora_grad", lora_grad_op);
  m.impl("lora_grad_a", lora_grad_a_op);
}

}  // namespace fastlora
