// Products of activations with packed weights: out[rows, n] = activations[rows, k] * weights[n, k].
//
// Weights are packed once, in panels of kPanel outputs. Inputs are taken `Format::kPack` at a time, so that a word of 32
// bits of an activation row meets one vector of 16 outputs with equally many inputs each:
//
//     panel   [k / kPack][kPanel][kPack]      one stretch of memory, read from front to back
//
// A tile is a few rows of activations against a panel. Every output is summed up over k in the same order whatever the
// tile, so a row's result is the same to the bit in any batch and on any number of threads.
#pragma once

#include <algorithm>

#include "simd.h"

namespace torchrelay {

constexpr int kPanel = 32;
constexpr int kColumns = 16;  // outputs of one vector of sums

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // with two vectors of sums each: 24 of 32 registers
#else
constexpr int kTileRows = 2;
#endif

typedef float Sums __attribute__((vector_size(kColumns * 4)));
typedef int32_t Counts __attribute__((vector_size(kColumns * 4)));
typedef uint32_t Words __attribute__((vector_size(kColumns * 4)));

inline Sums load_sums(const float* source) {
  Sums x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

inline Words load_words(const uint32_t* source) {
  Words x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

struct Float32Format {
  static constexpr int kPack = 1;

  static Sums multiply_add(Words weights, uint32_t activation, Sums sum) {
    float x;
    std::memcpy(&x, &activation, sizeof x);
    return (Sums)weights * x + sum;
  }
};

struct BFloat16Format {
  static constexpr int kPack = 2;

  static Sums multiply_add(Words weights, uint32_t activation, Sums sum) {
#if defined(__AVX512BF16__)
    return (Sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(activation));
#else
    const uint32_t low = activation << 16, high = activation & 0xffff0000u;
    float x, y;
    std::memcpy(&x, &low, sizeof x);
    std::memcpy(&y, &high, sizeof y);
    sum = (Sums)(weights << 16) * x + sum;
    return (Sums)(weights & 0xffff0000u) * y + sum;
#endif
  }
};

// A product, tile by tile: how far panels and rows lie apart, and a tile's sums [num_rows][kPanel]. Every second cache line
// from `next` on is fetched meanwhile: weights that are to come.
template <typename Format>
struct PlainProduct {
  static constexpr int kMostRows = kTileRows;

  static int64_t row_words(int64_t inputs) { return inputs / Format::kPack; }
  static int64_t panel_words(int64_t inputs) { return row_words(inputs) * kPanel; }

  template <int R>
  static void run_tile(const uint32_t* rows, int64_t inputs, const uint32_t* panel, const uint32_t* next, Sums* result) {
    constexpr int kVectors = kPanel / kColumns;
    constexpr int kPrefetch = 2048 / 4;  // words ahead: the panel comes from memory where the batch is small
    const int64_t num_words = row_words(inputs);
    Sums sums[R][kVectors];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < kVectors; c++) sums[r][c] = Sums{};
    for (int64_t k = 0; k < num_words; k++, panel += kPanel) {
      __builtin_prefetch(panel + kPrefetch);
      __builtin_prefetch(panel + kPrefetch + kColumns);
      __builtin_prefetch(next + k * kPanel, 0, 2);
      Words weights[kVectors];
      for (int c = 0; c < kVectors; c++) weights[c] = load_words(panel + c * kColumns);
      for (int r = 0; r < R; r++) {
        const uint32_t activation = rows[r * num_words + k];
        for (int c = 0; c < kVectors; c++) sums[r][c] = Format::multiply_add(weights[c], activation, sums[r][c]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int c = 0; c < kVectors; c++) result[r * kVectors + c] = sums[r][c];
  }
};

// A tile of as many rows as there are, at most Product::kMostRows.
template <typename Product, int R = Product::kMostRows>
void run_tile(int num_rows, const uint32_t* rows, int64_t inputs, const uint32_t* panel, const uint32_t* next,
              Sums* result) {
  if constexpr (R > 1)
    if (num_rows < R) return run_tile<Product, R - 1>(num_rows, rows, inputs, panel, next, result);
  Product::template run_tile<R>(rows, inputs, panel, next, result);
}

}  // namespace torchrelay
