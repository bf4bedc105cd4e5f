// Weights as they lie in memory: sixteen outputs a panel, whole numbers of four or eight bits where they are quantised.
#pragma once

#include "numbers.h"

namespace {

constexpr int GROUP = 32;  // inputs that share a scale and a smallest value

// A quantised weight is scale * number + least in the precision of the activations, so that a quantised model computes,
// bit for bit, what a model of these weights computes.
struct Weight {
  const uint32_t* lines;   // 16 bits and more: [panels][words][LANES]; 8: [panels][inputs / 2][2][LANES] bytes; 4: one
                           // byte for two inputs
  const uint16_t* scales;  // [panels][inputs / GROUP][2][LANES] scales and least values, bfloat16; null: not quantised
  const float* bias;       // [outputs], or null
  int64_t outputs, inputs, bits;
};

inline int64_t panels_of(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

inline Ints bytes_at(const uint8_t* at) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));  // the compiler would take byte by byte
#else
  return __builtin_convertvector(*(const LooseBytes*)at, Ints);
#endif
}

inline Floats whole(Ints x) { return __builtin_convertvector(x, Floats); }

template <class T>
void put_pair(Floats even, Floats odd, uint32_t* out) {
  if constexpr (sizeof(T) == 4) {
    *(LooseFloats*)out = even;
    *(LooseFloats*)(out + LANES) = odd;
  } else {
#if defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, halves));
#else
    *(LooseWords*)out = Type<bfloat16>::bits(even) | Type<bfloat16>::bits(odd) << 16;
#endif
  }
}

// Unpacks inputs from `first` to `first + count` of a panel, both multiples of GROUP, to lines.
template <class T>
void unpack(const Weight& w, int64_t panel, int64_t first, int64_t count, uint32_t* out) {
  const int64_t pair = w.bits == 8 ? 2 * LANES : LANES, words = 2 / Type<T>::PER_WORD * LANES;  // of two inputs
  const uint8_t* at = (const uint8_t*)w.lines + (panel * w.inputs + first) / 2 * pair;
  const bfloat16* scales = (const bfloat16*)w.scales + (panel * w.inputs + first) / GROUP * 2 * LANES;
  for (int64_t group = 0; group < count / GROUP; group++, scales += 2 * LANES) {
    const Floats scale = Type<bfloat16>::load(scales), least = Type<bfloat16>::load(scales + LANES);
    for (int i = 0; i < GROUP / 2; i++, at += pair, out += words) {
      if (w.bits == 8) {
        put_pair<T>(whole(bytes_at(at)) * scale + least, whole(bytes_at(at + LANES)) * scale + least, out);
      } else {
        Ints both = bytes_at(at);
        put_pair<T>(whole(both & 15) * scale + least, whole(both >> 4) * scale + least, out);
      }
    }
  }
}

}  // namespace
