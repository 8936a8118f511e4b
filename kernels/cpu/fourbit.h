// bitsandbytes' 4-bit weights, NF4 and FP4, decoded to fp32 a run at a time. Formats: QLoRA, arXiv:2305.14314.
#pragma once

#include <ATen/ops/empty.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>

#include "tile.h"

namespace fastlora {

using OptionalTensor = std::optional<Tensor>;
using Code = std::array<float, 16>;

alignas(64) constexpr Code NF4 = {
    -1.0f,         -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0.0f,
    0.0795802996f, 0.160930201f,  0.246112302f,  0.337915242f,  0.440709829f,  0.562617004f, 0.722956836f,   1.0f};
alignas(64) constexpr Code FP4 = {
    0.0f,  0.00520833349f,  0.666666687f,  1.0f,  0.333333343f,  0.5f,  0.166666672f,  0.25f,
    -0.0f, -0.00520833349f, -0.666666687f, -1.0f, -0.333333343f, -0.5f, -0.166666672f, -0.25f};

// A code book for vector look-ups. AVX2 looks up bytes: plane i holds byte i of every code. `in_steps` holds the codes
// as 16-bit integers, times `steps`, which is below 2^14 and chosen so that they round to integers with little error
// (FP4's are multiples of 1/192); twice, because the index that is looked up has a fifth bit, which says nothing.
struct Table {
  explicit Table(const Code& code) : code(code), steps(&code == &FP4 ? 85 * 192.0f : 15683.95f) {
    for (int i = 0; i < 32; ++i) in_steps[i] = static_cast<int16_t>(std::lrint(code[i % 16] * steps));
    for (int plane = 0; plane < 4; ++plane) {
      for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &code[i % 16], 4);
        planes[plane][i] = static_cast<uint8_t>(bits >> 8 * plane);
      }
    }
  }
  const Code& code;
  const float steps;
  alignas(64) int16_t in_steps[32];
  alignas(32) uint8_t planes[4][32];
};

#ifndef CPU_CAPABILITY_AVX512
// The codes of 32 numbers under 16. Within a vector v they are numbers 4v to 4v + 3 of each half.
inline void look_up_32(__m256i numbers, const Table& table, __m256 (&to)[4]) {
  __m256i plane[4];
  for (int i = 0; i < 4; ++i)
    plane[i] = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(table.planes[i])), numbers);
  const __m256i low[2] = {_mm256_unpacklo_epi8(plane[0], plane[1]), _mm256_unpackhi_epi8(plane[0], plane[1])};
  const __m256i high[2] = {_mm256_unpacklo_epi8(plane[2], plane[3]), _mm256_unpackhi_epi8(plane[2], plane[3])};
  for (int i = 0; i < 2; ++i) {
    to[2 * i] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[i], high[i]));
    to[2 * i + 1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[i], high[i]));
  }
}
#endif

// 32 weights from 16 bytes, the high half of a byte first.
inline void decode_32(const uint8_t* bytes, const Table& table, float scale, float* to) {
#ifdef CPU_CAPABILITY_AVX512
  const __m512 codes = _mm512_loadu_ps(table.code.data()), by = _mm512_set1_ps(scale);
  const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), codes), by);
  const __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(pairs, codes), by);  // looks at the low four bits only
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(even, second, odd));
#else
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), half = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(pairs, 4), half), odd = _mm_and_si128(pairs, half);
  const __m256i numbers = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
  __m256 codes[4];  // of eight successive numbers each, as fours of them alternate between the halves
  look_up_32(_mm256_permutevar8x32_epi32(numbers, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)), table, codes);
  for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, _mm256_mul_ps(codes[i], _mm256_set1_ps(scale)));
#endif
}

// The scales of `count` blocks of a weight from block `start` on: fp32 numbers, or bytes with statistics of their own.
struct Scales {
  Scales(
      const Tensor& absmax, const OptionalTensor& code2, const OptionalTensor& absmax2, const OptionalTensor& offset,
      int64_t blocksize2, int64_t start, int64_t count)
      : absmax(code2 ? absmax.contiguous() : in_fp32(absmax)), blocksize2(blocksize2), start(start), count(count) {
    if (!code2) return;
    code = in_fp32(*code2);
    absmax_of_bytes = in_fp32(*absmax2);
    plus = offset->item<float>();
  }

  // Those of blocks first to first + n: where they are, or `to`
  const float* read(int64_t first, int64_t n, float* to) const {
    first += start;
    if (!code.defined()) return absmax.const_data_ptr<float>() + first;
    const uint8_t* bytes = absmax.const_data_ptr<uint8_t>() + first;
    const float *codes = code.const_data_ptr<float>(), *by = absmax_of_bytes.const_data_ptr<float>();
    for (int64_t i = 0; i < n;) {
      const int64_t block = (first + i) / blocksize2;
      const float scale = by[block];
      for (const int64_t end = std::min(n, (block + 1) * blocksize2 - first); i < end; ++i)
        to[i] = codes[bytes[i]] * scale + plus;
    }
    return to;
  }

  // All of them in fp32
  Tensor whole() const {
    if (!code.defined()) return absmax.flatten().narrow(0, start, count);
    const Tensor out = at::empty({count}, absmax.options().dtype(at::kFloat));
    float* to = out.mutable_data_ptr<float>();
    at::parallel_for(0, count, 16384, [&](int64_t begin, int64_t end) { read(begin, end - begin, to + begin); });
    return out;
  }

  Tensor absmax, code, absmax_of_bytes;
  int64_t blocksize2, start, count;
  float plus = 0.0f;
};

// A weight w[N, K], quantised in blocks of its flat elements, or number `expert` of a stack of such weights that begin
// with whole blocks. `Operands::weight_4bit` has seen what it is made of.
struct Weight4bit {
  Weight4bit(
      const Tensor& packed, const Tensor& absmax, const OptionalTensor& code2, const OptionalTensor& absmax2,
      const OptionalTensor& offset, int64_t blocksize, int64_t blocksize2, std::string_view quant_type, int64_t N,
      int64_t K, int64_t expert = 0)
      : N(N),
        K(K),
        blocksize(blocksize),
        table(quant_type == "nf4" ? NF4 : FP4),
        packed(packed.contiguous()),
        bytes(this->packed.const_data_ptr<uint8_t>() + expert * (N * K / 2)),
        scales(
            absmax, code2, absmax2, offset, blocksize2, expert * (N * K / blocksize),
            (N * K + blocksize - 1) / blocksize) {
  }

  // The blocks of a row, if it is made of whole ones, and the scales of those of rows n to n + rows
  int64_t blocks() const {
    return K / blocksize;
  }
  const float* scales_of(int64_t n, int64_t rows, float* to) const {
    return scales.read(n * blocks(), rows * blocks(), to);
  }

  // What `read` and `prefetch` need
  void decode_scales() {
    decoded_scales = scales.whole();
  }

  // Elements k0 to k0 + cols of row n
  void read(int64_t n, int64_t k0, int64_t cols, float* to) const {
    const float* scale = decoded_scales.const_data_ptr<float>();
    const int64_t end = n * K + k0 + cols;
    int64_t first = n * K + k0, block = first / blocksize;
    for (; first < end; ++block) {
      const int64_t run = std::min(end, (block + 1) * blocksize) - first;
      decode_run(scale[block], first, run, to);
      first += run;
      to += run;
    }
  }

  // Loads what `read` will need. Rows are too far apart for the processor to see by itself what comes next.
  void prefetch(int64_t n, int64_t k0, int64_t cols) const {
    const int64_t first = n * K + k0;
    const auto load = [](const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); };
    for (int64_t i = 0; i < cols / 2; i += 64) load(bytes + first / 2 + i);
    load(decoded_scales.const_data_ptr<float>() + first / blocksize);
  }

  // `n` weights from flat index `first` on, all of one block
  void decode_run(float scale, int64_t first, int64_t n, float* to) const {
    const Code& code = table.code;
    const int64_t end = first + n;
    if (first % 2 == 1 && n > 0) *to++ = code[bytes[first++ / 2] & 15] * scale;
    for (; first + 32 <= end; first += 32, to += 32) decode_32(bytes + first / 2, table, scale, to);
    for (; first < end; ++first) *to++ = code[first % 2 == 0 ? bytes[first / 2] >> 4 : bytes[first / 2] & 15] * scale;
  }

  const int64_t N, K, blocksize;
  const Table table;
  const Tensor packed;
  const uint8_t* const bytes;  // of packed
  const Scales scales;
  Tensor decoded_scales;
};

// A right operand of a product: w[N, K]^T, whose columns are read from rows of w, or w itself.
struct FourBitOperand {
  // Elements first to first + n of row `line` of w
  void read(int64_t line, int64_t first, int64_t n, float* to) const {
    w->prefetch(std::min(line + 8, w->N - 1), first, n);
    w->read(line, first, n, to);
  }
  int64_t depth() const {
    return by_columns ? w->K : w->N;
  }
  Weight4bit* w;
  bool by_columns;
};

}  // namespace fastlora
