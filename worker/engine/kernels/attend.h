// Work of paged attention: cut into items that threads take one after another, and what is done with each.
//
// The rows of a sequence that share a kv head (tokens x heads of the group) are cut into tiles of up to kMaxRows, so
// that each key and value that is loaded serves several rows. One work item is a tile over all segments of its context,
// or, where keys and values must be widened before they can be multiplied, several tiles, which share that work.
// Where the batch has too few items for the threads (a long context alone), an item is split into runs of segments,
// whose results are merged afterwards in the same order as within an item; tile.h says why that changes no bit.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fetch.h"
#include "tile.h"

namespace torchrelay {

// Tiles of one item at most, see `widens`.
constexpr int kTilesTogether = 16;

// Multiply-adds worth a thread's start: below, waking it costs more than it saves.
constexpr int64_t kWorkPerThread = 200'000;

struct Item {
  int sequence, kv_head;
  int first_row, num_rows;        // of the sequence's rows for this kv head: token * group + head in group
  int first_segment, last_segment;
  int64_t partials;  // index of its first segment's partial result, or -1: the item covers its whole context
  int64_t cost;
};

struct Plan {
  std::vector<Item> items;
  std::vector<Item> splits;  // tiles whose segments are computed by several items
  int64_t num_partials = 0;
  int num_threads = 1;
};

using Arguments = PagedAttentionArguments;

inline int group_size(const Arguments& a) { return static_cast<int>(a.num_heads / a.num_kv_heads); }

// Rows that a tile of `num_rows` is computed as: the sizes that are compiled.
inline int padded_rows(int num_rows) {
  for (int rows : {1, 2, 3, 4, 6, 8, 12})
    if (num_rows <= rows) return rows;
  return kMaxRows;
}

// Rows of an item of several tiles.
inline int padded_rows_of_item(int num_rows) {
  return num_rows / kMaxRows * kMaxRows + (num_rows % kMaxRows ? padded_rows(num_rows % kMaxRows) : 0);
}

// Whether numbers of this type become floats before they are multiplied.
template <typename T>
constexpr bool kWidens = std::is_same_v<T, BFloat16> && !kPaired<T>;

inline bool widens(const Arguments& a) { return a.element_type == kBFloat16 && kWidens<BFloat16>; }

inline Visible visible_tokens(const Arguments& a, int sequence, int token) {
  const int num_queries = a.query_starts[sequence + 1] - a.query_starts[sequence];
  const int last = a.context_lens[sequence] - num_queries + token + 1;
  const int first = a.sliding_window > 0 ? static_cast<int>(std::max<int64_t>(0, last - a.sliding_window)) : 0;
  return {first, last};
}

// How many tiles an item has where there are enough: so many that each thread still finds several items.
inline int tiles_together(const Arguments& a) {
  if (!widens(a)) return 1;
  const int group = group_size(a);
  int64_t num_tiles = 0;
  for (int sequence = 0; sequence < a.num_seqs; sequence++)
    num_tiles += (a.query_starts[sequence + 1] - a.query_starts[sequence]) * group / kMaxRows * a.num_kv_heads;
  int together = kTilesTogether;
  while (together > 1 && num_tiles / together < 8 * a.num_threads) together /= 2;
  return together;
}

inline Plan make_plan(const Arguments& a) {
  Plan plan;
  const int group = group_size(a);
  int64_t total_cost = 0;
  const int most_rows = tiles_together(a) * kMaxRows;
  for (int sequence = 0; sequence < a.num_seqs; sequence++) {
    const int num_rows = (a.query_starts[sequence + 1] - a.query_starts[sequence]) * group;
    for (int row = 0; row < num_rows; row += most_rows) {
      const int rows = std::min(most_rows, num_rows - row);
      const int first = visible_tokens(a, sequence, row / group).first;
      const int last = visible_tokens(a, sequence, (row + rows - 1) / group).last;
      const int64_t cost = static_cast<int64_t>(padded_rows_of_item(rows)) * (last - first);
      for (int head = 0; head < a.num_kv_heads; head++)
        plan.items.push_back({sequence, head, row, rows, first / kSegment, (last - 1) / kSegment + 1, -1, cost});
      total_cost += cost * a.num_kv_heads;
    }
  }
  const int64_t useful_threads = total_cost * (a.key_dim + a.value_dim) / kWorkPerThread;
  plan.num_threads = static_cast<int>(std::clamp<int64_t>(useful_threads, 1, std::max(1, a.num_threads)));
  if (plan.num_threads == 1) return plan;

  // Four items per thread even out, and no item may be more than its thread's share of that.
  const int64_t share = total_cost / (4 * plan.num_threads);
  const size_t num_tiles = plan.items.size();
  for (size_t i = 0; i < num_tiles; i++) {
    const Item tile = plan.items[i];
    const int num_segments = tile.last_segment - tile.first_segment;
    if (tile.cost <= share || num_segments == 1 || tile.num_rows > kMaxRows) continue;
    const int64_t wanted_parts = tile.cost / std::max<int64_t>(share, 1) + 1;
    const int num_parts = static_cast<int>(std::min<int64_t>(num_segments, wanted_parts));
    const int per_part = (num_segments + num_parts - 1) / num_parts;
    Item whole = tile;
    whole.partials = plan.num_partials;
    plan.splits.push_back(whole);
    plan.num_partials += num_segments;
    for (int segment = tile.first_segment; segment < tile.last_segment; segment += per_part) {
      Item part = whole;
      part.first_segment = segment;
      part.last_segment = std::min(segment + per_part, tile.last_segment);
      part.partials = whole.partials + (segment - tile.first_segment);
      part.cost = tile.cost * (part.last_segment - segment) / num_segments;
      if (segment == tile.first_segment)
        plan.items[i] = part;
      else
        plan.items.push_back(part);
    }
  }
  std::stable_sort(plan.items.begin(), plan.items.end(), [](const Item& x, const Item& y) { return x.cost > y.cost; });
  return plan;
}

// Writes x[i] to target[2 * i + half], and nothing else: another thread may be writing the other halves.
template <typename T>
void write_half_pairs(const T* x, int64_t size, int64_t half, T* target) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  const __mmask32 lanes = half == 0 ? 0x55555555u : 0xaaaaaaaau;
  for (; i + kLanes <= size; i += kLanes) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const __m512i pairs = _mm512_cvtepu16_epi32(words);
    _mm512_mask_storeu_epi16(target + 2 * i, lanes, half == 0 ? pairs : _mm512_slli_epi32(pairs, 16));
  }
#endif
  for (; i < size; i++) target[2 * i + half] = x[i];
}

// Writes the keys and values of a row into its slot.
template <typename T>
void write_token(const Arguments& a, int64_t token) {
  const int64_t block = a.slots[token] / kBlockSize, offset = a.slots[token] % kBlockSize;
  for (int64_t head = 0; head < a.num_kv_heads; head++) {
    const T* key = static_cast<const T*>(a.key) + token * a.key_token_stride + head * a.key_head_stride;
    const T* value = static_cast<const T*>(a.value) + token * a.value_token_stride + head * a.value_head_stride;
    const int64_t place = (block * a.num_kv_heads + head) * kBlockSize;
    T* keys = static_cast<T*>(a.key_cache) + place * padded_key_dim<T>(a.key_dim);
    T* values = static_cast<T*>(a.value_cache) + place * a.value_dim;
    if constexpr (kPaired<T>) {
      keys += 2 * offset;
      for (int64_t d = 0; d + 1 < a.key_dim; d += 2) std::memcpy(keys + d * kBlockSize, key + d, 2 * sizeof(T));
      if (a.key_dim % 2 == 1) {
        keys[(a.key_dim - 1) * kBlockSize] = key[a.key_dim - 1];
        keys[(a.key_dim - 1) * kBlockSize + 1] = {0};
      }
      write_half_pairs(value, a.value_dim, offset % 2, values + offset / 2 * 2 * a.value_dim);
    } else {
      for (int64_t d = 0; d < a.key_dim; d++) keys[d * kBlockSize + offset] = key[d];
      std::memcpy(values + offset * a.value_dim, value, a.value_dim * sizeof(T));
    }
  }
}

// Scratch of one thread: scores, the query tile, and two results of kMaxRows rows; for items of several tiles a query and
// a result of each, and a widened segment.
struct Scratch {
  float* scores;
  float* query;
  Partial whole, part;
  float* queries;  // [kTilesTogether] of query_size
  float* wholes;   // [kTilesTogether] of partial_size
  Widened *keys, *values;

  static int64_t partial_size(const Arguments& a) { return kMaxRows * (2 + a.value_dim); }
  static int64_t query_size(const Arguments& a) { return kMaxRows * (a.key_dim + 1); }
  static int64_t size(const Arguments& a) {
    int64_t floats = kMaxRows * kSegment + query_size(a) + 2 * partial_size(a);
    if (widens(a))
      floats += kTilesTogether * (query_size(a) + partial_size(a)) + kSegment * (a.key_dim + a.value_dim) + 32;
    return (floats + 31) / 16 * 16;  // whole cache lines, and one between neighbours
  }
  Scratch(const Arguments& a, float* memory)
      : scores(memory), query(memory + kMaxRows * kSegment), whole(at(query + query_size(a))),
        part(at(query + query_size(a) + partial_size(a))), queries(query + query_size(a) + 2 * partial_size(a)),
        wholes(queries + kTilesTogether * query_size(a)),
        keys(aligned(wholes + kTilesTogether * partial_size(a))), values(keys + kSegment * a.key_dim) {}
  static Partial at(float* memory) { return {memory, memory + kMaxRows, memory + 2 * kMaxRows}; }
  static Widened* aligned(float* memory) {
    return reinterpret_cast<Widened*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  }
};

// Queries as tile.h says that a tile has them.
template <typename T>
void write_queries(const T* const* sources, int rows, int64_t key_dim, float scale, float* query) {
  if constexpr (!kPaired<T>) {
    for (int r = 0; r < rows; r++)
      for (int64_t d = 0; d < key_dim; d++) query[d * rows + r] = to_float(sources[r][d]) * scale;
    return;
  }
  int64_t d = 0;
#if defined(__AVX512BF16__)
  for (; rows > kFewRows && d + 2 * kLanes <= key_dim; d += 2 * kLanes) {
    const void* words[kMaxRows];
    for (int r = 0; r < rows; r++) words[r] = sources[r] + d;
    transpose_words(words, rows, query + d / 2 * rows);
  }
#endif
  for (; d < key_dim; d += 2)
    for (int r = 0; r < rows; r++) {
      const T pair[2] = {sources[r][d], d + 1 < key_dim ? sources[r][d + 1] : T{}};
      std::memcpy(query + d / 2 * rows + r, pair, sizeof pair);
    }
}

template <typename T>
Tile<T> make_tile(const Arguments& a, const Item& item, int rows, float* query) {
  const int group = group_size(a);
  Tile<T> tile;
  tile.key_block_stride = a.num_kv_heads * padded_key_dim<T>(a.key_dim) * kBlockSize;
  tile.value_block_stride = a.num_kv_heads * a.value_dim * kBlockSize;
  tile.keys = static_cast<const T*>(a.key_cache) + item.kv_head * padded_key_dim<T>(a.key_dim) * kBlockSize;
  tile.values = static_cast<const T*>(a.value_cache) + item.kv_head * a.value_dim * kBlockSize;
  tile.blocks = a.block_tables + item.sequence * a.block_table_stride;
  tile.first_block = 0;
  tile.key_dim = static_cast<int>(a.key_dim);
  tile.value_dim = static_cast<int>(a.value_dim);
  tile.scale = a.scale;
  tile.softcap = a.softcap;
  tile.query = query;
  tile.num_distances = static_cast<int>(a.num_distances);
  const T* sources[kMaxRows];
  for (int r = 0; r < rows; r++) {
    // Rows behind the tile's end repeat its last row; their results are dropped.
    const int row = item.first_row + std::min(r, item.num_rows - 1);
    const int token = row / group, head = item.kv_head * group + row % group;
    tile.visible[r] = visible_tokens(a, item.sequence, token);
    tile.distance_bias[r] = a.distance_bias ? a.distance_bias + head * a.num_distances : nullptr;
    const T* source = static_cast<const T*>(a.query) + head * a.query_head_stride +
                      (a.query_starts[item.sequence] + static_cast<int64_t>(token)) * a.query_token_stride;
    sources[r] = source;
  }
  write_queries(sources, rows, a.key_dim, a.scale, query);
  // Tokens ascend with rows, and so do both ends of what a row sees.
  tile.some = {tile.visible[0].first, tile.visible[rows - 1].last};
  tile.all = {tile.visible[rows - 1].first, tile.visible[0].last};
  return tile;
}

// The state before the first segment: nothing seen, or a sink's weight and no value.
inline void begin_rows(const Arguments& a, const Item& item, int rows, const Partial& whole) {
  const int group = group_size(a);
  for (int r = 0; r < rows; r++) {
    const int row = item.first_row + std::min(r, item.num_rows - 1);
    whole.maximum[r] = a.sinks ? a.sinks[item.kv_head * group + row % group] : kMasked;
    whole.sum[r] = a.sinks ? 1.0f : 0.0f;
  }
  std::fill_n(whole.values, rows * a.value_dim, 0.0f);
}

template <typename T>
void finish_rows(const Arguments& a, const Item& item, const Partial& whole) {
  const int group = group_size(a);
  for (int r = 0; r < item.num_rows; r++) {
    const int row = item.first_row + r;
    const int64_t token = a.query_starts[item.sequence] + row / group;
    const int64_t head = item.kv_head * group + row % group;
    T* target = static_cast<T*>(a.output) + (token * a.num_heads + head) * a.value_dim;
    const float inverse = 1.0f / whole.sum[r];
    const float* values = whole.values + r * a.value_dim;
    int64_t d = 0;
    for (; d + kLanes <= a.value_dim; d += kLanes) store(target + d, load(values + d) * inverse);
    for (; d < a.value_dim; d++) from_float(values[d] * inverse, target + d);
  }
}

// Queries of an item's tokens, or its outputs: heads of a group lie side by side.
template <typename Work>
void each_token(const Arguments& a, const Item& item, Work work) {
  const int group = group_size(a);
  for (int token = item.first_row / group; token <= (item.first_row + item.num_rows - 1) / group; token++)
    work(a.query_starts[item.sequence] + static_cast<int64_t>(token), static_cast<int64_t>(item.kv_head) * group);
}

// Fetches what an item that is to come reads first: its queries, which other threads wrote, and, where few rows wait for
// them, the first keys. Those that follow are fetched on the way, see tile.h.
template <typename T>
void fetch_start(const Arguments& a, const Item& item) {
  each_token(a, item, [&](int64_t token, int64_t head) {
    fetch_near(static_cast<const T*>(a.query) + token * a.query_token_stride + head * a.query_head_stride,
               group_size(a) * a.query_head_stride * static_cast<int64_t>(sizeof(T)));
  });
  if (item.num_rows > kFewRows) return;
  const int32_t* blocks = a.block_tables + item.sequence * a.block_table_stride;
  const int64_t size = padded_key_dim<T>(a.key_dim) * kBlockSize;
  const int first = item.first_segment * (kSegment / kBlockSize);
  const int last = std::min<int64_t>(first + 4, (a.context_lens[item.sequence] + kBlockSize - 1) / kBlockSize);
  for (int block = first; block < last; block++) {
    const T* keys = static_cast<const T*>(a.key_cache) + (blocks[block] * a.num_kv_heads + item.kv_head) * size;
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(keys + i, 0, 2);
  }
}

// Fetches what finish_rows will write.
template <typename T>
void fetch_outputs(const Arguments& a, const Item& item) {
  each_token(a, item, [&](int64_t token, int64_t head) {
    fetch_to_write(static_cast<T*>(a.output) + (token * a.num_heads + head) * a.value_dim,
                   group_size(a) * a.value_dim * static_cast<int64_t>(sizeof(T)));
  });
}

template <typename T, int R, typename MayWrite>
void run_tile_item(const Arguments& a, const Item& item, const Scratch& scratch, float* partials, MayWrite may_write) {
  const Tile<T> tile = make_tile<T>(a, item, R, scratch.query);
  if (item.partials >= 0) {
    if (!may_write()) return;
    for (int s = item.first_segment; s < item.last_segment; s++)
      attend_segment<T, R>(tile, s, scratch.scores,
                           Scratch::at(partials + (item.partials + s - item.first_segment) * Scratch::partial_size(a)));
    return;
  }
  begin_rows(a, item, R, scratch.whole);
  fetch_outputs<T>(a, item);
  for (int s = item.first_segment; s < item.last_segment; s++) {
    attend_segment<T, R>(tile, s, scratch.scores, scratch.part);
    merge(scratch.whole, scratch.part, R, tile.value_dim);
  }
  if (may_write()) finish_rows<T>(a, item, scratch.whole);
}

// Calls work(integral_constant) with the number of rows that a tile is computed as.
template <typename Work>
void with_rows(int num_rows, Work work) {
  switch (padded_rows(num_rows)) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    case 4: return work(std::integral_constant<int, 4>());
    case 6: return work(std::integral_constant<int, 6>());
    default: break;
  }
  if constexpr (kMaxRows > 6) {
    if (num_rows <= 8) return work(std::integral_constant<int, 8>());
    return work(std::integral_constant<int, 12>());
  }
}

// Converts a block; meanwhile the one that follows is fetched, which lies elsewhere.
template <typename T>
void widen(const T* source, const T* next, int64_t size, Widened* target) {
  for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(next + i);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(target + i, load(source + i));
  for (; i < size; i++) from_float(to_float(source[i]), target + i);
}

// Several tiles segment by segment, each as it would be alone: widening rounds nothing.
template <typename T, typename MayWrite>
void run_widened(const Arguments& a, const Item& item, const Scratch& scratch, MayWrite may_write) {
  Tile<Widened> tiles[kTilesTogether];
  Item items[kTilesTogether];
  Partial wholes[kTilesTogether];
  int num_tiles = 0;
  Tile<T> narrow;
  for (int row = 0; row < item.num_rows; row += kMaxRows, num_tiles++) {
    Item& part = items[num_tiles] = item;
    part.first_row = item.first_row + row;
    part.num_rows = std::min(kMaxRows, item.num_rows - row);
    const int rows = padded_rows(part.num_rows);
    narrow = make_tile<T>(a, part, rows, scratch.queries + num_tiles * Scratch::query_size(a));
    part.first_segment = narrow.some.first / kSegment;
    part.last_segment = (narrow.some.last - 1) / kSegment + 1;
    Tile<Widened>& tile = tiles[num_tiles];
    tile.keys = scratch.keys, tile.values = scratch.values;
    tile.key_block_stride = a.key_dim * kBlockSize, tile.value_block_stride = a.value_dim * kBlockSize;
    tile.blocks = nullptr;
    tile.key_dim = narrow.key_dim, tile.value_dim = narrow.value_dim;
    tile.scale = narrow.scale, tile.softcap = narrow.softcap;
    tile.query = narrow.query;
    std::copy_n(narrow.visible, rows, tile.visible);
    std::copy_n(narrow.distance_bias, rows, tile.distance_bias);
    tile.num_distances = narrow.num_distances;
    tile.all = narrow.all, tile.some = narrow.some;
    wholes[num_tiles] = Scratch::at(scratch.wholes + num_tiles * Scratch::partial_size(a));
    begin_rows(a, part, rows, wholes[num_tiles]);
  }
  for (int s = item.first_segment; s < item.last_segment; s++) {
    const int first_block = std::max(s * kSegment, tiles[0].some.first) / kBlockSize;
    const int last_token = std::min((s + 1) * kSegment, tiles[num_tiles - 1].some.last);
    for (int block = first_block; block * kBlockSize < last_token; block++) {
      const int64_t from = narrow.blocks[block], to = block - s * (kSegment / kBlockSize);
      const int64_t next = (block + 1) * kBlockSize < last_token ? narrow.blocks[block + 1] : from;
      widen(narrow.keys + from * narrow.key_block_stride, narrow.keys + next * narrow.key_block_stride,
            a.key_dim * kBlockSize, scratch.keys + to * a.key_dim * kBlockSize);
      widen(narrow.values + from * narrow.value_block_stride, narrow.values + next * narrow.value_block_stride,
            a.value_dim * kBlockSize, scratch.values + to * a.value_dim * kBlockSize);
    }
    for (int t = 0; t < num_tiles; t++) {
      if (s < items[t].first_segment || s >= items[t].last_segment) continue;
      tiles[t].first_block = s * (kSegment / kBlockSize);
      with_rows(items[t].num_rows, [&](auto rows) {
        attend_segment<Widened, rows>(tiles[t], s, scratch.scores, scratch.part);
        merge(wholes[t], scratch.part, rows, tiles[t].value_dim);
      });
    }
  }
  if (!may_write()) return;
  for (int t = 0; t < num_tiles; t++) finish_rows<T>(a, items[t], wholes[t]);
}

// Calls may_write() once, before it writes where others read, and if that is false writes nothing.
template <typename T, typename MayWrite>
void run_item(const Arguments& a, const Item& item, const Scratch& scratch, float* partials, MayWrite may_write) {
  if constexpr (kWidens<T>)
    if (item.num_rows > kMaxRows) return run_widened<T>(a, item, scratch, may_write);
  with_rows(item.num_rows, [&](auto rows) { run_tile_item<T, rows>(a, item, scratch, partials, may_write); });
}

// As `run_item`.
template <typename T, typename MayWrite>
void merge_split(const Arguments& a, const Item& tile, const Scratch& scratch, float* partials, MayWrite may_write) {
  const int rows = padded_rows(tile.num_rows);
  begin_rows(a, tile, rows, scratch.whole);
  for (int s = tile.first_segment; s < tile.last_segment; s++)
    merge(scratch.whole, Scratch::at(partials + (tile.partials + s - tile.first_segment) * Scratch::partial_size(a)),
          rows, static_cast<int>(a.value_dim));
  if (may_write()) finish_rows<T>(a, tile, scratch.whole);
}

inline bool is_consistent(const Arguments& a) {
  if (a.num_kv_heads < 1 || a.num_heads % a.num_kv_heads != 0 || a.key_dim < 1 || a.value_dim < 1) return false;
  if (a.distance_bias && a.num_distances < 1) return false;
  if (a.query_starts[0] != 0 || a.query_starts[a.num_seqs] != a.num_tokens) return false;
  for (int64_t i = 0; i < a.num_seqs; i++) {
    const int num_queries = a.query_starts[i + 1] - a.query_starts[i];
    if (num_queries < 0 || a.context_lens[i] < num_queries) return false;
    if ((a.context_lens[i] + kBlockSize - 1) / kBlockSize > a.block_table_width) return false;
  }
  return true;
}

// A wrong block id would read or overwrite foreign memory, so each one is looked at.
inline bool blocks_exist(const Arguments& a) {
  for (int64_t i = 0; i < a.num_tokens; i++)
    if (a.slots[i] < 0 || a.slots[i] / kBlockSize >= a.num_blocks) return false;
  for (int64_t i = 0; i < a.num_seqs; i++) {
    const int64_t num_blocks = (a.context_lens[i] + kBlockSize - 1) / kBlockSize;
    const int32_t* blocks = a.block_tables + i * a.block_table_stride;
    for (int64_t j = 0; j < num_blocks; j++)
      if (blocks[j] < 0 || blocks[j] >= a.num_blocks) return false;
  }
  return true;
}

}  // namespace torchrelay
