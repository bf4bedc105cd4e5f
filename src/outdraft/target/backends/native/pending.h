// Pending tokens of a forward, and how their keys and values come into the cache.
#pragma once

#include "norms.h"

namespace {

struct Heads {
  int64_t heads, kv_heads, width;
  float scale;
  const void *q_norm, *k_norm;  // [width] each, or null
  float q_eps, k_eps;
};

// A forward's tokens and the cache that they write to and read.
struct Pending {
  int64_t rows, tokens, pending;  // the tokens are the last ones of those pending
  const int32_t* lengths;         // [rows] committed tokens
  const uint8_t* seen;            // [rows][tokens][pending]
  const int64_t* positions;       // [rows][pending]
  const void *cos, *sin;          // [rows or 1][tokens][width]
  int64_t angles_row;             // 0 if all rows share them
  int64_t row_stride, head_stride, slot_stride;
  int64_t window;                 // 0: everything is seen
  void *keys, *values;            // [rows][kv_heads][slots][width] of one layer
};

template <class T>
void turn_and_store(const Team& team, const Heads& h, const Pending& p, T* mixed) {
  int64_t width = h.width, line = (h.heads + 2 * h.kv_heads) * width;
  for (int64_t item = team.first(p.rows * p.tokens); item < team.last(p.rows * p.tokens); item++) {
    int64_t row = item / p.tokens, token = item % p.tokens;
    T* x = mixed + item * line;
    const T* cos = (const T*)p.cos + row * p.angles_row + token * width;
    const T* sin = (const T*)p.sin + row * p.angles_row + token * width;
    for (int64_t head = 0; head < h.heads + h.kv_heads; head++) {
      bool query = head < h.heads;
      T* own = x + head * width;
      if (const T* weight = (const T*)(query ? h.q_norm : h.k_norm))
        norm(own, weight, query ? h.q_eps : h.k_eps, width, own);
      rotate(own, cos, sin, width);
    }
    int64_t slot = p.lengths[row] + p.pending - p.tokens + token;
    for (int64_t head = 0; head < h.kv_heads; head++) {
      int64_t at = row * p.row_stride + head * p.head_stride + slot * p.slot_stride;
      std::memcpy((T*)p.keys + at, x + (h.heads + head) * width, width * sizeof(T));
      std::memcpy((T*)p.values + at, x + (h.heads + h.kv_heads + head) * width, width * sizeof(T));
    }
  }
}

}  // namespace
