// Vectors of a register's numbers, float32, bfloat16 or float16, by the compiler's own vector types: one source for every
// processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4 * LANES)));
typedef float LooseFloats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t LooseWords __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline Floats all(float x) { return x - Floats{}; }

template <class T>
struct Type;

template <>
struct Type<float> {
  static constexpr int PER_WORD = 1;
  static Floats load(const float* at) { return *(const LooseFloats*)at; }
  static void store(float* at, Floats x) { *(LooseFloats*)at = x; }
  static Floats rounded(Floats x) { return x; }
  static Floats multiply_add(Floats sum, Words line, uint32_t word) { return sum + (Floats)line * from_bits(word); }
};

template <>
struct Type<bfloat16> {
  static constexpr int PER_WORD = 2;
  static Words words(const bfloat16* at) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
#else
    return __builtin_convertvector(*(const LooseHalves*)at, Words);
#endif
  }
  static Floats load(const bfloat16* at) { return (Floats)(words(at) << 16); }
  static Words bits(Floats x) {  // rounded to nearest, ties to even
    Words word = (Words)x;
    return (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  }
  static void store(bfloat16* at, Floats x) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#elif defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16((__m512i)bits(x)));
#else
    *(LooseHalves*)at = __builtin_convertvector(bits(x), LooseHalves);
#endif
  }
  static Floats rounded(Floats x) { return (Floats)(bits(x) << 16); }
  static Floats multiply_add(Floats sum, Words line, uint32_t word) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)line, (__m512bh)_mm512_set1_epi32((int)word));
#else
    sum += (Floats)(line << 16) * from_bits(word << 16);
    return sum + (Floats)(line & 0xffff0000u) * from_bits(word & 0xffff0000u);
#endif
  }
};

template <>
struct Type<float16> {
  static Floats load(const float16* at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
#else
    Words word = __builtin_convertvector(*(const LooseHalves*)at, Words);
    Floats size = (Floats)((word & 0x7fff) << 13) * 0x1p112f;
    return (Floats)((Words)size | (word & 0x8000) << 16);
#endif
  }
};

template <class T>
Floats load_part(const T* at, int count) {
  T part[LANES] = {};
  std::memcpy(part, at, count * sizeof(T));
  return Type<T>::load(part);
}

template <class T>
void store_part(T* at, Floats x, int count) {
  T part[LANES];
  Type<T>::store(part, x);
  std::memcpy(at, part, count * sizeof(T));
}

inline float sum_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += x[lane];
  return sum;
}

inline Floats larger(Floats x, Floats y) { return x > y ? x : y; }

inline float largest_of(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float most = x[0];
  for (int lane = 1; lane < LANES; lane++) most = std::max(most, x[lane]);
  return most;
}

inline Floats exponential(Floats x) {  // relative error below 2e-7; Cephes' expf
  x = larger(x, all(-87.3f));
  x = x < 88.0f ? x : all(88.0f);
  Floats whole = x * 1.44269504088896341f + 12582912.0f;  // rounds to nearest
  Words power = (Words)whole << 23;
  whole -= 12582912.0f;
  x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * x * x + x + 1.0f;
  return (Floats)((Words)y + power);
}

inline Floats power_of_two(Floats x) {  // of x <= 0, for results in bfloat16: relative error below 1e-4
  Floats whole = x + 12582912.0f;
  Floats part = x - (whole - 12582912.0f);
  Floats y = all(5.5171568e-2f);
  y = y * part + 2.4261111e-1f;
  y = y * part + 6.9326103e-1f;
  y = y * part + 9.9992806e-1f;
  y = (Floats)((Words)y + ((Words)whole << 23));
  return x < -126.0f ? Floats{} : y;
}

inline Floats activated(Floats x, int kind) {
  if (kind == 0) return x / (1.0f + exponential(-x));  // SiLU
  Floats inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // GELU by tanh
  return x / (1.0f + exponential(-inner));
}

}  // namespace
