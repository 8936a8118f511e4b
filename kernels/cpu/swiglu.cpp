// h = act(gate) * up of a gated MLP, and its backward, which computes h again: one pass over memory each, in fp32.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>

#include "checks.h"
#include "tile.h"

namespace fastlora {
namespace {

// FAST: an exponential to 20 ulp of fp32, more than bf16 and fp16 hold.
template <typename Vec, bool FAST>
Vec exp(const Vec& x) {
  if constexpr (FAST)
    return x.exp_u20();
  else
    return x.exp();
}

// sigmoid(x) and 1 - sigmoid(x), neither by cancellation
template <typename Vec, bool FAST>
std::pair<Vec, Vec> sigmoid(const Vec& x) {
  const Vec e = exp<Vec, FAST>(x.neg()), s = (Vec(1) + e).reciprocal();
  return {s, Vec::blendv(Vec(1) - s, e * s, e < Vec(1))};
}

// Each activation gives act(x) and, with SLOPE, act'(x).
struct Silu {
  template <typename Vec, bool FAST, bool SLOPE>
  static std::pair<Vec, Vec> at(const Vec& x) {
    const auto [s, rest] = sigmoid<Vec, FAST>(x);
    const Vec value = x * s;
    return {value, SLOPE ? s + value * rest : value};
  }
};

struct Gelu {
  template <typename Vec, bool FAST, bool SLOPE>
  static std::pair<Vec, Vec> at(const Vec& x) {
    const Vec cdf = Vec(0.5) + Vec(0.5) * (x * Vec(M_SQRT1_2)).erf(), value = x * cdf;
    if constexpr (!SLOPE) return {value, value};
    return {value, cdf + x * Vec(M_2_SQRTPI * M_SQRT1_2 / 2) * exp<Vec, FAST>(Vec(-0.5) * x * x)};
  }
};

struct GeluTanh {  // (1 + tanh(z)) / 2 is sigmoid(2 z)
  template <typename Vec, bool FAST, bool SLOPE>
  static std::pair<Vec, Vec> at(const Vec& x) {
    const Vec scale(2 * M_2_SQRTPI * M_SQRT1_2), square = x * x;
    const auto [cdf, rest] = sigmoid<Vec, FAST>(scale * x * (Vec(1) + Vec(0.044715) * square));
    const Vec value = x * cdf;
    return {value, SLOPE ? cdf + value * rest * scale * (Vec(1) + Vec(0.134145) * square) : value};
  }
};

struct QuickGelu {
  template <typename Vec, bool FAST, bool SLOPE>
  static std::pair<Vec, Vec> at(const Vec& x) {
    const Vec scale(1.702);
    const auto [s, rest] = sigmoid<Vec, FAST>(scale * x);
    const Vec value = x * s;
    return {value, SLOPE ? s + scale * value * rest : value};
  }
};

template <typename Vec>
Vec positive(const Vec& x, const Vec& then) {  // NaN is kept
  return Vec::blendv(then, Vec(0), x <= Vec(0));
}

struct Relu {
  template <typename Vec, bool FAST, bool SLOPE>
  static std::pair<Vec, Vec> at(const Vec& x) {
    return {positive(x, x), positive(x, Vec(1))};
  }
};

struct ReluSquared {
  template <typename Vec, bool FAST, bool SLOPE>
  static std::pair<Vec, Vec> at(const Vec& x) {
    const Vec kept = positive(x, x);
    return {kept * kept, kept + kept};
  }
};

constexpr int64_t CHUNK = 256;  // elements of a row that are in fp32 at a time, in the first-level cache

// h = act(gate) * up, without up act(gate); BACKWARD: h holds dh before, and gate and up their gradients afterwards.
template <typename T, typename Activation, bool BACKWARD>
void rows(const Tensor& gate, const OptionalTensor& up, const Tensor& h) {
  using A = Wide<T>;
  using Vec = at::vec::Vectorized<A>;
  constexpr bool FAST = sizeof(T) == 2;
  const int64_t M = gate.size(0), K = gate.size(1);
  const int64_t stride_u = up.has_value() ? up->stride(0) : 0;
  T *g = static_cast<T*>(gate.data_ptr()), *to = static_cast<T*>(h.data_ptr());
  T* u = up.has_value() ? static_cast<T*>(up->data_ptr()) : nullptr;
  at::parallel_for(0, M, std::max<int64_t>(1, 16384 / K), [&](int64_t begin, int64_t end) {
    alignas(64) A a[CHUNK] = {}, b[CHUNK], d[CHUNK] = {};
    std::fill_n(b, CHUNK, A(1));
    for (int64_t m = begin; m < end; ++m) {
      T *gate_row = g + m * gate.stride(0), *up_row = u + m * stride_u, *h_row = to + m * h.stride(0);
      for (int64_t k = 0; k < K; k += CHUNK) {
        const int64_t n = std::min(CHUNK, K - k);
        at::vec::convert(gate_row + k, a, n);
        if (u != nullptr) at::vec::convert(up_row + k, b, n);
        if constexpr (BACKWARD) at::vec::convert(h_row + k, d, n);
        for (int64_t i = 0; i < n; i += Vec::size()) {
          const Vec factor = Vec::loadu(b + i);
          const auto [value, slope] = Activation::template at<Vec, FAST, BACKWARD>(Vec::loadu(a + i));
          if constexpr (BACKWARD) {
            const Vec dh = Vec::loadu(d + i);
            (dh * factor * slope).store(a + i);
            if (u != nullptr) (dh * value).store(b + i);
          }
          (value * factor).store(d + i);
        }
        if constexpr (BACKWARD) {
          at::vec::convert(a, gate_row + k, n);
          if (u != nullptr) at::vec::convert(b, up_row + k, n);
        }
        at::vec::convert(d, h_row + k, n);
      }
    }
  });
}

template <bool BACKWARD>
void run(const Tensor& gate, const OptionalTensor& up, const Tensor& h, std::string_view activation) {
  FASTLORA_DISPATCH(gate.scalar_type(), [&] {
    if (activation == "silu") return rows<scalar_t, Silu, BACKWARD>(gate, up, h);
    if (activation == "gelu") return rows<scalar_t, Gelu, BACKWARD>(gate, up, h);
    if (activation == "gelu_tanh") return rows<scalar_t, GeluTanh, BACKWARD>(gate, up, h);
    if (activation == "quick_gelu") return rows<scalar_t, QuickGelu, BACKWARD>(gate, up, h);
    if (activation == "relu") return rows<scalar_t, Relu, BACKWARD>(gate, up, h);
    rows<scalar_t, ReluSquared, BACKWARD>(gate, up, h);
  });
}

void check(
    const Operands& operands, const Tensor& gate, const OptionalTensor& up, const Tensor& dh,
    std::string_view activation) {
  operands.matrix("gate", gate);
  if (up.has_value()) operands.matrix("up", *up, gate.size(0), gate.size(1), gate.scalar_type());
  operands.matrix("dh", dh, gate.size(0), gate.size(1), gate.scalar_type());
  const std::string_view names[] = {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"};
  TORCH_CHECK(
      std::find(std::begin(names), std::end(names), activation) != std::end(names), "fastlora: ", operands.op,
      ": activation must be one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, got ", activation);
}

Tensor swiglu_op(const Tensor& gate, const OptionalTensor& up, std::string_view activation) {
  check(Operands{"swiglu"}, gate, up, gate, activation);
  Tensor h = at::empty(gate.sizes(), gate.options());
  if (h.numel() == 0) return h;
  run<false>(with_rows(gate), up.has_value() ? OptionalTensor(with_rows(*up)) : up, h, activation);
  return h;
}

void swiglu_backward_op(Tensor& dh, Tensor& gate, const OptionalTensor& up, std::string_view activation) {
  const Operands operands{"swiglu_backward_"};
  check(operands, gate, up, dh, activation);
  operands.apart("dh", dh, "gate", gate);
  if (up.has_value()) {
    operands.apart("dh", dh, "up", *up);
    operands.apart("gate", gate, "up", *up);
  }
  operands.writable("dh", dh);
  operands.writable("gate", gate);
  if (up.has_value()) operands.writable("up", *up);
  if (gate.numel() == 0) return;
  const Tensor h = with_rows(dh), g = with_rows(gate);
  const OptionalTensor u = up.has_value() ? OptionalTensor(with_rows(*up)) : up;
  run<true>(g, u, h, activation);
  if (!h.is_same(dh)) dh.copy_(h);
  if (!g.is_same(gate)) gate.copy_(g);
  if (u.has_value() && !u->is_same(*up)) up->copy_(*u);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("swiglu", swiglu_op);
  m.impl("swiglu_backward_", swiglu_backward_op);
}

}  // namespace fastlora
