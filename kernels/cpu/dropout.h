// The dropout mask: Philox4x32 with 7 rounds, a pure function of seed and element, the same on every device.
//
// Element x[m, k] is lane k % 8 of the counter (k / 8, m, 0, 0) under the key (seed's low word, high word): each of the
// four words gives two lanes of 16 bits, the low half first. It is kept if its lane is at least p * 2^16.
// Seven rounds are the fewest that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef CPU_CAPABILITY_AVX512
#include <immintrin.h>
#endif

namespace fastlora {

class Dropout {
 public:
  static constexpr int LANES = 8;  // elements that one counter decides

  Dropout() = default;
  Dropout(double p, int64_t seed)
      : below_(std::min<long>(std::lround(p * 65536.0), 65535)),
        key0_(static_cast<uint32_t>(seed)),
        key1_(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {
  }

  bool active() const {
    return below_ != 0;
  }

  // The same mask for rows of which the first is number `row` of it
  Dropout from_row(int64_t row) const {
    Dropout of_rows = *this;
    of_rows.first_row_ += row;
    return of_rows;
  }

  // 1 / P(keep)
  double scale() const {
    return 65536.0 / (65536 - below_);
  }

  // Zero the dropped ones of `n` elements of row m from column k0, a multiple of LANES.
  template <typename T>
  void apply(T* row, int64_t m, int64_t k0, int64_t n) const {
    if (!active()) return;
    alignas(64) uint16_t lanes[BATCH];
    for (int64_t k = 0; k < n; k += BATCH) {
      draw(static_cast<uint32_t>((k0 + k) / LANES), static_cast<uint32_t>(first_row_ + m), lanes);
      const int64_t count = std::min<int64_t>(n - k, BATCH);
      for (int64_t i = 0; i < count; ++i) row[k + i] = lanes[i] >= below_ ? row[k + i] : T(0);
    }
  }
  void apply(at::BFloat16* row, int64_t m, int64_t k0, int64_t n) const {
    apply(reinterpret_cast<uint16_t*>(row), m, k0, n);
  }

 private:
  static constexpr int COUNTERS = 16, ROUNDS = 7, BATCH = COUNTERS * LANES;
  static constexpr uint32_t MULTIPLIER0 = 0xD2511F53, MULTIPLIER1 = 0xCD9E8D57, WEYL0 = 0x9E3779B9, WEYL1 = 0xBB67AE85;

  // The lanes of COUNTERS successive counters.
  void draw(uint32_t first, uint32_t m, uint16_t* lanes) const;

  uint32_t below_ = 0, key0_ = 0, key1_ = 0;
  int64_t first_row_ = 0;
};

#ifdef CPU_CAPABILITY_AVX512

// The high and low words of 16 products: two vector multiplications give those of the even and of the odd elements.
inline void multiply(__m512i a, __m512i by, __m512i& high, __m512i& low) {
  constexpr __mmask16 ODD = 0xAAAA;
  const __m512i even = _mm512_mul_epu32(a, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), by);
  high = _mm512_mask_blend_epi32(ODD, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(ODD, even, _mm512_slli_epi64(odd, 32));
}

inline void Dropout::draw(uint32_t first, uint32_t m, uint16_t* lanes) const {
  const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i by0 = _mm512_set1_epi64(MULTIPLIER0), by1 = _mm512_set1_epi64(MULTIPLIER1);
  __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(first), iota), c1 = _mm512_set1_epi32(m);
  __m512i c2 = _mm512_setzero_si512(), c3 = c2;
  uint32_t key0 = key0_, key1 = key1_;
  for (int round = 0; round < ROUNDS; ++round, key0 += WEYL0, key1 += WEYL1) {
    __m512i high0, low0, high1, low1;
    multiply(c0, by0, high0, low0);
    multiply(c2, by1, high1, low1);
    c0 = _mm512_xor_si512(_mm512_xor_si512(high1, c1), _mm512_set1_epi32(key0));
    c2 = _mm512_xor_si512(_mm512_xor_si512(high0, c3), _mm512_set1_epi32(key1));
    c1 = low1;
    c3 = low0;
  }
  // Transpose 4 x 16 words to 16 x 4: first within 128-bit groups of four counters, then the groups.
  const __m512i a = _mm512_unpacklo_epi32(c0, c1), b = _mm512_unpackhi_epi32(c0, c1);
  const __m512i c = _mm512_unpacklo_epi32(c2, c3), d = _mm512_unpackhi_epi32(c2, c3);
  const __m512i q0 = _mm512_unpacklo_epi64(a, c), q1 = _mm512_unpackhi_epi64(a, c);
  const __m512i q2 = _mm512_unpacklo_epi64(b, d), q3 = _mm512_unpackhi_epi64(b, d);
  alignas(64) __m128i counters[4][4];  // [i][group]: the words of counter 4 group + i
  _mm512_store_si512(counters[0], q0);
  _mm512_store_si512(counters[1], q1);
  _mm512_store_si512(counters[2], q2);
  _mm512_store_si512(counters[3], q3);
  for (int i = 0; i < COUNTERS; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(lanes) + i, counters[i % 4][i / 4]);
}

#else

inline void Dropout::draw(uint32_t first, uint32_t m, uint16_t* lanes) const {
  uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
  for (int i = 0; i < COUNTERS; ++i) {
    c0[i] = first + i;
    c1[i] = m;
    c2[i] = c3[i] = 0;
  }
  uint32_t key0 = key0_, key1 = key1_;
  for (int round = 0; round < ROUNDS; ++round, key0 += WEYL0, key1 += WEYL1) {
    for (int i = 0; i < COUNTERS; ++i) {
      const uint64_t product0 = uint64_t{MULTIPLIER0} * c0[i], product1 = uint64_t{MULTIPLIER1} * c2[i];
      c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
      c1[i] = static_cast<uint32_t>(product1);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
      c3[i] = static_cast<uint32_t>(product0);
    }
  }
  for (int i = 0; i < COUNTERS; ++i) {
    const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
    for (int lane = 0; lane < LANES; ++lane)
      lanes[i * LANES + lane] = static_cast<uint16_t>(words[lane / 2] >> (lane % 2 * 16));
  }
}

#endif

}  // namespace fastlora
