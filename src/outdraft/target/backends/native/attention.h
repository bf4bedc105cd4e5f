// Attention of pending tokens over the cache.
#pragma once

#include <vector>

#include "pending.h"
#include "products.h"

namespace {

constexpr int64_t BLOCK = 128;  // keys that are weighed together
constexpr int TILE = 16;    // tokens of a prompt that attend together
constexpr int WIDE = 2, AT_ONCE = MOST_TOKENS[WIDE - 1];  // panels and queries of a tile

// Values of two keys (bfloat16) or one as a line of every panel.
template <class T>
void line_of_values(const T* first, const T* second, int64_t panels, int64_t panel, uint32_t* out) {
  int64_t n = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    alignas(64) static constexpr uint16_t PAIRS[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(PAIRS), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; n + 2 <= panels; n += 2) {
      __m512i a = _mm512_loadu_si512(first + n * LANES), b = _mm512_loadu_si512(second + n * LANES);
      _mm512_storeu_si512(out + n * panel, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(out + (n + 1) * panel, _mm512_permutex2var_epi16(a, high, b));
    }
  }
#endif
  for (; n < panels; n++) {
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
  std::vector<int64_t> slots, begins;
};

// Attention of some tokens' queries of one head of keys, in blocks of keys in the order of their positions: a block's
// weights are relative to its largest score, and its sums are kept until all blocks are added. So threads may share the
// blocks of a head.
template <class T>
class Attention {
 public:
  // `found` holds, for every block and query, the sums [width] of weighed values, the largest score, and the weights' sum.
  Attention(const Heads& h, const Pending& p, const T* mixed, T* out, int64_t row, int64_t kv_head, int64_t first,
            int64_t count, float* found)
      : h_(h), p_(p), mixed_(mixed), out_(out), row_(row), first_(first), count_(count), group_(h.heads / h.kv_heads),
        head_(kv_head * group_), width_(h.width), words_(h.width / Type<T>::PER_WORD), committed_(p.lengths[row]),
        found_(found) {
    int64_t at = row * p.row_stride + kv_head * p.head_stride;
    keys_ = (const T*)p.keys + at;
    values_ = (const T*)p.values + at;
  }

  int64_t blocks() const { return (committed_ + p_.pending + BLOCK - 1) / BLOCK; }
  int64_t queries() const { return count_ * group_; }

  // Arranges the queries; before the first block of a thread.
  void begin() {
    int64_t common = p_.pending;  // pending tokens that all of these see, before any that one does not
    for (int64_t t = 0; t < count_; t++)
      if (const void* gap = std::memchr(seen(t), 0, common)) common = (const uint8_t*)gap - seen(t);
    shared_ = (committed_ + common) / LANES * LANES;
    Room& r = room();
    list_own(r);
    r.scores.resize(queries() * BLOCK);
    r.words.resize(queries() * (words_ + BLOCK / Type<T>::PER_WORD));
    r.panels.resize(std::max<int64_t>(WIDE * words_ * LANES, BLOCK * width_ / Type<T>::PER_WORD));
    scores_ = r.scores.data();
    q_ = r.words.data();
    weights_ = (T*)(q_ + queries() * words_);
    for (int64_t t = 0; t < count_; t++)
      for (int64_t g = 0; g < group_; g++) std::memcpy(q_ + (t * group_ + g) * words_, query(t, g), width_ * sizeof(T));
  }

  void block(int64_t b) {
    int64_t start = b * BLOCK, all = std::max<int64_t>(0, std::min<int64_t>(BLOCK, shared_ - start));
    float* sums = found_ + b * queries() * (width_ + 2);
    auto in_place = [&](int64_t i) { return start + i; };
    score(in_place, all, 0, 0, queries());
    for (int64_t t = 0; t < count_; t++) {
      int64_t own = each_own(t, start, all, [&](auto slot, int64_t n) { score(slot, n, all, t * group_, group_); });
      for (int64_t g = 0; g < group_; g++) softmax(t, t * group_ + g, start, all + own, sums);
    }
    std::memset(sums, 0, queries() * width_ * sizeof(float));
    weigh(in_place, all, 0, 0, queries(), sums);
    for (int64_t t = 0; t < count_; t++)
      each_own(t, start, all, [&](auto slot, int64_t n) { weigh(slot, n, all, t * group_, group_, sums); });
  }

  // Blocks from the first on that hold all keys which any of these tokens sees; after `begin`.
  int64_t needed() const {
    const std::vector<int64_t>& begins = room().begins;
    int64_t most = 0;
    for (int64_t t = 0; t < count_; t++) most = std::max(most, begins[t + 1] - begins[t]);
    return (shared_ + most + BLOCK - 1) / BLOCK;
  }

  // Adds a query's blocks, each with the factor that makes its weights relative to the largest score of all.
  void finish(int64_t q, int64_t count) {
    int64_t line = queries() * (width_ + 2);
    const float* most = found_ + queries() * width_ + q;
    float largest = -INFINITY, total = 0;
    for (int64_t b = 0; b < count; b++) largest = std::max(largest, most[b * line]);
    std::vector<float>& sums = room().sums;
    sums.assign(width_, 0);
    for (int64_t b = 0; b < count; b++) {
      if (most[b * line] == -INFINITY) continue;
      float factor = exponential(all((most[b * line] - largest) * h_.scale))[0];
      total += factor * most[b * line + queries()];
      const float* own = found_ + b * line + q * width_;
      for (int64_t i = 0; i < width_; i += LANES)
        *(LooseFloats*)(sums.data() + i) += *(const LooseFloats*)(own + i) * factor;
    }
    T* out = out_ + ((row_ * p_.tokens + first_ + q / group_) * h_.heads + head_ + q % group_) * width_;
    for (int64_t i = 0; i < width_; i += LANES) Type<T>::store(out + i, *(const LooseFloats*)(sums.data() + i) / total);
  }

 private:
  static Room& room() {
    thread_local Room room;
    return room;
  }

  const uint8_t* seen(int64_t t) const { return p_.seen + (row_ * p_.tokens + first_ + t) * p_.pending; }

  const T* query(int64_t t, int64_t g) const {
    int64_t line = (h_.heads + 2 * h_.kv_heads) * width_;
    return mixed_ + (row_ * p_.tokens + first_ + t) * line + (head_ + g) * width_;
  }

  // Lists the slots of the keys that each token sees beyond the shared ones, in the order of positions.
  void list_own(Room& r) {
    r.slots.clear();
    r.begins.assign(1, 0);
    for (int64_t t = 0; t < count_; t++) {
      for (int64_t slot = shared_; slot < committed_; slot++) r.slots.push_back(slot);
      const uint8_t* seen = this->seen(t);
      for (int64_t i = std::max<int64_t>(0, shared_ - committed_); i < p_.pending; i++) {
        static constexpr uint8_t NONE[8] = {};
        if (i + 8 <= p_.pending && std::memcmp(seen + i, NONE, 8) == 0)
          i += 7;  // of a prompt nearly all
        else if (seen[i])
          r.slots.push_back(committed_ + i);
      }
      r.begins.push_back(r.slots.size());
    }
  }

  // Calls use(slot, count) for the keys of a block that a token sees beyond the shared ones; returns how many there are.
  template <class Use>
  int64_t each_own(int64_t t, int64_t start, int64_t all, Use use) {
    const Room& r = room();
    int64_t from = r.begins[t] + start + all - shared_, count = std::min(r.begins[t + 1] - from, BLOCK - all);
    if (count <= 0) return 0;
    use([slots = r.slots.data() + from](int64_t i) { return slots[i]; }, count);
    return count;
  }

  // Scores of `count` keys, whose first one has index `start` in the block, for queries from `first` on.
  template <class Slot>
  void score(Slot slot, int64_t count, int64_t start, int64_t first, int64_t queries) {
    if (count <= 0) return;
    Room& r = room();
    const int64_t panel = words_ * LANES, turns = (queries + AT_ONCE - 1) / AT_ONCE;
    auto from = [&](int64_t turn) { return first + queries * turn / turns; };
    r.tokens.resize(turns * panel);
    for (int64_t turn = 0; turn < turns; turn++)
      side_by_side([&](int i) { return q_ + (from(turn) + i) * words_; }, (int)(from(turn + 1) - from(turn)), words_,
                   r.tokens.data() + turn * panel);
    for (int64_t k = 0; k < count; k += WIDE * LANES) {
      int n = (int)std::min<int64_t>(WIDE, (count - k + LANES - 1) / LANES);
      for (int i = 0; i < n; i++)
        side_by_side([&](int key) { return (const uint32_t*)(keys_ + slot(k + i * LANES + key) * p_.slot_stride); },
                     (int)std::min<int64_t>(LANES, count - k - i * LANES), words_, r.panels.data() + i * panel);
      for (int64_t turn = 0; turn < turns; turn++) {
        int m = (int)(from(turn + 1) - from(turn));
        alignas(64) float sums[SUMS];
        std::memset(sums, 0, m * n * LANES * sizeof(float));
        const uint32_t* x = m == 1 ? q_ + from(turn) * words_ : r.tokens.data() + turn * panel;
        tile_of<Dense<T>>(m, n)(r.panels.data(), panel, x, words_, nullptr, sums);
        for (int i = 0; i < m; i++)
          std::memcpy(scores_ + (from(turn) + i) * BLOCK + start + k, sums + i * n * LANES, n * LANES * sizeof(float));
      }
    }
  }

  // Turns a query's scores of `count` keys of a block into weights.
  void softmax(int64_t t, int64_t q, int64_t start, int64_t count, float* sums) {
    float* scores = scores_ + q * BLOCK;
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    if (p_.window) {
      int64_t position = p_.positions[row_ * p_.pending + p_.pending - p_.tokens + first_ + t];
      int64_t begin = std::min(position - p_.window + 1 - start, count);
      for (int64_t i = 0; i < begin; i++) scores[i] = -INFINITY;
    }
    Floats most = all(-INFINITY), total{};
    for (int64_t i = 0; i < padded; i += LANES) most = larger(most, *(const LooseFloats*)(scores + i));
    float largest = largest_of(most);
    T* weights = weights_ + q * BLOCK;
    // Powers of two where a weight has few bits.
    const float unit = sizeof(T) == 2 ? h_.scale * 1.44269504088896341f : h_.scale;
    const float from = largest == -INFINITY ? 0.0f : largest * unit;
    for (int64_t i = 0; i < padded; i += LANES) {
      Floats weight = weighed(*(const LooseFloats*)(scores + i) * unit - from);
      total += weight;
      Type<T>::store(weights + i, weight);
    }
    float* kept = sums + queries() * width_ + q;
    kept[0] = largest;
    kept[queries()] = sum_of(total);
  }

  static Floats weighed(Floats x) {
    if constexpr (sizeof(T) == 2) return power_of_two(x);
    return x == -INFINITY ? Floats{} : exponential(x);
  }

  // Adds `count` values, whose first one has index `start` (even) in the block, weighed for queries from `first` on.
  template <class Slot>
  void weigh(Slot slot, int64_t count, int64_t start, int64_t first, int64_t queries, float* found) {
    if (count <= 0) return;
    Room& r = room();
    int64_t per = Type<T>::PER_WORD, panels = width_ / LANES, lines = (count + per - 1) / per, panel = lines * LANES;
    auto value = [&](int64_t i) { return values_ + slot(std::min(i, count - 1)) * p_.slot_stride; };  // further: weight 0
    for (int64_t i = 0; i < lines; i++)
      line_of_values(value(i * per), value(i * per + per - 1), panels, panel, r.panels.data() + i * LANES);
    r.tokens.resize(lines * LANES);
    for (int64_t turn = 0, turns = (queries + AT_ONCE - 1) / AT_ONCE; turn < turns; turn++) {
      int64_t q = first + queries * turn / turns;
      int m = (int)(first + queries * (turn + 1) / turns - q);
      const uint32_t* x = (const uint32_t*)(weights_ + q * BLOCK + start);
      if (m > 1) side_by_side([&](int i) { return x + i * (BLOCK / per); }, m, lines, r.tokens.data());
      for (int64_t n = 0; n < panels; n += WIDE) {
        int wide = (int)std::min<int64_t>(WIDE, panels - n);
        alignas(64) float sums[SUMS];
        auto kept = [&](int i) { return found + (q + i) * width_ + n * LANES; };
        for (int i = 0; i < m; i++) std::memcpy(sums + i * wide * LANES, kept(i), wide * LANES * sizeof(float));
        tile_of<Dense<T>>(m, wide)(r.panels.data() + n * panel, panel, m > 1 ? r.tokens.data() : x, lines, nullptr, sums);
        for (int i = 0; i < m; i++) std::memcpy(kept(i), sums + i * wide * LANES, wide * LANES * sizeof(float));
      }
    }
  }

  const Heads& h_;
  const Pending& p_;
  const T* mixed_;
  T* out_;
  int64_t row_, first_, count_, group_, head_, width_, words_, committed_, shared_ = 0;
  float* found_;
  const T *keys_ = nullptr, *values_ = nullptr;
  float* scores_ = nullptr;
  uint32_t* q_ = nullptr;
  T* weights_ = nullptr;
};

// The attention of all tokens, in parts: a row's tokens of at most TILE, with one head of keys.
template <class T>
struct Parts {
  const Heads& h;
  const Pending& p;
  const T* mixed;
  T* out;
  int64_t tiles, most, count, blocks, room;  // parts and, of the largest one, blocks and numbers found

  Parts(const Heads& h, const Pending& p, const T* mixed, T* out) : h(h), p(p), mixed(mixed), out(out) {
    tiles = (p.tokens + TILE - 1) / TILE;
    most = (p.tokens + tiles - 1) / tiles;
    count = p.rows * h.kv_heads * tiles;
    blocks = (*std::max_element(p.lengths, p.lengths + p.rows) + p.pending + BLOCK - 1) / BLOCK;
    room = blocks * most * (h.heads / h.kv_heads) * (h.width + 2);
  }

  // True if threads share the blocks of a part, since there are few parts.
  bool shared(int threads) const { return threads > 1 && count < 4 * threads; }

  Attention<T> part(int64_t i, float* found) const {
    int64_t first = i / h.kv_heads % tiles * most;
    return Attention<T>(h, p, mixed, out, i / h.kv_heads / tiles, i % h.kv_heads, first,
                        std::min(most, p.tokens - first), found);
  }
};

// `found` is room for what the parts find, if threads share them.
template <class T>
void attend(const Team& team, const Heads& h, const Pending& p, const T* mixed, T* out, float* found) {
  const Parts<T> parts(h, p, mixed, out);
  if (!parts.shared(team.threads)) {
    thread_local std::vector<float> own;
    own.resize(parts.room);
    for (int64_t i = team.thread; i < parts.count; i += team.threads) {
      Attention<T> part = parts.part(i, own.data());
      part.begin();
      const int64_t blocks = part.needed();
      for (int64_t b = 0; b < blocks; b++) part.block(b);
      for (int64_t q = 0; q < part.queries(); q++) part.finish(q, blocks);
    }
    return;
  }
  int64_t units = parts.count * parts.blocks, first = team.first(units), last = team.last(units);
  for (int64_t i = first / parts.blocks; i * parts.blocks < last; i++) {
    Attention<T> part = parts.part(i, found + i * parts.room);
    part.begin();
    int64_t before = i * parts.blocks, end = std::min(part.blocks(), last - before);
    for (int64_t b = std::max<int64_t>(0, first - before); b < end; b++) part.block(b);
  }
  team.wait();
  for (int64_t i = 0; i < parts.count; i++) {
    Attention<T> part = parts.part(i, found + i * parts.room);
    for (int64_t q = team.first(part.queries()); q < team.last(part.queries()); q++) part.finish(q, part.blocks());
  }
}

}  // namespace
