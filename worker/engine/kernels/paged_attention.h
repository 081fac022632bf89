// The C interface of the paged attention library; `worker/engine/attention/cpu_ext.py` mirrors it field by field.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define TORCHRELAY_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace torchrelay {

// Raised with every change of what Python fills or reads.
constexpr int kAbiVersion = 6;

constexpr int kBlockSize = 16;

enum Status : int { kOk = 0, kBadBlock = 1, kBadShape = 2, kOutOfMemory = 3, kBadToken = 4 };

enum ElementType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

// Strides count elements. The last dimension of query, key and value is contiguous; caches and output are contiguous:
//   key cache    [num_blocks, num_kv_heads, key_dim, kBlockSize]    (transposed inside a block)
//   value cache  [num_blocks, num_kv_heads, kBlockSize, value_dim]
//   output       [num_tokens, num_heads, value_dim]
struct PagedAttentionArguments {
  const void* query;  // [num_tokens, num_heads, key_dim]
  const void* key;    // [num_tokens, num_kv_heads, key_dim]
  const void* value;  // [num_tokens, num_kv_heads, value_dim]
  void* key_cache;
  void* value_cache;
  void* output;
  const int32_t* slots;         // [num_tokens]
  const int32_t* block_tables;  // [num_seqs, block_table_width]
  const int32_t* query_starts;  // [num_seqs + 1]
  const int32_t* context_lens;  // [num_seqs]
  const float* sinks;           // [num_heads] or null
  const float* distance_bias;   // [num_heads, num_distances] or null; the last one is that of all that are farther
  int64_t query_token_stride, query_head_stride;
  int64_t key_token_stride, key_head_stride;
  int64_t value_token_stride, value_head_stride;
  int64_t block_table_stride, block_table_width;
  int64_t num_tokens, num_seqs, num_blocks;
  int64_t num_heads, num_kv_heads, key_dim, value_dim;
  int64_t sliding_window;  // 0: none
  int64_t num_distances;
  float scale;
  float softcap;  // 0: none
  int32_t element_type;
  int32_t num_threads;  // most threads used
};

}  // namespace torchrelay

TORCHRELAY_EXPORT int torchrelay_abi_version(void);
TORCHRELAY_EXPORT int torchrelay_paged_attention(const torchrelay::PagedAttentionArguments* arguments);
