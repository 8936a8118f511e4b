// The products of tile.h for bf16 tensors, by the matrix instructions that oneDNN's brgemm finds (AMX, AVX512-BF16).
//
// Products of bf16 numbers are exact in fp32, and fp32 adapters keep their precision: wherever they enter, their low
// part is one more block of rows or columns of the product.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "fourbit.h"
#include "pack.h"
#ifdef FASTLORA_REFERENCE_BRGEMM  // to test what is here where there are no matrix instructions
#include "reference_brgemm.h"
#endif

namespace fastlora::bf16 {

#ifndef FASTLORA_REFERENCE_BRGEMM
namespace cpublas = at::native::cpublas;
#endif

constexpr int64_t GRAIN_M = 16;     // rows of an AMX tile: heights of tiles are multiples of it
constexpr int64_t BLOCK_M = 32;     // rows of a product
constexpr int64_t BLOCK_N = 256;    // columns of an expanded tile
constexpr int64_t TAIL_M = 128;     // rows of a tile that the base product is in too,
constexpr int64_t TAIL_N = 96;      // and its columns,
constexpr int64_t TAIL_K = 512;     // summed up over about so much of the depth at a time
constexpr int64_t TAIL_BLOCKS = 8;  // blocks of TAIL_M rows for which a panel of part of the depth is made

inline bool amx() {
  return cpublas::could_pack(at::kBFloat16);  // torch packs for AMX alone
}

// Whether oneDNN has instructions for bf16 that do more work than fp32's: AMX, or pairs (AVX512-BF16). Intel's
// processors that have AMX multiply pairs at a quarter of the rate of fp32 vectors, half of their work (measured on
// Emerald Rapids): without AMX, as a virtual machine may have it, fp32 is faster there. Cooper Lake has no AMX at all
// and is left to oneDNN.
inline bool available() {
#if defined(__AVX512BF16__) && !defined(FASTLORA_REFERENCE_BRGEMM)
  static const bool works = [] {
    if (amx()) return true;
    if (__builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake")) return false;
    const BFloat16 a[2] = {}, b[2 * PAD] = {};
    float c[PAD];
    try {
      cpublas::brgemm(1, PAD, 2, 2, PAD, PAD, false, a, b, c);
      cpublas::brgemm_release();
    } catch (const c10::Error&) {  // as oneDNN was told to do without
      return false;
    }
    return true;
  }();
  return works;
#else
  return amx();
#endif
}

// c[M, N] (+)= a[M, K] @ b, which is in pairs. oneDNN runs out of memory on an empty product.
inline void multiply(
    int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const BFloat16* a,
    const BFloat16* b, float* c) {
  if (M > 0 && N > 0 && K > 0) return cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, add, a, b, c);
  for (int64_t m = 0; !add && m < M; ++m) std::fill_n(c + m * ld_c, N, 0.0f);
}

// sink(n, m0, rows, block, ld) is given rows m0 to m0 + rows of what adapter n makes of x, each row by one thread.
// Adapters without dropout are columns of one product, the others each one of a copy of x.
template <typename Sink>
void shrink(const Tensor& x, const std::vector<Shrink>& adapters, const Sink& sink) {
  const int64_t M = x.size(0), K = x.size(1), ldx = x.stride(0), even = round_up(K, 2), count = adapters.size();
  std::vector<int64_t> at(count);  // the first column of each, those without dropout first
  int64_t cols = 0, plain = 0;
  for (const bool active : {false, true}) {
    for (int64_t n = 0; n < count; ++n) {
      if (adapters[n].dropout.active() != active) continue;
      at[n] = cols;
      cols += parts_of(adapters[n].b) * round_up(adapters[n].b.size(1), PAD);
    }
    if (!active) plain = cols;
  }
  const Buffer<uint32_t> packed(even / 2, cols);
  for (int64_t n = 0; n < count; ++n) {
    const Tensor& b = adapters[n].b;
    uint32_t* to = packed.row(0) + at[n];
    pack(b, to, parts_of(b) == 2 ? to + round_up(b.size(1), PAD) : nullptr, cols);
  }
  const BFloat16* from = x.const_data_ptr<BFloat16>();
  at::parallel_for(0, (M + BLOCK_M - 1) / BLOCK_M, 1, [&](int64_t begin, int64_t end) {
    const Buffer<BFloat16> copy(BLOCK_M, even);
    const Buffer<float> sum(BLOCK_M, cols);
    for (int64_t m0 = begin * BLOCK_M; m0 < std::min(M, end * BLOCK_M); m0 += BLOCK_M) {
      const int64_t rows = std::min(BLOCK_M, M - m0);
      const auto product = [&](const Dropout& dropout, int64_t first, int64_t width) {
        const BFloat16* block = from + m0 * ldx;
        const bool direct = rows == BLOCK_M && even == K && !dropout.active();
        if (!direct) {
          std::fill(copy.row(0), copy.row(BLOCK_M), BFloat16(0));
          for (int64_t i = 0; i < rows; ++i) {
            std::copy_n(block + i * ldx, K, copy.row(i));
            dropout.apply(copy.row(i), m0 + i, 0, K);
          }
        }
        multiply(
            BLOCK_M, width, even, direct ? ldx : even, cols, cols, false, direct ? block : copy.row(0),
            as_bf16(packed.row(0) + first), sum.row(0) + first);
      };
      if (plain > 0) product(Dropout(), 0, plain);
      for (int64_t n = 0; n < count; ++n) {
        const auto& [b, s, dropout] = adapters[n];
        const int64_t parts = parts_of(b), R = round_up(b.size(1), PAD);
        if (dropout.active()) product(dropout, at[n], parts * R);
        for (int64_t i = 0; i < rows; ++i) {
          float *h = sum.row(i) + at[n], *l = h + R, factor = static_cast<float>(s);
          for (int64_t j = 0; j < R; ++j) h[j] = factor * (parts == 2 ? h[j] + l[j] : h[j]);
        }
        sink(n, m0, rows, sum.row(0) + at[n], cols);
      }
    }
    cpublas::brgemm_release();
  });
}

// The adapter's product s p[M, r] @ b[r, N] as one of depth L: (high + low)(high + low) less its smallest term, which
// is p's high | low | high parts against b's high | high | low.
class AdapterProduct {
 public:
  explicit AdapterProduct(const Adapter& adapter)
      : rows_(adapter.p.size(0)),
        even_(round_up(adapter.p.size(1), 2)),
        p_parts_(adapter.s == 1.0 ? parts_of(adapter.p) : 2),
        b_parts_(parts_of(adapter.b)),
        L_(round_up(even_ * (p_parts_ + b_parts_ - 1), amx() ? 32 : 2)),  // 32: an AMX tile's depth
        stride_(round_up(adapter.b.size(1), PAD)),
        left_(left_rows(), L_),
        right_(L_ / 2, stride_) {
    const int64_t pairs = even_ / 2;
    pack(adapter.b, right_.row(0), b_parts_ == 2 ? right_.row(pairs * p_parts_) : nullptr, stride_);
    if (p_parts_ == 2) std::copy(right_.row(0), right_.row(pairs), right_.row(pairs));
    std::fill(right_.row(pairs * (p_parts_ + b_parts_ - 1)), right_.row(L_ / 2), 0u);
    const Tensor p = with_rows(adapter.p);
    FASTLORA_DISPATCH(p.scalar_type(), [&] {
      const scalar_t* from = p.const_data_ptr<scalar_t>();
      at::parallel_for(0, left_rows(), 128, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m)
          split_row(from + m * p.stride(0), m < rows_ ? p.size(1) : 0, static_cast<float>(adapter.s), left_.row(m));
      });
    });
  }

  // tile[rows, cols] (+)= rows m0 and columns n0 on, for a multiple of PAD columns
  void onto(float* tile, int64_t ld, bool add, int64_t m0, int64_t rows, int64_t n0, int64_t cols) const {
    multiply(
        rows, cols, L_, L_, stride_, ld, add, reinterpret_cast<const BFloat16*>(left_.row(m0)),
        as_bf16(right_.row(0) + n0), tile);
  }

 private:
  int64_t left_rows() const {
    return round_up(rows_, TAIL_M);
  }

  template <typename T>
  void split_row(const T* from, int64_t cols, float s, uint16_t* to) {
    std::fill(to, to + L_, uint16_t(0));
    for (int64_t j = 0; j < cols; j += 16) {
      alignas(64) float line[16];
      alignas(64) uint16_t high[16], low[16];
      const int64_t n = std::min<int64_t>(16, cols - j);
      read_16(from + j, n, s, line);
      split_16(line, high, low);
      const auto put = [&](const uint16_t* part, uint16_t* at) {
        n == 16 ? std::memcpy(at, part, 32) : std::memcpy(at, part, 2 * n);  // a constant size is one instruction
      };
      put(high, to + j);
      if (p_parts_ == 2) put(low, to + even_ + j);
      if (b_parts_ == 2) put(high, to + p_parts_ * even_ + j);
    }
  }

  int64_t rows_, even_, p_parts_, b_parts_, L_, stride_;
  Buffer<uint16_t> left_;
  Buffer<uint32_t> right_;
};

inline std::vector<AdapterProduct> products_of(const std::vector<Adapter>& adapters) {
  return std::vector<AdapterProduct>(adapters.begin(), adapters.end());
}

template <typename Init>
void expand(const Init& init, const std::vector<Adapter>& adapters, BFloat16* y, int64_t M, int64_t N) {
  const std::vector<AdapterProduct> products = products_of(adapters);
  at::parallel_for(0, (M + BLOCK_M - 1) / BLOCK_M, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> tile(BLOCK_M, BLOCK_N), scratch(need_scratch<Init>(adapters) ? BLOCK_M : 0, BLOCK_N);
    for (int64_t m0 = begin * BLOCK_M; m0 < std::min(M, end * BLOCK_M); m0 += BLOCK_M) {
      const int64_t rows = std::min(BLOCK_M, M - m0);
      for (int64_t n0 = 0; n0 < N; n0 += BLOCK_N) {
        const int64_t cols = std::min(BLOCK_N, N - n0);
        const auto product = [&](size_t n, float* to, bool add) {
          products[n].onto(to, BLOCK_N, add, m0, BLOCK_M, n0, round_up(cols, PAD));
        };
        sum_adapters(init, adapters, m0, rows, n0, cols, tile.row(0), scratch.row(0), BLOCK_N, product);
        for (int64_t i = 0; i < rows; ++i) round_to(tile.row(i), cols, y + (m0 + i) * N + n0);
      }
    }
    cpublas::brgemm_release();
  });
}

// Whether `tail` takes these tensors and is faster than `expand` and then oneDNN: always as measured on Zen 4, up to
// some size on Sapphire Rapids.
inline bool prefers_tail(at::TensorList x, at::TensorList w) {
  int64_t work = 0;
  for (size_t n = 0; n < x.size(); ++n) {
    const int64_t K = x[n].size(1);
    const bool rows = w[n].stride(1) == 1 && w[n].stride(0) % 2 == 0, columns = w[n].stride(0) == 1;
    if (K == 0 || K % 2 != 0 || x[n].stride(1) != 1 || !(rows || columns)) return false;
    work += x[n].size(0) * w[n].size(0) * K;
  }
  return !amx() || work <= int64_t{1} << 33;
}

// sum[TAIL_M, cols] += rows m0 on and columns k0 to k0 + depth of x, times a packed panel
inline void multiply_block(
    const Tensor& x, int64_t m0, int64_t rows, int64_t k0, int64_t depth, int64_t cols, const uint32_t* packed,
    float* sum, BFloat16* copy) {
  const int64_t ldx = x.stride(0), steps = std::max<int64_t>(1, depth / TAIL_K);
  const int64_t step = round_up((depth + steps - 1) / steps, 32);
  const int64_t height = round_up(rows, GRAIN_M);
  const bool direct = rows == height && ldx >= x.size(1);
  for (int64_t k = 0; k < depth; k += step) {
    const int64_t terms = std::min(step, depth - k);
    const BFloat16* block = x.const_data_ptr<BFloat16>() + m0 * ldx + k0 + k;
    if (!direct) {
      for (int64_t i = 0; i < rows; ++i) std::copy_n(block + i * ldx, terms, copy + i * terms);
      std::fill_n(copy + rows * terms, (height - rows) * terms, BFloat16(0));
      block = copy;
    }
    multiply(
        height, cols, terms, direct ? ldx : terms, TAIL_N, TAIL_N, true, block, as_bf16(packed + k / 2 * TAIL_N), sum);
  }
}

// Right operands of `tail`: both write rows k0 to k0 + depth of columns n0 to n0 + cols in pairs, `TAIL_N` a row.

struct DenseOperand {
  static constexpr int64_t DEEPEST = std::numeric_limits<int64_t>::max();  // of a panel

  explicit DenseOperand(const Tensor& w) : w(w) {
  }
  int64_t depth() const {
    return w.size(1);
  }
  void pack(int64_t n0, int64_t cols, int64_t k0, int64_t depth, uint32_t* to) const {
    const BFloat16* from = w.const_data_ptr<BFloat16>() + k0 * w.stride(1);
    pack_panel(from, w.stride(0), w.stride(1), n0, cols, depth, to, TAIL_N);
  }
  Tensor w;
};

struct DecodedOperand : FourBitOperand {
  static constexpr int64_t DEEPEST = 4096;

  explicit DecodedOperand(const FourBitOperand& w) : FourBitOperand(w) {
  }
  // A few hundred rows at a time are decoded and rounded, and packed as a dense weight is.
  void pack(int64_t n0, int64_t cols, int64_t k0, int64_t depth, uint32_t* to) const {
    alignas(64) float line[TAIL_K];
    alignas(64) BFloat16 rounded[TAIL_N * TAIL_K];
    for (int64_t k = 0; k < depth; k += TAIL_K) {
      const int64_t rows = std::min(TAIL_K, depth - k);
      const int64_t lines = by_columns ? cols : rows, length = by_columns ? rows : cols;
      for (int64_t i = 0; i < lines; ++i) {
        by_columns ? read(n0 + i, k0 + k, length, line) : read(k0 + k + i, n0, length, line);
        round_to(line, length, rounded + i * length);
      }
      const int64_t stride_n = by_columns ? length : 1, stride_k = by_columns ? 1 : length;
      pack_panel(rounded, stride_n, stride_k, 0, cols, rows, to + k / 2 * TAIL_N, TAIL_N);
    }
  }
};

// Rows of the right operand of one of several products
struct Piece {
  size_t part;
  int64_t k0, depth;
};

// All rows, in panels that are made one after the other
template <typename Operand>
std::vector<std::vector<Piece>> panels_of(const std::vector<Operand>& w) {
  std::vector<std::vector<Piece>> panels(1);
  int64_t room = Operand::DEEPEST;
  for (size_t part = 0; part < w.size(); ++part) {
    for (int64_t k0 = 0; k0 < w[part].depth();) {
      const int64_t depth = std::min(room, w[part].depth() - k0);
      if (depth == 0) {
        panels.emplace_back();
        room = Operand::DEEPEST;
        continue;
      }
      panels.back().push_back({part, k0, depth});
      k0 += depth;
      room -= depth;
    }
  }
  return panels;
}

// y[M, N] = scale * (sum of x[i] @ w[i] + init + the adapters' parts): all accumulate in one fp32 tile, which is
// rounded once. A panel of the weights is packed and kept in the second-level cache for all rows. Depths are even.
template <typename Operand, typename Init>
void tail(
    const std::vector<Tensor>& x, const std::vector<Operand>& w, const Init& init, const std::vector<Adapter>& adapters,
    const ColumnScale& column_scale, BFloat16* y, int64_t M, int64_t N) {
  const int64_t threads = at::get_num_threads();
  if (M == 0 || N == 0) return;
  const int64_t across = (N + TAIL_N - 1) / TAIL_N, blocks = (M + TAIL_M - 1) / TAIL_M;
  const int64_t groups = std::min(blocks, (threads + across - 1) / across);  // few panels: threads share a panel's rows
  const std::vector<std::vector<Piece>> panels = panels_of(w);
  int64_t deepest = 0;
  for (const auto& pieces : panels) {
    int64_t depth = 0;
    for (const Piece& piece : pieces) depth += piece.depth;
    deepest = std::max(deepest, depth);
  }
  const bool once = panels.size() == 1;
  const int64_t height = once ? 1 : TAIL_BLOCKS;  // blocks of rows that are summed up side by side
  const std::vector<AdapterProduct> products = products_of(adapters);
  at::parallel_for(0, across * groups, 1, [&](int64_t begin, int64_t end) {
    const Buffer<uint32_t> panel(deepest / 2, TAIL_N);
    const Buffer<float> tile(height * TAIL_M, TAIL_N), scratch(need_scratch<Init>(adapters) ? TAIL_M : 0, TAIL_N);
    const Buffer<BFloat16> copy(TAIL_M, std::min(deepest, 2 * TAIL_K));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n0 = task / groups * TAIL_N, cols = std::min(TAIL_N, N - n0), padded = round_up(cols, PAD);
      const int64_t group = task % groups, first = blocks * group / groups, last = blocks * (group + 1) / groups;
      for (int64_t pass = first; pass < last; pass += height) {
        for (size_t n = 0; n < panels.size(); ++n) {
          uint32_t* packed = panel.row(0);
          for (const auto& [part, k0, depth] : panels[n]) {
            if (!once || pass == first) w[part].pack(n0, cols, k0, depth, packed);
            packed += depth / 2 * TAIL_N;
          }
          for (int64_t block = pass; block < std::min(last, pass + height); ++block) {
            const int64_t m0 = block * TAIL_M, rows = std::min(TAIL_M, M - m0);
            float* sum = tile.row((block - pass) * TAIL_M);
            const auto product = [&](size_t i, float* to, bool add) {
              products[i].onto(to, TAIL_N, add, m0, round_up(rows, GRAIN_M), n0, padded);
            };
            if (n == 0) sum_adapters(init, adapters, m0, rows, n0, cols, sum, scratch.row(0), TAIL_N, product);
            packed = panel.row(0);
            for (const auto& [part, k0, depth] : panels[n]) {
              multiply_block(x[part], m0, rows, k0, depth, padded, packed, sum, copy.row(0));
              packed += depth / 2 * TAIL_N;
            }
            for (int64_t i = 0; n + 1 == panels.size() && i < rows; ++i) {
              column_scale.apply(sum + i * TAIL_N, n0, cols);
              round_to(sum + i * TAIL_N, cols, y + (m0 + i) * N + n0);
            }
          }
        }
      }
    }
    cpublas::brgemm_release();
  });
}

}  // namespace fastlora::bf16
