// How numbers come into vectors: memory, widening, transposition.
#pragma once

#include <stdlib.h>

#include "abi.h"
#include "simd.h"

extern "C" int omp_get_thread_num(void);

namespace FASTPREF_ISA {

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for floats, on a cache line of its own; null where there is none.
struct Buffer {
  float* data;
  explicit Buffer(int64_t num_floats) : data(nullptr) {
    void* memory = nullptr;
    const size_t bytes = sizeof(float) * static_cast<size_t>(max_of(num_floats, 1));
    if (posix_memalign(&memory, 64, bytes) == 0) data = static_cast<float*>(memory);
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// The numbers of any dtype but INT8.
static inline Vec load_widened(const void* values, int64_t offset, int64_t dtype) {
  if (dtype == FP32) return load(static_cast<const float*>(values) + offset);
  const HalfVec half = load_half(static_cast<const uint16_t*>(values) + offset);
  return dtype == BF16 ? widen_bf16(half) : widen_fp16(half);
}

// The first `count` <= LANES values, then zeros; reads nothing behind them.
static inline Vec load_widened_part(const void* values, int64_t offset, int64_t count, int64_t dtype) {
  if (count >= LANES) return load_widened(values, offset, dtype);
  float part[LANES] = {};
  const int64_t bytes = dtype == FP32 ? 4 : 2;
  __builtin_memcpy(part, static_cast<const char*>(values) + offset * bytes, static_cast<size_t>(count * bytes));
  return load_widened(part, 0, dtype);
}

// Row i to lane i of every vector, by log2(LANES) perfect shuffles.
static inline void transpose(Vec* rows) {
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 2) {
    Vec shuffled[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + LANES / 2]);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = shuffled[i];
  }
}

}  // namespace FASTPREF_ISA
