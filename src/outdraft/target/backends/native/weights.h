// Weights as they lie in memory: LANES outputs a panel, whole numbers of four or eight bits where they are quantised.
#pragma once

#include "numbers.h"

namespace {

constexpr int GROUP = 32;  // inputs of a quantised weight that share scale and offset
constexpr int QUADS = GROUP / 4;

struct Weight {
  const uint32_t* lines;   // [panels][words][LANES], or [panels][groups][numbers of a group]
  const uint16_t* scales;  // [panels][groups][1 or 2][LANES] float16 scales, with four bits offsets too; null: not quantised
  const float* bias;       // [outputs], or null
  int64_t outputs, inputs, bits;
};

inline int64_t panels_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

// Lines of whole numbers without sign, four inputs a word: those of eight bits have 128 added. Of four bits, two lines
// share one, the first in the lower halves of its bytes.
template <int BITS>
constexpr int LINES = 8 / BITS;

template <int BITS>
inline void unpack(const uint32_t* block, Words* lines) {
  const Words all = *(const LooseWords*)block;
  if constexpr (BITS == 8) {
    lines[0] = all;
  } else {
    lines[0] = all & 0x0f0f0f0fu;
    lines[1] = all >> 4 & 0x0f0f0f0fu;
  }
}

// A token's four inputs of a word, from -127 to 127, ready to be multiplied with lines.
#if defined(__AVX512VNNI__)
struct Quad {
  __m512i all;
  explicit Quad(uint32_t word) : all(_mm512_set1_epi32((int)word)) {}
  Ints multiply_add(Ints sum, Words line) const { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)line, all); }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
struct Quad {
  __m256i even, odd;
  explicit Quad(uint32_t word) {
    const __m256i all = _mm256_set1_epi32((int)word);
    even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), odd = _mm256_srai_epi16(all, 8);
  }
  Ints multiply_add(Ints sum, Words line) const {
    const __m256i low = _mm256_and_si256((__m256i)line, _mm256_set1_epi16(255)), high = _mm256_srli_epi16((__m256i)line, 8);
    return sum + (Ints)_mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd));
  }
};
#else
struct Quad {
  int32_t inputs[4];
  explicit Quad(uint32_t word) {
    for (int i = 0; i < 4; i++) inputs[i] = (int8_t)(word >> 8 * i);
  }
  Ints multiply_add(Ints sum, Words line) const {
    for (int i = 0; i < 4; i++) sum += (Ints)(line >> 8 * i & 255u) * inputs[i];
    return sum;
  }
};
#endif

}  // namespace
