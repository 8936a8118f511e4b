// The product of a few rows of x with a weight in 4 bits or bf16, which is read once: weights are decoded and
// multiplied in registers, in whatever order decoding gives them, and x is put into that order before.
#pragma once

#include "fourbit.h"
#include "integers.h"
#include "tile.h"

namespace fastlora {

constexpr int64_t CHUNK = 64;  // weights of a row that are read together

// Whether whole chunks make up a block, a power of two of them, and whole blocks a row
inline bool in_chunks(const Weight4bit& w) {
  return w.blocksize % CHUNK == 0 && (w.blocksize & (w.blocksize - 1)) == 0 && w.K % w.blocksize == 0;
}

// Rows of x in fp32 lie so far apart, for at a power of two they would be on the same lines of the first-level cache.
struct RowsOfFloats {
  static int64_t ld_of_x(int64_t K) {
    return K + CHUNK / 2;
  }
};

constexpr int64_t AHEAD = 4096;  // bytes of a row of w that are loaded before they are needed

// Loads what comes so much later in one of ROWS rows. Several may lie a power of two apart, on the same lines of the
// first-level cache, and go to the second level.
template <int ROWS>
inline void load_ahead(const void* from) {
  _mm_prefetch(static_cast<const char*>(from) + AHEAD, ROWS == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
}

// A dense w[N, K] in bf16 whose rows have unit stride and whole chunks
struct DenseRows {
  static bool fits(const Tensor& w) {
    return w.scalar_type() == at::kBFloat16 && w.stride(1) == 1 && w.size(1) % CHUNK == 0;
  }
  explicit DenseRows(const Tensor& w)
      : from(w.const_data_ptr<at::BFloat16>()), ld(w.stride(0)), N(w.size(0)), K(w.size(1)) {
  }
  int64_t blocks() const {
    return 0;
  }
  const float* scales_of(int64_t, int64_t, float*) const {
    return nullptr;
  }
  const at::BFloat16* from;
  const int64_t ld, N, K;
};

// ---- ways to the product of rows n to n + J of w with I rows of x, which `order` has put in order:
//      out[i * ld_out + j] += w[n + j] . x[i], with the scales of these rows' blocks
//      With IN_ONE_STREAM rows of x or fewer, w is read from one end to the other, at memory's speed: J is 1.

// From bf16 in fp32: the 16 bits of a number and 16 zeros. The even weights of a vector come first, then the odd ones.
struct DenseInFloat : RowsOfFloats {
  using Weight = DenseRows;
  using Element = float;
  using Vec = at::vec::Vectorized<float>;
  static constexpr int LANES = Vec::size();
  static constexpr int ROWS_OF_X = LANES == 8 ? 4 : 6, ROWS_OF_W = LANES == 8 ? 2 : 4;  // at a time, in registers
  static constexpr int64_t IN_ONE_STREAM = 1;

  template <typename T>
  static void order(const DenseRows& w, const T* from, float* to) {
    for (int64_t i = 0; i < w.K; ++i)
      to[i] = static_cast<float>(from[i / (2 * LANES) * 2 * LANES + i % LANES * 2 + i / LANES % 2]);
  }

  static void read(const at::BFloat16* from, Vec& even, Vec& odd) {
#ifdef CPU_CAPABILITY_AVX512
    const __m512i pairs = _mm512_loadu_si512(from);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
#else
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
#endif
  }

  template <int I, int J>
  static void dot(const DenseRows& w, int64_t n, const float*, const float* x, float* out, int64_t ld_out) {
    constexpr int HALVES = I * J <= 4 ? 2 : 1;  // enough sums for an addition to end before the next to the same one
    const at::BFloat16* row = w.from + n * w.ld;
    Vec sum[HALVES][J][I];
    for (int i = 0; i < HALVES * J * I; ++i) (&sum[0][0][0])[i] = Vec(0.0f);
    for (int64_t k = 0; k < w.K; k += CHUNK) {
      for (int j = 0; j < J; ++j)
        for (int64_t line = 0; line < CHUNK; line += 32) load_ahead<J>(row + j * w.ld + k + line);
      for (int64_t v = 0; v < CHUNK; v += 2 * LANES) {
        Vec even[J], odd[J];
        for (int j = 0; j < J; ++j) read(row + j * w.ld + k + v, even[j], odd[j]);
        for (int i = 0; i < I; ++i) {
          const float* from = x + i * ld_of_x(w.K) + k + v;
          const Vec first = Vec::loadu(from), second = Vec::loadu(from + LANES);
          for (int j = 0; j < J; ++j) sum[0][j][i] = at::vec::fmadd(even[j], first, sum[0][j][i]);
          for (int j = 0; j < J; ++j) sum[HALVES - 1][j][i] = at::vec::fmadd(odd[j], second, sum[HALVES - 1][j][i]);
        }
      }
    }
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j)
        out[i * ld_out + j] += total(HALVES == 1 ? sum[0][j][i] : sum[0][j][i] + sum[1][j][i]);
  }
};

// From 4 bits in fp32: the scale of a block comes in after its products.
struct InFloat : RowsOfFloats {
  using Weight = Weight4bit;
  using Element = float;
  using Vec = at::vec::Vectorized<float>;
  static constexpr int ROWS_OF_X = 4, ROWS_OF_W = 1;
  static constexpr int64_t IN_ONE_STREAM = 0;

  // Half of the codes of a chunk
  static void look_up(const uint8_t* bytes, int half, const Table& table, Vec* to) {
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

  template <typename T>
  static void order(const Weight4bit& w, const T* from, float* to) {
    for (int64_t k = 0; k < w.K; k += CHUNK)
      for (int64_t i = 0; i < CHUNK; ++i) to[k + i] = static_cast<float>(from[k + place(i)]);
  }

  // Which of its 64 weights `look_up` gives at place i of both halves
  static int64_t place(int64_t i) {
#ifdef CPU_CAPABILITY_AVX512
    return i / 32 * 32 + i % 16 * 2 + i / 16 % 2;
#else
    return (i % 8 / 4 * 16 + i % 32 / 8 * 4 + i % 4) * 2 + i / 32;
#endif
  }

  template <int I, int J>
  static void dot(const Weight4bit& w, int64_t n, const float* scales, const float* x, float* out, int64_t ld_out) {
    static_assert(J == 1);
    const uint8_t* bytes = w.bytes + n * w.K / 2;
    Vec all[I];
    for (int i = 0; i < I; ++i) all[i] = Vec(0.0f);
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
              sum[i] = at::vec::fmadd(
                  codes[v], Vec::loadu(x + i * ld_of_x(w.K) + k + half * CHUNK / 2 + v * Vec::size()), sum[i]);
        }
      }
      for (int i = 0; i < I; ++i) all[i] = at::vec::fmadd(Vec(*scales), sum[i], all[i]);
    }
    for (int i = 0; i < I; ++i) out[i * ld_out] += total(all[i]);
  }
};

#ifdef __AVX512VNNI__
// From 4 bits in 16-bit integers, for x in bf16: two chunks at a time, whose words are looked up four times, shifted by
// 4, 0, 12 and 8 bits. What is looked up is the codes in `Table::steps`. A lane adds up eight products of less than
// 2^28. Codes are off by up to 2^-16 of the largest one; in bf16 each would be by up to 2^-9 of itself.
struct InIntegers {
  using Weight = Weight4bit;
  using Element = int16_t;
  static constexpr int ROWS_OF_X = 4, ROWS_OF_W = 2;
  static constexpr int64_t IN_ONE_STREAM = 4;

  static int64_t ld_of_x(int64_t K) {
    return RowOfIntegers::size(K);
  }

  static bool takes(const Tensor& x) {
    bool takes = true;
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
    for (int64_t m = 0; m < x.size(0); ++m) takes &= RowOfIntegers::takes(bits + m * x.stride(0), x.size(1));
    return takes;
  }

  static void order(const Weight4bit& w, const at::BFloat16* from, int16_t* to) {
    RowOfIntegers(to, w.K).fill(reinterpret_cast<const uint16_t*>(from), w.K, w.table.steps);
  }

  // A number of each block, for the lanes of two chunks
  static __m512 of_blocks(const float* scales, int64_t chunk, int shift) {
    const __m256 first = _mm256_set1_ps(scales[chunk >> shift]), second = _mm256_set1_ps(scales[(chunk + 1) >> shift]);
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }

  template <int I, int J>
  static void dot(const Weight4bit& w, int64_t n, const float* scales, const int16_t* x, float* out, int64_t ld_out) {
    const int64_t blocks = w.blocks(), chunks = w.K / CHUNK;
    const int shift = __builtin_ctzll(w.blocksize / CHUNK);
    const __m512i table = _mm512_load_si512(w.table.in_steps);
    const uint8_t* bytes = w.bytes + n * w.K / 2;
    const auto row = [&](int i) { return RowOfIntegers(const_cast<int16_t*>(x) + i * ld_of_x(w.K), w.K); };
    __m512 sum[J][I];
    for (int i = 0; i < J * I; ++i) (&sum[0][0])[i] = _mm512_setzero_ps();
    const auto multiply = [&](int64_t chunk, const __m512i(&words)[J], const __m512(&scale)[J], int part) {
      __m512i dot[J][I];
      for (int i = 0; i < J * I; ++i) (&dot[0][0])[i] = _mm512_setzero_si512();
      for (int n = 0; n < 4; ++n) {
        constexpr int SHIFT[4] = {4, 0, 12, 8};
        __m512i codes[J];
        for (int j = 0; j < J; ++j) codes[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[j], SHIFT[n]), table);
        for (int i = 0; i < I; ++i) {
          const __m512i of_x = _mm512_load_si512(row(i).part(part) + chunk * CHUNK + CHUNK / 2 * n);
          for (int j = 0; j < J; ++j) dot[j][i] = _mm512_dpwssd_epi32(dot[j][i], codes[j], of_x);
        }
      }
      for (int i = 0; i < I; ++i) {
        const __m512 by = _mm512_set1_ps(row(i).scales(part)[chunk / 2]);
        for (int j = 0; j < J; ++j)
          sum[j][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[j][i]), _mm512_mul_ps(scale[j], by), sum[j][i]);
      }
    };
    const auto step = [&](int64_t chunk, const __m512i(&words)[J], const __m512(&scale)[J]) {
      multiply(chunk, words, scale, 0);
      bool more = false;
      for (int i = 0; i < I; ++i) more |= row(i).scales(1)[chunk / 2] != 0.0f;
      if (__builtin_expect(more, false)) multiply(chunk, words, scale, 1);
    };
    int64_t chunk = 0;
    __m512i words[J];
    __m512 scale[J];
    for (; chunk + 2 <= chunks; chunk += 2) {
      for (int j = 0; j < J; ++j) {
        const uint8_t* from = bytes + j * (w.K / 2) + chunk * (CHUNK / 2);
        load_ahead<J>(from);
        words[j] = _mm512_loadu_si512(from);
        scale[j] = of_blocks(scales + j * blocks, chunk, shift);
      }
      step(chunk, words, scale);
    }
    if (chunk < chunks) {  // one is left, in a block of its own; x is zero beside it
      for (int j = 0; j < J; ++j) {
        const uint8_t* from = bytes + j * (w.K / 2) + chunk * (CHUNK / 2);
        words[j] = _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        scale[j] = _mm512_set1_ps(scales[j * blocks + (chunk >> shift)]);
      }
      step(chunk, words, scale);
    }
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j) out[i * ld_out + j] += _mm512_reduce_add_ps(sum[j][i]);
  }
};
#endif

// ---- by any of them

// The products of J rows of w with all rows of x
template <typename Way, int J, int I = Way::ROWS_OF_X>
void dots(
    const typename Way::Weight& w, int64_t n, const float* scales, const typename Way::Element* x, int64_t rows,
    float* out, int64_t ld_out) {
  for (; rows >= I; rows -= I, x += I * Way::ld_of_x(w.K), out += I * ld_out)
    Way::template dot<I, J>(w, n, scales, x, out, ld_out);
  if constexpr (I > 1) dots<Way, J, I - 1>(w, n, scales, x, rows, out, ld_out);
}

// y[M, N] = scale * (x w^T + init + the adapters' parts)
template <typename Way, typename T, typename Init>
void multiply_few(
    const Tensor& x, const typename Way::Weight& w, const Init& init, const std::vector<Adapter>& adapters,
    const ColumnScale& column_scale, T* y) {
  constexpr int64_t STRIP = 32;
  const int64_t M = x.size(0), N = w.N, K = w.K, blocks = w.blocks();
  const Buffer<typename Way::Element> ordered(M, Way::ld_of_x(K));
  for (int64_t m = 0; m < M; ++m) Way::order(w, x.const_data_ptr<T>() + m * x.stride(0), ordered.row(m));
  std::vector<Tile<float>> lefts;
  int64_t ranks = 0;
  for (const Adapter& adapter : adapters) {
    lefts.push_back(to_tile<float>(adapter.p));
    scale(lefts.back(), adapter.s);
    ranks = std::max(ranks, adapter.p.size(1));
  }
  at::parallel_for(0, (N + STRIP - 1) / STRIP, 4, [&](int64_t begin, int64_t end) {
    const Buffer<float> tile(M, STRIP), right(ranks, STRIP), scale(STRIP, blocks);
    const Buffer<float> scratch(need_scratch<Init>(adapters) ? M : 0, STRIP);
    for (int64_t n0 = begin * STRIP; n0 < std::min(N, end * STRIP); n0 += STRIP) {
      const int64_t cols = std::min(STRIP, N - n0);
      const auto product = [&](size_t i, float* to, bool add) {
        const Tensor& b = adapters[i].b;
        const int64_t r = b.size(0), si = b.stride(0), sj = b.stride(1);
        FASTLORA_DISPATCH(b.scalar_type(), [&] {
          read_matrix(b.const_data_ptr<scalar_t>() + n0 * sj, si, sj, r, cols, right.row(0), STRIP);
        });
        for (int64_t m = 0; !add && m < M; ++m) std::fill_n(to + m * STRIP, STRIP, 0.0f);
        accumulate(to, STRIP, lefts[i].row(0), lefts[i].stride, 1, right.row(0), STRIP, M, r, round_up(cols, PAD));
      };
      sum_adapters(init, adapters, 0, M, n0, cols, tile.row(0), scratch.row(0), STRIP, product);
      const float* scales = w.scales_of(n0, cols, scale.row(0));
      const auto multiply = [&]<int J>(int64_t n) {
        dots<Way, J>(w, n0 + n, scales + n * blocks, ordered.row(0), M, tile.row(0) + n, STRIP);
      };
      int64_t n = 0;
      if constexpr (Way::ROWS_OF_W > 1)
        for (constexpr int J = Way::ROWS_OF_W; M > Way::IN_ONE_STREAM && n + J <= cols; n += J)
          multiply.template operator()<J>(n);
      for (; n < cols; ++n) multiply.template operator()<1>(n);
      for (int64_t m = 0; m < M; ++m) {
        column_scale.apply(tile.row(m), n0, cols);
        at::vec::convert(tile.row(m), y + m * N + n0, cols);
      }
    }
  });
}

}  // namespace fastlora
