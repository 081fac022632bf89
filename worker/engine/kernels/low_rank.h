// What adapters add to linear layers: up(down(x)), of low rank (LoRA, arXiv:2106.09685), row by row, in float32.
//
// Each row's sums run in one order whatever else is in the batch, as those of matmul.h.
#pragma once

#include <algorithm>

#include "decoder.h"
#include "rows.h"

namespace torchrelay {

constexpr int kProducts = 4;  // of a layer: qkv, output, gate_up, down

// target[i] = down[i] * x, for so many i. Each has a sum of its own, so that none waits for another.
template <int kSums>
void project(const float* down, const float* x, int64_t inputs, float* target) {
  Floats sums[kSums] = {};
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    const Floats part = load(x + i);
    for (int k = 0; k < kSums; k++) sums[k] += load(down + k * inputs + i) * part;
  }
  for (int k = 0; k < kSums; k++) target[k] = horizontal_sum(sums[k]);
  for (; i < inputs; i++)
    for (int k = 0; k < kSums; k++) target[k] += down[k * inputs + i] * x[i];
}

// target [rank] = down * x [inputs].
inline void project_down(const LowRank& adapted, const float* x, int64_t inputs, float* target) {
  constexpr int kTogether = 8;
  int64_t k = 0;
  for (; k + kTogether <= adapted.rank; k += kTogether) project<kTogether>(adapted.down + k * inputs, x, inputs, target + k);
  for (; k < adapted.rank; k++) project<1>(adapted.down + k * inputs, x, inputs, target + k);
}

// y [kVectors] += what `projected` [rank] comes to in the outputs from `first` on.
inline void add_up(const LowRank& adapted, const float* projected, int64_t first, int64_t outputs, Floats* y) {
  constexpr int kParts = kColumns / kLanes;
  for (int64_t at = 0; at < kPanel && first + at < outputs; at += kColumns) {
    const LowRankBlock& block = adapted.blocks[(first + at) / kColumns];
    if (block.count == 0) continue;
    const float* up = adapted.up + block.offset;
    Floats sums[kParts] = {};
    for (int64_t k = 0; k < block.count; k++, up += kColumns)
      for (int c = 0; c < kParts; c++) sums[c] += load(up + c * kLanes) * projected[block.first + k];
    for (int c = 0; c < kParts; c++) y[at / kLanes + c] += sums[c];
  }
}

}  // namespace torchrelay
