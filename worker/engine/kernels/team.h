// Threads that go through the phases of a step together.
//
// A step has hundreds of phases of some microseconds, so threads wait for one another by looking, not by sleeping;
// after a while they yield the core, for other processes may share it. Each thread has a share of a phase's pieces, the
// same in every phase of as many, so that what it wrote is still in its core's caches and what it will read can be fetched
// ahead; whoever is through with his own takes from the others'. What ends a phase is that its pieces are done, not that
// every thread is there.
//
// A thread that loses its core in the middle of a piece would hold up all others for milliseconds, hundreds of times a
// second where other processes share the cores. So they finish its piece (helping, as in lock-free algorithms:
// M. Herlihy, Wait-free synchronization, 1991). A piece is a row of units; each is computed from what earlier phases
// wrote, by one thread or several at once, and written by the one that takes the turn to. A thread that comes back too
// late is refused its turn, and finds the phases over that the others have ended meanwhile.
//
// What it read for that unit may have been overwritten while it computed: nothing that a step writes may be followed as
// an address, and what was made of it goes nowhere.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchrelay {

class Team {
 public:
  explicit Team(int size) : size_(size), seats_(size) {}

  int size() const { return size_.load(std::memory_order_relaxed); }

  // By every thread before its first phase, all with the same number, at most the one that the team was made with.
  void set_size(int size) { size_.store(size, std::memory_order_relaxed); }

  // A thread's way to write what it made of a unit.
  class Turn {
   public:
    // Whether the caller may, and then must, write: true once for each unit, whoever computes it. From then on all wait
    // for the caller, so everything that takes time comes before.
    bool take() {
      taken_ = seat_.compare_exchange_strong(state_, state_ | kWriting, std::memory_order_acq_rel);
      return taken_;
    }

    // What the thread's next piece will probably be, the same for all units of a piece; -1 if it is the last of a share.
    int64_t likely_next() const { return likely_next_; }

   private:
    friend class Team;
    Turn(std::atomic<uint64_t>& seat, uint64_t state, int64_t likely_next)
        : seat_(seat), state_(state), likely_next_(likely_next) {}

    std::atomic<uint64_t>& seat_;
    uint64_t state_;
    const int64_t likely_next_;
    bool taken_ = false;
  };

  // Pieces of a thread's share: neighbours, or, where the first cost the most, every so manyeth.
  enum class Shares { kAdjacent, kAlternate };

  // The share's pieces in order, from number 0 on; -1 behind its end.
  template <Shares kShares = Shares::kAdjacent>
  int64_t piece_of_share(int64_t num_pieces, int thread, int64_t number) const {
    if constexpr (kShares == Shares::kAlternate) {
      const int64_t piece = thread + number * size();
      return piece < num_pieces ? piece : -1;
    } else {
      const int64_t piece = thread * num_pieces / size() + number;
      return piece < (thread + 1) * num_pieces / size() ? piece : -1;
    }
  }

  // A phase: calls work(piece, unit, turn) for each unit [0, num_units(piece)) of each piece [0, num_pieces), a piece's
  // units in their order, each directly after num_units. Returns when all are written; what was written is then
  // visible. To be called by all threads, with the same numbers. While it waits for others, a thread calls idle().
  template <Shares kShares = Shares::kAdjacent, typename NumUnits, typename Work, typename Idle>
  void each(int thread, int64_t num_pieces, NumUnits num_units, Work work, Idle idle) {
    if (num_pieces <= 0) return;
    Seat& own = seats_[thread];
    const Phase<kShares, NumUnits, Work> phase{own.num_phases++, num_pieces, num_units, work};
    for (int64_t piece = claim(phase, thread); piece >= 0; piece = claim(phase, thread)) {
      own.state.store(state_of(phase.number, piece), std::memory_order_release);
      work_on(phase, own.state);
    }
    // From here on nothing is claimed, so no seat is taken anew before its piece is done.
    for (int looks = 0; is_on(phase); looks++) {
      idle();
      if (looks < kLooks || !help(phase)) pause(looks);
    }
  }

 private:
  // A state: what a thread has claimed and how far that is: phase, piece, unit, and whether it is being written.
  static constexpr int kUnitBits = 19, kPieceBits = 24;
  static constexpr uint64_t kWriting = 1, kUnit = 2;
  static constexpr uint64_t kPieces = (uint64_t{1} << kPieceBits) - 1, kUnits = (uint64_t{1} << kUnitBits) - 1;
  static constexpr int kLooks = 1000;  // some tens of microseconds

  struct alignas(64) Seat {
    std::atomic<uint64_t> state{~uint64_t{0}};
    std::atomic<uint64_t> claims{0};      // the phase, and how many pieces of the thread's share are claimed
    alignas(64) uint64_t num_phases = 0;  // of its own thread's
  };

  template <Shares kShares, typename NumUnits, typename Work>
  struct Phase {
    static constexpr Shares shares = kShares;
    uint64_t number;
    int64_t num_pieces;
    NumUnits num_units;
    Work work;
  };

  static uint64_t state_of(uint64_t phase, int64_t piece) {
    return ((phase << kPieceBits) + static_cast<uint64_t>(piece)) << (kUnitBits + 1);
  }
  static uint64_t phase_of(uint64_t state) { return state >> (kPieceBits + kUnitBits + 1); }
  static int64_t piece_of(uint64_t state) { return static_cast<int64_t>(state >> (kUnitBits + 1) & kPieces); }
  static int64_t unit_of(uint64_t state) { return static_cast<int64_t>(state / kUnit & kUnits); }

  template <typename P>
  bool is_on(const P& phase) const {
    return phase_.load(std::memory_order_acquire) == phase.number;
  }

  // The next piece of the phase, of the thread's own share first, each given once; -1 when there is none.
  template <typename P>
  int64_t claim(const P& phase, int thread) {
    for (int i = 0, owner = thread; i < size(); i++, owner = owner + 1 < size() ? owner + 1 : 0) {
      std::atomic<uint64_t>& claims = seats_[owner].claims;
      uint64_t claimed = claims.load(std::memory_order_acquire);
      while (claimed >> kPieceBits == phase.number) {
        const int64_t piece = piece_of_share<P::shares>(phase.num_pieces, owner, claimed & kPieces);
        if (piece < 0) break;
        if (claims.compare_exchange_weak(claimed, claimed + 1, std::memory_order_acq_rel)) return piece;
      }
    }
    return -1;
  }

  // The piece behind one in the same share, or -1.
  template <typename P>
  int64_t next_in_share(const P& phase, int64_t piece) const {
    if constexpr (P::shares == Shares::kAlternate) return piece + size() < phase.num_pieces ? piece + size() : -1;
    const int64_t owner = ((piece + 1) * size() - 1) / phase.num_pieces;
    return piece + 1 < (owner + 1) * phase.num_pieces / size() ? piece + 1 : -1;
  }

  // Computes units of the piece in a seat until none is left or somebody writes one. Whether there was any to compute.
  template <typename P>
  bool work_on(const P& phase, std::atomic<uint64_t>& seat) {
    for (bool worked = false;; worked = true) {
      const uint64_t state = seat.load(std::memory_order_acquire);
      if (phase_of(state) != phase.number || state & kWriting) return worked;
      const int64_t piece = piece_of(state), unit = unit_of(state), num_units = phase.num_units(piece);
      if (unit >= num_units) return worked;
      Turn turn(seat, state, next_in_share(phase, piece));
      phase.work(piece, unit, turn);
      if (!turn.taken_) continue;
      seat.store(state + kUnit, std::memory_order_release);
      if (unit + 1 == num_units) end_piece(phase);
    }
  }

  template <typename P>
  void end_piece(const P& phase) {
    if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 < phase.num_pieces) return;
    num_done_.store(0, std::memory_order_relaxed);
    for (Seat& seat : seats_) seat.claims.store((phase.number + 1) << kPieceBits, std::memory_order_relaxed);
    phase_.store(phase.number + 1, std::memory_order_release);
  }

  // Works on what is in anybody's hands. Whether there was anything to do.
  template <typename P>
  bool help(const P& phase) {
    bool helped = false;
    for (Seat& seat : seats_) helped |= work_on(phase, seat.state);
    return helped;
  }

  static void pause(int looks) {
    if (looks >= 2 * kLooks) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
  }

  std::atomic<int> size_;
  alignas(64) std::atomic<uint64_t> phase_{0};
  alignas(64) std::atomic<int64_t> num_done_{0};
  std::vector<Seat> seats_;
};

}  // namespace torchrelay
