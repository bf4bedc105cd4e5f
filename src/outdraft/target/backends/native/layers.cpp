// Layers of a transformer over few tokens on a CPU, at the speed of its memory.
//
// Weights lie in panels of LANES outputs, as many as a register holds. A panel has a line of that size for every two
// inputs (bfloat16) or every input (float32), and one instruction multiplies a line with inputs that all lanes share. So
// weights are read once and in order, for several tokens at a time. Weights of eight or four bits have a line for every
// four or eight inputs, and inputs are rounded to eight bits.
//
// Every number of a result is a sum in one fixed order, which depends neither on the tokens beside it nor on threads:
// a product runs over inputs, attention over the keys that a token sees, in the order of their positions. A token that
// is verified in a tree therefore gets the same bits as one that is decoded alone.

#include "attention.h"

namespace {

struct Layer {
  Heads heads;
  Weight qkv, o, gate_up, down;
  const void *attention_norm, *mlp_norm;  // the first may be null
  float attention_eps, mlp_eps;
  int64_t activation;
};

// A layer over x [tokens][inputs of qkv], and what is added after attention [tokens][hidden]. Its output is as wide as the
// down projection's.
template <class T>
void layer(const Team& team, const Layer& l, const Pending& p, const T* x, const T* residual, T* out, T* room,
           float* found) {
  int64_t tokens = p.rows * p.tokens, width = l.o.outputs, inputs = l.qkv.inputs;
  T *normed = room, *mixed = normed + tokens * std::max(width, inputs), *attended = mixed + tokens * l.qkv.outputs;
  T *after = attended + tokens * l.o.inputs, *inner = after + tokens * width;
  if (l.attention_norm) {
    norms(team, x, (const T*)l.attention_norm, l.attention_eps, tokens, inputs, normed);
    team.wait();
  }
  linear<T>(team, l.qkv, l.attention_norm ? normed : x, tokens, mixed, nullptr, 1);
  team.wait();
  turn_and_store(team, l.heads, p, mixed);
  team.wait();
  attend(team, l.heads, p, mixed, attended, found);
  team.wait();
  linear<T>(team, l.o, attended, tokens, after, residual, width);
  team.wait();
  norms(team, after, (const T*)l.mlp_norm, l.mlp_eps, tokens, width, normed);
  team.wait();
  gated_linear(team, l.gate_up, normed, tokens, inner, (int)l.activation);
  team.wait();
  linear<T>(team, l.down, inner, tokens, out, after, width);
}

struct Fusion {
  Weight joined, gate, up, down;
  const void* norm;
  float eps;
};

// z = joined [e ; x], then z + down (silu(gate e) * up norm(z)), of embeddings e and features x, each [tokens][hidden].
template <class T>
void fusion(const Team& team, const Fusion& f, const T* e, const T* x, int64_t tokens, T* out, T* room) {
  int64_t width = f.down.outputs, half = f.joined.inputs / 2, inner = f.down.inputs;
  T *both = room, *z = both + tokens * 2 * half, *normed = z + tokens * width, *gates = normed + tokens * width;
  T* gated = gates + tokens * inner;
  for (int64_t t = team.first(tokens); t < team.last(tokens); t++) {
    std::memcpy(both + 2 * t * half, e + t * half, half * sizeof(T));
    std::memcpy(both + (2 * t + 1) * half, x + t * half, half * sizeof(T));
  }
  linear<T>(team, f.gate, e, tokens, gates, nullptr, 1);
  team.wait();
  linear<T>(team, f.joined, both, tokens, z, nullptr, 1);
  team.wait();
  norms(team, z, (const T*)f.norm, f.eps, tokens, width, normed);
  team.wait();
  int64_t panels = panels_of(inner);
  multiply(f.up, normed, tokens, team.first(panels), team.last(panels), 1,
           [&](int64_t token, int64_t panel, int count, const float* sums) {
             for (int n = 0; n < count; n++) {
               int64_t at = token * inner + (panel + n) * LANES;
               Type<T>::store(gated + at, activated(Type<T>::load(gates + at), 0) * *(const LooseFloats*)(sums + n * LANES));
             }
           });
  team.wait();
  linear<T>(team, f.down, gated, tokens, out, z, width);
}

template <class Work>
void by_type(int half, Work work) {
  if (half)
    work(bfloat16{});
  else
    work(0.0f);
}

}  // namespace

extern "C" {

int outdraft_lanes() { return LANES; }

void outdraft_linear(int half, int threads, const Weight* w, const void* x, int64_t tokens, void* out,
                     const void* added) {
  by_type(half, [&](auto type) {
    using T = decltype(type);
    together(threads, [&](const Team& team) {
      linear<T>(team, *w, (const T*)x, tokens, (T*)out, (const T*)added, w->outputs);
    });
  });
}

void outdraft_norm(int half, const void* x, const void* weight, float eps, int64_t tokens, int64_t width, void* out) {
  by_type(half, [&](auto type) {
    using T = decltype(type);
    norms(Team{0, 1, nullptr}, (const T*)x, (const T*)weight, eps, tokens, width, (T*)out);
  });
}

void outdraft_fusion(int half, int threads, const Fusion* f, const void* e, const void* x, int64_t tokens, void* out) {
  by_type(half, [&](auto type) {
    using T = decltype(type);
    thread_local std::vector<T> room;
    room.resize(tokens * (f->joined.inputs + 2 * f->down.outputs + 2 * f->down.inputs) + LANES);
    T* own = room.data();
    together(threads, [&](const Team& team) { fusion(team, *f, (const T*)e, (const T*)x, tokens, (T*)out, own); });
  });
}

// Layers one after the other; `residual` is added to the first one's attention, in place of x.
void outdraft_layers(int half, int threads, const Layer* const* layers, int64_t count, const Pending* p,
                     void* const* keys, void* const* values, const void* x, const void* residual, void* out) {
  by_type(half, [&](auto type) {
    using T = decltype(type);
    thread_local std::vector<T> room, between;
    thread_local std::vector<float> found;
    const int64_t tokens = p->rows * p->tokens;
    int64_t wide = 0, shared = 0;
    for (int64_t i = 0; i < count; i++) {
      const Layer& l = *layers[i];
      const Parts<T> parts(l.heads, *p, nullptr, nullptr);
      if (parts.shared(threads)) shared = std::max(shared, parts.count * parts.room);
      wide = std::max(wide, std::max(l.qkv.inputs, l.o.outputs) + l.qkv.outputs + l.o.inputs + l.o.outputs + l.down.inputs);
    }
    room.resize(tokens * wide + LANES);
    found.resize(shared);
    between.resize(count > 1 ? tokens * layers[0]->down.outputs : 0);
    T *own = room.data(), *turns[] = {(T*)out, between.data()};
    float* sums = found.data();
    const T* input = (const T*)x;
    // A team each, so that on a crowded machine fewer threads go on within one call.
    for (int64_t i = 0; i < count; i++) {
      Pending over = *p;
      over.keys = keys[i], over.values = values[i];
      T* output = turns[(count - 1 - i) % 2];
      const T* beside = i == 0 && residual ? (const T*)residual : input;
      together(threads, [&](const Team& team) { layer(team, *layers[i], over, input, beside, output, own, sums); });
      input = output;
    }
  });
}
}
