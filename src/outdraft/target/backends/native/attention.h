// Rotation, the cache, and attention of pending tokens over it.
#pragma once

#include <vector>

#include "norms.h"
#include "products.h"

namespace {

constexpr int CHUNK = 128;  // keys whose values are rearranged at once
constexpr int TILE = 16;    // tokens of a prompt that attend together
constexpr int WIDE = 2, AT_ONCE = MOST_TOKENS[WIDE - 1];  // panels and queries of a tile

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
  void *keys, *values;            // [rows][kv_heads][slots][width]
  int64_t row_stride, head_stride, slot_stride;
  int64_t window;  // 0: everything is seen
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

// Values of two keys (bfloat16) or one as a line of every panel.
template <class T>
void line_of_values(const T* first, const T* second, int64_t panels, int64_t panel, uint32_t* out) {
  for (int64_t n = 0; n < panels; n++) {
    if constexpr (sizeof(T) == 4) {
      *(LooseWords*)(out + n * panel) = *(const LooseWords*)(first + n * LANES);
    } else {
      *(LooseWords*)(out + n * panel) = Type<T>::words(first + n * LANES) | Type<T>::words(second + n * LANES) << 16;
    }
  }
}

// Room that a thread keeps from call to call.
struct Room {
  std::vector<float> scores, sums;
  std::vector<uint32_t> panels, words, tokens;
  std::vector<int64_t> slots;
};

// Attention of some tokens' queries of one head of keys, over keys in the order of their positions.
template <class T>
class Attention {
 public:
  Attention(const Heads& h, const Pending& p, const T* mixed, T* out, int64_t row, int64_t kv_head, int64_t first,
            int64_t count)
      : h_(h), p_(p), mixed_(mixed), out_(out), row_(row), first_(first), count_(count), group_(h.heads / h.kv_heads),
        head_(kv_head * group_), width_(h.width), words_(h.width / Type<T>::PER_WORD) {
    int64_t at = row * p.row_stride + kv_head * p.head_stride;
    keys_ = (const T*)p.keys + at;
    values_ = (const T*)p.values + at;
    committed_ = p.lengths[row];
  }

  void run() {
    thread_local Room room;
    const uint8_t* seen = p_.seen + (row_ * p_.tokens + first_) * p_.pending;
    int64_t common = 0;  // pending tokens that all of these see, before any that one does not
    while (common < p_.pending && sees_all(seen, common)) common++;
    int64_t shared = (committed_ + common) / LANES * LANES;
    room_ = (committed_ + p_.pending + LANES - 1) / LANES * LANES;
    int64_t queries = count_ * group_;
    room.scores.resize(queries * room_);
    room.words.resize(queries * (words_ + room_ / Type<T>::PER_WORD));
    room.panels.resize(std::max<int64_t>(WIDE * words_ * LANES, CHUNK * width_ / Type<T>::PER_WORD));
    room.sums.assign(queries * width_, 0);
    scores_ = room.scores.data();
    q_ = room.words.data();
    weights_ = (T*)(q_ + queries * words_);
    for (int64_t t = 0; t < count_; t++)
      for (int64_t g = 0; g < group_; g++) std::memcpy(q_ + (t * group_ + g) * words_, query(t, g), width_ * sizeof(T));

    auto in_place = [](int64_t slot) { return slot; };
    score(in_place, shared, 0, 0, queries, room);
    for (int64_t t = 0; t < count_; t++) {
      const std::vector<int64_t>& slots = own_slots(seen + t * p_.pending, shared, room);
      int64_t own = (int64_t)slots.size();
      score([&](int64_t i) { return slots[i]; }, own, shared, t * group_, group_, room);
      for (int64_t g = 0; g < group_; g++) softmax(t, t * group_ + g, shared + own);
    }
    weigh(in_place, shared, 0, 0, queries, room);
    for (int64_t t = 0; t < count_; t++) {
      const std::vector<int64_t>& slots = own_slots(seen + t * p_.pending, shared, room);
      weigh([&](int64_t i) { return slots[i]; }, (int64_t)slots.size(), shared, t * group_, group_, room);
      for (int64_t g = 0; g < group_; g++)
        finish(t, g, room.sums.data() + (t * group_ + g) * width_, scores_[(t * group_ + g) * room_]);
    }
  }

 private:
  bool sees_all(const uint8_t* seen, int64_t token) const {
    for (int64_t t = 0; t < count_; t++)
      if (!seen[t * p_.pending + token]) return false;
    return true;
  }

  const T* query(int64_t t, int64_t g) const {
    int64_t line = (h_.heads + 2 * h_.kv_heads) * width_;
    return mixed_ + (row_ * p_.tokens + first_ + t) * line + (head_ + g) * width_;
  }

  // Slots that a token sees beyond the shared ones, in the order of positions.
  const std::vector<int64_t>& own_slots(const uint8_t* seen, int64_t shared, Room& room) const {
    std::vector<int64_t>& slots = room.slots;
    slots.clear();
    for (int64_t slot = shared; slot < committed_; slot++) slots.push_back(slot);
    for (int64_t i = std::max<int64_t>(0, shared - committed_); i < p_.pending; i++)
      if (seen[i]) slots.push_back(committed_ + i);
    return slots;
  }

  // Scores of `count` keys, whose first one has index `start`, for queries from `first` on.
  template <class Slot>
  void score(Slot slot, int64_t count, int64_t start, int64_t first, int64_t queries, Room& room) {
    const int64_t panel = words_ * LANES, turns = (queries + AT_ONCE - 1) / AT_ONCE;
    auto from = [&](int64_t turn) { return first + queries * turn / turns; };
    room.tokens.resize(turns * panel);
    for (int64_t turn = 0; turn < turns && count > 0; turn++)
      side_by_side([&](int i) { return q_ + (from(turn) + i) * words_; }, (int)(from(turn + 1) - from(turn)), words_,
                   room.tokens.data() + turn * panel);
    for (int64_t k = 0; k < count; k += WIDE * LANES) {
      int n = (int)std::min<int64_t>(WIDE, (count - k + LANES - 1) / LANES);
      for (int i = 0; i < n; i++)
        side_by_side([&](int key) { return (const uint32_t*)(keys_ + slot(k + i * LANES + key) * p_.slot_stride); },
                     (int)std::min<int64_t>(LANES, count - k - i * LANES), words_, room.panels.data() + i * panel);
      for (int64_t turn = 0; turn < turns; turn++) {
        int m = (int)(from(turn + 1) - from(turn));
        alignas(64) float sums[SUMS];
        std::memset(sums, 0, m * n * LANES * sizeof(float));
        const uint32_t* x = m == 1 ? q_ + from(turn) * words_ : room.tokens.data() + turn * panel;
        tile_of<T>(m, n)(room.panels.data(), panel, x, words_, nullptr, sums);
        for (int i = 0; i < m; i++)
          std::memcpy(scores_ + (from(turn) + i) * room_ + start + k, sums + i * n * LANES, n * LANES * sizeof(float));
      }
    }
  }

  // Turns a query's scores into weights, and its first score into the factor by which their sum becomes one.
  void softmax(int64_t t, int64_t q, int64_t count) {
    float* scores = scores_ + q * room_;
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    int64_t begin = 0;
    if (p_.window) {
      int64_t position = p_.positions[row_ * p_.pending + p_.pending - p_.tokens + first_ + t];
      begin = std::max<int64_t>(0, std::min(position - p_.window + 1, count - 1));
      for (int64_t i = 0; i < begin; i++) scores[i] = -INFINITY;
    }
    T* weights = weights_ + q * room_;
    Floats most = all(-INFINITY), total{};
    for (int64_t i = 0; i < padded; i += LANES) most = larger(most, *(const LooseFloats*)(scores + i));
    float largest = most[0];
    for (int lane = 1; lane < LANES; lane++) largest = std::max(largest, most[lane]);
    for (int64_t i = 0; i < padded; i += LANES) {
      Floats x = *(const LooseFloats*)(scores + i);
      Floats e = exponential((x - largest) * h_.scale);
      e = x == -INFINITY ? Floats{} : e;
      total += e;
      Type<T>::store(weights + i, e);
    }
    scores[0] = 1.0f / sum_of(total);
  }

  // Adds `count` values, whose first one has index `start` (even), weighed for queries from `first` on.
  template <class Slot>
  void weigh(Slot slot, int64_t count, int64_t start, int64_t first, int64_t queries, Room& room) {
    int64_t per = Type<T>::PER_WORD, panels = width_ / LANES;
    auto value = [&](int64_t i) { return values_ + slot(std::min(i, count - 1)) * p_.slot_stride; };  // further: weight 0
    for (int64_t k = 0; k < count; k += CHUNK) {
      int64_t lines = (std::min<int64_t>(CHUNK, count - k) + per - 1) / per, panel = lines * LANES;
      for (int64_t i = 0; i < lines; i++)
        line_of_values(value(k + i * per), value(k + i * per + per - 1), panels, panel, room.panels.data() + i * LANES);
      for (int64_t turn = 0, turns = (queries + AT_ONCE - 1) / AT_ONCE; turn < turns; turn++) {
        int64_t q = first + queries * turn / turns;
        int m = (int)(first + queries * (turn + 1) / turns - q);
        const uint32_t* x = (const uint32_t*)(weights_ + q * room_ + start + k);
        room.tokens.resize(lines * LANES);
        if (m > 1) side_by_side([&](int i) { return x + i * (room_ / per); }, m, lines, room.tokens.data());
        for (int64_t n = 0; n < panels; n += WIDE) {
          int wide = (int)std::min<int64_t>(WIDE, panels - n);
          alignas(64) float sums[SUMS];
          auto kept = [&](int i) { return room.sums.data() + (q + i) * width_ + n * LANES; };
          for (int i = 0; i < m; i++) std::memcpy(sums + i * wide * LANES, kept(i), wide * LANES * sizeof(float));
          tile_of<T>(m, wide)(room.panels.data() + n * panel, panel, m > 1 ? room.tokens.data() : x, lines, nullptr, sums);
          for (int i = 0; i < m; i++) std::memcpy(kept(i), sums + i * wide * LANES, wide * LANES * sizeof(float));
        }
      }
    }
  }

  void finish(int64_t t, int64_t g, const float* sums, float factor) {
    T* out = out_ + ((row_ * p_.tokens + first_ + t) * h_.heads + head_ + g) * width_;
    for (int64_t i = 0; i < width_; i += LANES) Type<T>::store(out + i, *(const LooseFloats*)(sums + i) * factor);
  }

  const Heads& h_;
  const Pending& p_;
  const T* mixed_;
  T* out_;
  int64_t row_, first_, count_, group_, head_, width_, words_, committed_ = 0, room_ = 0;
  const T *keys_ = nullptr, *values_ = nullptr;
  float* scores_ = nullptr;
  uint32_t* q_ = nullptr;
  T* weights_ = nullptr;
};

template <class T>
void attend(const Team& team, const Heads& h, const Pending& p, const T* mixed, T* out) {
  // Keys are arranged anew for every tile, so there are no more of them than keep all threads busy.
  int64_t alone = p.rows * h.kv_heads, wanted = alone % team.threads ? (2 * team.threads + alone - 1) / alone : 1;
  int64_t most = std::min<int64_t>(TILE, (p.tokens + wanted - 1) / wanted);
  int64_t tiles = (p.tokens + most - 1) / most, items = alone * tiles;
  for (int64_t item = team.thread; item < items; item += team.threads) {
    int64_t row = item / (h.kv_heads * tiles), rest = item % (h.kv_heads * tiles), first = rest / h.kv_heads * most;
    Attention<T>(h, p, mixed, out, row, rest % h.kv_heads, first, std::min(most, p.tokens - first)).run();
  }
}

}  // namespace
