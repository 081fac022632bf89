// Attention of a tile: a few query rows of one kv head over one segment of a sequence's context.
//
// A segment is a fixed stretch of kSegment token positions. Each is computed for itself, as (maximum, sum, weighted
// values), and segments are merged in order (the online softmax of arXiv:1805.02867). A row's arithmetic therefore
// never depends on which rows share its tile, on how work was split over threads, or on what else is in the batch: its
// result is the same to the bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "paged_attention.h"
#include "simd.h"

namespace torchrelay {

// Whether keys and values lie in pairs that one instruction multiplies and adds up: neighbouring dimensions of a key,
// neighbouring tokens of a value.
template <typename T>
constexpr bool kPaired = false;
#if defined(__AVX512BF16__)
template <>
inline constexpr bool kPaired<BFloat16> = true;
#endif

// Dimensions of a key as they lie in the cache.
template <typename T>
constexpr int64_t padded_key_dim(int64_t key_dim) {
  return sizeof(T) == 2 ? (key_dim + 1) / 2 * 2 : key_dim;
}

constexpr int kSegment = 512;  // fewer to merge, but more scores than fit the first-level cache beyond
constexpr int kFewRows = 4;  // with up to so many attention waits for memory more than it computes
constexpr int kMaxRows = kAccumulators / 2;
constexpr int kUnitsPerBlock = kBlockSize / kLanes;  // a unit: kLanes neighbouring tokens of a block

// What a weight is kept as: floats, or, to be multiplied in pairs, bfloat16.
template <typename T>
using Weight = std::conditional_t<kPaired<T>, BFloat16, float>;

// A score that is not to be seen. Finite, so that no infinity minus infinity can arise: e^(kMasked - m) is exactly 0
// for any m that is not as large, and a segment without a visible token has no weight.
constexpr float kMasked = -1e30f;

// Visible tokens of a query row: first <= position < last.
struct Visible {
  int first, last;
};

template <typename T>
struct Tile {
  const T* keys;    // of this kv head in block 0
  const T* values;  // of this kv head in block 0
  int64_t key_block_stride, value_block_stride;
  const int32_t* blocks;  // the sequence's block table; null: blocks lie side by side from `first_block` on
  int first_block;
  int key_dim, value_dim;
  float scale, softcap;
  const float* query;  // [key_dim, rows], scaled; of paired types [pairs of key_dim, rows], not scaled
  const float* distance_bias[kMaxRows];  // of each row's head; null: none
  int num_distances;
  Visible visible[kMaxRows];
  Visible all;   // tokens that every row sees
  Visible some;  // tokens that at least one row sees

  // Products of paired types are scaled when they become weights, but for a softcap and a bias, which come between.
  bool has_edits() const { return softcap > 0.0f || distance_bias[0] != nullptr; }
  float scale_of_scores() const { return kPaired<T> && !has_edits() ? scale : 1.0f; }

  int64_t place(int block) const { return blocks ? blocks[block] : block - first_block; }

  // A paired type's unit is a whole block.
  const T* key_unit(int unit) const {
    return keys + place(unit / kUnitsPerBlock) * key_block_stride + unit % kUnitsPerBlock * kLanes;
  }
  const T* value_block(int block) const { return values + place(block) * value_block_stride; }
  const T* value_unit(int unit) const {
    return value_block(unit / kUnitsPerBlock) + static_cast<int64_t>(unit % kUnitsPerBlock * kLanes) * value_dim;
  }
};

// Result of one or more segments for the rows of a tile.
struct Partial {
  float* maximum;  // [rows]
  float* sum;      // [rows] of e^(score - maximum)
  float* values;   // [rows, value_dim], weighted by e^(score - maximum)
};

inline Ints unit_positions(int unit) {
  Ints positions;
  for (int i = 0; i < kLanes; i++) positions[i] = unit * kLanes + i;
  return positions;
}

// The bias of a row for the tokens of a unit, by how far they are before it; of those behind it, which are masked, any.
template <typename T>
inline Floats bias_of_unit(const Tile<T>& tile, int row, int unit) {
  const float* bias = tile.distance_bias[row];
  const int first = tile.visible[row].last - 1 - unit * kLanes;  // the distance of its first token, the largest
  const int last = tile.num_distances - 1;
  if (first - (kLanes - 1) >= last) return broadcast(bias[last]);
  Floats result;
  for (int i = 0; i < kLanes; i++) result[i] = bias[std::clamp(first - i, 0, last)];
  return result;
}

// Softcap, bias and mask of units whose products are in scores[units][R][kLanes]. Apart from the products, so that their
// sums need not leave the registers for what few tiles have.
template <typename T, int R>
__attribute__((noinline)) void edit_scores(const Tile<T>& tile, int unit, int num_units, float* scores, Floats* maxima) {
  const float inverse = (kPaired<T> ? tile.scale : 1.0f) / tile.softcap;
  const float scale = kPaired<T> && !(tile.softcap > 0.0f) ? tile.scale : 1.0f;
  for (int u = 0; u < num_units; u++, unit++) {
    const Ints positions = unit_positions(unit);
    const bool all_seen = unit * kLanes >= tile.all.first && (unit + 1) * kLanes <= tile.all.last;
    for (int r = 0; r < R; r++, scores += kLanes) {
      Floats score = load(scores);
      if (tile.softcap > 0.0f) score = hyperbolic_tangent(score * inverse) * tile.softcap;
      if (tile.distance_bias[0] != nullptr) score = score * scale + bias_of_unit(tile, r, unit);
      if (!all_seen) {
        const Ints seen = (positions >= tile.visible[r].first) & (positions < tile.visible[r].last);
        score = seen ? score : broadcast(kMasked);
      }
      maxima[r] = maximum(maxima[r], score);
      store(scores, score);
    }
  }
}

// Scores of U units for R rows, with mask, softcap and bias, to scores[U][R][kLanes]; still to be scaled.
//
// `ahead` are units that will be read next: blocks lie scattered, so that no processor guesses them. Where few rows share a
// key, attention waits for memory: they are fetched into the second-level cache, which can wait for more lines than the
// first, and so are the values of these tokens, which are wanted soon. Else they come from there.
template <typename T, int R, int U>
inline void score_units(const Tile<T>& tile, int unit, int ahead, float* scores, Floats* maxima) {
  constexpr bool kWaits = R <= kFewRows;
  const T* keys[U];
  const T* next[U];
  const char* values[U];
  Floats sums[U][R];
  for (int u = 0; u < U; u++) {
    keys[u] = tile.key_unit(unit + u);
    next[u] = tile.key_unit(ahead + u);
    if constexpr (kWaits) {
      values[u] = reinterpret_cast<const char*>(tile.value_unit(unit + u));
    }
    for (int r = 0; r < R; r++) sums[u][r] = Floats{};
  }
  const float* query = tile.query;
  constexpr int kStep = kPaired<T> ? 2 : 1;
  for (int d = 0; d < tile.key_dim; d += kStep, query += R) {
    decltype(load_keys(keys[0])) key[U];
    for (int u = 0; u < U; u++) {
      key[u] = load_keys(keys[u] + d * kBlockSize);
      __builtin_prefetch(next[u] + d * kBlockSize, 0, kWaits ? 2 : 3);
      if constexpr (kWaits) __builtin_prefetch(values[u] + d * (64 / kStep), 0, 2);
    }
    for (int r = 0; r < R; r++) {
      const auto both = broadcast_for(key[0], query + r);
      for (int u = 0; u < U; u++) sums[u][r] = multiply_add(key[u], both, sums[u][r]);
    }
  }
  const bool all_seen = unit * kLanes >= tile.all.first && (unit + U) * kLanes <= tile.all.last;
  const bool is_plain = all_seen && !tile.has_edits();
  for (int u = 0; u < U; u++)
    for (int r = 0; r < R; r++) {
      if (is_plain) maxima[r] = maximum(maxima[r], sums[u][r]);
      store(scores + (u * R + r) * kLanes, sums[u][r]);
    }
  if (!is_plain) edit_scores<T, R>(tile, unit, U, scores, maxima);
}

// Weighted sums of the values [first_dim, first_dim + C * kLanes) over tokens [begin, end).
template <typename T, int R, int C>
inline void weigh_values(const Tile<T>& tile, int begin, int end, const float* weights, int first_dim, float* target) {
  const int first_unit = begin / kLanes;
  Floats sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = Floats{};
  for (int token = begin; token < end;) {
    const int unit = token / kLanes, unit_end = std::min(end, (unit + 1) * kLanes);
    const T* values = tile.value_unit(unit) + first_dim + static_cast<int64_t>(token % kLanes) * tile.value_dim;
    const float* weight = weights + (unit - first_unit) * R * kLanes + token % kLanes;
    for (; token < unit_end; token++, weight++, values += tile.value_dim) {
      Floats value[C];
      for (int c = 0; c < C; c++) value[c] = load(values + c * kLanes);
      for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = value[c] * weight[r * kLanes] + sums[r][c];
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(target + r * tile.value_dim + first_dim + c * kLanes, sums[r][c]);
}

#if defined(__AVX512BF16__)
// The same for pairs of tokens, with weights in bfloat16 [units][R][kLanes]. A pair of which only one token belongs to
// the range counts with that one: the other's weight is zero, but its value may be anything.
template <int R, int C>
inline void weigh_pairs(const Tile<BFloat16>& tile, int begin, int end, const BFloat16* weights, int first_dim,
                        float* target) {
  const int first_unit = begin / kLanes;
  Floats sums[R][C];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) sums[r][c] = Floats{};
  for (int token = begin / 2 * 2; token < end;) {
    const int block = token / kBlockSize;
    const int block_end = std::min(end, (block + 1) * kBlockSize);
    const BFloat16* values =
        tile.value_block(block) + 2 * first_dim + static_cast<int64_t>(token % kBlockSize) * tile.value_dim;
    const BFloat16* weight = weights + (token / kLanes - first_unit) * R * kLanes + token % kLanes;
    const BFloat16* next = block_end < end ? tile.value_block(block + 1) + 2 * first_dim : values;
    for (; token < block_end; token += 2, weight += 2, values += 2 * tile.value_dim, next += 2 * tile.value_dim) {
      if constexpr (R > kFewRows)  // of few they are on their way
        for (int c = 0; c < C; c++) __builtin_prefetch(next + 2 * c * kLanes);
      Pairs value[C];
      for (int c = 0; c < C; c++) value[c] = load_pairs(values + 2 * c * kLanes);
      if (token < begin || token + 1 >= end)
        for (int c = 0; c < C; c++) value[c] = keep_half(value[c], token < begin ? 0xffff0000u : 0x0000ffffu);
      for (int r = 0; r < R; r++) {
        const Pairs both = broadcast_pair(weight + r * kLanes);
        for (int c = 0; c < C; c++) sums[r][c] = multiply_add(value[c], both, sums[r][c]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++) store(target + r * tile.value_dim + first_dim + c * kLanes, sums[r][c]);
}
#endif

// All value dimensions from first_dim on: as many vectors at a time as registers allow, then half of that, and so on.
template <typename T, int R, int C>
inline void weigh_all_values(const Tile<T>& tile, int begin, int end, const Weight<T>* weights, int first_dim,
                             float* target) {
  for (; first_dim + C * kLanes <= tile.value_dim; first_dim += C * kLanes) {
#if defined(__AVX512BF16__)
    if constexpr (kPaired<T>)
      weigh_pairs<R, C>(tile, begin, end, weights, first_dim, target);
    else
#endif
      weigh_values<T, R, C>(tile, begin, end, weights, first_dim, target);
  }
  if constexpr (C > 1) {
    weigh_all_values<T, R, C / 2>(tile, begin, end, weights, first_dim, target);
  } else {
    // Dimensions that fill no vector: only models with odd head sizes have them.
    const int first_unit = begin / kLanes;
    for (; first_dim < tile.value_dim; first_dim++) {
      for (int r = 0; r < R; r++) {
        float sum = 0.0f;
        for (int token = begin; token < end; token++) {
          const float weight = to_float(weights[((token / kLanes - first_unit) * R + r) * kLanes + token % kLanes]);
          const T* values = tile.value_block(token / kBlockSize);
          const int64_t offset = token % kBlockSize;
          sum += weight * to_float(kPaired<T> ? values[(offset / 2 * tile.value_dim + first_dim) * 2 + offset % 2]
                                              : values[offset * tile.value_dim + first_dim]);
        }
        target[r * tile.value_dim + first_dim] = sum;
      }
    }
  }
}

constexpr int vectors_at_a_time(int rows) {
  int vectors = 8;
  while (vectors > 1 && vectors * rows > kAccumulators) vectors /= 2;
  return vectors;
}

// e^(score * scale - maximum), as precisely as keys and values are kept.
template <typename T>
inline Floats weight_of(Floats score, float scale, float maximum) {
  constexpr float kLog2E = 1.44269504088896341f;
  if constexpr (!std::is_same_v<T, float>)
    return rough_power_of_two(score * (scale * kLog2E) - maximum * kLog2E);
  else
    return exponential(score * scale - maximum);
}

// One segment for R rows. `scores` has room for kSegment * R floats.
template <typename T, int R>
void attend_segment(const Tile<T>& tile, int segment, float* scores, const Partial& result) {
  const int begin = std::max(segment * kSegment, tile.some.first);
  const int end = std::min((segment + 1) * kSegment, tile.some.last);
  const int first_unit = begin / kLanes;
  const int last_unit = (end + kLanes - 1) / kLanes;
  constexpr int kTogether = R * 4 <= kAccumulators ? 4 : 2;
  Floats maxima[R];
  for (int r = 0; r < R; r++) maxima[r] = broadcast(kMasked);
  int unit = first_unit;
  for (; unit + kTogether <= last_unit; unit += kTogether)
    score_units<T, R, kTogether>(tile, unit, unit + 2 * kTogether <= last_unit ? unit + kTogether : unit,
                                 scores + (unit - first_unit) * R * kLanes, maxima);
  for (; unit < last_unit; unit++)
    score_units<T, R, 1>(tile, unit, unit, scores + (unit - first_unit) * R * kLanes, maxima);

  const float scale = tile.scale_of_scores();
  Floats sums[R];
  float tops[R];
  for (int r = 0; r < R; r++) {
    result.maximum[r] = horizontal_maximum(maxima[r]) * scale;
    // Of a row that sees nothing here all weights are to be zero: large numbers do not cancel out.
    tops[r] = result.maximum[r] > kMasked * 1e-6f ? result.maximum[r] : 0.0f;
    sums[r] = Floats{};
  }
  // A NaN score may be missing from the maximum, but not from the sum: it makes its row's output NaN, and no other's.
  // Weights take their scores' place; bfloat16 ones are half as long and so never catch up with the reading.
  Weight<T>* const weights = reinterpret_cast<Weight<T>*>(scores);
  for (int i = 0; i < (last_unit - first_unit) * R * kLanes; i += R * kLanes) {
    for (int r = 0; r < R; r++) {
      const Floats weight = weight_of<T>(load(scores + i + r * kLanes), scale, tops[r]);
      sums[r] += weight;
      store(weights + i + r * kLanes, weight);
    }
  }
  for (int r = 0; r < R; r++) result.sum[r] = horizontal_sum(sums[r]);
  weigh_all_values<T, R, vectors_at_a_time(R)>(tile, begin, end, weights, 0, result.values);
}

// Folds `part`, the next segment in order, into `whole`.
inline void merge(const Partial& whole, const Partial& part, int rows, int value_dim) {
  constexpr int kRoom = (kMaxRows + kLanes - 1) / kLanes * kLanes;
  float tops[kRoom], keeps[kRoom], adds[kRoom];
  for (int r = 0; r < kRoom; r++) tops[r] = keeps[r] = adds[r] = 0.0f;
  for (int r = 0; r < rows; r++) {
    tops[r] = maximum(part.maximum[r], whole.maximum[r]);
    keeps[r] = whole.maximum[r] - tops[r];
    adds[r] = part.maximum[r] - tops[r];
  }
  // Not `exp`: the vector form is exactly 0 where a masked maximum meets a real one.
  for (int r = 0; r < rows; r += kLanes) {
    store(keeps + r, exponential(load(keeps + r)));
    store(adds + r, exponential(load(adds + r)));
  }
  for (int r = 0; r < rows; r++) {
    const float keep = keeps[r], add = adds[r];
    whole.maximum[r] = tops[r];
    whole.sum[r] = whole.sum[r] * keep + part.sum[r] * add;
    float* target = whole.values + r * value_dim;
    const float* source = part.values + r * value_dim;
    int d = 0;
    for (; d + kLanes <= value_dim; d += kLanes)
      store(target + d, load(target + d) * keep + load(source + d) * add);
    for (; d < value_dim; d++) target[d] = target[d] * keep + source[d] * add;
  }
}

}  // namespace torchrelay
