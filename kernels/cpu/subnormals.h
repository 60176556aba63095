// Arithmetic that takes subnormal numbers (below 1.2e-38 in float32) as zeros, while an object of this type lives.
//
// An element that gets no gradient for long, in an epoch's mask or an unused row of an embedding, has moments that decay
// until they are subnormal and stay so, since a tenth of the smallest number rounds to zero and is never taken off.
// Processors compute such numbers several times more slowly. What becomes of them is below any tolerance.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace graddrop {

class FlushSubnormals {
 public:
  FlushSubnormals() : before_(get()) { set(before_ | FLUSH); }
  ~FlushSubnormals() { set(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__SSE2__)
  static constexpr uint64_t FLUSH = 0x8040;  // of results and of operands
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__)
  static constexpr uint64_t FLUSH = uint64_t{1} << 24;
  static uint64_t get() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  static constexpr uint64_t FLUSH = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif

  uint64_t before_;
};

}  // namespace graddrop
