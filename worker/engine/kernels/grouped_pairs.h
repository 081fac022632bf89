// Products of grouped 8-bit weights where no instruction multiplies bytes without losing bits: weights and activations meet
// as pairs of 16 bits, which every x86 multiplies and adds up at once. 16-bit activations then cost no more than 8-bit ones.
//
//     row     of each group and word of weights: activations 0 and 2 of its four, then 1 and 3; then the group's two words
//
// So pairs of weights are the even bytes of a word and the odd ones. The result is that of grouped_bytes.h to the bit.
#pragma once

#include "grouped.h"

namespace torchrelay {

template <bool kWide>
struct GroupedProduct {
  static constexpr int kMostRows = kTileRows;
  static constexpr int kParts = 2;
  static constexpr int kRowGroup = kGroupWords * kParts + 2;  // words

  static int64_t panel_words(int64_t inputs) { return num_groups(inputs) * kPanelGroup; }
  static int64_t row_words(int64_t inputs) { return num_groups(inputs) * kRowGroup; }

  static int64_t num_looks(int64_t inputs) { return num_groups(inputs) * (kVectors / vectors_together(kMostRows)); }

  static void write_row(const float* x, int64_t size, uint32_t* row) {
    each_group<kWide>(x, size, [&](int64_t g, const int32_t* steps, float scale) {
      uint32_t* const target = row + g * kRowGroup;
      int32_t sum = 0;
      for (int i = 0; i < kGroup; i++) sum += steps[i];
      for (int k = 0; k < kGroupWords; k++)
        for (int part = 0; part < kParts; part++)
          target[k * kParts + part] = (static_cast<uint32_t>(steps[4 * k + part]) & 0xffffu) |
                                      static_cast<uint32_t>(steps[4 * k + part + 2]) << 16;
      target[kGroupWords * kParts] = static_cast<uint32_t>(-128 * sum);
      std::memcpy(target + kGroupWords * kParts + 1, &scale, sizeof scale);
    });
  }

  template <int R>
  static void run_tile(const uint32_t* rows, int64_t inputs, const uint32_t* panel, Fetch& fetch,
                       Floats* result) {
    constexpr int V = vectors_together(R);
    for (int first = 0; first < kVectors; first += V)
      run_part<R, V>(rows, inputs, panel, first, fetch, result + first);
  }

  template <int R, int V>
  static void run_part(const uint32_t* rows, int64_t inputs, const uint32_t* panel, int first, Fetch& fetch,
                       Floats* result) {
    constexpr int kPrefetch = 2048 / 4;  // words ahead
    const int64_t groups = num_groups(inputs), row_words = groups * kRowGroup;
    Floats sums[R][V];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < V; c++) sums[r][c] = Floats{};
    for (int64_t g = 0; g < groups; g++, panel += kPanelGroup, rows += kRowGroup) {
      const char* const chunk = fetches<GroupedProduct>(R) ? fetch.look() : nullptr;
      Ints counts[R][V];
      for (int r = 0; r < R; r++)
        for (int c = 0; c < V; c++)
          counts[r][c] = Ints{} + static_cast<int32_t>(rows[r * row_words + kGroupWords * kParts]);
      for (int k = 0; k < kGroupWords; k++) {
        const uint32_t* const words = panel + k * kPanel + first * kLanes;
        for (int c = 0; c < V * kLanes; c += kLine) __builtin_prefetch(words + kPrefetch + c);
        if constexpr (fetches<GroupedProduct>(R)) fetch_lines(chunk, k);
        for (int part = 0; part < kParts; part++) {
          Bits weights[V];
          for (int c = 0; c < V; c++) weights[c] = every_second(load_words(words + c * kLanes), part);
          for (int r = 0; r < R; r++) {
            const auto pair = static_cast<int32_t>(rows[r * row_words + k * kParts + part]);
            for (int c = 0; c < V; c++) counts[r][c] = dot(weights[c], pair, counts[r][c]);
          }
        }
      }
      __builtin_prefetch(panel + kGroupWords * kPanel + kPrefetch);
      for (int c = 0; c < V; c++) {
        const Floats scales = group_scales(panel + kGroupWords * kPanel, (first + c) * kLanes);
        for (int r = 0; r < R; r++) {
          const float scale = kWide ? 1.0f : as_float(rows[r * row_words + kGroupWords * kParts + 1]);
          sums[r][c] += __builtin_convertvector(counts[r][c], Floats) * (kWide ? scales : scales * scale);
        }
      }
    }
    rows -= groups * kRowGroup;
    for (int r = 0; r < R; r++)
      for (int c = 0; c < V; c++)
        result[r * kVectors + c] =
            kWide ? sums[r][c] * as_float(rows[r * row_words + kGroupWords * kParts + 1]) : sums[r][c];
  }

 private:
  // The even bytes of each lane, or the odd ones, as two numbers of 16 bits.
  static Bits every_second(Bits words, int part) { return (part == 0 ? words : words >> 8) & 0x00ff00ffu; }

  // Adds the products of two pairs.
  static Ints dot(Bits weights, int32_t pair, Ints sum) {
#if defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(pair));
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(pair));
#elif defined(__SSE2__)
    return sum + (Ints)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32(pair));
#else
    return sum + (Ints)(weights & 0xffffu) * static_cast<int16_t>(pair) + (Ints)(weights >> 16) * (pair >> 16);
#endif
  }
};

}  // namespace torchrelay
