// bf16 operands for oneDNN's brgemm: fp32 numbers in two parts, right operands in pairs of rows.
//
// An fp32 number is, to 16 bits, the sum of two bf16 ones: its high and its low part.
// A right operand comes in pairs: rows 2l and 2l + 1 interleaved, one 32-bit word a column.
#pragma once

#include "tile.h"

namespace fastlora::bf16 {

using at::BFloat16;

inline uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, 4);
  return u;
}

// The bits of v rounded to bf16. A NaN stays one.
inline uint16_t high_bits(float v) {
  const uint32_t u = bits_of(v);
  return v == v ? static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16) : 0x7FC0;
}

// What that leaves of v. Nothing of an infinity or NaN, so that they come out as they went in.
inline uint16_t low_bits(float v) {
  const uint32_t high = static_cast<uint32_t>(high_bits(v)) << 16;
  float low;
  std::memcpy(&low, &high, 4);
  low = v - low;
  return low == low ? high_bits(low) : 0;
}

// n numbers rounded to bf16
inline void round_to(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
#ifdef __AVX512BF16__
  for (; i + 32 <= n; i += 32) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
    std::memcpy(to + i, &pair, sizeof(pair));
  }
#endif
  for (; i < n; ++i) to[i] = high_bits(from[i]);
}

inline void round_to(const float* from, int64_t n, BFloat16* to) {
  round_to(from, n, reinterpret_cast<uint16_t*>(to));
}

// 16 numbers as their high and low parts; `low` may be null.
inline void split_16(const float* from, uint16_t* high, uint16_t* low) {
#ifdef __AVX512BF16__
  const __m512 v = _mm512_loadu_ps(from);
  const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), h);
  if (low == nullptr) return;
  const __m512 rest = _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)));
  const __m512 finite = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(finite)));
#else
  for (int i = 0; i < 16; ++i) high[i] = high_bits(from[i]);
  for (int i = 0; low != nullptr && i < 16; ++i) low[i] = low_bits(from[i]);
#endif
}

// Rows 0 to n of `to` become columns 0 to n of 16 rows of words.
inline void transpose_16(const uint32_t* from, int64_t ld_from, uint32_t* to, int64_t ld_to, int64_t n) {
  at::vec::transpose_mxn<float>(
      reinterpret_cast<const float*>(from), ld_from, reinterpret_cast<float*>(to), ld_to, 16, static_cast<int>(n));
}

// Two rows of n numbers as pairs
inline void interleave(const uint16_t* even, const uint16_t* odd, int64_t n, uint32_t* to) {
  for (int64_t c = 0; c < n; ++c) to[c] = even[c] | static_cast<uint32_t>(odd[c]) << 16;
}

// How many bf16 numbers an element of t is the sum of.
inline int parts_of(const Tensor& t) {
  return t.scalar_type() == at::kBFloat16 ? 1 : 2;
}

// n of at most 16 numbers as fp32, times `by`, and zeros up to 16
template <typename T>
void read_16(const T* from, int64_t n, float by, float* to) {
  at::vec::convert(from, to, n);
  std::fill(to + n, to + 16, 0.0f);
  for (int i = 0; by != 1.0f && i < 16; ++i) to[i] *= by;
}

// A right operand t[L, C] in pairs, padded with zeros to even L and whole tiles of 16 columns: its high parts and,
// unless null, its low parts, each in rows of `stride` words.
inline void pack(const Tensor& t, uint32_t* high, uint32_t* low, int64_t stride) {
  const Tensor strided = t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
  const int64_t L = t.size(0), C = t.size(1), stride_l = strided.stride(0), stride_c = strided.stride(1);
  const bool transposed = stride_c != 1;  // its columns are what is contiguous
  const int64_t across = (C + 15) / 16, blocks = (L + 31) / 32 * across;
  FASTLORA_DISPATCH(t.scalar_type(), [&] {
    const scalar_t* from = strided.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
      alignas(64) float line[16];
      alignas(64) uint16_t parts[2][32][16];  // of 32 rows of 16 columns, or of 16 columns of 32 rows
      alignas(64) uint32_t words[16][16];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t l0 = i / across * 32, c0 = i % across * 16;
        const int64_t depth = std::min<int64_t>(32, L - l0), width = std::min<int64_t>(16, C - c0);
        const int64_t pairs = (depth + 1) / 2, lines = transposed ? 32 : 2 * pairs;
        for (int64_t n = 0; n < lines; ++n) {
          const int64_t l = transposed ? n % 2 * 16 : n, c = transposed ? n / 2 : 0;
          const bool inside = l < depth && c < width;
          const int64_t length = transposed ? std::min<int64_t>(16, depth - l) : width;
          read_16(from + (l0 + l) * stride_l + (c0 + c) * stride_c, inside ? length : 0, 1.0f, line);
          split_16(line, parts[0][n], low == nullptr ? nullptr : parts[1][n]);
        }
        for (int part = 0; part < (low == nullptr ? 1 : 2); ++part) {
          uint32_t* to = (part == 0 ? high : low) + l0 / 2 * stride + c0;
          if (transposed) {
            std::memcpy(words, parts[part], sizeof(words));  // column by column, pairs of rows as words
            transpose_16(&words[0][0], 16, to, stride, pairs);
          } else {
            for (int64_t l = 0; l < pairs; ++l)
              interleave(parts[part][2 * l], parts[part][2 * l + 1], 16, to + l * stride);
          }
        }
      }
    });
  });
}

// Rows n0 to n0 + cols of w[N, K] as a right operand w^T, in pairs; padded with zeros to whole tiles of 16 columns.
inline void pack_panel(
    const BFloat16* w, int64_t stride_n, int64_t stride_k, int64_t n0, int64_t cols, int64_t K, uint32_t* to,
    int64_t stride) {
  const int64_t padded = round_up(cols, PAD);
  if (stride_k == 1) {  // two successive elements of a row are a pair already
    at::vec::transpose_mxn<float>(
        reinterpret_cast<const float*>(w + n0 * stride_n), stride_n / 2, reinterpret_cast<float*>(to), stride,
        static_cast<int>(cols), static_cast<int>(K / 2));
    for (int64_t l = 0; cols < padded && l < K / 2; ++l)
      std::fill(to + l * stride + cols, to + l * stride + padded, 0u);
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(w) + n0;
    for (int64_t l = 0; l < K / 2; ++l) {
      const uint16_t *even = from + 2 * l * stride_k, *odd = even + stride_k;
      interleave(even, odd, cols, to + l * stride);
      std::fill(to + l * stride + cols, to + l * stride + padded, 0u);
    }
  }
}

// A left operand: p[M, r] transposed, [r, M] padded with zeros to `depth` columns; the low parts are the next r rows.
struct Transposed : Buffer<uint16_t> {
  Transposed(int64_t M, int64_t r, int64_t parts, int64_t depth) : Buffer(parts * r, depth), r(r), parts(parts) {
    for (int64_t j = 0; j < parts * r; ++j) std::fill(row(j) + M, row(j) + depth, uint16_t(0));
  }

  // Rows m0 to m0 + n of p are by * from[n, r]. m0 is a multiple of 16.
  template <typename T>
  void put(int64_t m0, int64_t n, const T* from, int64_t ld, float by) const {
    alignas(64) float rows[16][16], columns[16][16];
    for (int64_t i0 = 0; i0 < n; i0 += 16) {
      for (int64_t j0 = 0; j0 < r; j0 += 16) {
        const int64_t width = std::min<int64_t>(16, r - j0);
        for (int64_t i = 0; i < 16; ++i) read_16(from + (i0 + i) * ld + j0, i0 + i < n ? width : 0, by, rows[i]);
        transpose_16(reinterpret_cast<uint32_t*>(rows), 16, reinterpret_cast<uint32_t*>(columns), 16, 16);
        for (int64_t j = 0; j < width; ++j)
          split_16(columns[j], row(j0 + j) + m0 + i0, parts == 1 ? nullptr : row(r + j0 + j) + m0 + i0);
      }
    }
  }

  int64_t r, parts;
};

inline const BFloat16* as_bf16(const uint32_t* pairs) {
  return reinterpret_cast<const BFloat16*>(pairs);
}

}  // namespace fastlora::bf16
