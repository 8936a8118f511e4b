// What the ops ask of their operands before a kernel reads them: pointers know no bounds. fastlora/checks.py asks the
// same for the ops in plain torch and for the fakes.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <cmath>
#include <optional>

namespace fastlora {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t ANY = -1;  // a size that the op leaves open

// The operands of one op; a message names it.
struct Operands {
  const char* op;
  // Views and copies that the op makes of them, one or more for each expert, are then made without autograd's layer:
  // it costs half of such a call, and the ops have no gradients of their own.
  at::AutoDispatchBelowADInplaceOrView below_autograd{};

  static bool is_floating(at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
  }

  // t is a floating-point matrix [rows, cols], of this dtype if one is given.
  void matrix(
      const char* name, const Tensor& t, int64_t rows = ANY, int64_t cols = ANY,
      at::ScalarType dtype = at::ScalarType::Undefined) const {
    const auto sizes = t.sizes();
    const bool fits = sizes.size() == 2 && (rows == ANY || sizes[0] == rows) && (cols == ANY || sizes[1] == cols);
    TORCH_CHECK(fits, "fastlora: ", op, ": ", name, " must be ", shape({rows, cols}), ", got ", sizes);
    floating(name, t, dtype);
  }

  // The same for a matrix of each expert, [experts, rows, cols].
  void stack(
      const char* name, const Tensor& t, int64_t experts, int64_t rows, int64_t cols,
      at::ScalarType dtype = at::ScalarType::Undefined) const {
    const auto sizes = t.sizes();
    const auto is = [](int64_t size, int64_t expected) { return expected == ANY || size == expected; };
    const bool fits = sizes.size() == 3 && is(sizes[0], experts) && is(sizes[1], rows) && is(sizes[2], cols);
    TORCH_CHECK(fits, "fastlora: ", op, ": ", name, " must be ", shape({experts, rows, cols}), ", got ", sizes);
    floating(name, t, dtype);
  }

  void vector(const char* name, const Tensor& t, int64_t length) const {
    const bool fits = t.dim() == 1 && t.size(0) == length;
    TORCH_CHECK(fits, "fastlora: ", op, ": ", name, " must be [", length, "], got ", t.sizes());
    floating(name, t, at::ScalarType::Undefined);
  }

  void floating(const char* name, const Tensor& t, at::ScalarType dtype) const {
    const at::ScalarType is = t.scalar_type();
    const bool fits = (dtype == at::ScalarType::Undefined ? is_floating(is) : is == dtype) && t.is_cpu();
    TORCH_CHECK(
        fits, "fastlora: ", op, ": ", name, " must be ",
        dtype == at::ScalarType::Undefined ? "floating point" : c10::toString(dtype), " on cpu, got ", is, " on ",
        t.device());
  }

  // At least `least` elements of this dtype, in any shape.
  void elements(const char* name, const Tensor& t, int64_t least, bool exact, at::ScalarType dtype) const {
    const bool fits = exact ? t.numel() == least : t.numel() >= least;
    TORCH_CHECK(
        fits, "fastlora: ", op, ": ", name, " must have ", exact ? "" : "at least ", least, " elements, got ",
        t.sizes());
    floating(name, t, dtype);
  }

  void scaling(double s) const {
    TORCH_CHECK(std::isfinite(s), "fastlora: ", op, ": s must be finite, got ", s);
  }

  void dropout(double p, const OptionalTensor& seed) const {
    if (p == 0.0) return;
    TORCH_CHECK(p > 0.0 && p < 1.0, "fastlora: ", op, ": p must be in [0, 1), got ", p);
    TORCH_CHECK(seed.has_value(), "fastlora: ", op, ": dropout needs a seed");
    elements("seed", *seed, 1, true, at::kLong);
  }

  void length(const char* name, size_t is, size_t expected) const {
    TORCH_CHECK(is == expected, "fastlora: ", op, ": ", name, " must have ", expected, " entries, got ", is);
  }

  // The bytes and statistics of a 4-bit weight [N, K], and what says how to read them
  void weight_4bit(
      const Tensor& packed, const Tensor& absmax, const OptionalTensor& code2, const OptionalTensor& absmax2,
      const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, c10::string_view quant_type, int64_t N,
      int64_t K) const {
    TORCH_CHECK(
        quant_type == "nf4" || quant_type == "fp4", "fastlora: ", op, ": quant_type must be nf4 or fp4, got ",
        quant_type);
    const bool sane = N >= 0 && K >= 0 && (K == 0 || N <= (int64_t{1} << 62) / K);
    TORCH_CHECK(sane, "fastlora: ", op, ": a weight [", N, ", ", K, "] cannot be");
    block("blocksize", blocksize);
    const int64_t blocks = (N * K + blocksize - 1) / blocksize;
    elements("packed", packed, (N * K + 1) / 2, false, at::kByte);
    const bool nested = code2.has_value();
    TORCH_CHECK(
        nested == absmax2.has_value() && nested == offset.has_value(), "fastlora: ", op,
        ": code2, absmax2 and offset are those of nested statistics: all must be given, or none");
    elements("absmax", absmax, blocks, false, nested ? at::kByte : at::ScalarType::Undefined);
    if (!nested) return;
    block("blocksize2", blocksize2);
    elements("code2", *code2, 256, true, at::ScalarType::Undefined);
    const int64_t blocks2 = absmax.numel() / blocksize2 + (absmax.numel() % blocksize2 != 0);
    elements("absmax2", *absmax2, blocks2, false, at::ScalarType::Undefined);
    elements("offset", *offset, 1, true, at::ScalarType::Undefined);
  }

  // Both matrices of an adapter of a weight [N, K], or none
  void adapter(const OptionalTensor& a, const OptionalTensor& b, int64_t N, int64_t K) const {
    TORCH_CHECK(a.has_value() == b.has_value(), "fastlora: ", op, ": a and b must both be given, or none");
    if (!a.has_value()) return;
    matrix("a", *a, ANY, K);
    matrix("b", *b, N, a->size(0));
  }

  // No two elements of a matrix that is written share memory.
  void writable(const char* name, const Tensor& t) const {
    const int64_t rows = t.size(0), cols = t.size(1), step = t.stride(0), across = t.stride(1);
    const bool single = rows == 0 || cols == 0 || (rows == 1 && cols == 1);
    const bool by_rows = (cols <= 1 || across > 0) && (rows <= 1 || step > (cols - 1) * across);
    const bool by_columns = (rows <= 1 || step > 0) && (cols <= 1 || across > (rows - 1) * step);
    TORCH_CHECK(
        single || by_rows || by_columns, "fastlora: ", op, ": elements of ", name, " of strides ", t.strides(),
        " share memory, and it is written");
  }

  // Two matrices of one shape, of which one is written, share no memory. Interleaved rows of one tensor do not.
  void apart(const char* name, const Tensor& t, const char* other, const Tensor& u) const {
    const int64_t size = t.element_size(), rows = t.size(0), cols = t.size(1);
    if (t.numel() == 0) return;
    const auto first = [](const Tensor& m) { return reinterpret_cast<intptr_t>(m.const_data_ptr()); };
    const auto last = [&](const Tensor& m) {
      return first(m) + ((rows - 1) * m.stride(0) + (cols - 1) * m.stride(1)) * size;
    };
    bool fits = last(t) < first(u) || last(u) < first(t);
    if (!fits && t.stride(1) == 1 && u.stride(1) == 1 && t.stride(0) == u.stride(0) && t.stride(0) > 0) {
      const int64_t step = t.stride(0) * size, width = cols * size;
      const int64_t ahead = ((first(u) - first(t)) % step + step) % step;  // of a row of t
      fits = ahead >= width && ahead + width <= step;
    }
    TORCH_CHECK(fits, "fastlora: ", op, ": ", name, " and ", other, " share memory, and it works in place");
  }

 private:
  void block(const char* name, int64_t size) const {
    const bool fits = size >= 32 && size <= 4096 && (size & (size - 1)) == 0;
    TORCH_CHECK(fits, "fastlora: ", op, ": ", name, " must be a power of two from 32 to 4096, got ", size);
  }

  static std::string shape(std::initializer_list<int64_t> sizes) {
    std::string text;
    for (const int64_t n : sizes)
      text += (text.empty() ? "[" : ", ") + (n == ANY ? std::string("*") : std::to_string(n));
    return text + "]";
  }
};

}  // namespace fastlora
