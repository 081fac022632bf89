// A step of a Llama-shaped decoder: embedding, layers and head, for all tokens of the step, in one parallel region.
//
//     x    float32 [tokens, hidden_size]: the residual stream, never rounded
//     layer    norm | qkv | rotary, keys and values into the cache | attention | output | norm | gate_up | down
//
// Rows with an adapter get what it adds to each product: projected down where the product's inputs are made, and up where
// its outputs are taken.
//
// The bars are phases' ends (team.h), where threads wait for each other's work. Of the last layer only rows whose logits
// are wanted go beyond attention.
#pragma once

#include <chrono>
#include <type_traits>
#include <vector>

#include "arena.h"
#include "attend.h"
#include "decoder.h"
#include "low_rank.h"
#include "product.h"
#include "rows.h"
#include "team.h"

namespace torchrelay {

struct AttentionPlan {
  int64_t sliding_window;
  Plan plan;
  std::vector<std::vector<int64_t>> contexts;  // by thread: parts of keys and values that it waits for
};

template <typename T>
class Step {
 public:
  Step(const Decoder& decoder, const DecoderStep& step, int num_threads)
      : d_(decoder), s_(step), team_(num_threads), rows_(step.num_tokens), fetches_(num_threads) {
    if (!s_.row_adapters) return;
    adapts_.resize(d_.num_layers * kProducts);
    for (int64_t i = 0; i < s_.num_adapters; i++)
      for (size_t at = 0; at < adapts_.size(); at++) {
        adapts_[at] |= s_.adapters[i][at].rank > 0;
        most_rank_ = std::max(most_rank_, s_.adapters[i][at].rank);
      }
    for (int64_t i = 0; i < s_.num_logit_rows; i++) kept_adapters_.push_back(s_.row_adapters[s_.logit_rows[i]]);
  }

  void make_plans() {
    for (int64_t i = 0; i < d_.num_layers; i++) {
      const int64_t window = d_.layers[i].sliding_window;
      const auto is_same = [&](const AttentionPlan& entry) { return entry.sliding_window == window; };
      if (std::none_of(plans_.begin(), plans_.end(), is_same))
        plans_.push_back({window, make_plan(attention_arguments(d_.layers[i])), {}});
    }
    for (AttentionPlan& entry : plans_) list_contexts(entry);
    const Layer& layer = d_.layers[0];
    for (const Linear* linear : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
      const Cut cut = cut_product(*linear, rows_, team_.size());
      words_of_layer_ += cut.num_panels * cut.panel_words;
    }
  }

  Arguments attention_arguments(const Layer& layer) const {
    Arguments a{};
    const int64_t query_size = d_.num_heads * d_.head_dim, kv_size = d_.num_kv_heads * d_.head_dim;
    a.query = query_, a.key = key_, a.value = value_, a.output = attended_;
    a.key_cache = layer.key_cache, a.value_cache = layer.value_cache;
    a.slots = s_.slots, a.block_tables = s_.block_tables;
    a.query_starts = s_.query_starts, a.context_lens = s_.context_lens;
    a.query_token_stride = query_size, a.query_head_stride = d_.head_dim;
    a.key_token_stride = a.value_token_stride = kv_size;
    a.key_head_stride = a.value_head_stride = d_.head_dim;
    a.block_table_stride = a.block_table_width = s_.block_table_width;
    a.num_tokens = s_.num_tokens, a.num_seqs = s_.num_seqs, a.num_blocks = d_.num_blocks;
    a.num_heads = d_.num_heads, a.num_kv_heads = d_.num_kv_heads;
    a.key_dim = a.value_dim = d_.head_dim;
    a.sliding_window = layer.sliding_window;
    a.scale = layer.scale, a.softcap = layer.softcap;
    a.element_type = static_cast<int32_t>(d_.element_type);
    a.num_threads = team_.size();
    return a;
  }

  // Two passes over the same code: the first, without memory, tells how much is needed.
  int64_t lay_out(char* memory) {
    Arena arena(memory);
    const int64_t query_size = d_.num_heads * d_.head_dim, kv_size = d_.num_kv_heads * d_.head_dim;
    int64_t words = 0;
    bool has_branch = false, has_mlp = false;  // most models need neither
    for (int64_t i = 0; i < d_.num_layers; i++) {
      const Layer& layer = d_.layers[i];
      for (const Linear* linear : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down})
        words = std::max(words, row_words(*linear));
      has_branch |= layer.attention_output_norm || layer.mlp_output_norm;
      has_mlp |= !is_plain(layer.down);
    }
    words = std::max(words, row_words(d_.head));
    x_ = arena.take<float>(rows_ * d_.hidden_size);
    kept_x_ = arena.take<float>(s_.num_logit_rows * d_.hidden_size);
    branch_ = arena.take<float>(has_branch ? rows_ * d_.hidden_size : 0);
    inputs_ = arena.take<uint32_t>(rows_ * words);
    mlp_inputs_ = arena.take<uint32_t>(rows_ * words);
    qkv_ = arena.take<float>(rows_ * (query_size + 2 * kv_size));
    query_ = arena.take<T>(rows_ * query_size);
    key_ = arena.take<T>(rows_ * kv_size);
    value_ = arena.take<T>(rows_ * kv_size);
    attended_ = arena.take<T>(rows_ * query_size);
    kept_attended_ = arena.take<T>(s_.num_logit_rows * query_size);
    mlp_ = arena.take<float>(has_mlp ? rows_ * d_.mlp_size : 0);
    projected_ = arena.take<float>(rows_ * most_rank_);
    const int64_t widest = std::max({d_.hidden_size, d_.mlp_size, query_size});
    row_ = arena.take<float>(team_.size() * (widest + 64));
    row_size_ = widest + 64;
    const Arguments a = attention_arguments(d_.layers[0]);
    scratch_size_ = Scratch::size(a);
    scratch_ = arena.take<float>(team_.size() * scratch_size_);
    int64_t partials = 0;
    for (const AttentionPlan& entry : plans_) partials = std::max(partials, entry.plan.num_partials);
    partials_ = arena.take<float>(partials * Scratch::partial_size(a));
    return arena.used();
  }

  int num_threads() const { return team_.size(); }

  // By every thread of the team, which may have turned out smaller than planned.
  void run(int thread, int num_threads) {
    team_.set_size(num_threads);
    Fetch& fetch = fetches_[thread].fetch;
    clock_ = std::chrono::steady_clock::now();
    each_row(thread, [&](int64_t row) { embed(row); });
    int64_t num_rows = rows_;
    float* x = x_;
    const int32_t* adapters = s_.row_adapters;
    for (int64_t i = 0; i < d_.num_layers; i++) {
      const Layer& layer = d_.layers[i];
      const auto adapted = [&](int product) {
        const int64_t at = i * kProducts + product;
        return Adapted{adapters && adapts_[at] ? adapters : nullptr, at};
      };
      const bool is_last = i + 1 == d_.num_layers;
      // What the layer before added under a norm of its own joins here.
      const float* pending = i > 0 ? d_.layers[i - 1].mlp_output_norm : nullptr;
      if (i == 0) fetch.set_context(context(layer, thread));
      const int64_t num_later_rows = is_last ? s_.num_logit_rows : num_rows;
      norm_rows(thread, x, num_rows, pending, layer.attention_norm, layer.qkv, inputs_, adapted(0));
      spent(thread, &DecoderTimes::norms);
      multiply(
          thread, layer.qkv, inputs_, num_rows, &layer.output, num_later_rows, adapted(0),
          [&](int64_t row, int64_t first, int64_t count, const Floats* y) {
            store_columns<kVectors>(y, count, qkv_ + row * layer.qkv.outputs + first);
          },
          [&](int64_t row, int64_t first) { touch(qkv_ + row * layer.qkv.outputs + first); });
      spent(thread, &DecoderTimes::linears);
      const Arguments a = attention_arguments(layer);
      each_row(thread, [&](int64_t row) { place_row(a, layer, row); });
      spent(thread, &DecoderTimes::rotary);
      if (is_last && s_.num_logit_rows == 0) return;
      attend(thread, a);
      fetch.set_context(is_last ? ContextParts() : context(d_.layers[i + 1], thread));
      const T* attended = attended_;
      if (is_last && s_.num_logit_rows < num_rows) {
        each_row(thread, [&](int64_t row) { keep_row(row); }, s_.num_logit_rows);
        num_rows = s_.num_logit_rows;
        x = kept_x_;
        attended = kept_attended_;
        if (adapters) adapters = kept_adapters_.data();
      }
      const uint32_t* words = attention_output(thread, attended, layer.output, num_rows);
      project_rows(thread, adapted(1), num_rows, attended, layer.output.inputs, layer.output.inputs);
      spent(thread, &DecoderTimes::attention);
      multiply_add(thread, layer.output, words, num_rows, &layer.gate_up, adapted(1), x, layer.attention_output_norm);
      spent(thread, &DecoderTimes::linears);
      norm_rows(thread, x, num_rows, layer.attention_output_norm, layer.mlp_norm, layer.gate_up, inputs_,
                adapted(2));
      spent(thread, &DecoderTimes::norms);
      const bool down_is_plain = is_plain(layer.down);
      const int64_t down_words = row_words(layer.down);
      const bool rounds = layer.down.format == kLinearBFloat16 && sizeof(BFloat16Format::Input) == sizeof(BFloat16);
      multiply(
          thread, layer.gate_up, inputs_, num_rows, &layer.down, num_rows, adapted(2),
          [&](int64_t row, int64_t first, int64_t, const Floats* y) {
            Floats active[kVectors / 2];
            for (int c = 0; c < kVectors / 2; c++)
              active[c] = rounds ? gate<true>(d_.activation, y[c], y[c + kVectors / 2])
                                 : gate<false>(d_.activation, y[c], y[c + kVectors / 2]);
            const int64_t at = first / 2, count = std::min<int64_t>(kColumns, d_.mlp_size - at);
            uint32_t* const words = mlp_inputs_ + row * down_words;
            if (!down_is_plain)
              store_columns<kVectors / 2>(active, count, mlp_ + row * d_.mlp_size + at);
            else if (layer.down.format == kLinearFloat32)
              store_columns<kVectors / 2>(active, count, reinterpret_cast<float*>(words) + at);
            else
              store_columns<kVectors / 2>(active, count, reinterpret_cast<BFloat16Format::Input*>(words) + at);
          },
          [&](int64_t row, int64_t first) {
            if (down_is_plain) __builtin_prefetch(mlp_inputs_ + row * down_words + first / 2 * down_words / d_.mlp_size, 1);
          });
      if (!down_is_plain)
        each_row(thread, [&](int64_t row) { prepare(layer.down, mlp_ + row * d_.mlp_size, row, mlp_inputs_); }, num_rows);
      if (!down_is_plain)
        project_rows(thread, adapted(3), num_rows, mlp_, d_.mlp_size, d_.mlp_size);
      else if (layer.down.format == kLinearFloat32)
        project_rows(thread, adapted(3), num_rows, reinterpret_cast<const float*>(mlp_inputs_), down_words, d_.mlp_size);
      else
        project_rows(thread, adapted(3), num_rows, reinterpret_cast<const BFloat16Format::Input*>(mlp_inputs_),
                     down_words * static_cast<int64_t>(sizeof(uint32_t) / sizeof(BFloat16Format::Input)), d_.mlp_size);
      multiply_add(thread, layer.down, mlp_inputs_, num_rows, is_last ? &d_.head : &d_.layers[i + 1].qkv, adapted(3), x,
                   layer.mlp_output_norm);
      spent(thread, &DecoderTimes::linears);
    }
    norm_rows(thread, x, num_rows, d_.layers[d_.num_layers - 1].mlp_output_norm, d_.final_norm, d_.head, inputs_,
              Adapted{});
    multiply(
        thread, d_.head, inputs_, num_rows, nullptr, 0, Adapted{},
        [&](int64_t row, int64_t first, int64_t count, const Floats* y) {
          Floats logits[kVectors];
          for (int c = 0; c < kVectors; c++) {
            logits[c] = y[c] * d_.logit_scale;
            if (d_.logit_softcap > 0.0f) logits[c] = hyperbolic_tangent(logits[c] / d_.logit_softcap) * d_.logit_softcap;
          }
          store_columns<kVectors>(logits, count, s_.logits + row * d_.vocab_size + first);
        },
        [&](int64_t row, int64_t first) { touch(s_.logits + row * d_.vocab_size + first); });
    spent(thread, &DecoderTimes::head);
  }

 private:
  // A product of a layer, and which adapter each of its rows has; null where none of the step's adapters is of it.
  struct Adapted {
    const int32_t* of_rows = nullptr;
    int64_t at = 0;  // in an adapter's array
  };

  // What is added to a row of a product; null for nothing.
  const LowRank* low_rank(const Adapted& adapted, int64_t row) const {
    if (!adapted.of_rows || adapted.of_rows[row] < 0) return nullptr;
    const LowRank* const found = s_.adapters[adapted.of_rows[row]] + adapted.at;
    return found->rank > 0 ? found : nullptr;
  }

  void project_row(const Adapted& adapted, int64_t row, const float* x, int64_t inputs) {
    if (const LowRank* const found = low_rank(adapted, row))
      project_down(*found, x, inputs, projected_ + row * most_rank_);
  }

  // A phase of rows, where any has something added to its product. Rows of x lie `stride` numbers apart.
  template <typename X>
  void project_rows(int thread, const Adapted& adapted, int64_t num_rows, const X* x, int64_t stride, int64_t inputs) {
    if (!adapted.of_rows) return;
    float* const row_floats = row_ + thread * row_size_;
    each_row(
        thread,
        [&](int64_t row) {
          if (!low_rank(adapted, row)) return;
          const float* source;
          if constexpr (std::is_same_v<X, float>) {
            source = x + row * stride;
          } else {
            convert_row(x + row * stride, inputs, row_floats);
            source = row_floats;
          }
          project_row(adapted, row, source, inputs);
        },
        num_rows);
  }

  void spent(int thread, double DecoderTimes::*part) {
    if (thread != 0 || !s_.times) return;
    const auto now = std::chrono::steady_clock::now();
    s_.times->*part += std::chrono::duration<double>(now - clock_).count();
    clock_ = now;
  }

  // A phase of rows. They take too little time for the writing to be told apart.
  template <typename Work>
  void each_row(int thread, Work work, int64_t num_rows = -1) {
    if (num_rows < 0) num_rows = rows_;
    const int64_t size = std::max<int64_t>(1, num_rows / (team_.size() * 4));
    team_.each(
        thread, (num_rows + size - 1) / size, [](int64_t) { return 1; },
        [&](int64_t piece, int64_t, Team::Turn& turn) {
          if (!turn.take()) return;
          for (int64_t row = piece * size; row < std::min(num_rows, (piece + 1) * size); row++) work(row);
        },
        [&] { fetches_[thread].fetch.idle(); });
  }

  static void touch(const float* outputs) { fetch_to_write(outputs, kPanel * sizeof(float)); }

  // Of the items that a thread will have: blocks of those whose few rows make attention wait for memory.
  void list_contexts(AttentionPlan& entry) const {
    entry.contexts.resize(team_.size());
    const std::vector<Item>& items = entry.plan.items;
    const int64_t most_rows = std::max<int64_t>(kFewRows, d_.num_heads / d_.num_kv_heads);
    const int64_t together = items_together(items.size());
    for (size_t i = 0; i < items.size(); i++) {
      const Item& item = items[i];
      if (item.num_rows > most_rows) continue;
      std::vector<int64_t>& places = entry.contexts[i / together % team_.size()];
      const int64_t first = item.first_segment * (kSegment / kBlockSize);
      const int64_t last = std::min<int64_t>(item.last_segment * (kSegment / kBlockSize),
                                             (s_.context_lens[item.sequence] + kBlockSize - 1) / kBlockSize);
      for (int64_t block = first; block < last; block++)
        places.push_back(s_.block_tables[item.sequence * s_.block_table_width + block] * d_.num_kv_heads + item.kv_head);
    }
  }

  ContextParts context(const Layer& layer, int thread) const {
    const int64_t size = d_.head_dim * kBlockSize * sizeof(T);
    return {static_cast<const char*>(layer.key_cache), static_cast<const char*>(layer.value_cache), size, size,
            &plan_of(layer.sliding_window).contexts[thread]};
  }

  const AttentionPlan& plan_of(int64_t sliding_window) const {
    return *std::find_if(plans_.begin(), plans_.end(),
                         [&](const AttentionPlan& entry) { return entry.sliding_window == sliding_window; });
  }

  // Heads of a sequence lie side by side in its blocks: one thread takes them all where there is work enough.
  int64_t items_together(int64_t num_items) const {
    return num_items >= 4 * team_.size() * d_.num_kv_heads ? d_.num_kv_heads : 1;
  }

  void embed(int64_t row) {
    float* target = x_ + row * d_.hidden_size;
    if (!d_.embedding) return embed_from_head(s_.token_ids[row], target);
    const T* source = static_cast<const T*>(d_.embedding) + s_.token_ids[row] * d_.hidden_size;
    for (int64_t i = 0; i < d_.hidden_size; i++) target[i] = to_float(source[i]) * d_.embedding_scale;
  }

  // Tied weights: a token's stand in its panel of the head, one word in each row.
  void embed_from_head(int64_t token, float* target) {
    constexpr int64_t kPack = sizeof(uint32_t) / sizeof(T);
    const int64_t num_words = d_.head.inputs / kPack;
    const uint32_t* word = d_.head.panels + token / kPanel * num_words * kPanel + token % kPanel;
    for (int64_t k = 0; k < num_words; k++, word += kPanel, target += kPack) {
      T source[kPack];
      std::memcpy(source, word, sizeof source);
      for (int64_t i = 0; i < kPack; i++) target[i] = to_float(source[i]) * d_.embedding_scale;
    }
  }

  static void prepare(const Linear& linear, const float* source, int64_t row, uint32_t* inputs) {
    prepare_row(linear, source, inputs + row * row_words(linear));
  }

  // Adds what waits in branch_ under the norm `pending`, then makes inputs of the rows under the norm `weight`.
  void norm_rows(int thread, float* x, int64_t num_rows, const float* pending, const float* weight, const Linear& linear,
                 uint32_t* inputs, const Adapted& adapted) {
    float* const normed = row_ + thread * row_size_;
    each_row(
        thread,
        [&](int64_t row) {
          float* const residual = x + row * d_.hidden_size;
          if (pending) {
            rms_norm(branch_ + row * d_.hidden_size, pending, d_.hidden_size, d_.norm_epsilon, normed);
            for (int64_t i = 0; i < d_.hidden_size; i++) residual[i] += normed[i] * d_.residual_scale;
          }
          if (weight) rms_norm(residual, weight, d_.hidden_size, d_.norm_epsilon, normed);
          prepare(linear, weight ? normed : residual, row, inputs);
          project_row(adapted, row, weight ? normed : residual, linear.inputs);
        },
        num_rows);
  }

  // Norms and rotary positions of a row's query and key; key and value go into the cache.
  void place_row(const Arguments& a, const Layer& layer, int64_t row) {
    const int64_t query_size = d_.num_heads * d_.head_dim, kv_size = d_.num_kv_heads * d_.head_dim;
    float* const query = qkv_ + row * (query_size + 2 * kv_size);
    float* const key = query + query_size;
    if (layer.query_norm) norm_heads(query, query_size, layer.query_norm);
    if (layer.key_norm) norm_heads(key, kv_size, layer.key_norm);
    if (layer.cosines) {
      const int64_t at = s_.positions[row] * (d_.rotary_dim / 2);
      for (int64_t head = 0; head < d_.num_heads + d_.num_kv_heads; head++)
        rotate(query + head * d_.head_dim, layer.cosines + at, layer.sines + at, d_.rotary_dim);
    }
    convert_row(query, query_size, query_ + row * query_size);
    convert_row(key, kv_size, key_ + row * kv_size);
    convert_row(key + kv_size, kv_size, value_ + row * kv_size);
    write_token<T>(a, row);
  }

  void norm_heads(float* x, int64_t size, const float* weight) {
    const int64_t width = d_.wide_query_key_norm ? size : d_.head_dim;
    for (int64_t at = 0; at < size; at += width) rms_norm(x + at, weight, width, d_.norm_epsilon, x + at);
  }

  void attend(int thread, const Arguments& a) {
    const Plan& plan = plan_of(a.sliding_window).plan;
    const Scratch scratch(a, scratch_ + thread * scratch_size_);
    const int64_t num_items = plan.items.size(), num_splits = plan.splits.size();
    const int64_t together = items_together(num_items);
    const auto idle = [&] { fetches_[thread].fetch.idle(); };
    team_.each<Team::Shares::kAlternate>(
        thread, (num_items + together - 1) / together,
        [&](int64_t piece) { return std::min(together, num_items - piece * together); },
        [&](int64_t piece, int64_t unit, Team::Turn& turn) {
          const int64_t i = piece * together + unit;
          const int64_t next = unit + 1 < together ? i + 1 : turn.likely_next() * together;
          if (next >= 0 && next < num_items) fetch_start<T>(a, plan.items[next]);
          run_item<T>(a, plan.items[i], scratch, partials_, [&] { return turn.take(); });
        },
        idle);
    team_.each(
        thread, num_splits, [](int64_t) { return 1; },
        [&](int64_t piece, int64_t, Team::Turn& turn) {
          merge_split<T>(a, plan.splits[piece], scratch, partials_, [&] { return turn.take(); });
        },
        idle);
  }

  void keep_row(int64_t row) {
    const int64_t from = s_.logit_rows[row], query_size = d_.num_heads * d_.head_dim;
    std::memcpy(kept_x_ + row * d_.hidden_size, x_ + from * d_.hidden_size, d_.hidden_size * sizeof(float));
    std::memcpy(kept_attended_ + row * query_size, attended_ + from * query_size, query_size * sizeof(T));
  }

  // The attention's output as the output layer's inputs: as it is where the formats agree.
  const uint32_t* attention_output(int thread, const T* attended, const Linear& linear, int64_t num_rows) {
    const bool agree = (linear.format == kLinearFloat32 && std::is_same_v<T, float>) ||
                       (linear.format == kLinearBFloat16 && std::is_same_v<T, BFloat16Format::Input>);
    if (agree) return reinterpret_cast<const uint32_t*>(attended);
    float* const row_floats = row_ + thread * row_size_;
    each_row(
        thread,
        [&](int64_t row) {
          convert_row(attended + row * linear.inputs, linear.inputs, row_floats);
          prepare(linear, row_floats, row, inputs_);
        },
        num_rows);
    return inputs_;
  }

  // x += layer's product, or, when a norm is to come in between, the product into branch_.
  void multiply_add(int thread, const Linear& linear, const uint32_t* words, int64_t num_rows, const Linear* next,
                    const Adapted& adapted, float* x, const float* norm) {
    float* const target = norm ? branch_ : x;
    multiply(
        thread, linear, words, num_rows, next, num_rows, adapted,
        [&](int64_t row, int64_t first, int64_t count, const Floats* y) {
          const int64_t at = row * d_.hidden_size + first;
          if (norm)
            store_columns<kVectors>(y, count, branch_ + at);
          else
            add_columns<kVectors>(y, d_.residual_scale, count, x + at);
        },
        [&](int64_t row, int64_t first) { touch(target + row * d_.hidden_size + first); });
  }

  // As multiply in product.h, with what adapters add.
  template <typename Take, typename Touch>
  void multiply(int thread, const Linear& linear, const uint32_t* rows, int64_t num_rows, const Linear* next,
                int64_t num_next_rows, const Adapted& adapted, Take take, Touch touch) {
    with_product(linear, [&](auto product) {
      torchrelay::multiply<decltype(product)>(
          team_, thread, fetches_[thread].fetch, linear, rows, num_rows, next, num_next_rows, words_of_layer_,
          [&](int64_t row, int64_t first, int64_t count, Floats* y) {
            if (const LowRank* const found = low_rank(adapted, row))
              add_up(*found, projected_ + row * most_rank_, first, linear.outputs, y);
            take(row, first, count, y);
          },
          touch);
    });
  }

  // On cache lines of its own, and the processor's neighbour of each.
  struct alignas(128) ThreadFetch {
    Fetch fetch;
  };

  const Decoder& d_;
  const DecoderStep& s_;
  Team team_;
  const int64_t rows_;
  std::vector<AttentionPlan> plans_;
  float *x_ = nullptr, *kept_x_ = nullptr, *branch_ = nullptr, *qkv_ = nullptr, *mlp_ = nullptr, *row_ = nullptr;
  float *scratch_ = nullptr, *partials_ = nullptr, *projected_ = nullptr;
  T *query_ = nullptr, *key_ = nullptr, *value_ = nullptr, *attended_ = nullptr, *kept_attended_ = nullptr;
  uint32_t *inputs_ = nullptr, *mlp_inputs_ = nullptr;
  int64_t row_size_ = 0, scratch_size_ = 0;
  std::vector<char> adapts_;             // by layer and product: whether any of the step's adapters adds to it
  std::vector<int32_t> kept_adapters_;  // of the rows whose logits are wanted
  int64_t most_rank_ = 0, words_of_layer_ = 0;
  std::vector<ThreadFetch> fetches_;
  std::chrono::steady_clock::time_point clock_;
};

}  // namespace torchrelay
