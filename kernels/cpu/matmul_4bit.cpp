// The CPU kernel of torch.ops.fastlora.lora_matmul_4bit: products with 4-bit weights, of which no more is ever decoded
// than a panel in cache.
#include <torch/library.h>

#include "products.h"

namespace fastlora {
namespace {

// The sum of the products with 4-bit weights, with the adapters' parts and a bias
Tensor lora_matmul_4bit(
    at::TensorList x, const c10::List<OptionalTensor>& weights, at::IntArrayRef sizes,
    const c10::List<std::string>& quant_types, at::TensorList xa, at::TensorList b, const OptionalTensor& bias,
    at::ArrayRef<double> p, const c10::List<OptionalTensor>& seed, bool transposed) {
  const size_t count = x.size();
  const bool lists = weights.size() == 5 * count && sizes.size() == 4 * count && quant_types.size() == count &&
                     xa.size() == count && b.size() == count && p.size() == count && seed.size() == count;
  TORCH_CHECK(count > 0 && lists, "fastlora: lora_matmul_4bit needs lists of one length");
  std::vector<Weight4bit> read;
  std::vector<FourBitOperand> operands;
  std::vector<Adapter> adapters;
  read.reserve(count);
  const int64_t M = x[0].size(0), N = sizes[transposed ? 3 : 2];
  for (size_t i = 0; i < count; ++i) {
    const auto field = [&](size_t n) -> OptionalTensor { return weights[5 * i + n]; };
    const int64_t* size = sizes.data() + 4 * i;
    TORCH_CHECK(field(0).has_value() && field(1).has_value(), "fastlora: a 4-bit weight needs its bytes and scales");
    read.emplace_back(
        *field(0), *field(1), field(2), field(3), field(4), size[0], size[1], quant_types.get(i), size[2], size[3]);
    operands.push_back({&read.back(), !transposed});
    const bool base = size[transposed ? 3 : 2] == N && x[i].size(0) == M && x[i].size(1) == operands[i].depth();
    const bool adapter = xa[i].size(0) == M && b[i].size(0) == N && xa[i].size(1) == b[i].size(1);
    TORCH_CHECK(base && adapter, "fastlora: the shapes of the operands of lora_matmul_4bit do not fit together");
    TORCH_CHECK(x[i].scalar_type() == x[0].scalar_type(), "fastlora: x must have one dtype");
    const Dropout dropout = dropout_of(p[i], seed[i]);
    adapters.push_back({xa[i], dropout.scale(), b[i].t(), dropout});
  }
  TORCH_CHECK(!bias.has_value() || bias->numel() == N, "fastlora: bias must have an element for each output");
  const std::vector<Tensor> rows = with_rows(x);
  Tensor y = at::empty({M, N}, x[0].options());
  FASTLORA_DISPATCH_FLOAT(y.scalar_type(), [&] {
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    if (!bias.has_value()) return multiply_4bit<scalar_t>(rows, operands, nullptr, adapters, to, M, N);
    const Tile<float> row = to_tile<float>(bias->reshape({1, N}));
    const auto init = [&](int64_t, int64_t n0, int64_t cols, float* out) { std::copy_n(row.row(0) + n0, cols, out); };
    multiply_4bit<scalar_t>(rows, operands, init, adapters, to, M, N);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("lora_matmul_4bit", lora_matmul_4bit);
}

}  // namespace fastlora
