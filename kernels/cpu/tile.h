// Tiles of fp32 (fp64 for fp64 tensors), and the three adapter products on them by vector instructions.
//
// Tensors of any floating dtype are read into a tile, with dropout, and written from one; in between there is a single
// inner loop, `accumulate`. Work is cut by output elements only, so results do not depend on the number of threads.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "dropout.h"

#define FASTLORA_DISPATCH(DTYPE, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, DTYPE, "fastlora", __VA_ARGS__)

// The dtypes that are computed in fp32
#define FASTLORA_DISPATCH_FLOAT(DTYPE, ...)                                                  \
  AT_DISPATCH_SWITCH(                                                                        \
      DTYPE, "fastlora",                                                                     \
      AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
          AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace fastlora {

using at::Tensor;

// What a dtype is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Uninitialised memory for `rows` rows of `stride` elements.
template <typename T>
struct Buffer {
  Buffer(int64_t rows, int64_t stride)
      : stride(stride), data(static_cast<T*>(std::aligned_alloc(64, round_up(rows * stride * sizeof(T) + 1, 64)))) {
    if (!data) throw std::bad_alloc();
  }
  T* row(int64_t i) const {
    return data.get() + i * stride;
  }
  struct Free {
    void operator()(T* p) const {
      std::free(p);
    }
  };
  int64_t stride;
  std::unique_ptr<T[], Free> data;
};

inline float total(const at::vec::Vectorized<float>& lanes) {
  using Vec = at::vec::Vectorized<float>;
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, lanes);
}

constexpr int64_t PAD = 16;  // tiles have whole vectors of any instruction set a row, so no inner loop has a tail

// An fp32 or fp64 matrix with padded rows.
template <typename A>
struct Tile : Buffer<A> {
  Tile(int64_t rows, int64_t cols) : Buffer<A>(rows, round_up(cols, PAD)), rows(rows), cols(cols) {
  }
  int64_t rows, cols;
};

// A tensor whose rows have unit stride: only a transposed or expanded one is copied.
inline Tensor with_rows(const Tensor& t) {
  return t.stride(1) == 1 || t.numel() == 0 ? t : t.contiguous();
}

inline std::vector<Tensor> with_rows(at::ArrayRef<Tensor> all) {
  std::vector<Tensor> out;
  for (const Tensor& t : all) out.push_back(with_rows(t));
  return out;
}

inline Tensor in_fp32(const Tensor& t) {
  return t.to(at::kFloat).contiguous();
}

// ---- from tensors to tiles and back

// to[rows, cols] = from, whose rows or columns have unit stride if it is to be fast, and zeros up to whole vectors
template <typename A, typename T>
void read_matrix(const T* from, int64_t si, int64_t sj, int64_t rows, int64_t cols, A* to, int64_t ld) {
  bool transposed = false;
  if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>) {
    transposed = si == 1 && sj != 1;
    if (transposed) at::vec::transpose_mxn<float>(from, sj, to, ld, static_cast<int>(cols), static_cast<int>(rows));
  }
  for (int64_t i = 0; !transposed && i < rows; ++i) {
    if (sj == 1) {
      at::vec::convert(from + i * si, to + i * ld, cols);
    } else {
      for (int64_t j = 0; j < cols; ++j) to[i * ld + j] = static_cast<A>(from[i * si + j * sj]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) std::fill(to + i * ld + cols, to + i * ld + round_up(cols, PAD), A(0));
}

template <typename A>
Tile<A> to_tile(const Tensor& t) {
  const int64_t rows = t.size(0), cols = t.size(1), si = t.stride(0), sj = t.stride(1);
  Tile<A> tile(rows, cols);
  const bool by_columns = si == 1 && sj != 1;
  const int64_t lines = by_columns ? tile.stride / PAD : rows, length = by_columns ? rows * PAD : cols;
  FASTLORA_DISPATCH(t.scalar_type(), [&] {
    const scalar_t* from = t.const_data_ptr<scalar_t>();
    at::parallel_for(
        0, lines, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, length)), [&](int64_t begin, int64_t end) {
          if (by_columns) {
            const int64_t first = begin * PAD, width = std::min(cols, end * PAD) - first;
            read_matrix(from + first * sj, si, sj, rows, width, tile.row(0) + first, tile.stride);
          } else {
            read_matrix(from + begin * si, si, sj, end - begin, cols, tile.row(begin), tile.stride);
          }
        });
  });
  return tile;
}

// Rows m0 to m0 + rows of `to`, contiguous, are taken from a tile.
template <typename A>
void write_rows(const A* from, int64_t stride, int64_t m0, int64_t rows, const Tensor& to) {
  const int64_t cols = to.size(1);
  FASTLORA_DISPATCH(to.scalar_type(), [&] {
    scalar_t* out = to.mutable_data_ptr<scalar_t>() + m0 * cols;
    for (int64_t i = 0; i < rows; ++i) at::vec::convert(from + i * stride, out + i * cols, cols);
  });
}

template <typename A>
void to_tensor(const Tile<A>& tile, const Tensor& to) {
  write_rows(tile.row(0), tile.stride, 0, tile.rows, to);
}

template <typename A>
void scale(Tile<A>& tile, double by) {
  if (by != 1.0)
    for (A* v = tile.row(0); v != tile.row(tile.rows); ++v) *v *= static_cast<A>(by);
}

// Columns c0 to c0 + cols of a product [r, C] go to `out`, which is [r, C], or [C, r] if transposed; both contiguous.
template <typename A, typename T>
void write_columns(
    const A* from, int64_t stride, int64_t r, int64_t c0, int64_t cols, T* out, int64_t C, bool transposed) {
  if (!transposed) {
    for (int64_t j = 0; j < r; ++j) at::vec::convert(from + j * stride, out + j * C + c0, cols);
  } else if constexpr (std::is_same_v<A, float> && std::is_same_v<T, float>) {
    at::vec::transpose_mxn(from, stride, out + c0 * r, r, static_cast<int>(r), static_cast<int>(cols));
  } else {
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t j = 0; j < r; ++j) out[(c0 + c) * r + j] = static_cast<T>(from[j * stride + c]);
  }
}

// ---- the inner loop

constexpr int64_t RUN = 128;  // terms that are summed up before they join the rest: long sums stay as exact as a GEMM's

// c[i, :] += sum_l a[i, l] * b[l, :] for I rows and V vectors of columns, held in registers over a run of l.
template <int I, int V, typename A>
inline void accumulate_block(
    A* c, int64_t ldc, const A* a, int64_t a_i, int64_t a_l, const A* b, int64_t ldb, int64_t L) {
  using Vec = at::vec::Vectorized<A>;
  constexpr int64_t W = Vec::size();
  for (int64_t l = 0; l < L;) {
    Vec sum[I][V];
    for (int i = 0; i < I; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] = Vec(A(0));
    for (const int64_t end = std::min(L, l + RUN); l < end; ++l) {
      Vec row[V];
      for (int v = 0; v < V; ++v) row[v] = Vec::loadu(b + l * ldb + v * W);
      for (int i = 0; i < I; ++i) {
        const Vec factor(a[i * a_i + l * a_l]);
        for (int v = 0; v < V; ++v) sum[i][v] = at::vec::fmadd(factor, row[v], sum[i][v]);
      }
    }
    for (int i = 0; i < I; ++i)
      for (int v = 0; v < V; ++v) {
        A* to = c + i * ldc + v * W;
        (Vec::loadu(to) + sum[i][v]).store(to);
      }
  }
}

template <int I, typename A>
inline void accumulate_rows(
    A* c, int64_t ldc, const A* a, int64_t a_i, int64_t a_l, const A* b, int64_t ldb, int64_t L, int64_t cols) {
  constexpr int64_t W = at::vec::Vectorized<A>::size();
  int64_t n = 0;
  for (; n + 2 * W <= cols; n += 2 * W) accumulate_block<I, 2>(c + n, ldc, a, a_i, a_l, b + n, ldb, L);
  for (; n < cols; n += W) accumulate_block<I, 1>(c + n, ldc, a, a_i, a_l, b + n, ldb, L);
}

constexpr int64_t ROWS = sizeof(at::vec::Vectorized<float>) == 32 ? 4 : 8;  // AVX2 has 16 registers, others 32

// c[rows, cols] += a[rows, L] @ b[L, cols]. a has strides (a_i, a_l); cols is a multiple of PAD.
template <typename A>
inline void accumulate(
    A* c, int64_t ldc, const A* a, int64_t a_i, int64_t a_l, const A* b, int64_t ldb, int64_t rows, int64_t L,
    int64_t cols) {
  int64_t i = 0;
  for (; i + ROWS <= rows; i += ROWS) accumulate_rows<ROWS>(c + i * ldc, ldc, a + i * a_i, a_i, a_l, b, ldb, L, cols);
  for (; i < rows; ++i) accumulate_rows<1>(c + i * ldc, ldc, a + i * a_i, a_i, a_l, b, ldb, L, cols);
}

// Elements k0 to k0 + n of row m, dropped ones as zero, then zeros up to a multiple of PAD.
template <typename T, typename A>
inline void read(const T* from, int64_t n, A* to, const Dropout& dropout, int64_t m, int64_t k0) {
  at::vec::convert(from, to, n);
  dropout.apply(to, m, k0, n);
  std::fill(to + n, to + round_up(n, PAD), A(0));
}

constexpr int64_t STEP = 32;  // columns that threads share out: a cache line of bf16, whole lanes of dropout

// What one adapter makes of x: s * drop(x[M, K]) @ b[K, r].
struct Shrink {
  Tensor b;
  double s;
  Dropout dropout;
};

// One adapter's part of a product: drop(s * p[M, r] @ b[r, N]).
struct Adapter {
  Tensor p;
  double s;
  Tensor b;
  Dropout dropout;
};

// What a sum of adapters starts from: `init(m, n0, cols, row)` fills in a part of row m, nullptr stands for zero.
template <typename Init>
constexpr bool starts = !std::is_same_v<Init, std::nullptr_t>;

template <typename Init>
bool need_scratch(const std::vector<Adapter>& adapters) {
  const bool alone = adapters.size() == 1 && !starts<Init>;
  return !alone && std::any_of(adapters.begin(), adapters.end(), [](const auto& a) { return a.dropout.active(); });
}

// tile = init + the adapters' parts, for rows m0 and columns n0 on. product(i, to, add) writes adapter i's product to
// `to` or adds it there. `scratch` is as large as the tile; nothing is there if `need_scratch` says no.
template <typename Init, typename A, typename Product>
void sum_adapters(
    const Init& init, const std::vector<Adapter>& adapters, int64_t m0, int64_t rows, int64_t n0, int64_t cols, A* tile,
    A* scratch, int64_t ld, const Product& product) {
  bool add = starts<Init>;
  if constexpr (starts<Init>) {
    for (int64_t i = 0; i < rows; ++i) {
      init(m0 + i, n0, cols, tile + i * ld);
      std::fill(tile + i * ld + cols, tile + i * ld + round_up(cols, PAD), A(0));
    }
  }
  for (size_t n = 0; n < adapters.size(); ++n) {
    const Dropout& dropout = adapters[n].dropout;
    const bool apart = add && dropout.active();
    A* to = apart ? scratch : tile;
    product(n, to, add && !apart);
    for (int64_t i = 0; dropout.active() && i < rows; ++i) {
      dropout.apply(to + i * ld, m0 + i, n0, cols);
      for (int64_t c = 0; apart && c < cols; ++c) tile[i * ld + c] += to[i * ld + c];
    }
    add = true;
  }
}

// What multiplies the columns of a finished tile, before it is rounded: nothing if no scale is given
struct ColumnScale {
  explicit ColumnScale(const std::optional<Tensor>& scale) {
    if (scale.has_value()) values = in_fp32(*scale);
  }
  void apply(float* row, int64_t n0, int64_t cols) const {
    if (!values.defined()) return;
    const float* by = values.const_data_ptr<float>() + n0;
    for (int64_t c = 0; c < cols; ++c) row[c] *= by[c];
  }
  Tensor values;  // of all columns
};

// ---- the products by vector instructions

namespace vector {

constexpr int64_t COLUMNS = 512;  // of a tile: 8 rows of 512 floats stay in the first-level cache
constexpr int64_t DEPTH = 64;     // rows of a tile that are summed up at a time

// The same for a row or two, and columns of b that have unit stride: they are read as they are.
template <typename T>
Tile<float> shrink_few(const Tensor& x, const Tensor& b, double s, const Dropout& dropout) {
  using Vec = at::vec::Vectorized<float>;
  constexpr int64_t COLUMNS_AT_ONCE = 4;  // and so many sums, for an instruction to add to one takes some clocks
  const int64_t M = x.size(0), K = x.size(1), r = b.size(1), ldb = b.stride(1);
  const Tile<float> rows(M, K);
  Tile<float> out(M, r);
  for (int64_t m = 0; m < M; ++m) read(x.const_data_ptr<T>() + m * x.stride(0), K, rows.row(m), dropout, m, 0);
  const float* from = b.const_data_ptr<float>();
  const int64_t whole = K / Vec::size() * Vec::size(), work = COLUMNS_AT_ONCE * std::max<int64_t>(1, M * K);
  at::parallel_for(
      0, (r + COLUMNS_AT_ONCE - 1) / COLUMNS_AT_ONCE, std::max<int64_t>(1, 65536 / work),
      [&](int64_t begin, int64_t end) {
        for (int64_t j0 = begin * COLUMNS_AT_ONCE; j0 < std::min(r, end * COLUMNS_AT_ONCE); j0 += COLUMNS_AT_ONCE) {
          for (int64_t m = 0; m < M; ++m) {
            const float* row = rows.row(m);
            const float* column[COLUMNS_AT_ONCE];
            Vec sum[COLUMNS_AT_ONCE];
            for (int64_t j = 0; j < COLUMNS_AT_ONCE; ++j) {
              column[j] = from + std::min(j0 + j, r - 1) * ldb;
              sum[j] = Vec(0.0f);
            }
            for (int64_t k = 0; k < whole; k += Vec::size()) {
              const Vec factor = Vec::loadu(row + k);
              for (int64_t j = 0; j < COLUMNS_AT_ONCE; ++j)
                sum[j] = at::vec::fmadd(factor, Vec::loadu(column[j] + k), sum[j]);
            }
            for (int64_t j = 0; j < std::min(COLUMNS_AT_ONCE, r - j0); ++j) {
              float all = total(sum[j]);
              for (int64_t k = whole; k < K; ++k) all += row[k] * column[j][k];
              out.row(m)[j0 + j] = all * static_cast<float>(s);
            }
          }
        }
      });
  return out;
}

template <typename T>
Tile<Wide<T>> shrink(const Tensor& x, const Tensor& b, double s, const Dropout& dropout) {
  using A = Wide<T>;
  if constexpr (std::is_same_v<A, float>)
    if (x.size(0) <= 2 && b.scalar_type() == at::kFloat && b.stride(0) == 1) return shrink_few<T>(x, b, s, dropout);
  const int64_t M = x.size(0), K = x.size(1), ldx = x.stride(0);
  const Tile<A> packed = to_tile<A>(b);
  Tile<A> out(M, b.size(1));
  const T* from = x.const_data_ptr<T>();
  at::parallel_for(0, (M + ROWS - 1) / ROWS, 4, [&](int64_t begin, int64_t end) {
    const Tile<A> tile(ROWS, K);
    for (int64_t m0 = begin * ROWS; m0 < std::min(M, end * ROWS); m0 += ROWS) {
      const int64_t rows = std::min(ROWS, M - m0);
      for (int64_t i = 0; i < rows; ++i) read(from + (m0 + i) * ldx, K, tile.row(i), dropout, m0 + i, 0);
      std::fill(out.row(m0), out.row(m0 + rows), A(0));
      accumulate(
          out.row(m0), out.stride, tile.row(0), tile.stride, 1, packed.row(0), packed.stride, rows, K, out.stride);
    }
  });
  scale(out, s);
  return out;
}

// The adapter's product s p[M, r] @ b[r, N]
template <typename A>
struct AdapterProduct {
  explicit AdapterProduct(const Adapter& adapter) : left(to_tile<A>(adapter.p)), right(to_tile<A>(adapter.b)) {
    scale(left, adapter.s);
    if (left.cols < SPARSE) return;
    for (int64_t i = 0; i < left.rows; ++i) {
      const auto is_zero = [](A v) { return v == A(0); };
      const A *row = left.row(i), *end = row + left.cols, *first = std::find_if_not(row, end, is_zero);
      while (end > first && is_zero(end[-1])) --end;
      used.push_back({first - row, end - row});
    }
  }

  // tile[rows, cols] (+)= rows m0 and columns n0 on, for a multiple of PAD columns
  void onto(A* tile, int64_t ld, bool add, int64_t m0, int64_t rows, int64_t n0, int64_t cols) const {
    for (int64_t i = 0; !add && i < rows; ++i) std::fill_n(tile + i * ld, cols, A(0));
    const auto terms = [&](int64_t i, int64_t height, int64_t l, int64_t depth) {
      accumulate(
          tile + i * ld, ld, left.row(m0 + i) + l, left.stride, 1, right.row(l) + n0, right.stride, height, depth,
          cols);
    };
    if (used.empty()) return terms(0, rows, 0, left.cols);
    for (int64_t i = 0; i < rows; i += ROWS) {
      const int64_t height = std::min(ROWS, rows - i);
      auto [first, last] = used[m0 + i];
      for (int64_t j = 1; j < height; ++j) {
        first = std::min(first, used[m0 + i + j].first);
        last = std::max(last, used[m0 + i + j].second);
      }
      for (int64_t l = first; l < last;) {  // runs begin where they would without zeros: sums are the same
        const int64_t end = std::min(last, round_up(l + 1, RUN));
        terms(i, height, l, end - l);
        l = end;
      }
    }
  }

  static constexpr int64_t SPARSE = 32;  // columns from which on it is worth looking for zeros
  Tile<A> left, right;
  std::vector<std::pair<int64_t, int64_t>> used;  // of each row, the columns that are not zero, as in a mixed batch
};

template <typename T, typename Init>
void expand(const Init& init, const std::vector<Adapter>& adapters, T* y, int64_t M, int64_t N) {
  using A = Wide<T>;
  const std::vector<AdapterProduct<A>> products(adapters.begin(), adapters.end());
  at::parallel_for(0, (M + ROWS - 1) / ROWS, 4, [&](int64_t begin, int64_t end) {
    const Tile<A> tile(ROWS, COLUMNS), scratch(need_scratch<Init>(adapters) ? ROWS : 0, COLUMNS);
    for (int64_t m0 = begin * ROWS; m0 < std::min(M, end * ROWS); m0 += ROWS) {
      const int64_t rows = std::min(ROWS, M - m0);
      for (int64_t n0 = 0; n0 < N; n0 += COLUMNS) {
        const int64_t cols = std::min(COLUMNS, N - n0), padded = round_up(cols, PAD);
        const auto product = [&](size_t n, A* to, bool add) {
          products[n].onto(to, COLUMNS, add, m0, rows, n0, padded);
        };
        sum_adapters(init, adapters, m0, rows, n0, cols, tile.row(0), scratch.row(0), COLUMNS, product);
        for (int64_t i = 0; i < rows; ++i) at::vec::convert(tile.row(i), y + (m0 + i) * N + n0, cols);
      }
    }
  });
}

template <typename T>
void outer(const Tile<Wide<T>>& p, const Tensor& q, const Dropout& dropout, const Tensor& out, bool transposed) {
  using A = Wide<T>;
  const int64_t M = p.rows, r = p.cols, C = q.size(1), ldq = q.stride(0);
  const T* from = q.const_data_ptr<T>();
  FASTLORA_DISPATCH(out.scalar_type(), [&] {
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, (C + STEP - 1) / STEP, 1, [&](int64_t begin, int64_t end) {
      const Tile<A> tile(DEPTH, COLUMNS), sum(r, COLUMNS);
      const int64_t stop = std::min(C, end * STEP);
      for (int64_t c0 = begin * STEP; c0 < stop; c0 += COLUMNS) {
        const int64_t cols = std::min(COLUMNS, stop - c0), padded = round_up(cols, PAD);
        std::fill(sum.row(0), sum.row(r), A(0));
        for (int64_t m0 = 0; m0 < M; m0 += DEPTH) {
          const int64_t depth = std::min(DEPTH, M - m0);
          for (int64_t i = 0; i < depth; ++i) read(from + (m0 + i) * ldq + c0, cols, tile.row(i), dropout, m0 + i, c0);
          accumulate(sum.row(0), sum.stride, p.row(m0), 1, p.stride, tile.row(0), tile.stride, r, depth, padded);
        }
        write_columns(sum.row(0), sum.stride, r, c0, cols, to, C, transposed);
      }
    });
  });
}

}  // namespace vector
}  // namespace fastlora
