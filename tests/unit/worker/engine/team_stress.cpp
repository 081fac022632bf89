// More threads than cores go through phases whose units add to what earlier phases left: one that is written twice, not
// at all, or before the phase in front of it has ended changes the sums. Prints how many units are wrong at the end.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <thread>

using torchrelay::Team;
using Numbers = std::vector<std::atomic<uint64_t>>;  // atomic, since a late thread reads what others overwrite

constexpr int64_t kPieces = 12, kMostUnits = 5, kPhases = 2500;

int64_t num_units(int64_t piece) { return 1 + piece % kMostUnits; }

uint64_t made_of(const Numbers& from, int64_t at, uint64_t salt) {
  uint64_t made = salt + from[at].load(std::memory_order_relaxed);
  for (int i = 0; i < 600; i++)
    made = made * 6364136223846793005u + from[(at + i) % from.size()].load(std::memory_order_relaxed);
  return made;
}

void go_through(Team& team, int thread, int num_threads, Numbers& even, Numbers& odd) {
  team.set_size(num_threads);
  for (int64_t phase = 0; phase < kPhases; phase++) {
    const Numbers& from = phase % 2 ? odd : even;
    Numbers& to = phase % 2 ? even : odd;
    const int64_t num_pieces = phase % 7 ? kPieces - phase % 4 : 0;
    const auto work = [&](int64_t piece, int64_t unit, Team::Turn& turn) {
      const int64_t at = piece * kMostUnits + unit;
      if (phase % 5 == 0 && !turn.take()) return;  // some phases know from the start that they will write
      const uint64_t made = made_of(from, at, phase);
      if (phase % 5 != 0 && !turn.take()) return;
      if (phase % 3 == 0) sched_yield();  // whoever writes is held up too
      to[at].store(to[at].load(std::memory_order_relaxed) + made, std::memory_order_relaxed);
    };
    if (phase % 3 == 1)
      team.each<Team::Shares::kAlternate>(thread, num_pieces, num_units, work, [] {});
    else
      team.each(thread, num_pieces, num_units, work, [] {});
  }
}

std::vector<uint64_t> sums(int num_threads) {
  Team team(num_threads);
  Numbers even(kPieces * kMostUnits), odd(kPieces * kMostUnits);
  std::vector<std::thread> others;
  for (int thread = 1; thread < num_threads; thread++)
    others.emplace_back([&, thread] { go_through(team, thread, num_threads, even, odd); });
  go_through(team, 0, num_threads, even, odd);
  for (std::thread& other : others) other.join();
  std::vector<uint64_t> found;
  for (const Numbers* numbers : {&even, &odd})
    for (const auto& number : *numbers) found.push_back(number.load());
  return found;
}

int main(int, char** arguments) {
  const std::vector<uint64_t> alone = sums(1), together = sums(std::atoi(arguments[1]));
  int num_wrong = 0;
  for (size_t i = 0; i < alone.size(); i++) num_wrong += alone[i] != together[i];
  std::printf("%d\n", num_wrong);
}
