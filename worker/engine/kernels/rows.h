// What is done with one row of activations between matrix products: norms, rotary positions, conversion.
//
// Rows are floats; each function takes one row and is called by whichever thread has it.
#pragma once

#include <algorithm>
#include <cmath>

#include "decoder.h"
#include "grouped.h"

namespace torchrelay {

constexpr int kColumns = kPanel / 2;  // gates of a panel, and as many ups

inline float sum_of_squares(const float* x, int64_t size) {
  constexpr int kSums = kColumns / kLanes;  // as many numbers at a time on every instruction set
  Floats sums[kSums] = {};
  int64_t i = 0;
  for (; i + kColumns <= size; i += kColumns)
    for (int c = 0; c < kSums; c++) sums[c] += load(x + i + c * kLanes) * load(x + i + c * kLanes);
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int c = 0; c < width; c++) sums[c] += sums[c + width];
  float total = horizontal_sum(sums[0]);
  for (; i < size; i++) total += x[i] * x[i];
  return total;
}

// Where the largest number stands, of equal ones the first; a NaN counts as larger than all.
inline int64_t argmax(const float* x, int64_t size) {
  Floats largest = broadcast(-INFINITY);
  Ints blocks{}, nans{};
  int64_t i = 0;
  for (int32_t block = 0; i + kLanes <= size; i += kLanes, block++) {
    const Floats y = load(x + i);
    nans |= y != y;
    blocks = y > largest ? Ints{} + block : blocks;
    largest = y > largest ? y : largest;
  }
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; lane++) has_nan |= nans[lane] != 0;
  for (int64_t j = i; j < size; j++) has_nan |= x[j] != x[j];
  if (has_nan) return std::find_if(x, x + size, [](float y) { return y != y; }) - x;
  int64_t best = 0;
  if (i > 0)
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t at = static_cast<int64_t>(blocks[lane]) * kLanes + lane;
      if (x[at] > x[best] || (x[at] == x[best] && at < best)) best = at;
    }
  for (int64_t j = i; j < size; j++)
    if (x[j] > x[best]) best = j;
  return best;
}

inline void rms_norm(const float* x, const float* weight, int64_t size, float epsilon, float* target) {
  const float factor = 1.0f / std::sqrt(sum_of_squares(x, size) / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < size; i++) target[i] = x[i] * factor * weight[i];
}

// Rotary positions (arXiv:2104.09864): dimension i turns with dimension i + size / 2. In place.
inline void rotate(float* __restrict__ x, const float* __restrict__ cosines, const float* __restrict__ sines,
                   int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

inline void convert_row(const float* x, int64_t size, float* target) { std::memcpy(target, x, size * sizeof(float)); }

inline void convert_row(const float* x, int64_t size, BFloat16* target) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(target + i, load(x + i));
  for (; i < size; i++) from_float(x[i], target + i);
}

inline void convert_row(const BFloat16* x, int64_t size, float* target) {
  for (int64_t i = 0; i < size; i++) target[i] = to_float(x[i]);
}

// Words of a row of activations for a linear layer.
inline int64_t row_words(const Linear& linear) {
  switch (linear.format) {
    case kLinearFloat32: return PlainProduct<Float32Format>::row_words(linear.inputs);
    case kLinearBFloat16: return PlainProduct<BFloat16Format>::row_words(linear.inputs);
    case kLinearInt8: return GroupedProduct<false>::row_words(linear.inputs);
    default: return GroupedProduct<true>::row_words(linear.inputs);
  }
}

// Turns a row into what a linear layer takes.
inline void prepare_row(const Linear& linear, const float* x, uint32_t* words) {
  switch (linear.format) {
    case kLinearFloat32: return convert_row(x, linear.inputs, reinterpret_cast<float*>(words));
    case kLinearBFloat16: return convert_row(x, linear.inputs, reinterpret_cast<BFloat16Format::Input*>(words));
    case kLinearInt8: return GroupedProduct<false>::write_row(x, linear.inputs, words);
    default: return GroupedProduct<true>::write_row(x, linear.inputs, words);
  }
}

// Activation of gates, times ups; roughly, where the result is rounded to bfloat16.
template <bool kRoughly>
inline Floats gate(int64_t activation, Floats g, Floats ups) {
  if (activation == kSilu) {
    const Floats x = g < -88.0f ? broadcast(88.0f) : -g;
    if constexpr (kRoughly)
      return g * reciprocal(rough_power_of_two(x * 1.44269504088896341f) + 1.0f) * ups;
    else
      return g * reciprocal(exponential(x) + 1.0f) * ups;
  }
  const Floats inner = (g * g * g * 0.044715f + g) * 0.7978845608028654f;
  return (hyperbolic_tangent(inner) + 1.0f) * g * 0.5f * ups;
}

// Writes the first `count` of the numbers in V vectors: of floats as they are, or rounded.
template <int V, typename T>
inline void store_columns(const Floats* y, int64_t count, T* target) {
  if (count == V * kLanes) {
    for (int c = 0; c < V; c++) store(target + c * kLanes, y[c]);
    return;
  }
  T columns[V * kLanes];
  for (int c = 0; c < V; c++) store(columns + c * kLanes, y[c]);
  std::memcpy(target, columns, count * sizeof(T));
}

// Adds the first `count` of the numbers in V vectors, scaled.
template <int V>
inline void add_columns(const Floats* y, float scale, int64_t count, float* target) {
  if (count == V * kLanes) {
    for (int c = 0; c < V; c++) store(target + c * kLanes, y[c] * scale + load(target + c * kLanes));
    return;
  }
  float columns[V * kLanes];
  for (int c = 0; c < V; c++) store(columns + c * kLanes, y[c]);
  for (int64_t i = 0; i < count; i++) target[i] += columns[i] * scale;
}

}  // namespace torchrelay
