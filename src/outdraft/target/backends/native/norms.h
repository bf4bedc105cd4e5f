// Root mean square norms and rotary embeddings.
#pragma once

#include "numbers.h"
#include "team.h"

namespace {

template <class T>
void norm(const T* x, const T* weight, float eps, int64_t width, T* out) {
  Floats squares{};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    Floats v = Type<T>::load(x + i);
    squares += v * v;
  }
  int rest = (int)(width - i);
  if (rest) {
    Floats v = load_part(x + i, rest);
    squares += v * v;
  }
  float scale = 1.0f / std::sqrt(sum_of(squares) / width + eps);
  for (i = 0; i + LANES <= width; i += LANES)
    Type<T>::store(out + i, Type<T>::rounded(Type<T>::load(x + i) * scale) * Type<T>::load(weight + i));
  if (rest) store_part(out + i, Type<T>::rounded(load_part(x + i, rest) * scale) * load_part(weight + i, rest), rest);
}

template <class T>
void norms(const Team& team, const T* x, const T* weight, float eps, int64_t tokens, int64_t width, T* out) {
  for (int64_t t = team.first(tokens); t < team.last(tokens); t++)
    norm(x + t * width, weight, eps, width, out + t * width);
}

// x * cos + (-x2, x1) * sin, over halves of a multiple of sixteen, or slowly.
template <class T>
void rotate(T* x, const T* cos, const T* sin, int64_t width) {
  int64_t half = width / 2;
  if (half % LANES == 0) {
    for (int64_t i = 0; i < half; i += LANES) {
      Floats one = Type<T>::load(x + i), other = Type<T>::load(x + half + i);
      Type<T>::store(x + i, one * Type<T>::load(cos + i) - other * Type<T>::load(sin + i));
      Type<T>::store(x + half + i, other * Type<T>::load(cos + half + i) + one * Type<T>::load(sin + half + i));
    }
    return;
  }
  for (int64_t i = 0; i < half; i += LANES) {
    int n = (int)std::min<int64_t>(LANES, half - i);
    Floats one = load_part(x + i, n), other = load_part(x + half + i, n);
    store_part(x + i, one * load_part(cos + i, n) - other * load_part(sin + i, n), n);
    store_part(x + half + i, other * load_part(cos + half + i, n) + one * load_part(sin + half + i, n), n);
  }
}

}  // namespace
