// The CPU kernels of the ops of experts. The rows of x are sorted: those of expert e end at offs[e]. Each expert's rows
// go through the products of one layer, and where many experts have rows, several experts are computed side by side.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "products.h"

namespace fastlora {
namespace {

// The rows of one expert
struct Rows {
  int64_t expert, first, count;
  Tensor of(const Tensor& t) const {
    return t.narrow(0, first, count);
  }
};

// Those of the experts that have rows, most rows first
std::vector<Rows> rows_of(const Operands& operands, const Tensor& offs, int64_t experts, int64_t rows) {
  TORCH_CHECK(offs.defined(), "fastlora: ", operands.op, ": offs must be a tensor, got None");
  TORCH_CHECK(
      offs.dim() == 1 && (experts == ANY || offs.size(0) == experts) && offs.scalar_type() == at::kInt && offs.is_cpu(),
      "fastlora: ", operands.op, ": offs must be int32 [", experts == ANY ? "experts" : std::to_string(experts),
      "] on cpu, got ", offs.scalar_type(), " ", offs.sizes(), " on ", offs.device());
  std::vector<Rows> found;
  int64_t first = 0;
  const Tensor ends = offs.contiguous();
  for (int64_t e = 0; e < ends.size(0); ++e) {
    const int64_t end = ends.const_data_ptr<int32_t>()[e];
    TORCH_CHECK(
        first <= end && end <= rows, "fastlora: ", operands.op, ": offs must not decrease or exceed ", rows,
        " rows, got ", end, " after ", first);
    if (end > first) found.push_back({e, first, end - first});
    first = end;
  }
  std::stable_sort(found.begin(), found.end(), [](const Rows& a, const Rows& b) { return a.count > b.count; });
  return found;
}

int64_t rows_in_all(const std::vector<Rows>& experts) {
  int64_t all = 0;
  for (const Rows& rows : experts) all += rows.count;
  return all;
}

// [rows, cols], to be written but for the rows of no expert, which are zero
Tensor output_of(const std::vector<Rows>& experts, int64_t rows, int64_t cols, const at::TensorOptions& options) {
  const Tensor out = at::empty({rows, cols}, options);
  const int64_t used = rows_in_all(experts);
  out.narrow(0, used, rows - used).zero_();
  return out;
}

// Calls compute(rows) for each. Experts that have much of the work are computed one after the other, each by all
// threads; the others side by side, in one parallel region.
template <typename Compute>
void for_each_expert(const std::vector<Rows>& experts, const Compute& compute) {
  const int64_t threads = at::get_num_threads(), all = rows_in_all(experts);
  size_t i = 0;
  const auto large = [&](const Rows& rows) { return 2 * threads * rows.count > all; };
  for (; i < experts.size() && (threads == 1 || large(experts[i])); ++i) compute(experts[i]);
  std::atomic<size_t> next{i};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // other threads have the dispatch keys of no op
    for (int64_t thread = begin; thread < end; ++thread)
      for (size_t j = next++; j < experts.size(); j = next++) compute(experts[j]);
  });
}

Tensor shrink_experts(
    const Tensor& x, const Tensor& a, const Tensor& offs, double s, double p, const OptionalTensor& seed) {
  const Operands operands{"shrink_experts"};
  operands.matrix("x", x);
  operands.stack("a", a, ANY, ANY, x.size(1));
  operands.scaling(s);
  operands.dropout(p, seed);
  const std::vector<Rows> experts = rows_of(operands, offs, a.size(0), x.size(0));
  const Tensor out = output_of(experts, x.size(0), a.size(1), a.options());
  if (out.numel() == 0) return out;
  const Dropout dropout = dropout_of(p, seed);
  const Tensor rows_of_x = with_rows(x);
  FASTLORA_DISPATCH(x.scalar_type(), [&] {
    for_each_expert(experts, [&](const Rows& rows) {
      const Shrink adapter{a[rows.expert].t(), s * dropout.scale(), dropout.from_row(rows.first)};
      shrink<scalar_t>(rows.of(rows_of_x), {adapter}, {rows.of(out)});
    });
  });
  return out;
}

Tensor lora_matmul_experts(
    const Tensor& x, const Tensor& w, const Tensor& xa, const Tensor& b, const Tensor& offs, const OptionalTensor& bias,
    double p, const OptionalTensor& seed) {
  const Operands operands{"lora_matmul_experts"};
  operands.matrix("x", x);
  operands.stack("w", w, ANY, ANY, x.size(1), x.scalar_type());
  const int64_t M = x.size(0), E = w.size(0), N = w.size(1);
  operands.matrix("xa", xa, M);
  operands.stack("b", b, E, N, xa.size(1));
  if (bias.has_value()) operands.matrix("bias", *bias, E, N);
  operands.dropout(p, seed);
  const std::vector<Rows> experts = rows_of(operands, offs, E, M);
  const Tensor y = output_of(experts, M, N, x.options());
  if (y.numel() == 0) return y;
  const Dropout dropout = dropout_of(p, seed);
  for_each_expert(experts, [&](const Rows& rows) {
    const Tensor x_of = rows.of(x), w_of = w[rows.expert];
    const OptionalTensor bias_of = bias.has_value() ? OptionalTensor((*bias)[rows.expert]) : bias;
    const Adapter adapter{rows.of(xa), dropout.scale(), b[rows.expert].t(), dropout.from_row(rows.first)};
    matmul_into(x_of, w_of, bias_of, {adapter}, std::nullopt, rows.of(y));
  });
  return y;
}

// The same with 4-bit weights w[E * N, K]; with the transposes of each expert's if `transposed`
Tensor lora_matmul_experts_4bit(
    const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& code2,
    const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2,
    std::string_view quant_type, int64_t N, int64_t K, const Tensor& xa, const Tensor& b, const Tensor& offs,
    const OptionalTensor& bias, double p, const OptionalTensor& seed, bool transposed) {
  const Operands operands{"lora_matmul_experts_4bit"};
  operands.weight_4bit(packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, N, K);
  operands.matrix("x", x);
  TORCH_CHECK(
      x.scalar_type() != at::kDouble,
      "fastlora: lora_matmul_experts_4bit: the dtype of x must be float32, bfloat16 or float16, got ", x.scalar_type());
  operands.stack("b", b, ANY, ANY, ANY);
  const int64_t M = x.size(0), E = b.size(0), rows_of_w = E == 0 ? 0 : N / E;
  TORCH_CHECK(
      E * rows_of_w == N && rows_of_w * K % blocksize == 0,
      "fastlora: lora_matmul_experts_4bit: the weight of each of ", E, " experts must begin with a whole block of ",
      blocksize, ", got a weight [", N, ", ", K, "]");
  const int64_t outputs = transposed ? K : rows_of_w;
  operands.matrix("x", x, M, transposed ? rows_of_w : K);
  operands.matrix("xa", xa, M);
  operands.stack("b", b, E, outputs, xa.size(1));
  if (bias.has_value()) operands.matrix("bias", *bias, E, outputs);
  operands.dropout(p, seed);
  const std::vector<Rows> experts = rows_of(operands, offs, E, M);
  const Tensor y = output_of(experts, M, outputs, x.options());
  if (y.numel() == 0) return y;
  const Dropout dropout = dropout_of(p, seed);
  const Tensor rows_of_x = with_rows(x);
  FASTLORA_DISPATCH_FLOAT(x.scalar_type(), [&] {
    for_each_expert(experts, [&](const Rows& rows) {
      Weight4bit w(
          packed, absmax, code2, absmax2, offset, blocksize, blocksize2, quant_type, rows_of_w, K, rows.expert);
      const Adapter adapter{rows.of(xa), dropout.scale(), b[rows.expert].t(), dropout.from_row(rows.first)};
      const OptionalTensor bias_of = bias.has_value() ? OptionalTensor((*bias)[rows.expert]) : bias;
      onto_bias<float>(bias_of, [&](const auto& init) {
        multiply_4bit<scalar_t>(
            {rows.of(rows_of_x)}, {{&w, !transposed}}, init, {adapter}, ColumnScale(std::nullopt),
            rows.of(y).mutable_data_ptr<scalar_t>(), rows.count, outputs);
      });
    });
  });
  return y;
}

Tensor lora_grad_experts(const Tensor& dxa, const Tensor& x, const Tensor& offs, double p, const OptionalTensor& seed) {
  const Operands operands{"lora_grad_experts"};
  operands.matrix("x", x);
  operands.matrix("dxa", dxa, x.size(0));
  operands.dropout(p, seed);
  const std::vector<Rows> experts = rows_of(operands, offs, ANY, x.size(0));
  const int64_t E = offs.size(0);
  const Tensor da = at::zeros({E, dxa.size(1), x.size(1)}, dxa.options());
  if (da.numel() == 0) return da;
  const Dropout dropout = dropout_of(p, seed);
  const Tensor rows_of_dxa = with_rows(dxa), rows_of_x = with_rows(x);
  FASTLORA_DISPATCH(x.scalar_type(), [&] {
    for_each_expert(experts, [&](const Rows& rows) {
      const Dropout of_rows = dropout.from_row(rows.first);
      lora_grad_a<scalar_t>(rows.of(rows_of_dxa), rows.of(rows_of_x), of_rows, da[rows.expert]);
    });
  });
  return da;
}

// The sum over a token's experts of weight * row, in fp32 (fp64 for fp64)
template <typename T>
void combine(const Tensor& rows, const Tensor& index, const OptionalTensor& weights, const Tensor& out) {
  using A = Wide<T>;
  using Vec = at::vec::Vectorized<A>;
  constexpr int64_t CHUNK = 256;  // elements of a row that are summed up at a time
  const int64_t N = rows.size(1), k = index.size(1), stride = rows.stride(0);
  const T* from = rows.const_data_ptr<T>();
  const int64_t* chosen = index.const_data_ptr<int64_t>();
  const A* by = weights.has_value() ? weights->const_data_ptr<A>() : nullptr;
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(
      0, index.size(0), std::max<int64_t>(1, 16384 / std::max<int64_t>(1, N * k)), [&](int64_t begin, int64_t end) {
        alignas(64) A sum[CHUNK], part[CHUNK] = {};
        for (int64_t t = begin; t < end; ++t) {
          for (int64_t n0 = 0; n0 < N; n0 += CHUNK) {
            const int64_t n = std::min(CHUNK, N - n0);
            std::fill_n(sum, CHUNK, A(0));
            for (int64_t j = 0; j < k; ++j) {
              at::vec::convert(from + chosen[t * k + j] * stride + n0, part, n);
              const Vec weight(by == nullptr ? A(1) : by[t * k + j]);
              for (int64_t i = 0; i < n; i += Vec::size())
                at::vec::fmadd(weight, Vec::loadu(part + i), Vec::loadu(sum + i)).store(sum + i);
            }
            at::vec::convert(sum, to + t * N + n0, n);
          }
        }
      });
}

Tensor combine_experts(const Tensor& rows, const Tensor& index, const OptionalTensor& weights) {
  const Operands operands{"combine_experts"};
  operands.matrix("rows", rows);
  TORCH_CHECK(
      index.dim() == 2 && index.scalar_type() == at::kLong && index.is_cpu(),
      "fastlora: combine_experts: index must be int64 [tokens, experts of a token] on cpu, got ", index.scalar_type(),
      " ", index.sizes(), " on ", index.device());
  if (weights.has_value()) operands.matrix("weights", *weights, index.size(0), index.size(1));
  const Tensor out = at::empty({index.size(0), rows.size(1)}, rows.options());
  const Tensor chosen = index.contiguous();
  for (const int64_t *each = chosen.const_data_ptr<int64_t>(), *end = each + chosen.numel(); each != end; ++each)
    TORCH_CHECK(
        *each >= 0 && *each < rows.size(0), "fastlora: combine_experts: index must be one of ", rows.size(0),
        " rows, got ", *each);
  if (out.numel() == 0) return out;
  FASTLORA_DISPATCH(rows.scalar_type(), [&] {
    const auto wide = c10::CppTypeToScalarType<Wide<scalar_t>>::value;
    const OptionalTensor by = weights.has_value() ? OptionalTensor(weights->to(wide).contiguous()) : weights;
    combine<scalar_t>(with_rows(rows), chosen, by, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("shrink_experts", shrink_experts);
  m.impl("lora_matmul_experts", lora_matmul_experts);
  m.impl("lora_matmul_experts_4bit", lora_matmul_experts_4bit);
  m.impl("lora_grad_experts", lora_grad_experts);
  m.impl("combine_experts", combine_experts);
}

}  // namespace fastlora
