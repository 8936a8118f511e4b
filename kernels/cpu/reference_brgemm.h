// A plain loop in the place of oneDNN's brgemm: FASTLORA_REFERENCE_BRGEMM, for debugging.
#pragma once

#include <c10/core/ScalarType.h>

namespace fastlora::bf16::cpublas {

inline bool could_pack(c10::ScalarType) {
  return true;
}

inline void brgemm_release() {
}

// c[M, N] (+)= a[M, K] @ b, whose rows 2k and 2k + 1 are interleaved
inline void brgemm(
    int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const c10::BFloat16* a,
    const c10::BFloat16* b, float* c) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      float sum = add ? c[m * ld_c + n] : 0.0f;
      for (int64_t k = 0; k < K; ++k)
        sum += static_cast<float>(a[m * ld_a + k]) * static_cast<float>(b[k / 2 * 2 * ld_b + 2 * n + k % 2]);
      c[m * ld_c + n] = sum;
    }
  }
}

}  // namespace fastlora::bf16::cpublas
