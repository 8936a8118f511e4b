// The product of a few rows of x with a 4-bit weight, which is read once: weights are looked up and multiplied in
// registers, in whatever order the look-up gives them, and x is put into that order before.
#pragma once

#include "fourbit.h"
#include "tile.h"

namespace fastlora::vector {

constexpr int64_t CHUNK = 64;                          // weights that are looked up together
constexpr int64_t FEW = sizeof(__m256) == 32 ? 4 : 8;  // rows for which a weight is looked up once

// Half of the codes of 64 weights
inline void look_up(const uint8_t* bytes, int half, const Table& table, at::vec::Vectorized<float>* to) {
#ifdef CPU_CAPABILITY_AVX512
  const __m512 codes = _mm512_loadu_ps(table.code.data());
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * half)));
  to[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), codes);
  to[1] = _mm512_permutexvar_ps(pairs, codes);
#else
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), low = _mm256_set1_epi8(15);
  __m256 codes[4];
  look_up_32(_mm256_and_si256(half == 0 ? _mm256_srli_epi16(pairs, 4) : pairs, low), table, codes);
  for (int i = 0; i < 4; ++i) to[i] = codes[i];
#endif
}

// Which of its 64 weights `look_up` gives at place i of both halves
inline int64_t place(int64_t i) {
#ifdef CPU_CAPABILITY_AVX512
  return i / 32 * 32 + i % 16 * 2 + i / 16 % 2;
#else
  return (i % 8 / 4 * 16 + i % 32 / 8 * 4 + i % 4) * 2 + i / 32;
#endif
}

// Whether whole chunks make up a block, and whole blocks a row
inline bool in_chunks(const Weight4bit& w) {
  return w.blocksize % CHUNK == 0 && w.K % w.blocksize == 0;
}

// out[i] += the product of row n of w with row i of x[I, K], which is in the order of `look_up`
template <int I>
void dot(const Weight4bit& w, int64_t n, const float* x, float* out, int64_t ld_out) {
  using Vec = at::vec::Vectorized<float>;
  const uint8_t* bytes = w.bytes + n * w.K / 2;
  const float* scales = w.scales + n * (w.K / w.blocksize);
  Vec total[I];
  for (int i = 0; i < I; ++i) total[i] = Vec(0.0f);
  for (int64_t k = 0; k < w.K; ++scales) {
    Vec sum[I];
    for (int i = 0; i < I; ++i) sum[i] = Vec(0.0f);
    for (const int64_t end = k + w.blocksize; k < end; k += CHUNK, bytes += CHUNK / 2) {
      for (int half = 0; half < 2; ++half) {
        constexpr int64_t VECTORS = CHUNK / 2 / Vec::size();
        Vec codes[VECTORS];
        look_up(bytes, half, w.table, codes);
        for (int64_t v = 0; v < VECTORS; ++v)
          for (int i = 0; i < I; ++i)
            sum[i] = at::vec::fmadd(codes[v], Vec::loadu(x + i * w.K + k + half * CHUNK / 2 + v * Vec::size()), sum[i]);
      }
    }
    for (int i = 0; i < I; ++i) total[i] = at::vec::fmadd(Vec(*scales), sum[i], total[i]);
  }
  const auto add = [](const Vec& a, const Vec& b) { return a + b; };
  for (int i = 0; i < I; ++i) out[i * ld_out] += at::vec::vec_reduce_all<float>(add, total[i]);
}

// The same for all rows
template <int I = FEW>
void dots(const Weight4bit& w, int64_t n, const float* x, int64_t rows, float* out, int64_t ld_out) {
  for (; rows >= I; rows -= I, x += I * w.K, out += I * ld_out) dot<I>(w, n, x, out, ld_out);
  if constexpr (I > 1) dots<I - 1>(w, n, x, rows, out, ld_out);
}

// y[M, N] = x w^T + init + the adapters' parts
template <typename T, typename Init>
void multiply_few(const Tensor& x, const Weight4bit& w, const Init& init, const std::vector<Adapter>& adapters, T* y) {
  constexpr int64_t STRIP = 32;
  const int64_t M = x.size(0), N = w.N, K = w.K;
  const Buffer<float> ordered(M, K);
  for (int64_t m = 0; m < M; ++m) {
    const T* from = x.const_data_ptr<T>() + m * x.stride(0);
    for (int64_t k = 0; k < K; k += CHUNK)
      for (int64_t i = 0; i < CHUNK; ++i) ordered.row(m)[k + i] = static_cast<float>(from[k + place(i)]);
  }
  const std::vector<AdapterProduct<float>> products(adapters.begin(), adapters.end());
  at::parallel_for(0, (N + STRIP - 1) / STRIP, 4, [&](int64_t begin, int64_t end) {
    const Buffer<float> tile(M, STRIP), scratch(need_scratch<Init>(adapters) ? M : 0, STRIP);
    for (int64_t n0 = begin * STRIP; n0 < std::min(N, end * STRIP); n0 += STRIP) {
      const int64_t cols = std::min(STRIP, N - n0);
      const auto product = [&](size_t i, float* to, bool add) {
        products[i].onto(to, STRIP, add, 0, M, n0, round_up(cols, PAD));
      };
      sum_adapters(init, adapters, 0, M, n0, cols, tile.row(0), scratch.row(0), STRIP, product);
      for (int64_t n = 0; n < cols; ++n) dots(w, n0 + n, ordered.row(0), M, tile.row(0) + n, STRIP);
      for (int64_t m = 0; m < M; ++m) at::vec::convert(tile.row(m), y + m * N + n0, cols);
    }
  });
}

}  // namespace fastlora::vector
