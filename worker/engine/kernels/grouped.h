// Products of 8-bit weights in groups of inputs that share a scale, as Q8_0 of llama.cpp keeps them: an outlier spoils the
// steps of its own group and no other's.
//
//     panel   of each group: [kGroup / 4][kPanel][4] bytes, 128 too large; then the outputs' scales in bfloat16, output i
//             in the lower half of word i, output i + 16 in the upper half
//     row     of each plane and group: kGroup signed bytes; -128 times their sum, which takes the 128 off; a scale
//
// One plane holds 8-bit activations with a scale per group. Two planes hold 16 bits, the upper byte's first, with one scale
// for the whole row. Groups are summed up exactly, in integers, and added to float sums in order, so a row's result is the
// same to the bit in any batch and on any number of threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "matmul.h"

namespace torchrelay {

constexpr int kGroup = 32;
constexpr int kGroupWords = kGroup / 4;
constexpr int kPanelGroup = kGroupWords * kPanel + kPanel / 2;  // words
constexpr int kRowGroup = kGroupWords + 2;                      // words

inline int64_t num_groups(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }

// Adds the products of four unsigned with four signed bytes.
inline Counts dot_bytes(Words weights, uint32_t activations, Counts sum) {
#if defined(__AVX512VNNI__)
  return (Counts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(activations));
#else
  for (int i = 0; i < 4; i++)
    sum += (Counts)(weights >> (8 * i) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(activations >> (8 * i)));
  return sum;
#endif
}

inline float as_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

template <int kPlanes>
struct GroupedProduct {
  static constexpr int kMostRows = kTileRows >= 12 ? (kPlanes == 1 ? 6 : 4) : 1;

  static int64_t panel_words(int64_t inputs) { return num_groups(inputs) * kPanelGroup; }
  static int64_t row_words(int64_t inputs) { return num_groups(inputs) * kRowGroup * kPlanes; }

  template <int R>
  static void run_tile(const uint32_t* rows, int64_t inputs, const uint32_t* panel, const uint32_t* next, Sums* result) {
    constexpr int kVectors = kPanel / kColumns;
    constexpr int kPrefetch = 2048 / 4;  // words ahead
    const int64_t groups = num_groups(inputs), plane_words = groups * kRowGroup, row_words = plane_words * kPlanes;
    Sums sums[R][kVectors];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < kVectors; c++) sums[r][c] = Sums{};
    for (int64_t g = 0; g < groups; g++, panel += kPanelGroup, next += kPanelGroup, rows += kRowGroup) {
      Counts counts[R][kPlanes][kVectors];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < kPlanes; p++)
          for (int c = 0; c < kVectors; c++)
            counts[r][p][c] = Counts{} + static_cast<int32_t>(rows[r * row_words + p * plane_words + kGroupWords]);
      for (int k = 0; k < kGroupWords; k++) {
        __builtin_prefetch(panel + k * kPanel + kPrefetch);
        __builtin_prefetch(panel + k * kPanel + kPrefetch + kColumns);
        __builtin_prefetch(next + k * kPanel, 0, 2);
        Words weights[kVectors];
        for (int c = 0; c < kVectors; c++) weights[c] = load_words(panel + k * kPanel + c * kColumns);
        for (int r = 0; r < R; r++)
          for (int p = 0; p < kPlanes; p++) {
            const uint32_t activations = rows[r * row_words + p * plane_words + k];
            for (int c = 0; c < kVectors; c++) counts[r][p][c] = dot_bytes(weights[c], activations, counts[r][p][c]);
          }
      }
      __builtin_prefetch(panel + kGroupWords * kPanel + kPrefetch);
      const Words halves = load_words(panel + kGroupWords * kPanel);
      const Sums scales[kVectors] = {(Sums)(halves << 16), (Sums)(halves & 0xffff0000u)};
      for (int r = 0; r < R; r++)
        for (int c = 0; c < kVectors; c++) {
          if constexpr (kPlanes == 1) {
            const float scale = as_float(rows[r * row_words + kGroupWords + 1]);
            sums[r][c] += __builtin_convertvector(counts[r][0][c], Sums) * (scales[c] * scale);
          } else {
            const Counts both = (counts[r][0][c] << 8) + counts[r][1][c];
            sums[r][c] += __builtin_convertvector(both, Sums) * scales[c];
          }
        }
    }
    rows -= groups * kRowGroup;
    for (int r = 0; r < R; r++)
      for (int c = 0; c < kVectors; c++)
        result[r * kVectors + c] =
            kPlanes == 1 ? sums[r][c] : sums[r][c] * as_float(rows[r * row_words + kGroupWords + 1]);
  }
};

// A NaN counts as the largest.
inline float largest_magnitude(const float* x, int64_t size) {
  float largest = 0.0f;
  for (int64_t i = 0; i < size; i++) {
    const float magnitude = std::fabs(x[i]);
    largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
  }
  return largest;
}

// Whole steps nearest to x, as integers in the low bits.
inline int32_t round_to_steps(float x, float steps_per_unit) {
  const float shifted = x * steps_per_unit + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

// Writes a row of `size` activations as planes; inputs behind its end count as zero. A NaN makes its group's scale, or its
// row's, a NaN, and touches no other row.
template <int kPlanes>
void write_planes(const float* x, int64_t size, uint32_t* row) {
  constexpr float kSteps = kPlanes == 1 ? 127.0f : 32512.0f;  // 127 * 256: the upper byte is never more than 127
  const int64_t groups = num_groups(size);
  float largest = kPlanes == 1 ? 0.0f : largest_magnitude(x, size);
  for (int64_t g = 0; g < groups; g++) {
    float padded[kGroup] = {};
    const float* source = x + g * kGroup;
    if (const int64_t left = size - g * kGroup; left < kGroup) {
      std::memcpy(padded, source, left * sizeof(float));
      source = padded;
    }
    if constexpr (kPlanes == 1) largest = largest_magnitude(source, kGroup);
    const float scale = largest / kSteps, steps_per_unit = largest > 1e-30f ? kSteps / largest : 0.0f;
    int8_t bytes[kPlanes][kGroup];
    int32_t sums[kPlanes] = {};
    for (int i = 0; i < kGroup; i++) {
      const int32_t steps = round_to_steps(source[i], steps_per_unit);
      const int8_t low = static_cast<int8_t>(steps);
      bytes[kPlanes - 1][i] = low;
      sums[kPlanes - 1] += low;
      if constexpr (kPlanes == 2) {
        const int8_t high = static_cast<int8_t>((steps - low) >> 8);
        bytes[0][i] = high;
        sums[0] += high;
      }
    }
    for (int p = 0; p < kPlanes; p++) {
      uint32_t* const target = row + (p * groups + g) * kRowGroup;
      std::memcpy(target, bytes[p], kGroup);
      target[kGroupWords] = static_cast<uint32_t>(-128 * sums[p]);
      std::memcpy(target + kGroupWords + 1, &scale, sizeof scale);
    }
  }
}

}  // namespace torchrelay
