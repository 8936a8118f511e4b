// The CPU kernel of torch.ops.fastlora.decode_4bit: bitsandbytes' NF4 and FP4, with the adapter merged in on the way.
//
// Rows are decoded into an fp32 tile in cache, the adapter's product s * b @ a is accumulated onto it, and the sum is
// rounded once on its way out.
#include <torch/library.h>

#include "checks.h"
#include "fourbit.h"
#include "products.h"

namespace fastlora {
namespace {

Tensor decode_4bit(
    const Tensor& packed, const Tensor& absmax, const OptionalTensor& code2, const OptionalTensor& absmax2,
    const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, c10::string_view quant_type, int64_t N,
    int64_t K, at::ScalarType dtype, const OptionalTensor& a, const OptionalTensor& b, double s) {
  const Operands operands{"decode_4bit"};
  operands.weight_4bit(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, K);
  operands.adapter(a, b, N, K);
  operands.scaling(s);
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "fastlora: decode_4bit: dtype must be float32, bfloat16 or float16, got ", dtype);
  if (N == 0 || K == 0) return at::empty({N, K}, packed.options().dtype(dtype));
  Weight4bit weight(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, K);
  weight.decode_scales();
  const auto decode = [&](int64_t n, int64_t k0, int64_t cols, float* row) { weight.read(n, k0, cols, row); };
  Tensor w = at::empty({N, K}, packed.options().dtype(dtype));
  std::vector<Adapter> adapters;
  if (a.has_value()) adapters.push_back({*b, s, *a, Dropout()});
  FASTLORA_DISPATCH_FLOAT(dtype, [&] { expand<scalar_t>(decode, adapters, w.mutable_data_ptr<scalar_t>(), N, K); });
  return w;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("decode_4bit", decode_4bit);
}

}  // namespace fastlora
