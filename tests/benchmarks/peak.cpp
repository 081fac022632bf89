// What the arithmetic units do when nothing else holds them up: multiply-adds from registers to registers.
// Arguments: threads, seconds. Prints operations per second of fp32, bf16 and int8; 0 without an instruction for it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "simd.h"

using namespace torchrelay;

namespace {

constexpr int kSums = kAccumulators;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of one thread: sums that start apart, so that none can stand for another.
template <typename Operand, typename Sum, typename MultiplyAdd>
double rate(double seconds, Operand operand, Sum first, int operations, MultiplyAdd multiply_add) {
  constexpr int kLoops = 20'000;
  Sum sums[kSums];
  for (int i = 0; i < kSums; i++) sums[i] = first + static_cast<decltype(first[0] + 0)>(i);
  long num_rounds = 0;
  const double start = now();
  double spent = 0.0;
  for (; spent < seconds; spent = now() - start, num_rounds++)
    for (int loop = 0; loop < kLoops; loop++)
      for (int i = 0; i < kSums; i++) sums[i] = multiply_add(operand, sums[i]);
  for (int i = 1; i < kSums; i++) sums[0] += sums[i];
  volatile auto kept = sums[0][0];
  (void)kept;
  return static_cast<double>(num_rounds) * kLoops * kSums * operations / spent;
}

template <typename Rate>
double of_all(int num_threads, Rate rate) {
  std::vector<double> rates(num_threads);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; i++) threads.emplace_back([&, i] { rates[i] = rate(); });
  for (std::thread& thread : threads) thread.join();
  double sum = 0.0;
  for (double one : rates) sum += one;
  return sum;
}

}  // namespace

int main(int, char** arguments) {
  const int num_threads = std::atoi(arguments[1]);
  const double seconds = std::atof(arguments[2]);
  const double fp32 = of_all(num_threads, [&] {
    return rate(seconds, broadcast(0.999f), Floats{}, 2 * kLanes, [](Floats x, Floats sum) { return x * sum + x; });
  });
  double bf16 = 0.0, int8 = 0.0;
#if defined(__AVX512BF16__)
  bf16 = of_all(num_threads, [&] {
    const Pairs ones = (Pairs)_mm512_set1_epi32(0x3f803f80);
    return rate(seconds, ones, Floats{}, 4 * kLanes, [](Pairs x, Floats sum) { return multiply_add(x, x, sum); });
  });
#endif
#if defined(__AVX512VNNI__)
  int8 = of_all(num_threads, [&] {
    const Ints ones = Ints{} + 0x01010101;
    return rate(seconds, ones, Ints{}, 8 * kLanes,
                [](Ints x, Ints sum) { return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)x); });
  });
#endif
  std::printf("%.6g %.6g %.6g\n", fp32, bf16, int8);
}
