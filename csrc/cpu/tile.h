// One tile of logits in registers: packed operands, the product, and what turns a product into logits.
//
// A logit is one sum over H in an order of its own: the same bits however many rows and columns come along, in either
// pass and for either instruction set. Sums of BLOCK_H products are added up, which also halves the error of a
// plain sum at H = 1024.
//
// Dims: R rows, H hidden, V vocabulary. Rows are packed in panels of TILE_ROWS (the last one narrower), columns in
// panels of TILE_COLUMNS (the last one filled up with zeros); a panel holds its rows or columns innermost, [H, width].
#pragma once

#include <stdlib.h>

#include "abi.h"
#include "simd.h"

extern "C" int omp_get_thread_num(void);

namespace FASTPREF_ISA {

constexpr int64_t BLOCK_H = 256;

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory for floats on a cache line of its own; null where there is none.
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

// Pack columns [first, first + TILE_COLUMNS) of the logits, that is rows of the weight, into panel [H, TILE_COLUMNS].
static void pack_weight_panel(const Product& product, int64_t first, float* panel) {
  const int64_t H = product.hidden_size;
  for (int64_t group = 0; group < TILE_COLUMNS; group += LANES) {
    const int64_t num_columns = min_of(LANES, product.num_columns - first - group);
    for (int64_t k = 0; k < H; k += LANES) {
      const int64_t count = min_of(LANES, H - k);
      Vec rows[LANES];
      for (int i = 0; i < LANES; i++) {
        const int64_t offset = (first + group + i) * product.weight_stride + k;
        rows[i] = i < num_columns ? load_widened_part(product.weight, offset, count, product.dtype) : broadcast(0.0f);
      }
      transpose(rows);
      for (int64_t i = 0; i < count; i++) store(panel + (k + i) * TILE_COLUMNS + group, rows[i]);
    }
  }
}

// The bias of columns [first, first + TILE_COLUMNS) in fp32, zeros behind the last column.
static void pack_bias_panel(const Product& product, int64_t first, float* panel) {
  for (int64_t group = 0; group < TILE_COLUMNS; group += LANES) {
    const int64_t count = max_of(0, min_of(LANES, product.num_columns - first - group));
    const bool wanted = product.bias != nullptr && count > 0;
    store(panel + group, wanted ? load_widened_part(product.bias, first + group, count, product.dtype) : broadcast(0.0f));
  }
}

// Pack the rows from `first` on, at most TILE_ROWS, into panel [H, rows].
static void pack_x_panel(const Product& product, int64_t first, float* panel) {
  const int64_t H = product.hidden_size, num_rows = min_of(TILE_ROWS, product.num_rows - first);
  for (int64_t i = 0; i < num_rows; i++) {
    for (int64_t k = 0; k < H; k += LANES) {
      const int64_t count = min_of(LANES, H - k);
      float values[LANES];
      store(values, load_widened_part(product.x, (first + i) * product.x_stride + k, count, product.dtype));
      for (int64_t j = 0; j < count; j++) panel[(k + j) * num_rows + i] = values[j];
    }
  }
}

// tile [ROWS, TILE_COLUMNS] = panel products, accumulated in registers.
template <int ROWS>
static void multiply_panels(const float* x, const float* weight, int64_t H, float* tile) {
  for (int64_t start = 0; start < H; start += BLOCK_H) {
    const int64_t stop = min_of(start + BLOCK_H, H);
    Vec sums[ROWS][TILE_VECS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECS; v++) sums[i][v] = broadcast(0.0f);
    for (int64_t k = start; k < stop; k++) {
      Vec columns[TILE_VECS];
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECS; v++) columns[v] = load(weight + k * TILE_COLUMNS + v * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const Vec row = broadcast(x[k * ROWS + i]);
#pragma GCC unroll 4
        for (int v = 0; v < TILE_VECS; v++) sums[i][v] = fma(row, columns[v], sums[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECS; v++) {
        float* place = tile + i * TILE_COLUMNS + v * LANES;
        store(place, start == 0 ? sums[i][v] : load(place) + sums[i][v]);
      }
    }
  }
}

template <int ROWS = TILE_ROWS>
static void multiply_panels_of(int num_rows, const float* x, const float* weight, int64_t H, float* tile) {
  if (num_rows == ROWS) return multiply_panels<ROWS>(x, weight, H, tile);
  if constexpr (ROWS > 1) multiply_panels_of<ROWS - 1>(num_rows, x, weight, H, tile);
}

static void bias_scale_and_cap(const Product& product, const float* bias_panel, int num_rows, float* tile) {
  const bool capped = product.softcap != 0.0f;
  if (product.bias == nullptr && product.logit_scale == 1.0f && !capped) return;
  const Vec scale = broadcast(product.logit_scale), cap = broadcast(product.softcap);
  for (int place = 0; place < num_rows * TILE_COLUMNS; place += LANES) {
    Vec z = load(tile + place);
    if (product.bias != nullptr) z = z + load(bias_panel + place % TILE_COLUMNS);
    z = z * scale;
    if (capped) z = tanh(z / cap) * cap;
    store(tile + place, z);
  }
}

// The logits of one pair of panels, [num_rows, TILE_COLUMNS]; -inf in the columns from `num_columns` on.
static void logit_tile(const Product& product, const float* x_panel, int num_rows, const float* weight_panel,
                       const float* bias_panel, int64_t num_columns, float* tile) {
  multiply_panels_of(num_rows, x_panel, weight_panel, product.hidden_size, tile);
  bias_scale_and_cap(product, bias_panel, num_rows, tile);
  for (int i = 0; i < num_rows; i++)
    for (int64_t c = num_columns; c < TILE_COLUMNS; c++) tile[i * TILE_COLUMNS + c] = -__builtin_inff();
}

}  // namespace FASTPREF_ISA
