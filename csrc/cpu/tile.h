// One tile of logits in registers: packed operands, the product, and what turns a product into logits.
//
// A logit is one sum over H in an order of its own: the same bits however many rows and columns come along, in either
// pass and for either instruction set. Sums of BLOCK_H products are added up, which also halves the error of a
// plain sum at H = 1024.
//
// Where the processor can, bf16 numbers are multiplied in pairs at twice the rate, into fp32 sums as ever. Forward sees
// them as bf16 tensors and backward widened, so the numbers decide and not the dtype: a logit is multiplied in pairs if
// all numbers of its row and of its column are narrow, that is bf16 numbers. That depends on no neighbour either.
//
// INT8 numbers are multiplied in fours, into sums of integers that are exact, and then by the two scales.
//
// Dims: R rows, H hidden, V vocabulary. Rows are packed in panels of TILE_ROWS (the last one narrower), columns in
// panels of TILE_COLUMNS (the last one filled up with zeros); a panel holds its rows or columns innermost, [H, width].
#pragma once

#include "operands.h"

namespace FASTPREF_ISA {

constexpr int64_t BLOCK_H = 256;

struct Panel {
  float* wide;      // [H, width]; of INT8 [ceil(H / 4), width] words, the bytes of columns with 128 added
  float* pairs;     // [ceil(H / 2), width], two bf16 numbers in each; filled in where `narrow` is not 0
                    // of INT8 [2, width]: scales, and for rows integers that take the 128 out of their sums again
  uint32_t narrow;  // bit i: row or column i holds bf16 numbers only
};

static inline int64_t pairs_of(int64_t H) { return HAS_PAIRS ? ceil_div(H, 2) : 0; }
static inline int64_t words_of(int64_t H) { return ceil_div(H, 4); }
static inline int64_t panel_floats(const Product& product, int64_t width) {
  const int64_t H = product.hidden_size;
  return (product.dtype == INT8 ? words_of(H) + 2 : H + pairs_of(H)) * width;
}

static inline uint32_t bits_of(float a) {
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof(bits));
  return bits;
}

// Fill in `pairs`: the upper halves of two numbers that follow each other in H, the first one low.
static void pack_pairs(const Panel& panel, int64_t H, int64_t width) {
  uint32_t* pairs = reinterpret_cast<uint32_t*>(panel.pairs);
  for (int64_t k = 0; k < H; k += 2) {
    const bool has_second = k + 1 < H;
    const float *first = panel.wide + k * width, *second = has_second ? first + width : first;
    for (int64_t i = 0; i < width; i++) {
      pairs[k / 2 * width + i] = (has_second ? bits_of(second[i]) & 0xffff0000u : 0u) | bits_of(first[i]) >> 16;
    }
  }
}

// `count` bytes of INT8 rows, at most as many as a vector holds, then zeros.
static inline Vec load_bytes(const void* values, int64_t offset, int64_t count) {
  const char* place = static_cast<const char*>(values) + offset;
  if (count >= 4 * LANES) return load(reinterpret_cast<const float*>(place));
  float part[LANES] = {};
  __builtin_memcpy(part, place, static_cast<size_t>(count));
  return load(part);
}

static Panel pack_weight_bytes(const Product& product, int64_t first, float* memory) {
  const int64_t H = product.hidden_size, num_words = words_of(H);
  const Panel panel = {memory, memory + num_words * TILE_COLUMNS, 0};
  const Words flip = broadcast_word(static_cast<int32_t>(0x80808080u));
  for (int64_t group = 0; group < TILE_COLUMNS; group += LANES) {
    const int64_t num_columns = min_of(LANES, product.num_columns - first - group);
    for (int64_t k = 0; k < num_words; k += LANES) {
      Vec rows[LANES];
      for (int i = 0; i < LANES; i++) {
        const int64_t offset = (first + group + i) * product.weight_stride + 4 * k;
        rows[i] = i < num_columns ? load_bytes(product.weight, offset, H - 4 * k) : broadcast(0.0f);
      }
      transpose(rows);
      for (int64_t i = 0; i < min_of(LANES, num_words - k); i++) {
        store(panel.wide + (k + i) * TILE_COLUMNS + group, of_bits(exclusive_or(bits(rows[i]), flip)));
      }
    }
    for (int64_t i = 0; i < LANES; i++) {
      panel.pairs[group + i] = i < num_columns ? product.weight_scales[first + group + i] : 0.0f;
    }
  }
  return panel;
}

static Panel pack_x_bytes(const Product& product, int64_t first, float* memory) {
  const int64_t H = product.hidden_size, num_words = words_of(H);
  const int64_t num_rows = min_of(TILE_ROWS, product.num_rows - first);
  const Panel panel = {memory, memory + num_words * num_rows, 0};
  for (int64_t i = 0; i < num_rows; i++) {
    const int8_t* row = static_cast<const int8_t*>(product.x) + (first + i) * product.x_stride;
    int32_t sum = 0;
    for (int64_t k = 0; k < H; k++) sum += row[k];
    for (int64_t k = 0; k < num_words; k++) {
      float word = 0.0f;
      __builtin_memcpy(&word, row + 4 * k, static_cast<size_t>(min_of(4, H - 4 * k)));
      panel.wide[k * num_rows + i] = word;
    }
    const int32_t correction = -128 * sum;
    panel.pairs[i] = product.x_scales[first + i];
    __builtin_memcpy(panel.pairs + num_rows + i, &correction, sizeof(correction));
  }
  return panel;
}

// Pack columns [first, first + TILE_COLUMNS) of the logits, that is rows of the weight.
static Panel pack_weight_panel(const Product& product, int64_t first, float* memory) {
  if (product.dtype == INT8) return pack_weight_bytes(product, first, memory);
  const int64_t H = product.hidden_size;
  Panel panel = {memory, memory + H * TILE_COLUMNS, 0};
  for (int64_t group = 0; group < TILE_COLUMNS; group += LANES) {
    const int64_t num_columns = min_of(LANES, product.num_columns - first - group);
    Vec seen = broadcast(0.0f);
    for (int64_t k = 0; k < H; k += LANES) {
      const int64_t count = min_of(LANES, H - k);
      Vec rows[LANES];
      for (int i = 0; i < LANES; i++) {
        const int64_t offset = (first + group + i) * product.weight_stride + k;
        rows[i] = i < num_columns ? load_widened_part(product.weight, offset, count, product.dtype) : broadcast(0.0f);
      }
      transpose(rows);
      for (int64_t i = 0; i < count; i++) {
        store(panel.wide + (k + i) * TILE_COLUMNS + group, rows[i]);
        seen = bitwise_or(seen, rows[i]);
      }
    }
    float lanes[LANES];
    store(lanes, seen);
    for (int i = 0; HAS_PAIRS && i < LANES; i++) {
      panel.narrow |= static_cast<uint32_t>((bits_of(lanes[i]) & 0xffffu) == 0) << (group + i);
    }
  }
  if (panel.narrow != 0) pack_pairs(panel, H, TILE_COLUMNS);
  return panel;
}

// The bias of columns [first, first + TILE_COLUMNS) in fp32, zeros behind the last column.
static void pack_bias_panel(const Product& product, int64_t first, float* panel) {
  for (int64_t group = 0; group < TILE_COLUMNS; group += LANES) {
    const int64_t count = max_of(0, min_of(LANES, product.num_columns - first - group));
    const bool wanted = product.bias != nullptr && count > 0;
    const int64_t dtype = product.dtype == INT8 ? static_cast<int64_t>(FP32) : product.dtype;
    store(panel + group, wanted ? load_widened_part(product.bias, first + group, count, dtype) : broadcast(0.0f));
  }
}

// Pack the rows from `first` on, at most TILE_ROWS.
static Panel pack_x_panel(const Product& product, int64_t first, float* memory) {
  if (product.dtype == INT8) return pack_x_bytes(product, first, memory);
  const int64_t H = product.hidden_size, num_rows = min_of(TILE_ROWS, product.num_rows - first);
  Panel panel = {memory, memory + H * num_rows, 0};
  for (int64_t i = 0; i < num_rows; i++) {
    uint32_t seen = 0;
    for (int64_t k = 0; k < H; k += LANES) {
      const int64_t count = min_of(LANES, H - k);
      float values[LANES];
      store(values, load_widened_part(product.x, (first + i) * product.x_stride + k, count, product.dtype));
      for (int64_t j = 0; j < count; j++) {
        panel.wide[(k + j) * num_rows + i] = values[j];
        seen |= bits_of(values[j]);
      }
    }
    panel.narrow |= static_cast<uint32_t>(HAS_PAIRS && (seen & 0xffffu) == 0) << i;
  }
  if (panel.narrow != 0) pack_pairs(panel, H, num_rows);
  return panel;
}

// tile [ROWS, TILE_COLUMNS] = products over so many numbers, or pairs of numbers, accumulated in registers.
template <bool IN_PAIRS, int ROWS>
static void multiply_panels(const float* x, const float* weight, int64_t steps, float* tile) {
  for (int64_t start = 0; start < steps; start += BLOCK_H) {
    const int64_t stop = min_of(start + BLOCK_H, steps);
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
        for (int v = 0; v < TILE_VECS; v++) {
          sums[i][v] = IN_PAIRS ? dot_pairs(row, columns[v], sums[i][v]) : fma(row, columns[v], sums[i][v]);
        }
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

template <bool IN_PAIRS, int ROWS = TILE_ROWS>
static void multiply_rows(int num_rows, const float* x, const float* weight, int64_t steps, float* tile) {
  if (num_rows == ROWS) return multiply_panels<IN_PAIRS, ROWS>(x, weight, steps, tile);
  if constexpr (ROWS > 1) multiply_rows<IN_PAIRS, ROWS - 1>(num_rows, x, weight, steps, tile);
}

// tile [ROWS, TILE_COLUMNS] = sums of products of bytes, times the scales of row and column.
template <int ROWS>
static void multiply_byte_panels(const Panel& x, const Panel& weight, int64_t num_words, float* tile) {
  Words sums[ROWS][TILE_VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    int32_t correction;
    __builtin_memcpy(&correction, x.pairs + ROWS + i, sizeof(correction));
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) sums[i][v] = broadcast_word(correction);
  }
  for (int64_t k = 0; k < num_words; k++) {
    Words columns[TILE_VECS];
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) columns[v] = bits(load(weight.wide + k * TILE_COLUMNS + v * LANES));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      int32_t row;
      __builtin_memcpy(&row, x.wide + k * ROWS + i, sizeof(row));
#pragma GCC unroll 4
      for (int v = 0; v < TILE_VECS; v++) sums[i][v] = dot_bytes(sums[i][v], columns[v], broadcast_word(row));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < TILE_VECS; v++) {
      const Vec scaled = to_float(sums[i][v]) * broadcast(x.pairs[i]);
      store(tile + i * TILE_COLUMNS + v * LANES, scaled * load(weight.pairs + v * LANES));
    }
  }
}

template <int ROWS = TILE_ROWS>
static void multiply_bytes(int num_rows, const Panel& x, const Panel& weight, int64_t num_words, float* tile) {
  if (num_rows == ROWS) return multiply_byte_panels<ROWS>(x, weight, num_words, tile);
  if constexpr (ROWS > 1) multiply_bytes<ROWS - 1>(num_rows, x, weight, num_words, tile);
}

// The product of two panels: in pairs where row and column are narrow, else in fp32.
static void multiply(const Panel& x, int num_rows, const Panel& weight, const Product& product, float* tile) {
  const int64_t H = product.hidden_size;
  if (product.dtype == INT8) return multiply_bytes(num_rows, x, weight, words_of(H), tile);
  if (x.narrow == 0 || weight.narrow == 0) return multiply_rows<false>(num_rows, x.wide, weight.wide, H, tile);
  if constexpr (HAS_PAIRS) {
    const uint32_t all_rows = ~0u >> (32 - num_rows), all_columns = ~0u >> (32 - TILE_COLUMNS);
    multiply_rows<true>(num_rows, x.pairs, weight.pairs, pairs_of(H), tile);
    if (x.narrow == all_rows && weight.narrow == all_columns) return;
    alignas(64) float wide_tile[TILE_ROWS * TILE_COLUMNS];
    multiply_rows<false>(num_rows, x.wide, weight.wide, H, wide_tile);
    for (int place = 0; place < num_rows * TILE_COLUMNS; place++) {
      const uint32_t row = x.narrow >> place / TILE_COLUMNS, column = weight.narrow >> place % TILE_COLUMNS;
      if ((row & column & 1) == 0) tile[place] = wide_tile[place];
    }
  }
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
static void logit_tile(const Product& product, const Panel& x_panel, int num_rows, const Panel& weight_panel,
                       const float* bias_panel, int64_t num_columns, float* tile) {
  multiply(x_panel, num_rows, weight_panel, product, tile);
  bias_scale_and_cap(product, bias_panel, num_rows, tile);
  for (int i = 0; i < num_rows; i++)
    for (int64_t c = num_columns; c < TILE_COLUMNS; c++) tile[i * TILE_COLUMNS + c] = -__builtin_inff();
}

}  // namespace FASTPREF_ISA
