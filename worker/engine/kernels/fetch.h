// What one thread of a step fetches into its second-level cache before it is wanted.
//
// Products of more than a few rows compute longer than their weights take to arrive, attention of few rows waits for
// memory, and between two products memory idles. So while a thread multiplies it fetches the rows of its next tile, the
// panels of its next piece, and keys and values of the attention that follows; and while it waits for other threads, the
// first panels of its share of the next product. All are hints: what is never read costs a little time, no result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace torchrelay {

constexpr int64_t kLineBytes = 64;

// Steps of a tile's loop between two looks at what to fetch, and what each of them fetches: two lines.
constexpr int kFetchSteps = 8;
constexpr int64_t kFetchBytes = kFetchSteps * 2 * kLineBytes;

// One of the kFetchSteps.
inline void fetch_lines(const char* chunk, int64_t step) {
  __builtin_prefetch(chunk + step * 2 * kLineBytes, 0, 2);
  __builtin_prefetch(chunk + step * 2 * kLineBytes + kLineBytes, 0, 2);
}

inline void fetch_now(const void* start, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char*>(start) + i, 0, 2);
}

// Into the first-level cache.
inline void fetch_near(const void* start, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(static_cast<const char*>(start) + i);
}

// Memory that is about to be written.
inline void fetch_to_write(const void* start, int64_t bytes) {
  const char* const first = static_cast<const char*>(start);
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(first + i, 1);
  __builtin_prefetch(first + bytes - 1, 1);
}

// Where a layer's keys and values lie: parts of one head and block each.
struct ContextParts {
  const char *keys = nullptr, *values = nullptr;
  int64_t key_bytes = 0, value_bytes = 0;            // of a part
  const std::vector<int64_t>* places = nullptr;  // of the parts that a thread will read, in that order
};

class Fetch {
 public:
  // Of the product that follows: the first panels of the thread's share.
  void set_following(const void* start, int64_t bytes) {
    following_ = static_cast<const char*>(start);
    following_end_ = following_ + bytes;
  }
  void set_context(const ContextParts& context) {
    context_ = context;
    next_part_ = 0;
    owed_parts_ = 0.0;
  }

  // While the thread has nothing else to do.
  void idle() {
    if (following_ >= following_end_) return;
    fetch_now(following_, 2 * kLineBytes);
    following_ += 2 * kLineBytes;
  }

  // A tile's piece of work, of so many looks: what was added since is fetched, evenly.
  void begin(const void* harmless) {
    harmless_ = static_cast<const char*>(harmless);
    num_ranges_ = range_ = 0;
    num_chunks_ = due_ = 0;
  }
  void add(const void* start, int64_t bytes) {
    if (bytes <= 0 || num_ranges_ == kMostRanges) return;
    const auto first = reinterpret_cast<uintptr_t>(start);
    ranges_[num_ranges_++] = {first, first + bytes};
    num_chunks_ += (bytes + kFetchBytes - 1) / kFetchBytes;
  }
  // A part of what follows: as much of it as is the unit's, one of `units_left` until the product's end.
  void add_following(int64_t units_left) {
    const int64_t chunks = (following_end_ - following_ + kFetchBytes - 1) / kFetchBytes;
    const int64_t bytes = std::min((chunks + units_left - 1) / units_left * kFetchBytes, following_end_ - following_);
    add(following_, bytes);
    following_ += std::max<int64_t>(bytes, 0);
  }
  // `share`: which part of the work before the attention the unit is.
  void add_context(double share) {
    if (!context_.places) return;
    const auto num_parts = static_cast<int64_t>(context_.places->size());
    owed_parts_ += static_cast<double>(num_parts) * share;
    for (; owed_parts_ >= 1.0 && next_part_ < num_parts && num_ranges_ + 2 <= kMostRanges; owed_parts_ -= 1.0) {
      const int64_t place = (*context_.places)[next_part_++];
      add(context_.keys + place * context_.key_bytes, context_.key_bytes);
      add(context_.values + place * context_.value_bytes, context_.value_bytes);
    }
  }
  void spread_over(int64_t num_looks) {
    num_looks_ = num_looks;
    ranges_[num_ranges_] = {reinterpret_cast<uintptr_t>(harmless_), ~uintptr_t{0}};  // never ends
  }

  // The chunk to fetch next, or memory that is in the cache. Without a branch, which no processor would predict.
  const char* look() {
    due_ += num_chunks_;
    const int64_t is_due = -static_cast<int64_t>(due_ >= num_looks_);  // all bits or none
    due_ -= num_looks_ & is_due;
    Range& range = ranges_[range_];
    const uintptr_t to_harmless = (reinterpret_cast<uintptr_t>(harmless_) ^ range.at) & ~is_due;
    const char* const chunk = reinterpret_cast<const char*>(range.at ^ to_harmless);
    range.at += kFetchBytes & is_due;
    range_ += range.at >= range.end;
    return chunk;
  }

 private:
  static constexpr int kMostRanges = 128;
  struct Range {
    uintptr_t at, end;
  };

  Range ranges_[kMostRanges + 1];
  int num_ranges_ = 0, range_ = 0;
  const char* harmless_ = nullptr;
  int64_t num_chunks_ = 0, num_looks_ = 1, due_ = 0;
  const char *following_ = nullptr, *following_end_ = nullptr;
  ContextParts context_;
  int64_t next_part_ = 0;
  double owed_parts_ = 0.0;
};

}  // namespace torchrelay
