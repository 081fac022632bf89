// Products of activations with packed weights: out[rows, n] = activations[rows, k] * weights[n, k].
//
// Weights are packed once, in panels of kPanel outputs. Inputs are taken `Format::kPack` at a time, so that a word of 32
// bits holds equally many inputs of one output:
//
//     panel   [k / kPack][kPanel][kPack]      one stretch of memory, read from front to back
//
// A tile is a few rows of activations against a panel, or, where registers are few, against one part of it after the
// other. Every output is summed up over k in the same order whatever the tile, so a row's result is the same to the bit in
// any batch and on any number of threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fetch.h"
#include "simd.h"

namespace torchrelay {

constexpr int kPanel = 32;
constexpr int kVectors = kPanel / kLanes;  // of a row's sums
constexpr int kLine = 64 / 4;              // words of a cache line

// Rows of a tile, and vectors of sums that stay in registers: all else that a step of the loop holds must fit beside them,
// or the compiler keeps sums in memory.
#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTileSums = 24;
#elif defined(__AVX2__)
constexpr int kTileRows = 5, kTileSums = 10;
#elif defined(__aarch64__)
constexpr int kTileRows = 6, kTileSums = 24;
#else
constexpr int kTileRows = 4, kTileSums = 8;
#endif

// Vectors of each row's sums that a tile of so many rows computes at a time.
constexpr int vectors_together(int rows) {
  int vectors = kVectors;
  while (vectors > 1 && rows * vectors > kTileSums) vectors /= 2;
  return vectors;
}

inline Bits load_words(const uint32_t* source) {
  Bits x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

// A format says how a word of weights meets a row: in kParts steps, each with one number or pair of the row.
struct Float32Format {
  typedef float Input;
  static constexpr int kPack = 1, kParts = 1;

  static Floats weights(const uint32_t* words, int) { return (Floats)load_words(words); }
  static Floats multiply_add(Floats weights, const uint32_t* input, Floats sum) {
    float x;
    std::memcpy(&x, input, sizeof x);
    return weights * x + sum;
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Format {
  typedef BFloat16 Input;
  static constexpr int kPack = 2, kParts = 1;

  static Pairs weights(const uint32_t* words, int) { return (Pairs)load_words(words); }
  static Floats multiply_add(Pairs weights, const uint32_t* input, Floats sum) {
    return torchrelay::multiply_add(weights, (Pairs)_mm512_set1_epi32(static_cast<int32_t>(*input)), sum);
  }
};
#else
// Without an instruction for pairs a weight becomes a float, and activations are floats from the start.
struct BFloat16Format {
  typedef float Input;
  static constexpr int kPack = 2, kParts = 2;

  static Floats weights(const uint32_t* words, int part) {
    const Bits both = load_words(words);
    return (Floats)(part == 0 ? both << 16 : both & 0xffff0000u);
  }
  static Floats multiply_add(Floats weights, const uint32_t* input, Floats sum) {
    return Float32Format::multiply_add(weights, input, sum);
  }
};
#endif

// Whether a tile computes long enough to fetch something else meanwhile. It does wherever there are several.
template <typename Product>
constexpr bool fetches(int rows) {
  return 2 * rows >= Product::kMostRows;
}

// Calls work(0), work(1) to work(N - 1), each with a constant.
template <int N, typename Work>
inline void each_of(Work work) {
  if constexpr (N > 0) {
    each_of<N - 1>(work);
    work(std::integral_constant<int, N - 1>());
  }
}

// The rows of a tile: few registers reach them all, by what addresses can add and multiply.
class RowPointers {
 public:
  RowPointers(const uint32_t* rows, int64_t row_words)
      : at_(reinterpret_cast<const char*>(rows)), one_(row_words * static_cast<int64_t>(sizeof(uint32_t))),
        three_(3 * one_), five_(5 * one_), seven_(7 * one_), nine_(9 * one_), eleven_(11 * one_) {}

  // To the next word of each. Compilers would keep every row's distance in a register of its own, and run out of them.
  void advance() {
    at_ += sizeof(uint32_t);
#if defined(__x86_64__)
    __asm__("" : "+r"(one_), "+r"(three_), "+r"(five_), "+r"(seven_), "+r"(nine_), "+r"(eleven_));
#endif
  }

  template <int R>
  const uint32_t* row() const {
    return reinterpret_cast<const uint32_t*>(at_ + distance<R>());
  }

 private:
  template <int R>
  int64_t distance() const {
    if constexpr (R == 0) return 0;
    if constexpr (R == 1 || R == 2 || R == 4 || R == 8) return R * one_;
    if constexpr (R == 3 || R == 6) return R / 3 * three_;
    if constexpr (R == 5 || R == 10) return R / 5 * five_;
    if constexpr (R == 7) return seven_;
    if constexpr (R == 9) return nine_;
    if constexpr (R == 11) return eleven_;
  }

  const char* at_;
  int64_t one_, three_, five_, seven_, nine_, eleven_;
};

// A product, tile by tile: how far panels and rows lie apart, and a tile's sums [num_rows][kVectors].
template <typename Format>
struct PlainProduct {
  static constexpr int kMostRows = kTileRows;

  static int64_t row_words(int64_t inputs) { return inputs / Format::kPack * Format::kParts; }
  // At what to fetch, by a tile of many rows.
  static int64_t num_looks(int64_t inputs) {
    return (inputs / Format::kPack + kFetchSteps - 1) / kFetchSteps * (kVectors / vectors_together(kMostRows));
  }
  static int64_t panel_words(int64_t inputs) { return inputs / Format::kPack * kPanel; }

  template <int R>
  static void run_tile(const uint32_t* rows, int64_t inputs, const uint32_t* panel, Fetch& fetch,
                       Floats* result) {
    constexpr int V = vectors_together(R);
    for (int first = 0; first < kVectors; first += V)
      run_part<R, V>(rows, inputs, panel + first * kLanes, fetch, result + first);
  }

  template <int R, int V>
  static void run_part(const uint32_t* rows, int64_t inputs, const uint32_t* panel, Fetch& fetch,
                       Floats* result) {
    constexpr int kPrefetch = 2048 / 4;  // words ahead: the panel comes from memory where the batch is small
    constexpr int kParts = Format::kParts;
    const int64_t num_words = inputs / Format::kPack, row_words = num_words * kParts;
    Floats sums[R][V];
    for (int r = 0; r < R; r++)
      for (int c = 0; c < V; c++) sums[r][c] = Floats{};
    RowPointers input(rows, row_words);
    int64_t k = 0;
    do {
      const char* const chunk = fetches<PlainProduct>(R) ? fetch.look() : nullptr;
      const int64_t end = fetches<PlainProduct>(R) ? std::min(k + kFetchSteps, num_words) : num_words;
      int64_t step = 0;
      do {
        for (int c = 0; c < V * kLanes; c += kLine) __builtin_prefetch(panel + kPrefetch + c);
        if constexpr (fetches<PlainProduct>(R)) fetch_lines(chunk, step);
        for (int part = 0; part < kParts; part++, input.advance()) {
          decltype(Format::weights(panel, 0)) weights[V];
          for (int c = 0; c < V; c++) weights[c] = Format::weights(panel + c * kLanes, part);
          each_of<R>([&](auto r) {
            for (int c = 0; c < V; c++)
              sums[r][c] = Format::multiply_add(weights[c], input.template row<r>(), sums[r][c]);
          });
        }
        panel += kPanel;
      } while (step++, ++k < end);
    } while (k < num_words);
    for (int r = 0; r < R; r++)
      for (int c = 0; c < V; c++) result[r * kVectors + c] = sums[r][c];
  }
};

// A tile of as many rows as there are, at most Product::kMostRows.
template <typename Product, int R = Product::kMostRows>
void run_tile(int num_rows, const uint32_t* rows, int64_t inputs, const uint32_t* panel, Fetch& fetch,
              Floats* result) {
  if constexpr (R > 1)
    if (num_rows < R) return run_tile<Product, R - 1>(num_rows, rows, inputs, panel, fetch, result);
  Product::template run_tile<R>(rows, inputs, panel, fetch, result);
}

}  // namespace torchrelay
