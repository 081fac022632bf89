// Products of grouped 8-bit weights by the instruction that multiplies four bytes of each lane and adds them up.
//
//     row     of each plane and group: kGroup signed bytes, then the group's two words
//
// Wide activations are two planes: that of the upper bytes comes first.
#pragma once

#include "grouped.h"

namespace torchrelay {

template <bool kWide>
struct GroupedProduct {
  static constexpr int kPlanes = kWide ? 2 : 1;
  static constexpr int kMostRows = kWide ? 4 : 6;
  static constexpr int kRowGroup = kGroupWords + 2;  // words

  static int64_t panel_words(int64_t inputs) { return num_groups(inputs) * kPanelGroup; }
  static int64_t row_words(int64_t inputs) { return num_groups(inputs) * kRowGroup * kPlanes; }

  static int64_t num_looks(int64_t inputs) { return num_groups(inputs); }

  static void write_row(const float* x, int64_t size, uint32_t* row) {
    each_group<kWide>(x, size, [&](int64_t g, const int32_t* steps, float scale) {
      int8_t bytes[kPlanes][kGroup];
      int32_t sums[kPlanes] = {};
      for (int i = 0; i < kGroup; i++) {
        const int8_t low = static_cast<int8_t>(steps[i]);
        bytes[kPlanes - 1][i] = low;
        sums[kPlanes - 1] += low;
        if constexpr (kWide) {
          const int8_t high = static_cast<int8_t>((steps[i] - low) >> 8);
          bytes[0][i] = high;
          sums[0] += high;
        }
      }
      for (int p = 0; p < kPlanes; p++) {
        uint32_t* const target = row + (p * num_groups(size) + g) * kRowGroup;
        std::memcpy(target, bytes[p], kGroup);
        target[kGroupWords] = static_cast<uint32_t>(-128 * sums[p]);
        std::memcpy(target + kGroupWords + 1, &scale, sizeof scale);
      }
    });
  }

  template <int R>
  static void run_tile(const uint32_t* rows, int64_t inputs, const uint32_t* panel, Fetch& fetch,
                       Floats* result) {
    constexpr int kPrefetch = 2048 / 4;  // words ahead
    const int64_t groups = num_groups(inputs), plane_words = groups * kRowGroup, row_words = plane_words * kPlanes;
    Floats sums[R][kVectors];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < kVectors; c++) sums[r][c] = Floats{};
    for (int64_t g = 0; g < groups; g++, panel += kPanelGroup, rows += kRowGroup) {
      const char* const chunk = fetches<GroupedProduct>(R) ? fetch.look() : nullptr;
      Ints counts[R][kPlanes][kVectors];
      for (int r = 0; r < R; r++)
        for (int p = 0; p < kPlanes; p++)
          for (int c = 0; c < kVectors; c++)
            counts[r][p][c] = Ints{} + static_cast<int32_t>(rows[r * row_words + p * plane_words + kGroupWords]);
      for (int k = 0; k < kGroupWords; k++) {
        __builtin_prefetch(panel + k * kPanel + kPrefetch);
        __builtin_prefetch(panel + k * kPanel + kPrefetch + kLine);
        if constexpr (fetches<GroupedProduct>(R)) fetch_lines(chunk, k);
        Bits weights[kVectors];
        for (int c = 0; c < kVectors; c++) weights[c] = load_words(panel + k * kPanel + c * kLanes);
        for (int r = 0; r < R; r++)
          for (int p = 0; p < kPlanes; p++) {
            const auto activations = static_cast<int32_t>(rows[r * row_words + p * plane_words + k]);
            for (int c = 0; c < kVectors; c++) counts[r][p][c] = dot(weights[c], activations, counts[r][p][c]);
          }
      }
      __builtin_prefetch(panel + kGroupWords * kPanel + kPrefetch);
      Floats scales[kVectors];
      for (int c = 0; c < kVectors; c++) scales[c] = group_scales(panel + kGroupWords * kPanel, c * kLanes);
      for (int r = 0; r < R; r++)
        for (int c = 0; c < kVectors; c++) {
          if constexpr (!kWide) {
            const float scale = as_float(rows[r * row_words + kGroupWords + 1]);
            sums[r][c] += __builtin_convertvector(counts[r][0][c], Floats) * (scales[c] * scale);
          } else {
            const Ints both = (counts[r][0][c] << 8) + counts[r][1][c];
            sums[r][c] += __builtin_convertvector(both, Floats) * scales[c];
          }
        }
    }
    rows -= groups * kRowGroup;
    for (int r = 0; r < R; r++)
      for (int c = 0; c < kVectors; c++)
        result[r * kVectors + c] =
            kWide ? sums[r][c] * as_float(rows[r * row_words + kGroupWords + 1]) : sums[r][c];
  }

 private:
  // Adds the products of four unsigned with four signed bytes.
  static Ints dot(Bits weights, int32_t activations, Ints sum) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(activations));
  }
};

}  // namespace torchrelay
