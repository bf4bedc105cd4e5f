// Weights as they lie in memory: LANES outputs a panel, whole numbers of four or eight bits where they are quantised.
#pragma once

#include "numbers.h"

namespace {

constexpr int GROUP = 32;  // inputs of a quantised weight that share scale and offset
constexpr int PAIRS = GROUP / 2;

struct Weight {
  const uint32_t* lines;   // [panels][words][LANES], or [panels][groups][numbers of a group]
  const uint16_t* scales;  // [panels][groups][1 or 2][LANES] float16 scales, with four bits offsets too; null: not quantised
  const float* bias;       // [outputs], or null
  int64_t outputs, inputs, bits;
};

inline int64_t panels_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

// Lines of bfloat16, two inputs each, of a block of whole numbers. Eight bits: -127 to 127; four bits: 128 to 143, since
// that takes one instruction. A block of 4 * LANES bytes holds two lines of eight bits, or two lines of four bits in the
// lower halves of its bytes and the next two in the upper ones. Of every 16 bytes, eight belong to each line.
template <int BITS>
constexpr int LINES = 16 / BITS;

#if defined(__AVX512VBMI__)
struct Halves {  // lower and upper bytes of the bfloat16 numbers 0 to 127
  alignas(64) uint8_t low[128], high[128];
  constexpr Halves() : low{}, high{} {
    for (int i = 1, power = 0; i < 128; i++) {
      while (i >> (power + 1)) power++;
      int bits = (127 + power) << 7 | (i << (7 - power) & 127);
      low[i] = bits & 255, high[i] = bits >> 8;
    }
  }
};
constexpr Halves HALVES;

template <int BITS>
inline void unpack(const uint8_t* block, Words* lines) {
  const __m512i all = _mm512_loadu_si512(block);
  if constexpr (BITS == 8) {
    const __m512i size = _mm512_abs_epi8(all);
    __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(HALVES.low), size, _mm512_load_si512(HALVES.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(HALVES.high), size, _mm512_load_si512(HALVES.high + 64));
    high = _mm512_ternarylogic_epi32(high, all, _mm512_set1_epi8((char)0x80), 0xf8);  // and the sign
    lines[0] = (Words)_mm512_unpacklo_epi8(low, high);
    lines[1] = (Words)_mm512_unpackhi_epi8(low, high);
  } else {
    const __m512i half = _mm512_set1_epi8(15), exponent = _mm512_set1_epi8(0x43);
    const __m512i lower = _mm512_and_si512(all, half), upper = _mm512_and_si512(_mm512_srli_epi16(all, 4), half);
    lines[0] = (Words)_mm512_unpacklo_epi8(lower, exponent);
    lines[1] = (Words)_mm512_unpackhi_epi8(lower, exponent);
    lines[2] = (Words)_mm512_unpacklo_epi8(upper, exponent);
    lines[3] = (Words)_mm512_unpackhi_epi8(upper, exponent);
  }
}
#else
inline uint32_t bfloat_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 16;
}

template <int BITS>
inline void unpack(const uint8_t* block, Words* lines) {
  for (int i = 0; i < LINES<BITS>; i++)
    for (int lane = 0; lane < LANES; lane++) {
      const uint8_t* pair = block + lane / 4 * 16 + i % 2 * 8 + lane % 4 * 2;
      auto number = [&](uint8_t x) { return BITS == 8 ? (float)(int8_t)x : 128.0f + (x >> i / 2 * 4 & 15); };
      lines[i][lane] = bfloat_bits(number(pair[0])) | bfloat_bits(number(pair[1])) << 16;
    }
}
#endif

}  // namespace
