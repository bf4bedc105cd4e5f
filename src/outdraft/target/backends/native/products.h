// Products of packed weights with a few tokens.
#pragma once

#include <vector>

#include "team.h"
#include "weights.h"

namespace {

// Tokens of a tile of one to four panels, whose sums stay in registers; LANES at most. Quantised weights have sums of
// whole numbers, too.
#if defined(__AVX512F__)
constexpr int MOST_TOKENS[] = {16, 14, 8, 6}, MOST_QUANTISED[] = {16, 7, 5, 4};
#elif defined(__AVX2__)
constexpr int MOST_TOKENS[] = {8, 6, 4, 2}, MOST_QUANTISED[] = {8, 4, 2, 2};
#else
constexpr int MOST_TOKENS[] = {4, 4, 4, 4}, MOST_QUANTISED[] = {4, 4, 4, 4};
#endif
constexpr int PANELS = 4, MANY = 2;  // of a tile, at most and for many tokens
constexpr int SUMS = 32 * LANES;  // of the largest tile

#if defined(__AVX512F__)
inline void transpose(const uint32_t* const* rows, int64_t column, uint32_t* out) {  // 16 x 16 words
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + column);
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    _mm512_storeu_si512(out + i * 16, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (8 + i) * 16, _mm512_shuffle_i32x4(low, high, 0xdd));
    low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_storeu_si512(out + (4 + i) * 16, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_storeu_si512(out + (12 + i) * 16, _mm512_shuffle_i32x4(low, high, 0xdd));
  }
}
#endif

// Words of up to LANES rows side by side, [words][LANES]: a panel whose outputs are the rows, or a tile's tokens.
template <class Rows>
void side_by_side(Rows row, int rows, int64_t words, uint32_t* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const uint32_t* all[LANES];
  for (int lane = 0; lane < LANES; lane++) all[lane] = row(std::min(lane, rows - 1));
  for (; i + LANES <= words; i += LANES) transpose(all, i, out + i * LANES);
#endif
  for (int lane = 0; lane < LANES; lane++) {
    const uint32_t* own = row(std::min(lane, rows - 1));
    for (int64_t j = i; j < words; j++) out[j * LANES + lane] = own[j];
  }
}

// Adds products of M tokens and N panels to sums [M][N][LANES]; x are the tokens' words side by side, those of a single
// token one after the other.
template <class T>
struct Dense {
  static constexpr const int* MOST = MOST_TOKENS;
  template <int M, int N>
  static void tile(const uint32_t* lines, int64_t panel, const uint32_t* x, int64_t count, const uint32_t* next,
                   float* sums) {
    constexpr int STRIDE = M == 1 ? 1 : LANES;
    Floats sum[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) sum[m][n] = *(const LooseFloats*)(sums + (m * N + n) * LANES);
    for (int64_t i = 0; i < count; i++) {
      Words line[N];
      for (int n = 0; n < N; n++) {
        line[n] = *(const LooseWords*)(lines + n * panel + i * LANES);
#if defined(__AVX512F__)
        if (next) _mm_prefetch((const char*)(next + n * panel + i * LANES), _MM_HINT_T1);
#endif
      }
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) sum[m][n] = Type<T>::multiply_add(sum[m][n], line[n], x[i * STRIDE + m]);
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) *(LooseFloats*)(sums + (m * N + n) * LANES) = sum[m][n];
  }
};

// The same for panels from `panel` on of a quantised weight, group by group. Words of x are those of rounded inputs
// (`round_inputs`), then scales and totals of the groups.
template <int BITS>
struct Quantised {
  static constexpr const int* MOST = MOST_QUANTISED;
  template <int M, int N>
  static void tile(const Weight& w, int64_t panel, const uint32_t* x, float* sums) {
    constexpr int STRIDE = M == 1 ? 1 : LANES, KINDS = BITS == 4 ? 2 : 1, WORDS = QUADS / LINES<BITS> * LANES;
    const int64_t groups = w.inputs / GROUP;
    const uint32_t *numbers = w.lines + panel * groups * WORDS, *factors = x + groups * QUADS * STRIDE;
    const float16* scales = (const float16*)w.scales + panel * groups * KINDS * LANES;
    Floats kept[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) kept[m][n] = *(const LooseFloats*)(sums + (m * N + n) * LANES);
    for (int64_t g = 0; g < groups; g++) {
      Ints sum[M][N];
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++)
          sum[m][n] = BITS == 8 ? Ints{} + (int32_t)factors[(groups + g) * STRIDE + m] : Ints{};
      for (int i = 0; i < QUADS; i += LINES<BITS>) {
        Words lines[N][LINES<BITS>];
        for (int n = 0; n < N; n++) {
          const uint32_t* block = numbers + (n * groups + g) * WORDS + i / LINES<BITS> * LANES;
#if defined(__AVX512F__)
          _mm_prefetch((const char*)(block + N * groups * WORDS), _MM_HINT_T1);  // of the next tile
#endif
          unpack<BITS>(block, lines[n]);
        }
        for (int j = 0; j < LINES<BITS>; j++)
          for (int m = 0; m < M; m++) {
            const Quad quad(x[(g * QUADS + i + j) * STRIDE + m]);
            for (int n = 0; n < N; n++) sum[m][n] = quad.multiply_add(sum[m][n], lines[n][j]);
          }
      }
      for (int n = 0; n < N; n++) {
        const float16* own = scales + (n * groups + g) * KINDS * LANES;
        const Floats scale = Type<float16>::load(own);
        for (int m = 0; m < M; m++) {
          if constexpr (BITS == 4)
            kept[m][n] += Type<float16>::load(own + LANES) * from_bits(factors[(groups + g) * STRIDE + m]);
          kept[m][n] += __builtin_convertvector(sum[m][n], Floats) * scale * from_bits(factors[g * STRIDE + m]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) *(LooseFloats*)(sums + (m * N + n) * LANES) = kept[m][n];
  }
};

template <class Kind, int N, int M = Kind::MOST[N - 1]>
auto tile_of_panels(int tokens) {
  if constexpr (M > 1)
    if (tokens < M) return tile_of_panels<Kind, N, M - 1>(tokens);
  return &Kind::template tile<M, N>;
}

template <class Kind>
auto tile_of(int tokens, int panels) {
  if (panels == 1) return tile_of_panels<Kind, 1>(tokens);
  if (panels == 2) return tile_of_panels<Kind, 2>(tokens);
  return panels == 3 ? tile_of_panels<Kind, 3>(tokens) : tile_of_panels<Kind, 4>(tokens);
}

// Panels of a tile: as many as leave room for all tokens at once, so that a line is read once; many tokens go in turns.
inline int panels_for(int64_t tokens, const int* most) {
  for (int panels = PANELS; panels > 0; panels--)
    if (tokens <= most[panels - 1]) return panels;
  return MANY;
}

// Words of tokens, [tokens][words], in tiles, for products of any number of panels.
struct Tokens {
  const uint32_t* rows;
  int64_t tokens, words, turns;
  std::vector<uint32_t>& room;

  Tokens(const uint32_t* rows, int64_t words, int64_t tokens, int most, std::vector<uint32_t>& room)
      : rows(rows), tokens(tokens), words(words), turns((tokens + most - 1) / most), room(room) {
    if (tokens == 1) return;
    room.resize(turns * words * LANES);
    for (int64_t turn = 0; turn < turns; turn++)
      side_by_side([&](int i) { return rows + (first(turn) + i) * words; }, count(turn), words,
                   room.data() + turn * words * LANES);
  }
  int64_t first(int64_t turn) const { return tokens * turn / turns; }
  int count(int64_t turn) const { return (int)(first(turn + 1) - first(turn)); }
  const uint32_t* at(int64_t turn) const {
    if (count(turn) == 1) return rows + first(turn) * words;
    return room.data() + turn * words * LANES;
  }
};

// A token's inputs for quantised weights: numbers from -127 to 127, four a word, then a scale for each group, then each
// group's total, the sum of what its numbers stand for.
template <class T>
void round_inputs(const T* x, int64_t groups, int64_t bits, uint32_t* words) {
  constexpr int PARTS = GROUP / LANES;
  for (int64_t g = 0; g < groups; g++) {
    Floats parts[PARTS], most{}, total{};
    for (int i = 0; i < PARTS; i++) {
      parts[i] = Type<T>::load(x + g * GROUP + i * LANES);
      most = larger(most, larger(parts[i], -parts[i]));
    }
    const float largest = largest_of(most), inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (int i = 0; i < PARTS; i++) {
      const Floats whole = parts[i] * inverse + 12582912.0f - 12582912.0f;  // rounds to nearest
      const Bytes numbers = __builtin_convertvector(whole, Bytes);
      std::memcpy((int8_t*)(words + g * QUADS) + i * LANES, &numbers, LANES);
      total += whole;
    }
    const float sum = sum_of(total), scale = largest / 127.0f + 0.0f * sum, stands_for = scale * sum;  // NaN stays NaN
    const int32_t added = -128 * (int32_t)sum;
    std::memcpy(words + groups * QUADS + g, &scale, 4);
    std::memcpy(words + groups * (QUADS + 1) + g, bits == 8 ? (const void*)&added : &stands_for, 4);
  }
}

// Calls use(token, panel, panels, sums) for sums [panels][LANES] of every token and of panels from `first` to `last`, in
// multiples of `step`.
template <class T, class Use>
void multiply(const Weight& w, const T* x, int64_t tokens, int64_t first, int64_t last, int step, Use use) {
  thread_local std::vector<uint32_t> rounded, room;
  const int* of_panels = w.bits ? MOST_QUANTISED : MOST_TOKENS;
  // One token alone waits for memory, which is read fastest in one stream.
  const int panels = w.bits && tokens == 1 ? 1 : panels_for(tokens, of_panels), most = std::max(step, panels / step * step);
  const int64_t groups = w.inputs / GROUP, words = w.bits ? groups * (QUADS + 2) : w.inputs / Type<T>::PER_WORD;
  if (w.bits) {
    rounded.resize(tokens * words);
    for (int64_t t = 0; t < tokens; t++) round_inputs(x + t * w.inputs, groups, w.bits, rounded.data() + t * words);
  }
  const Tokens tiles(w.bits ? rounded.data() : (const uint32_t*)x, words, tokens, of_panels[most - 1], room);
  const int64_t panel = words * LANES;
  for (int64_t p = first; p < last; p += most) {
    int n = (int)std::min<int64_t>(most, last - p);
    for (int64_t turn = 0; turn < tiles.turns; turn++) {
      int m = tiles.count(turn);
      alignas(64) float sums[SUMS];
      std::memset(sums, 0, m * n * LANES * sizeof(float));
      if (w.bits == 8)
        tile_of<Quantised<8>>(m, n)(w, p, tiles.at(turn), sums);
      else if (w.bits == 4)
        tile_of<Quantised<4>>(m, n)(w, p, tiles.at(turn), sums);
      else
        tile_of<Dense<T>>(m, n)(w.lines + p * panel, panel, tiles.at(turn), tiles.words,
                                turn == 0 && p + most < last ? w.lines + (p + most) * panel : nullptr, sums);
      for (int i = 0; i < m; i++) use(tiles.first(turn) + i, p, n, sums + i * n * LANES);
    }
  }
}

// Stores outputs of one token in T, plus its bias, plus `added`, whose numbers repeat after `period`.
template <class T>
void store_outputs(const Weight& w, T* out, int64_t panel, int panels, const float* sums, const T* added,
                   int64_t period) {
  for (int n = 0; n < panels; n++) {
    int64_t at = (panel + n) * LANES;
    int count = (int)std::min<int64_t>(LANES, w.outputs - at);
    Floats x = *(const LooseFloats*)(sums + n * LANES);
    if (count == LANES) {
      if (w.bias) x += *(const LooseFloats*)(w.bias + at);
      if (added) x += Type<T>::load(added + at % period);
      Type<T>::store(out + at, x);
    } else {
      if (w.bias) x += load_part(w.bias + at, count);
      if (added) x += load_part(added + at % period, count);
      store_part(out + at, x, count);
    }
  }
}

template <class T>
void linear(const Team& team, const Weight& w, const T* x, int64_t tokens, T* out, const T* added, int64_t period) {
  int64_t panels = panels_of(w.outputs);
  multiply(w, x, tokens, team.first(panels), team.last(panels), 1,
           [&](int64_t token, int64_t panel, int count, const float* sums) {
             store_outputs(w, out + token * w.outputs, panel, count, sums, added ? added + token * period : nullptr,
                           period);
           });
}

// Gates and gated values lie in panels in turn.
template <class T>
void gated_linear(const Team& team, const Weight& w, const T* x, int64_t tokens, T* out, int kind) {
  int64_t pairs = panels_of(w.outputs) / 2, width = w.outputs / 2;
  multiply(w, x, tokens, 2 * team.first(pairs), 2 * team.last(pairs), 2,
           [&](int64_t token, int64_t panel, int count, const float* sums) {
             for (int n = 0; n < count; n += 2) {
               Floats gate = *(const LooseFloats*)(sums + n * LANES), up = *(const LooseFloats*)(sums + (n + 1) * LANES);
               if (w.bias) {
                 gate += *(const LooseFloats*)(w.bias + (panel + n) * LANES);
                 up += *(const LooseFloats*)(w.bias + (panel + n + 1) * LANES);
               }
               Type<T>::store(out + token * width + (panel + n) / 2 * LANES, activated(gate, kind) * up);
             }
           });
}

}  // namespace
