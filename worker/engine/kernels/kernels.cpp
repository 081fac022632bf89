// What the library does when it is called: checks its arguments, finds memory, and starts the threads.
#include <new>

#include "attend.h"
#include "decoder.h"
#include "decoder_step.h"
#include "paged_attention.h"

#if defined(_OPENMP)
extern "C" int omp_get_thread_num(void);  // instead of <omp.h>, which not every compiler's package brings
extern "C" int omp_get_num_threads(void);
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace torchrelay {
namespace {

// Up to so many keys and values are written by the calling thread: some microseconds.
constexpr int64_t kNumbersWrittenAlone = 16'384;

template <typename T>
void attend(const Arguments& a) {
  const Plan plan = make_plan(a);
  // Kept between calls: a step makes one call per layer, and fresh memory would be faulted in each time.
  static thread_local std::vector<float> memory;
  const int64_t scratch_size = Scratch::size(a);
  const size_t needed = plan.num_threads * scratch_size + plan.num_partials * Scratch::partial_size(a);
  if (memory.size() < needed) memory.resize(needed);
  float* const scratches = memory.data();
  float* const partials = scratches + plan.num_threads * scratch_size;
  const int64_t num_items = plan.items.size(), num_splits = plan.splits.size();
  const auto always = [] { return true; };

  // Each barrier may cost a sleep and a wake-up, so a decode step meets only the one at the region's end.
  const bool writes_alone = a.num_tokens * a.num_kv_heads * (a.key_dim + a.value_dim) <= kNumbersWrittenAlone;
  if (writes_alone)
    for (int64_t token = 0; token < a.num_tokens; token++) write_token<T>(a, token);

#pragma omp parallel num_threads(plan.num_threads) if (plan.num_threads > 1)
  {
    const Scratch scratch(a, scratches + omp_get_thread_num() * scratch_size);
    if (!writes_alone) {
#pragma omp for schedule(static)
      for (int64_t token = 0; token < a.num_tokens; token++) write_token<T>(a, token);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < num_items; i++) run_item<T>(a, plan.items[i], scratch, partials, always);
    if (num_splits > 0) {
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < num_splits; i++) merge_split<T>(a, plan.splits[i], scratch, partials, always);
    }
  }
}

template <typename T>
int decode(const Decoder& decoder, const DecoderStep& step) {
  Step<T> work(decoder, step, static_cast<int>(std::max<int64_t>(1, step.num_threads)));
  if (!is_consistent(work.attention_arguments(decoder.layers[0]))) return kBadShape;
  if (!blocks_exist(work.attention_arguments(decoder.layers[0]))) return kBadBlock;
  work.make_plans();
  // Kept between calls: fresh memory would be faulted in each time.
  static thread_local std::vector<char> memory;
  const size_t needed = work.lay_out(nullptr) + 64;
  if (memory.size() < needed) {
    memory = {};  // first, or old and new memory would be held at once
    memory.resize(needed);
  }
  const uintptr_t start = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
  work.lay_out(reinterpret_cast<char*>(start));
#pragma omp parallel num_threads(work.num_threads())
  work.run(omp_get_thread_num(), omp_get_num_threads());
  return kOk;
}

bool tokens_exist(const Decoder& d, const DecoderStep& s) {
  for (int64_t i = 0; i < s.num_tokens; i++) {
    if (s.token_ids[i] < 0 || s.token_ids[i] >= d.vocab_size) return false;
    if (s.positions[i] < 0 || s.positions[i] >= d.num_positions) return false;
  }
  for (int64_t i = 0; s.row_adapters && i < s.num_tokens; i++)
    if (s.row_adapters[i] < -1 || s.row_adapters[i] >= s.num_adapters) return false;
  for (int64_t i = 0; i < s.num_logit_rows; i++)
    if (s.logit_rows[i] < (i > 0 ? s.logit_rows[i - 1] + 1 : 0) || s.logit_rows[i] >= s.num_tokens) return false;
  return true;
}

}  // namespace
}  // namespace torchrelay

int torchrelay_abi_version(void) { return torchrelay::kAbiVersion; }

int torchrelay_paged_attention(const torchrelay::PagedAttentionArguments* arguments) {
  using namespace torchrelay;
  if (!is_consistent(*arguments)) return kBadShape;
  if (!blocks_exist(*arguments)) return kBadBlock;
  try {
    if (arguments->element_type == kBFloat16)
      attend<BFloat16>(*arguments);
    else
      attend<float>(*arguments);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  return kOk;
}

int torchrelay_decoder_step(const torchrelay::Decoder* decoder, const torchrelay::DecoderStep* step) {
  using namespace torchrelay;
  if (!tokens_exist(*decoder, *step)) return kBadToken;
  try {
    return decoder->element_type == kBFloat16 ? decode<BFloat16>(*decoder, *step) : decode<float>(*decoder, *step);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
}

int torchrelay_argmax(const float* rows, int64_t num_rows, int64_t width, int64_t* result, int64_t num_threads) {
  constexpr int64_t kNumbersPerThread = 200'000;  // some tens of microseconds: below, a thread costs more than it saves
  const int64_t useful = std::clamp<int64_t>(num_rows * width / kNumbersPerThread, 1, std::max<int64_t>(1, num_threads));
#pragma omp parallel for num_threads(static_cast<int>(useful)) if (useful > 1)
  for (int64_t row = 0; row < num_rows; row++) {
    const int64_t at = torchrelay::argmax(rows + row * width, width);
    result[row] = std::isfinite(rows[row * width + at]) ? at : ~at;
  }
  return torchrelay::kOk;
}
