// The C interface of the decoder: a whole step of a Llama-shaped model in one call.
// `worker/engine/decoder/program.py` mirrors it field by field.
#pragma once

#include <cstdint>

#include "paged_attention.h"

namespace torchrelay {

// How a linear layer's weights are kept, and what its inputs are turned into.
enum LinearFormat : int32_t {
  kLinearFloat32 = 0,
  kLinearBFloat16 = 1,
  kLinearInt8 = 2,      // 8 bits in groups; inputs likewise
  kLinearInt8Wide = 3,  // 8 bits in groups; inputs of 16 bits, one scale per row
};

enum Activation : int32_t { kSilu = 0, kGeluTanh = 1 };

struct Linear {
  const uint32_t* panels;   // as matmul.h and grouped.h say; outputs padded to whole panels
  const float* bias;        // [outputs], padded, or null
  int64_t inputs, outputs;  // of gate_up: outputs counts gates and ups
  int64_t format;
};

inline bool is_plain(const Linear& linear) {
  return linear.format == kLinearFloat32 || linear.format == kLinearBFloat16;
}

// Norms are RMS norms (arXiv:1910.07467) with weights in float32; null where the model has none.
struct Layer {
  Linear qkv;  // queries of all heads, then keys, then values
  Linear output;
  Linear gate_up;  // 16 gates and 16 ups in each panel
  Linear down;
  const float* attention_norm;         // [hidden_size], before attention
  const float* query_norm;             // [head_dim], or [num_heads * head_dim] with wide_query_key_norm
  const float* key_norm;               // likewise
  const float* attention_output_norm;  // [hidden_size], of what attention adds
  const float* mlp_norm;               // [hidden_size], before the MLP
  const float* mlp_output_norm;        // [hidden_size], of what the MLP adds
  const float* cosines;                // [num_positions, rotary_dim / 2], or null: no rotary positions
  const float* sines;
  void* key_cache;
  void* value_cache;
  int64_t sliding_window;  // 0: none
  float scale;             // of attention scores
  float softcap;           // of attention scores; 0: none
};

struct Decoder {
  const Layer* layers;
  Linear head;
  const void* embedding;    // [vocab_size, hidden_size] of element_type, or null: the head's weights, which are too
  const float* final_norm;  // [hidden_size]
  int64_t num_layers, hidden_size, vocab_size;
  int64_t num_heads, num_kv_heads, head_dim, rotary_dim, mlp_size;
  int64_t num_positions, num_blocks;
  int64_t element_type;         // of the KV cache and the embedding
  int64_t activation;
  int64_t wide_query_key_norm;  // query and key norms run over all heads together
  float norm_epsilon;
  float embedding_scale, residual_scale, logit_scale;
  float logit_softcap;  // 0: none
};

// Outputs that an adapter reaches by the numbers first to first + count - 1 of its rank.
struct LowRankBlock {
  int64_t first, count;
  int64_t offset;  // in LowRank::up, of [count][16]
};

// What an adapter adds to a product: up * (down * x), with its scale in `up`. See low_rank.h.
struct LowRank {
  const float* down;           // [rank, inputs]
  const float* up;             // for each block, behind one another
  const LowRankBlock* blocks;  // one for 16 outputs each, in the order of the product's panels
  int64_t rank;                // of all its modules together; 0: nothing is added
};

// Seconds of the calling thread by part of a step.
struct DecoderTimes {
  double norms, linears, attention, rotary, head;
};

struct DecoderStep {
  const int64_t* token_ids;     // [num_tokens]
  const int64_t* positions;     // [num_tokens]
  const int64_t* logit_rows;    // [num_logit_rows], ascending
  const int32_t* slots;         // [num_tokens]
  const int32_t* block_tables;  // [num_seqs, block_table_width]
  const int32_t* query_starts;  // [num_seqs + 1]
  const int32_t* context_lens;  // [num_seqs]
  float* logits;                // [num_logit_rows, vocab_size]
  DecoderTimes* times;          // added to, or null
  const int32_t* row_adapters;  // [num_tokens]: which of `adapters` a row has, -1 for none; or null: no row has any
  const LowRank* const* adapters;  // [num_adapters], each [num_layers][qkv, output, gate_up, down]
  int64_t num_tokens, num_seqs, num_logit_rows, block_table_width;
  int64_t num_threads, num_adapters;
};

}  // namespace torchrelay

// Writes where each row's largest number stands, of equal ones the first; a NaN counts as larger than all. Where that
// number is not finite, the complement of its place is written, which is negative.
TORCHRELAY_EXPORT int torchrelay_argmax(const float* rows, int64_t num_rows, int64_t width, int64_t* result,
                                        int64_t num_threads);

TORCHRELAY_EXPORT int torchrelay_decoder_step(const torchrelay::Decoder* decoder, const torchrelay::DecoderStep* step);
