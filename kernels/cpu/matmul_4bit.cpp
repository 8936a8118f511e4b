// The CPU kernel of torch.ops.fastlora.lora_matmul_4bit: products with 4-bit weights, of which no more is ever decoded
// than a panel in cache.
#include <torch/library.h>

#include "checks.h"
#include "products.h"

namespace fastlora {
namespace {

// The sum of the products with 4-bit weights, with the adapters' parts and a bias; its columns times `scale`
Tensor lora_matmul_4bit(
    at::TensorList x, const c10::List<OptionalTensor>& weights, at::IntArrayRef sizes,
    const c10::List<std::string>& quant_types, at::TensorList xa, at::TensorList b, const OptionalTensor& bias,
    at::ArrayRef<double> p, const c10::List<OptionalTensor>& seed, bool transposed, const OptionalTensor& scale) {
  const Operands check{"lora_matmul_4bit"};
  const size_t count = x.size();
  TORCH_CHECK(count > 0, "fastlora: lora_matmul_4bit: x must have at least one entry");
  check.length("weights", weights.size(), 5 * count);
  check.length("sizes", sizes.size(), 4 * count);
  check.length("quant_types", quant_types.size(), count);
  check.length("xa", xa.size(), count);
  check.length("b", b.size(), count);
  check.length("p", p.size(), count);
  check.length("seed", seed.size(), count);
  std::vector<Weight4bit> read;
  std::vector<FourBitOperand> operands;
  std::vector<Adapter> adapters;
  read.reserve(count);
  check.matrix("x", x[0]);
  TORCH_CHECK(
      x[0].scalar_type() != at::kDouble,
      "fastlora: lora_matmul_4bit: the dtype of x must be float32, bfloat16 or float16, got ", x[0].scalar_type());
  const int64_t M = x[0].size(0), N = sizes[transposed ? 3 : 2];
  for (size_t i = 0; i < count; ++i) {
    const auto field = [&](size_t n) -> OptionalTensor { return weights[5 * i + n]; };
    const int64_t* size = sizes.data() + 4 * i;
    const std::string quant_type = quant_types.get(i);
    TORCH_CHECK(
        field(0).has_value() && field(1).has_value(),
        "fastlora: lora_matmul_4bit: a 4-bit weight needs its packed bytes and absmax");
    check.weight_4bit(
        *field(0), *field(1), field(2), field(3), field(4), size[0], size[1], quant_type, size[2], size[3]);
    TORCH_CHECK(size[transposed ? 3 : 2] == N, "fastlora: lora_matmul_4bit: the weights must have the same outputs");
    check.matrix("x", x[i], M, size[transposed ? 2 : 3], x[0].scalar_type());
    check.matrix("b", b[i], N);
    check.matrix("xa", xa[i], M, b[i].size(1));
    check.dropout(p[i], seed[i]);
    read.emplace_back(
        *field(0), *field(1), field(2), field(3), field(4), size[0], size[1], quant_type, size[2], size[3]);
    operands.push_back({&read.back(), !transposed});
    const Dropout dropout = dropout_of(p[i], seed[i]);
    adapters.push_back({xa[i], dropout.scale(), b[i].t(), dropout});
  }
  if (bias.has_value()) check.vector("bias", *bias, N);
  if (scale.has_value()) check.vector("scale", *scale, N);
  Tensor y = at::empty({M, N}, x[0].options());
  if (y.numel() == 0) return y;
  const std::vector<Tensor> rows = with_rows(x);
  const ColumnScale column_scale(scale);
  FASTLORA_DISPATCH_FLOAT(y.scalar_type(), [&] {
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    onto_bias<float>(bias, [&](const auto& init) {
      multiply_4bit<scalar_t>(rows, operands, init, adapters, column_scale, to, M, N);
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_matmul_4bit", lora_matmul_4bit);
}

}  // namespace fastlora
