// A product of a step's rows with a linear layer's weights, shared out among a team.
//
// A piece of work is a few panels, which then stay in the second-level cache, for a stretch of rows; its units are tiles,
// as equal as can be. What the thread will need next is fetched meanwhile, see fetch.h.
#pragma once

#include <algorithm>

#include "decoder.h"
#include "fetch.h"
#include "grouped.h"
#include "team.h"

namespace torchrelay {

// What a piece of a product keeps in the second-level cache: panels, and a stretch of rows that meets each of them.
// Processors with AVX-512 have 1 MiB or more, others half of that.
#if defined(__AVX512F__)
constexpr int64_t kPanelBytes = 512 << 10, kStretchBytes = 512 << 10, kMostPanels = 4;
#else
constexpr int64_t kPanelBytes = 256 << 10, kStretchBytes = 128 << 10, kMostPanels = 8;
#endif

// Calls work(Product) with the product of a linear layer's format.
template <typename Work>
auto with_product(const Linear& linear, Work work) {
  switch (linear.format) {
    case kLinearFloat32: return work(PlainProduct<Float32Format>());
    case kLinearBFloat16: return work(PlainProduct<BFloat16Format>());
    case kLinearInt8: return work(GroupedProduct<false>());
    default: return work(GroupedProduct<true>());
  }
}

// How a product is cut into pieces.
struct Cut {
  int64_t panel_words, row_words;
  int64_t num_panels, panels_together, num_groups;
  int64_t num_rows, num_tiles, num_stretches;

  int64_t num_pieces() const { return num_groups * num_stretches; }
  int64_t first_panel(int64_t piece) const { return piece / num_stretches * panels_together; }
  int64_t panels_of(int64_t piece) const { return std::min(panels_together, num_panels - first_panel(piece)); }
  int64_t first_tile(int64_t piece) const { return piece % num_stretches * num_tiles / num_stretches; }
  int64_t tiles_of(int64_t piece) const {
    return (piece % num_stretches + 1) * num_tiles / num_stretches - first_tile(piece);
  }
  int64_t first_row(int64_t tile) const { return tile * num_rows / num_tiles; }
};

// How many panels to take at a time, `most` or fewer: so many that the thread with the most has the least.
inline int64_t even_share(int64_t num_panels, int64_t most, int num_threads) {
  const auto longest = [&](int64_t together) {
    const int64_t pieces = (num_panels + together - 1) / together;
    return (pieces + num_threads - 1) / num_threads * together;
  };
  int64_t best = most;
  for (int64_t together = most - 1; together > 0; together--)
    if (longest(together) < longest(best)) best = together;
  return best;
}

inline Cut cut_product(const Linear& linear, int64_t num_rows, int num_threads) {
  return with_product(linear, [&](auto product) {
    typedef decltype(product) Product;
    // How many pieces of so many words go into `bytes`, within limits.
    const auto fitting = [](int64_t bytes, int64_t words, int64_t least, int64_t most) {
      return std::clamp<int64_t>(bytes / static_cast<int64_t>(words * sizeof(uint32_t)), least, most);
    };
    Cut cut;
    cut.panel_words = Product::panel_words(linear.inputs), cut.row_words = Product::row_words(linear.inputs);
    const int64_t most_panels = fitting(kPanelBytes, cut.panel_words, 1, kMostPanels);
    const int64_t tiles_together = fitting(kStretchBytes, Product::kMostRows * cut.row_words, 2, 8);
    cut.num_panels = (linear.outputs + kPanel - 1) / kPanel;
    cut.num_rows = num_rows;
    cut.num_tiles = (num_rows + Product::kMostRows - 1) / Product::kMostRows;
    cut.num_stretches = (cut.num_tiles + tiles_together - 1) / tiles_together;
    const int64_t share = cut.num_panels / (num_threads * 3);
    const int64_t wanted = cut.num_tiles == 1 ? share / 2 : share;
    cut.panels_together = even_share(cut.num_panels, std::clamp<int64_t>(wanted, 1, most_panels), num_threads);
    cut.num_groups = (cut.num_panels + cut.panels_together - 1) / cut.panels_together;
    return cut;
  });
}

// What a thread will read first of the product.
inline void expect(Fetch& fetch, const Team& team, int thread, const Linear* linear, int64_t num_rows) {
  fetch.set_following(nullptr, 0);
  if (!linear || num_rows == 0) return;
  const Cut cut = cut_product(*linear, num_rows, team.size());
  const int64_t piece = team.piece_of_share(cut.num_pieces(), thread, 0);
  if (piece < 0) return;
  fetch.set_following(linear->panels + cut.first_panel(piece) * cut.panel_words,
                      cut.panels_of(piece) * cut.panel_words * static_cast<int64_t>(sizeof(uint32_t)));
}

// Calls take(row, first output, number of outputs, Floats outputs[kVectors]) for all of the product, bias included, and
// before it touch(row, first output), to fetch what will be written. `next` is the product that follows, or null, and
// `num_next_rows` its rows; `words_of_layer` how many words of weights stand between two attentions, or 0.
template <typename Product, typename Take, typename Touch>
void multiply(Team& team, int thread, Fetch& fetch, const Linear& linear, const uint32_t* rows, int64_t num_rows,
              const Linear* next, int64_t num_next_rows, int64_t words_of_layer, Take take, Touch touch) {
  constexpr int64_t kWordBytes = sizeof(uint32_t);
  const Cut cut = cut_product(linear, num_rows, team.size());
  const int64_t num_looks = Product::num_looks(linear.inputs);
  const double panel_share =
      words_of_layer == 0 ? 0.0
                          : static_cast<double>(cut.panel_words * team.size()) / static_cast<double>(words_of_layer);
  const auto fetch_rows = [&](int64_t tile, auto fetch_them) {
    const int64_t row = cut.first_row(tile), end = cut.first_row(tile + 1);
    fetch_them(rows + row * cut.row_words, (end - row) * cut.row_words * kWordBytes);
  };
  expect(fetch, team, thread, next, num_next_rows);
  const int64_t first = team.piece_of_share(cut.num_pieces(), thread, 0);
  if (cut.num_tiles > 1 && first >= 0) fetch_rows(cut.first_tile(first), fetch_now);
  team.each(
      thread, cut.num_pieces(), [&](int64_t piece) { return cut.tiles_of(piece); },
      [&](int64_t piece, int64_t unit, Team::Turn& turn) {
        const int64_t first_panel = cut.first_panel(piece), num_panels = cut.panels_of(piece);
        const int64_t num_units = cut.tiles_of(piece), tile = cut.first_tile(piece) + unit;
        const int64_t row = cut.first_row(tile), end = cut.first_row(tile + 1);
        fetch.begin(rows + row * cut.row_words);
        if (cut.num_tiles > 1) {
          const auto fetch_later = [&](const void* start, int64_t bytes) { fetch.add(start, bytes); };
          const int64_t next_piece = turn.likely_next();
          if (unit + 1 < num_units)
            fetch_rows(tile + 1, fetch_later);
          else if (next_piece >= 0)
            fetch_rows(cut.first_tile(next_piece), fetch_later);
          if (next_piece < 0) {
            fetch.add_following(num_units - unit);
          } else if (cut.first_panel(next_piece) != first_panel) {
            const int64_t size = cut.panels_of(next_piece) * cut.panel_words;
            const int64_t from = unit * size / num_units, to = (unit + 1) * size / num_units;
            fetch.add(linear.panels + cut.first_panel(next_piece) * cut.panel_words + from, (to - from) * kWordBytes);
          }
          fetch.add_context(panel_share * static_cast<double>(num_panels) * static_cast<double>(end - row) /
                            static_cast<double>(num_rows));
        }
        fetch.spread_over(num_panels * num_looks);
        Floats sums[kMostPanels * Product::kMostRows * kVectors];
        for (int64_t i = 0; i < num_panels; i++) {
          for (int64_t r = row; r < end; r++) touch(r, (first_panel + i) * kPanel);
          run_tile<Product>(static_cast<int>(end - row), rows + row * cut.row_words, linear.inputs,
                            linear.panels + (first_panel + i) * cut.panel_words, fetch,
                            sums + i * Product::kMostRows * kVectors);
        }
        if (!turn.take()) return;
        for (int64_t i = 0; i < num_panels; i++) {
          const int64_t first = (first_panel + i) * kPanel;
          const int64_t count = std::min<int64_t>(kPanel, linear.outputs - first);
          for (int64_t r = row; r < end; r++) {
            Floats* const y = sums + (i * Product::kMostRows + r - row) * kVectors;
            if (linear.bias)
              for (int c = 0; c < kVectors; c++) y[c] += load(linear.bias + first + c * kLanes);
            take(r, first, count, y);
          }
        }
      },
      [&] { fetch.idle(); });
}

}  // namespace torchrelay
