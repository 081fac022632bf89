// Products of 8-bit weights in groups of inputs that share a scale, as Q8_0 of llama.cpp keeps them: an outlier spoils the
// steps of its own group and no other's.
//
//     panel   of each group: [kGroup / 4][kPanel][4] bytes, 128 too large; then the outputs' scales in bfloat16, output i
//             in the lower half of word i, output i + 16 in the upper half
//     row     of each group: its numbers as the instructions at hand take them (grouped_bytes.h, grouped_pairs.h);
//             -128 times their sum, which takes the 128 off; a scale
//
// Activations have 8 bits and a scale per group, or, wide, 16 bits and one scale for the whole row. Groups are summed up
// exactly, in integers, and added to float sums in order, so a row's result is the same to the bit in any batch and on any
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "matmul.h"

namespace torchrelay {

constexpr int kGroup = 32;
constexpr int kGroupWords = kGroup / 4;
static_assert(kGroupWords == kFetchSteps);
constexpr int kPanelGroup = kGroupWords * kPanel + kPanel / 2;  // words

inline int64_t num_groups(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }

inline float as_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

// Scales of the outputs from `first` on, of a group whose scales stand at `words`.
inline Floats group_scales(const uint32_t* words, int first) {
  const Bits halves = load_words(words + first % (kPanel / 2));
  return (Floats)(first < kPanel / 2 ? halves << 16 : halves & 0xffff0000u);
}

// A NaN counts as the largest: as integers its bits are, and those of all numbers without a sign stand in their order.
inline float largest_magnitude(const float* x, int64_t size) {
  Ints largest{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Ints magnitudes = (Ints)load(x + i) & 0x7fffffff;
    largest = magnitudes > largest ? magnitudes : largest;
  }
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; lane++) found = std::max(found, largest[lane]);
  for (; i < size; i++) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found = std::max(found, bits & 0x7fffffff);
  }
  return as_float(static_cast<uint32_t>(found));
}

// Whole steps nearest to x, as integers.
inline Ints round_to_steps(Floats x, float steps_per_unit) {
  return (Ints)(x * steps_per_unit + 12582912.0f) - 0x4b400000;  // adding 1.5 * 2^23 rounds to an integer
}

// Calls take(group, steps[kGroup], scale) for each group of `size` activations; inputs behind the end count as zero. A NaN
// makes its group's scale, or its row's, a NaN, and touches no other row.
template <bool kWide, typename Take>
void each_group(const float* x, int64_t size, Take take) {
  constexpr float kSteps = kWide ? 32512.0f : 127.0f;  // 127 * 256: the upper byte is never more than 127
  float largest = kWide ? largest_magnitude(x, size) : 0.0f;
  for (int64_t g = 0; g < num_groups(size); g++) {
    float padded[kGroup] = {};
    const float* source = x + g * kGroup;
    if (const int64_t left = size - g * kGroup; left < kGroup) {
      std::memcpy(padded, source, left * sizeof(float));
      source = padded;
    }
    if constexpr (!kWide) largest = largest_magnitude(source, kGroup);
    const float steps_per_unit = largest > 1e-30f ? kSteps / largest : 0.0f;
    int32_t steps[kGroup];
    for (int i = 0; i < kGroup; i += kLanes) {
      const Ints rounded = round_to_steps(load(source + i), steps_per_unit);
      std::memcpy(steps + i, &rounded, sizeof rounded);
    }
    take(g, steps, largest / kSteps);
  }
}

}  // namespace torchrelay

#if defined(__AVX512VNNI__)
#include "grouped_bytes.h"
#else
#include "grouped_pairs.h"
#endif
