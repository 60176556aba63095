// Eight float lanes, and eight counters with Philox words in the low half of 64-bit lanes.
#pragma once

#include <immintrin.h>

#include "draw.h"
#include "dtypes.h"

namespace graddrop {
namespace {

struct Floats8 {
  static constexpr int WIDTH = 8;
  using Real = float;
  using Floats = __m256;
  using Kept = __m256;  // all ones where kept

  static Floats set(float x) { return _mm256_set1_ps(x); }
  static Floats max(Floats a, Floats b) {  // NaN where either is: the instruction's own is b where a is NaN
    return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static Floats sqrt(Floats a) { return _mm256_sqrt_ps(a); }
  static Floats sign(Floats a) {
    const Floats signed_one = _mm256_or_ps(_mm256_and_ps(a, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(1.0f));
    return _mm256_and_ps(signed_one, _mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_OQ));
  }

  static Kept kept(const WordDecisions& decisions, int i) {
    const __m256i lanes = _mm256_slli_epi32(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), i % 32);
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(decisions.word[i / 32]));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(bits, lanes), lanes));
  }
  static void pin(Floats&) {}  // there are no masked loads that a select could be folded into
  static Floats keep(Kept kept, Floats a) { return _mm256_and_ps(kept, a); }
  static Floats select(Kept kept, Floats a, Floats b) { return _mm256_blendv_ps(b, a, kept); }

  static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static Floats load(const bfloat16* x) {
    const __m256i upper_halves = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                                  -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, upper_halves));
  }
  static Floats load(const float16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }

  static void store(float* x, Floats a) { _mm256_storeu_ps(x, a); }
  static void store(bfloat16* x, Floats a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    store_upper_halves(x, _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan));
  }
  static void store(bfloat16* x, Floats a, const uint16_t* random) {
    const __m256i more = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(random)));
    const __m256i rounded = _mm256_add_epi32(_mm256_castps_si256(a), more);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    store_upper_halves(x, _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan));
  }
  static void store_upper_halves(bfloat16* x, __m256i a) {
    const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                           2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, upper), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
  }
  static void store(float16* x, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

struct Philox8 {
  using Decisions = WordDecisions;
  static constexpr int COUNTERS = 8;
  using Vector = __m256i;  // upper halves are dirty: nothing may read them

  static Vector set(const uint32_t* x) { return _mm256_set1_epi32(static_cast<int>(*x)); }
  static Vector key(const uint32_t x[KEY_COPIES]) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(x)); }
  // first, first + 2, ...: every other counter, so that two vectors interleave into COUNTERS consecutive ones
  static Vector counters(uint32_t first) {
    return _mm256_add_epi32(_mm256_set1_epi64x(first), _mm256_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0));
  }
  static Vector multiply(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
  static Vector high_half(Vector product) { return _mm256_srli_epi64(product, 32); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm256_xor_si256(a, b); }
  static Vector exclusive_or(Vector a, Vector b, Vector c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
  // Consecutive counters' words, that is their halves.
  static Vector halves(Vector even, Vector odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa); }
  static void store(uint16_t* x, Vector halves) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), halves); }
  // Bits 2 l and 2 l + 1: whether the low and the high half of counter l's word lie in the window.
  static uint32_t decide(Vector halves, uint16_t lo, uint16_t span) {
    // saturated differences, since AVX2 compares signed numbers only
    const __m256i beyond = _mm256_subs_epu16(_mm256_sub_epi16(halves, _mm256_set1_epi16(static_cast<int16_t>(lo))),
                                             _mm256_set1_epi16(static_cast<int16_t>(span)));
    const __m256i inside = _mm256_cmpeq_epi16(beyond, _mm256_setzero_si256());
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(inside), _mm256_extracti128_si256(inside, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
};

}  // namespace
}  // namespace graddrop
