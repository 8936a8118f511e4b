// The CPU kernel of torch.ops.fastlora.decode_4bit: bitsandbytes' NF4 and FP4, with the adapter merged in on the way.
//
// Rows are decoded into an fp32 tile in cache, the adapter's product s * b @ a is accumulated onto it, and the sum is
// rounded once on its way out. Formats: QLoRA, arXiv:2305.14314.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "checks.h"
#include "products.h"

namespace fastlora {
namespace {

using Code = std::array<float, 16>;

alignas(64) constexpr Code NF4 = {
    -1.0f,         -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0.0f,
    0.0795802996f, 0.160930201f,  0.246112302f,  0.337915242f,  0.440709829f,  0.562617004f, 0.722956836f,   1.0f};
alignas(64) constexpr Code FP4 = {
    0.0f,  0.00520833349f,  0.666666687f,  1.0f,  0.333333343f,  0.5f,  0.166666672f,  0.25f,
    -0.0f, -0.00520833349f, -0.666666687f, -1.0f, -0.333333343f, -0.5f, -0.166666672f, -0.25f};

// 32 weights from 16 bytes, the high half of a byte first.
inline void decode_32(const uint8_t* bytes, const Code& code, float scale, float* to) {
#ifdef CPU_CAPABILITY_AVX512
  const __m512 table = _mm512_loadu_ps(code.data()), by = _mm512_set1_ps(scale);
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table), by);
  const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(pairs, table), by);  // looks at the low four bits only
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, second, odd));
#else
  for (int i = 0; i < 16; ++i) {
    to[2 * i] = code[bytes[i] >> 4] * scale;
    to[2 * i + 1] = code[bytes[i] & 15] * scale;
  }
#endif
}

// `n` weights from flat index `first` on, all of one block.
void decode_run(const uint8_t* packed, const Code& code, float scale, int64_t first, int64_t n, float* to) {
  const int64_t end = first + n;
  if (first % 2 == 1 && n > 0) *to++ = code[packed[first++ / 2] & 15] * scale;
  for (; first + 32 <= end; first += 32, to += 32) decode_32(packed + first / 2, code, scale, to);
  for (; first < end; ++first) *to++ = code[first % 2 == 0 ? packed[first / 2] >> 4 : packed[first / 2] & 15] * scale;
}

// The scale of every block in fp32, nested statistics decoded.
Tile<float> decode_absmax(
    const Tensor& absmax, const OptionalTensor& code2, const OptionalTensor& absmax2, const OptionalTensor& offset,
    int64_t blocksize2) {
  const int64_t n = absmax.numel();
  const Tensor flat = absmax.contiguous();
  if (!code2.has_value()) return to_tile<float>(flat.view({1, n}));
  Tile<float> out(1, n);
  const Tensor table = code2->to(at::kFloat).contiguous(), scales = absmax2->to(at::kFloat).contiguous();
  const float *code = table.const_data_ptr<float>(), *scale = scales.const_data_ptr<float>();
  const float plus = offset->item<float>();
  const uint8_t* from = flat.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < n; ++i) out.row(0)[i] = code[from[i]] * scale[i / blocksize2] + plus;
  return out;
}

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
  const Tile<float> scales = decode_absmax(absmax, code2, absmax2, offset, blocksize2);
  const Tensor bytes = packed.contiguous();
  const uint8_t* from = bytes.const_data_ptr<uint8_t>();
  const Code& code = quant_type == "nf4" ? NF4 : FP4;
  const auto decode = [&](int64_t n, int64_t k0, int64_t cols, auto* row) {
    for (int64_t k = 0; k < cols;) {
      const int64_t first = n * K + k0 + k, block = first / blocksize;
      const int64_t run = std::min(cols - k, (block + 1) * blocksize - first);
      decode_run(from, code, scales.row(0)[block], first, run, row + k);
      k += run;
    }
  };
  Tensor w = at::empty({N, K}, packed.options().dtype(dtype));
  std::vector<Adapter> adapters;
  if (a.has_value()) adapters.push_back({*b, s, *a, Dropout()});
  const auto decode_to = [&]<typename T>(T* to) { expand<T>(decode, adapters, to, N, K); };
  AT_DISPATCH_SWITCH(dtype, "fastlora", AT_DISPATCH_CASE(at::kFloat, [&] {
                       decode_to(w.mutable_data_ptr<scalar_t>());
                     }) AT_DISPATCH_CASE(at::kBFloat16, [&] {
                       decode_to(w.mutable_data_ptr<scalar_t>());
                     }) AT_DISPATCH_CASE(at::kHalf, [&] { decode_to(w.mutable_data_ptr<scalar_t>()); }));
  return w;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("decode_4bit", decode_4bit);
}

}  // namespace fastlora
