// A step of a Llama-shaped decoder: embedding, layers and head, for all tokens of the step, in one parallel region.
//
//     x    float32 [tokens, hidden_size]: the residual stream, never rounded
//     layer    norm | qkv | rotary, keys and values into the cache | attention | output | norm | gate_up | down
//
// Rows with an adapter get what it adds to each product: projected down where the product's inputs are made, and up where
// its outputs are taken.
//
// The bars are phases' ends (team.h), where threads wait for each other's work. Of the last layer only rows whose logits are wanted go beyond attention.
#pragma once

#include <chrono>
#include <type_traits>
#include <vector>

#include "arena.h"
#include "attend.h"
#include "decoder.h"
#include "low_rank.h"
#include "matmul.h"
#include "rows.h"
#include "team.h"

namespace torchrelay {

struct AttentionPlan {
  int64_t sliding_window;
  Plan plan;
};

// What a piece of a product keeps in the second-level cache: panels, and a stretch of rows that meets each of them.
// Processors with AVX-512 have 1 MiB or more, others half of that.
#if defined(__AVX512F__)
constexpr int64_t kPanelBytes = 512 << 10, kStretchBytes = 512 << 10, kMostPanels = 4;
#else
constexpr int64_t kPanelBytes = 256 << 10, kStretchBytes = 128 << 10, kMostPanels = 8;
#endif

template <typename T>
class Step {
 public:
  Step(const Decoder& decoder, const DecoderStep& step, int num_threads)
      : d_(decoder), s_(step), team_(num_threads), rows_(step.num_tokens) {
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
        plans_.push_back({window, make_plan(attention_arguments(d_.layers[i]))});
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
      norm_rows(thread, x, num_rows, pending, layer.attention_norm, layer.qkv, inputs_, adapted(0));
      spent(thread, &DecoderTimes::norms);
      multiply(thread, layer.qkv, inputs_, num_rows, adapted(0), [&](int64_t row, int64_t first, int64_t count, const Floats* y) {
        store_columns<kVectors>(y, count, qkv_ + row * layer.qkv.outputs + first);
      });
      spent(thread, &DecoderTimes::linears);
      const Arguments a = attention_arguments(layer);
      each_row(thread, [&](int64_t row) { place_row(a, layer, row); });
      spent(thread, &DecoderTimes::rotary);
      if (is_last && s_.num_logit_rows == 0) return;
      attend(thread, a);
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
      multiply_add(thread, layer.output, words, num_rows, adapted(1), x, layer.attention_output_norm);
      spent(thread, &DecoderTimes::linears);
      norm_rows(thread, x, num_rows, layer.attention_output_norm, layer.mlp_norm, layer.gate_up, inputs_,
                adapted(2));
      spent(thread, &DecoderTimes::norms);
      const bool down_is_plain = is_plain(layer.down);
      const int64_t down_words = row_words(layer.down);
      multiply(thread, layer.gate_up, inputs_, num_rows, adapted(2), [&](int64_t row, int64_t first, int64_t, const Floats* y) {
        Floats active[kVectors / 2];
        for (int c = 0; c < kVectors / 2; c++) active[c] = gate(d_.activation, y[c], y[c + kVectors / 2]);
        const int64_t at = first / 2, count = std::min<int64_t>(kColumns, d_.mlp_size - at);
        uint32_t* const words = mlp_inputs_ + row * down_words;
        if (!down_is_plain)
          store_columns<kVectors / 2>(active, count, mlp_ + row * d_.mlp_size + at);
        else if (layer.down.format == kLinearFloat32)
          store_columns<kVectors / 2>(active, count, reinterpret_cast<float*>(words) + at);
        else
          store_columns<kVectors / 2>(active, count, reinterpret_cast<BFloat16Format::Input*>(words) + at);
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
      multiply_add(thread, layer.down, mlp_inputs_, num_rows, adapted(3), x, layer.mlp_output_norm);
      spent(thread, &DecoderTimes::linears);
    }
    norm_rows(thread, x, num_rows, d_.layers[d_.num_layers - 1].mlp_output_norm, d_.final_norm, d_.head, inputs_,
              Adapted{});
    multiply(thread, d_.head, inputs_, num_rows, Adapted{}, [&](int64_t row, int64_t first, int64_t count, const Floats* y) {
      Floats logits[kVectors];
      for (int c = 0; c < kVectors; c++) {
        logits[c] = y[c] * d_.logit_scale;
        if (d_.logit_softcap > 0.0f) logits[c] = hyperbolic_tangent(logits[c] / d_.logit_softcap) * d_.logit_softcap;
      }
      store_columns<kVectors>(logits, count, s_.logits + row * d_.vocab_size + first);
    });
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
        });
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
    const auto entry = std::find_if(plans_.begin(), plans_.end(),
                                    [&](const AttentionPlan& e) { return e.sliding_window == a.sliding_window; });
    const Plan& plan = entry->plan;
    const Scratch scratch(a, scratch_ + thread * scratch_size_);
    const int64_t num_items = plan.items.size(), num_splits = plan.splits.size();
    // Heads of a sequence lie side by side in its blocks: one thread takes them all where there is work enough.
    const int64_t together = num_items >= 4 * team_.size() * d_.num_kv_heads ? d_.num_kv_heads : 1;
    team_.each(
        thread, (num_items + together - 1) / together,
        [&](int64_t piece) { return std::min(together, num_items - piece * together); },
        [&](int64_t piece, int64_t unit, Team::Turn& turn) {
          const int64_t i = piece * together + unit;
          const int64_t next = unit + 1 < together ? i + 1 : turn.likely_next() * together;
          if (next < num_items) fetch_start<T>(a, plan.items[next]);
          run_item<T>(a, plan.items[i], scratch, partials_, [&] { return turn.take(); });
        });
    team_.each(
        thread, num_splits, [](int64_t) { return 1; },
        [&](int64_t piece, int64_t, Team::Turn& turn) {
          merge_split<T>(a, plan.splits[piece], scratch, partials_, [&] { return turn.take(); });
        });
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
  void multiply_add(int thread, const Linear& linear, const uint32_t* words, int64_t num_rows, const Adapted& adapted, float* x,
                    const float* norm) {
    multiply(thread, linear, words, num_rows, adapted,
             [&](int64_t row, int64_t first, int64_t count, const Floats* y) {
               const int64_t at = row * d_.hidden_size + first;
               if (norm)
                 store_columns<kVectors>(y, count, branch_ + at);
               else
                 add_columns<kVectors>(y, d_.residual_scale, count, x + at);
             });
  }

  // Calls take(row, first output, number of outputs, Floats outputs[kVectors]) for all of the product, with what adapters add.
  template <typename Take>
  void multiply(int thread, const Linear& linear, const uint32_t* rows, int64_t num_rows, const Adapted& adapted, Take take) {
    switch (linear.format) {
      case kLinearFloat32: return multiply<PlainProduct<Float32Format>>(thread, linear, rows, num_rows, adapted, take);
      case kLinearBFloat16: return multiply<PlainProduct<BFloat16Format>>(thread, linear, rows, num_rows, adapted, take);
      case kLinearInt8: return multiply<GroupedProduct<false>>(thread, linear, rows, num_rows, adapted, take);
      default: return multiply<GroupedProduct<true>>(thread, linear, rows, num_rows, adapted, take);
    }
  }

  // How many pieces of so many words go into `bytes`, within limits.
  static int64_t fitting(int64_t bytes, int64_t words, int64_t least, int64_t most) {
    return std::clamp<int64_t>(bytes / static_cast<int64_t>(words * sizeof(uint32_t)), least, most);
  }

  // How many panels to take at a time, `most` or fewer: so many that the thread with the most has the least.
  int64_t even_share(int64_t num_panels, int64_t most) const {
    const auto longest = [&](int64_t together) {
      const int64_t pieces = (num_panels + together - 1) / together;
      return (pieces + team_.size() - 1) / team_.size() * together;
    };
    int64_t best = most;
    for (int64_t together = most - 1; together > 0; together--)
      if (longest(together) < longest(best)) best = together;
    return best;
  }

  // A piece of work is a few panels, which then stay in the second-level cache, for a stretch of rows. The first tile
  // waits for memory to bring them; while the others compute, the panels of the piece after are fetched.
  template <typename Product, typename Take>
  void multiply(int thread, const Linear& linear, const uint32_t* rows, int64_t num_rows, const Adapted& adapted, Take take) {
    const int64_t panel_words = Product::panel_words(linear.inputs), row_words = Product::row_words(linear.inputs);
    const int64_t most_panels = fitting(kPanelBytes, panel_words, 1, kMostPanels);
    const int64_t tiles_together = fitting(kStretchBytes, Product::kMostRows * row_words, 2, 8);
    const int64_t num_panels = (linear.outputs + kPanel - 1) / kPanel;
    const int64_t num_tiles = (num_rows + Product::kMostRows - 1) / Product::kMostRows;
    const int64_t num_stretches = (num_tiles + tiles_together - 1) / tiles_together;
    const int64_t share = num_panels / (team_.size() * 3);
    const int64_t wanted = num_tiles == 1 ? share / 2 : share;
    const int64_t together = even_share(num_panels, std::clamp<int64_t>(wanted, 1, most_panels));
    const int64_t num_groups = (num_panels + together - 1) / together;
    // The piece whose units were asked for last: that of the unit in hand. Its tiles are as equal as can be.
    struct {
      int64_t piece = -1, first_panel, num_panels, first_tile, num_tiles;
    } now;
    const auto look_at = [&](int64_t piece) {
      if (now.piece == piece) return;
      const int64_t group = piece / num_stretches, stretch = piece % num_stretches;
      now.piece = piece;
      now.first_panel = group * together;
      now.num_panels = std::min(together, num_panels - now.first_panel);
      now.first_tile = stretch * num_tiles / num_stretches;
      now.num_tiles = (stretch + 1) * num_tiles / num_stretches - now.first_tile;
    };
    team_.each(
        thread, num_groups * num_stretches,
        [&](int64_t piece) {
          look_at(piece);
          return now.num_tiles;
        },
        [&](int64_t, int64_t unit, Team::Turn& turn) {
          const int64_t to_next = turn.likely_next() / num_stretches * together - now.first_panel;
          const int64_t tile = now.first_tile + unit;
          const int64_t row = tile * num_rows / num_tiles, end = (tile + 1) * num_rows / num_tiles;
          Floats sums[kMostPanels * Product::kMostRows * kVectors];
          for (int64_t i = 0; i < now.num_panels; i++) {
            const int64_t panel = now.first_panel + i;
            const uint32_t* const weights = linear.panels + panel * panel_words;
            const uint32_t* next = weights;
            if (unit > 0 && unit < 3 && panel + to_next < num_panels)
              next += to_next * panel_words + (unit - 1) * kLine;
            run_tile<Product>(static_cast<int>(end - row), rows + row * row_words, linear.inputs, weights, next,
                              sums + i * Product::kMostRows * kVectors);
          }
          if (!turn.take()) return;
          for (int64_t i = 0; i < now.num_panels; i++) {
            const int64_t first = (now.first_panel + i) * kPanel;
            const int64_t count = std::min<int64_t>(kPanel, linear.outputs - first);
            for (int64_t r = row; r < end; r++) {
              Floats* const y = sums + (i * Product::kMostRows + r - row) * kVectors;
              if (linear.bias)
                for (int c = 0; c < kVectors; c++) y[c] += load(linear.bias + first + c * kLanes);
              if (const LowRank* const found = low_rank(adapted, r))
                add_up(*found, projected_ + r * most_rank_, first, linear.outputs, y);
              take(r, first, count, y);
            }
          }
        });
  }

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
  int64_t most_rank_ = 0;
  std::chrono::steady_clock::time_point clock_;
};

}  // namespace torchrelay
