// Vectors of floats for one instruction set, chosen by the flags that this translation unit is compiled with.
//
// Only the compilers' generic vectors are used (GCC and Clang: the operators, __builtin_convertvector), so one source
// serves AVX-512, AVX2, SSE2 and NEON. Multiply-adds contract to FMA through -ffp-contract=fast; nothing here needs or
// tolerates -ffast-math: NaN and infinity keep their meaning.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace torchrelay {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kAccumulators = 24;  // of 32 registers, the rest hold operands
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kAccumulators = 12;  // of 16
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kAccumulators = 24;  // of 32
#else
constexpr int kLanes = 4;
constexpr int kAccumulators = 12;  // of 16
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats broadcast(float x) { return x - Floats{}; }

inline Floats load(const float* source) {
  Floats x;
  std::memcpy(&x, source, sizeof x);
  return x;
}

// A bfloat16 as a float.
struct Widened {
  float number;
};

// A bfloat16 is the upper half of a float.
inline Floats load(const BFloat16* source) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Converting generic vectors takes GCC twice as many instructions.
  return (Floats)((Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))) << 16);
#else
  Halves halves;
  std::memcpy(&halves, source, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

inline Floats load(const Widened* source) { return load(&source->number); }

inline void store(float* target, Floats x) { std::memcpy(target, &x, sizeof x); }
inline void store(Widened* target, Floats x) { store(&target->number, x); }

inline Floats load_keys(const float* source) { return load(source); }
inline Floats load_keys(const Widened* source) { return load(source); }
inline float broadcast_for(Floats, const float* source) { return *source; }
inline Floats multiply_add(Floats a, float b, Floats sum) { return a * b + sum; }

#if defined(__AVX512BF16__)
// Two bfloat16 numbers in each lane, multiplied with another two and added to a float at once.
typedef __m512bh Pairs;

inline Pairs load_pairs(const void* source) { return (Pairs)_mm512_loadu_si512(source); }

inline Pairs broadcast_pair(const void* source) {
  int32_t pair;
  std::memcpy(&pair, source, sizeof pair);
  return (Pairs)_mm512_set1_epi32(pair);
}

inline Pairs keep_half(Pairs x, uint32_t mask) { return (Pairs)((Bits)x & mask); }

inline Pairs load_keys(const BFloat16* source) { return load_pairs(source); }
inline Pairs broadcast_for(Pairs, const float* source) { return broadcast_pair(source); }

// Rounds each sum of two products to nearest even; denormals count as zero.
inline Floats multiply_add(Pairs a, Pairs b, Floats sum) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }

// Rows and lanes that differ by kHalf change places in each square of twice that.
template <int kHalf>
inline void exchange(Bits (&rows)[16]) {
  Bits low, high;
  for (unsigned i = 0; i < 16; i++) {
    low[i] = i & kHalf ? i - kHalf + 16 : i;
    high[i] = i & kHalf ? i + 16 : i + kHalf;
  }
  for (int r = 0; r < 16; r++) {
    if (r & kHalf) continue;
    const __m512i a = (__m512i)rows[r], b = (__m512i)rows[r + kHalf];
    rows[r] = (Bits)_mm512_permutex2var_epi32(a, (__m512i)low, b);
    rows[r + kHalf] = (Bits)_mm512_permutex2var_epi32(a, (__m512i)high, b);
  }
}

// 16 words each of up to 16 rows, to target[word][num_rows] (J. O. Eklundh, A fast computer method for matrix
// transposing, 1972).
inline void transpose_words(const void* const* rows, int num_rows, float* target) {
  Bits words[16];
  for (int r = 0; r < 16; r++) words[r] = r < num_rows ? (Bits)_mm512_loadu_si512(rows[r]) : Bits{};
  exchange<8>(words);
  exchange<4>(words);
  exchange<2>(words);
  exchange<1>(words);
  for (int i = 0; i < 16; i++)
    _mm512_mask_storeu_epi32(target + i * num_rows, static_cast<__mmask16>((1u << num_rows) - 1), (__m512i)words[i]);
}

// 2^x for x < 128 within 1e-4, for numbers that are rounded to bfloat16 next, which is to 4e-3; exactly 0 below -150, of
// -infinity too, which leaves no fraction. A NaN stays a NaN. 2^n times a minimax polynomial of 2^f on [0, 1).
inline Floats rough_power_of_two(Floats x) {
  const Floats f = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p = broadcast(7.80245226e-2f);
  p = p * f + 2.26067155e-1f;
  p = p * f + 6.9583354e-1f;
  p = p * f + 9.99925219e-1f;
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// Rounds to nearest even; a NaN stays a NaN.
inline void store(BFloat16* target, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#else
inline Floats load_keys(const BFloat16* source) { return load(source); }

// As above, but exactly 0 below -126, and of 2^f on [-1/2, 1/2].
inline Floats rough_power_of_two(Floats x) {
  const Floats shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats clamped = x < -126.0f ? broadcast(-126.0f) : x;
  const Floats shifted = clamped + shift;
  const Floats f = clamped - (shifted - shift);
  Floats p = broadcast(5.517167e-2f);
  p = p * f + 2.4261113e-1f;
  p = p * f + 6.9326099e-1f;
  p = p * f + 9.9992807e-1f;
  const Floats power = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x < -126.0f ? Floats{} : (x == x ? power : x);
}

inline void store(BFloat16* target, Floats x) {
  const Bits bits = (Bits)x;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits kept = x == x ? rounded : (bits >> 16) | 0x40u;
  const Halves halves = __builtin_convertvector(kept, Halves);
  std::memcpy(target, &halves, sizeof halves);
}
#endif

// 1 / x for 1 <= x, within an ulp or two; of numbers beyond 1e38 possibly 0. A NaN stays a NaN.
inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
  const Floats estimate = (Floats)_mm512_rcp14_ps((__m512)x);  // a division takes the time of ten multiplications
  return estimate * (2.0f - x * estimate);
#else
  return 1.0f / x;
#endif
}

inline float to_float(float x) { return x; }
inline float to_float(Widened x) { return x.number; }

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void from_float(float x, float* target) { *target = x; }
inline void from_float(float x, Widened* target) { target->number = x; }

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
inline void from_float(float x, BFloat16* target) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool is_nan = x != x;
  target->bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

inline float maximum(float a, float b) { return a > b ? a : b; }

inline float horizontal_maximum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < kLanes; i++) m = maximum(x[i], m);
  return m;
#endif
}

// Halves are added up, and halves of these.
inline float horizontal_sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// e^x within 2 ulp for x <= 88; exactly 0 below -87, so that masked scores weigh nothing. A NaN stays a NaN.
// Cephes' expf: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r, the exponent n set bit by bit.
inline Floats exponential(Floats x) {
  const Floats shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Floats clamped = x < -87.0f ? broadcast(-87.0f) : x;
  const Floats n = (clamped * 1.44269504088896341f + shift) - shift;
  Floats r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x < -87.0f ? Floats{} : p * (Floats)exponent;
}

// tanh x within a few ulp: Cephes' odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel, else that formula.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats magnitude = x < 0.0f ? -x : x;
  const Floats square = x * x;
  Floats p = broadcast(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const Floats near_zero = p * square * x + x;
  const Floats bounded = magnitude > 40.0f ? broadcast(40.0f) : magnitude;
  const Floats far = 1.0f - 2.0f / (exponential(bounded + bounded) + 1.0f);
  return magnitude < 0.625f ? near_zero : (x < 0.0f ? -far : far);
}

}  // namespace torchrelay
