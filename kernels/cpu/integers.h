// Rows of bf16 as 16-bit integers, which processors with VNNI multiply twice as many of as of fp32.
#pragma once

#ifdef __AVX512VNNI__
#include <cmath>
#include <cstring>

#include "tile.h"

namespace fastlora {

// A row of x in bf16 as 16-bit integers, in groups of 128 numbers (a pair of chunks), each scaled by a power of two so
// that the largest is below 2^14: numbers down to 1/128 of that are exact. Where most are smaller, beside an outlier,
// what rounding took from them is a second row of integers.
struct RowOfIntegers {
  static constexpr int64_t PAIR = 128;
  static constexpr int PARTS = 2;

  RowOfIntegers(int16_t* x, int64_t K) : x(x), K(round_up(K, PAIR)) {
  }
  static int64_t size(int64_t K) {
    const int64_t pairs = (K + PAIR - 1) / PAIR;
    return round_up(PARTS * pairs * (PAIR + 2), PAIR / 4);  // 2: a float
  }
  int16_t* part(int n) const {
    return x + n * K;
  }
  // What the products of each pair with a part are to be scaled by, 0 where there is none
  float* scales(int n) const {
    return reinterpret_cast<float*>(x + PARTS * K) + n * (K / PAIR);
  }

  // The exponents, biased by 127, of the largest number of a pair for which no scale is subnormal or overflows
  static constexpr int LEAST = 64, MOST = 191;

  static bool takes(const uint16_t* bits, int64_t K) {
    bool takes = true;
    for (int64_t k = 0; k < K; k += PAIR) {
      const uint16_t largest = largest_of(bits + k, std::min(K - k, PAIR));
      takes &= largest == 0 || (largest >> 7 >= LEAST && largest >> 7 <= MOST);
    }
    return takes;
  }

  // The largest of n numbers, without its sign
  static uint16_t largest_of(const uint16_t* bits, int64_t n) {
    uint16_t largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max<uint16_t>(largest, bits[i] & 0x7fff);
    return largest;
  }

  // From `cols` numbers; a part's numbers 4i + n of a pair come before its numbers 4i + n + 1. Products with integers
  // that are so many steps to 1 are scaled back.
  void fill(const uint16_t* from, int64_t cols, float steps) const {
    for (int64_t k = 0; k < K; k += PAIR) {
      alignas(64) uint16_t bits[PAIR] = {};
      std::memcpy(bits, from + k, std::min(cols - k, PAIR) * sizeof(uint16_t));
      const int largest = std::max(largest_of(bits, PAIR) >> 7, LEAST);
      const float scale = std::ldexp(1.0f, 140 - largest);  // 2^(largest - 126) is more than any
      write(bits, scale, k);
      scales(0)[k / PAIR] = std::ldexp(1.0f / steps, largest - 140);
      scales(1)[k / PAIR] = loses(bits, largest) ? std::ldexp(1.0f / steps, largest - 140 - 14) : 0.0f;
    }
  }

  // Whether the second part of a pair is needed, of which the largest number has this exponent: in the first most of
  // its numbers are not exact, or an eighth of them lost more than three of their eight bits.
  static bool loses(const uint16_t* bits, int largest) {
    int numbers = 0, inexact = 0, lost = 0;
    for (int64_t i = 0; i < PAIR; ++i) {
      const int number = bits[i] & 0x7fff, smaller = largest - (number >> 7);
      numbers += number != 0;
      inexact += number != 0 && smaller > 6;
      lost += number != 0 && smaller > 9;
    }
    return 2 * inexact > numbers || 8 * lost > numbers;
  }

  void write(const uint16_t* bits, float scale, int64_t k) const {
    for (int64_t i = 0; i < PAIR; i += PAIR / 4) {
      __m256i first[PARTS], second[PARTS];
      in_parts(bits + i, scale, first);
      in_parts(bits + i + PAIR / 8, scale, second);
      for (int p = 0; p < PARTS; ++p) {
        const __m512i fours = _mm512_inserti64x4(_mm512_castsi256_si512(first[p]), second[p], 1);
        for (int n = 0; n < 4; ++n) {
          __m128i* to = reinterpret_cast<__m128i*>(part(p) + k + PAIR / 4 * n + i / 4);
          _mm_store_si128(to, _mm512_cvtepi64_epi16(_mm512_srli_epi64(fours, 16 * n)));
        }
      }
    }
  }

  // Sixteen numbers
  static void in_parts(const uint16_t* bits, float scale, __m256i (&to)[PARTS]) {
    const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(bits));
    const __m512 number = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    const __m512 scaled = _mm512_mul_ps(number, _mm512_set1_ps(scale));
    const __m512i whole = _mm512_cvtps_epi32(scaled);
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(scaled, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(1 << 14));
    to[0] = _mm512_cvtepi32_epi16(whole);
    to[1] = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(rest));
  }

  int16_t* x;
  int64_t K;
};

}  // namespace fastlora
#endif
