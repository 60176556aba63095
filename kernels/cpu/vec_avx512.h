// Eight float lanes with mask registers, and sixteen counters with Philox words in the low half of 64-bit lanes.
#pragma once

#ifdef GRADDROP_EMULATE_AVX512  // test builds only: SIMDe runs AVX-512 on any x86-64 processor with AVX2
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "vec_avx2.h"

namespace graddrop {
namespace {

// Not sixteen lanes: a square root and a division of 512 bits take three times as long as those of 256 on Zen 4, and
// twice as long elsewhere.
struct MaskedFloats8 : Floats8 {
  using Kept = __mmask8;

  static Kept kept(const WordDecisions& d, int i) { return static_cast<Kept>(d.word[i / 32] >> (i % 32)); }

  // Compilers would fold a select into the load of what is selected. The hardware's prefetcher does not follow masked
  // loads, so that a step from memory would take nearly twice as long. Therefore it has to be in a register first.
  static void pin(Floats& a) { asm("" : "+v"(a)); }
  static Floats keep(Kept kept, Floats a) { return _mm256_maskz_mov_ps(kept, a); }
  static Floats select(Kept kept, Floats a, Floats b) {
    pin(a);
    pin(b);
    return _mm256_mask_blend_ps(kept, b, a);
  }

  using Floats8::store;
  static void store(bfloat16* x, Floats a) {  // to nearest, ties to even
    const __m256i upper_halves = _mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i bits = _mm256_castps_si256(a);
    const __mmask8 odd = _mm256_test_epi32_mask(bits, _mm256_set1_epi32(0x10000));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff));
    rounded = _mm256_mask_add_epi32(rounded, odd, rounded, _mm256_set1_epi32(1));
    const __mmask8 number = _mm256_cmp_ps_mask(a, a, _CMP_ORD_Q);  // of the lower eight 16-bit lanes, that is
    rounded = _mm256_mask_permutexvar_epi16(_mm256_set1_epi16(0x7fc0), number, upper_halves, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(rounded));
  }
};

struct Philox16 {
  using Decisions = WordDecisions;
  static constexpr int COUNTERS = 16;
  using Vector = __m512i;  // upper halves are dirty: nothing may read them

  static Vector set(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
  static Vector key(const uint32_t x[KEY_COPIES]) { return set(x); }
  // first, first + 2, ...: every other counter, so that two vectors interleave into COUNTERS consecutive ones
  static Vector counters(uint32_t first) {
    return _mm512_add_epi32(_mm512_set1_epi64(first),
                            _mm512_setr_epi32(0, 0, 2, 0, 4, 0, 6, 0, 8, 0, 10, 0, 12, 0, 14, 0));
  }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
  static Vector high_half(Vector product) { return _mm512_srli_epi64(product, 32); }
  static Vector exclusive_or(Vector a, Vector b) { return _mm512_xor_si512(a, b); }
  static Vector exclusive_or(Vector a, Vector b, Vector c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  // Consecutive counters' words, that is their halves.
  static Vector halves(Vector even, Vector odd) {
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  }
  static void store(uint16_t* x, Vector halves) { _mm512_storeu_si512(x, halves); }
  // Bits 2 l and 2 l + 1: whether the low and the high half of counter l's word lie in the window.
  static uint32_t decide(Vector halves, uint16_t lo, uint16_t span) {
    const __m512i moved = _mm512_sub_epi16(halves, _mm512_set1_epi16(static_cast<int16_t>(lo)));
    return _mm512_cmple_epu16_mask(moved, _mm512_set1_epi16(static_cast<int16_t>(span)));
  }
};

}  // namespace
}  // namespace graddrop
