// Weights as they lie in memory: LANES outputs a panel, whole numbers of four or eight bits where they are quantised.
#pragma once

#include "numbers.h"

namespace {

constexpr int GROUP = 32;  // inputs of a quantised weight that share scale and offset
constexpr int PAIRS = GROUP / 2;

struct Weight {
  const uint32_t* lines;   // [panels][words][LANES], or [panels][groups][numbers of a group]
  const uint16_t* scales;  // [panels][groups][1 or 2][LANES] scales and, with four bits, offsets; null: not quantised
  const float* bias;       // [outputs], or null
  int64_t outputs, inputs, bits;
};

inline int64_t panels_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

// The numbers of a group as lines of bfloat16, two inputs each. Eight bits: -127 to 127; four bits: 128 to 143, since
// that takes one instruction. A block of 4 * LANES bytes holds, for eight bits, lines 2b and 2b + 1; for four bits, 4b and
// 4b + 1 in its lower halves of bytes and the next two in its upper ones. Of every 16 bytes, eight belong to each line.
#if defined(__AVX512VBMI__)
inline void unpack_eight(const uint8_t* at, Words* lines) {
  alignas(64) static const struct Table {
    uint8_t low[128], high[128];
    Table() {
      for (int i = 0; i < 128; i++) {
        float x = (float)i;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        low[i] = bits >> 16 & 255, high[i] = bits >> 24;
      }
    }
  } table;
  const __m512i low0 = _mm512_load_si512(table.low), low1 = _mm512_load_si512(table.low + 64);
  const __m512i high0 = _mm512_loadu_si512(table.high), high1 = _mm512_loadu_si512(table.high + 64);
  for (int b = 0; b < PAIRS / 2; b++) {
    __m512i signed_ = _mm512_loadu_si512(at + 64 * b), size = _mm512_abs_epi8(signed_);
    __m512i low = _mm512_permutex2var_epi8(low0, size, low1), high = _mm512_permutex2var_epi8(high0, size, high1);
    high = _mm512_ternarylogic_epi32(high, signed_, _mm512_set1_epi8((char)0x80), 0xf8);  // and the sign
    lines[2 * b] = (Words)_mm512_unpacklo_epi8(low, high);
    lines[2 * b + 1] = (Words)_mm512_unpackhi_epi8(low, high);
  }
}

inline void unpack_four(const uint8_t* at, Words* lines) {
  const __m512i half = _mm512_set1_epi8(15), exponent = _mm512_set1_epi8(0x43);
  for (int b = 0; b < PAIRS / 4; b++) {
    __m512i both = _mm512_loadu_si512(at + 64 * b);
    __m512i lower = _mm512_and_si512(both, half), upper = _mm512_and_si512(_mm512_srli_epi16(both, 4), half);
    lines[4 * b] = (Words)_mm512_unpacklo_epi8(lower, exponent);
    lines[4 * b + 1] = (Words)_mm512_unpackhi_epi8(lower, exponent);
    lines[4 * b + 2] = (Words)_mm512_unpacklo_epi8(upper, exponent);
    lines[4 * b + 3] = (Words)_mm512_unpackhi_epi8(upper, exponent);
  }
}
#else
inline uint32_t bfloat_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 16;
}

template <class Number>
void unpack_line(const uint8_t* block, int second, Words* line, Number number) {
  for (int lane = 0; lane < LANES; lane++) {
    const uint8_t* pair = block + lane / 4 * 16 + second * 8 + lane % 4 * 2;
    (*line)[lane] = bfloat_bits(number(pair[0])) | bfloat_bits(number(pair[1])) << 16;
  }
}

inline void unpack_eight(const uint8_t* at, Words* lines) {
  for (int i = 0; i < PAIRS; i++)
    unpack_line(at + i / 2 * 4 * LANES, i % 2, lines + i, [](uint8_t x) { return (float)(int8_t)x; });
}

inline void unpack_four(const uint8_t* at, Words* lines) {
  for (int i = 0; i < PAIRS; i++) {
    int shift = i % 4 / 2 * 4;
    unpack_line(at + i / 4 * 4 * LANES, i % 2, lines + i, [&](uint8_t x) { return 128.0f + (x >> shift & 15); });
  }
}
#endif

}  // namespace
