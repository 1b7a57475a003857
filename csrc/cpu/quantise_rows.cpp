// Rows of numbers to INT8: signs, a rotation, and one scale per row; the specification is fastpref/kernels/screening.py.
//
// LANES rows at a time, one in each lane, so that a rotation adds and subtracts whole vectors: the same operations in
// the same order for every row, whatever the instruction set.
#include "operands.h"

namespace FASTPREF_ISA {

// As in screening.py: a row whose largest number is below has no scale, as its reciprocal would overflow.
constexpr float LEAST = 1.2621774e-29f;  // 2^-96
constexpr float LARGEST = 127.0f;

// Load the rows from `first` on, at most LANES, times the signs: values [H], rows in the lanes.
static void load_rows(const QuantiseArgs& args, int64_t first, Vec* values) {
  const int64_t H = args.hidden_size, num_rows = min_of(LANES, args.num_rows - first);
  for (int64_t k = 0; k < H; k += LANES) {
    const int64_t count = min_of(LANES, H - k);
    Vec rows[LANES];
    for (int i = 0; i < LANES; i++) {
      const int64_t offset = (first + i) * args.stride + k;
      rows[i] = i < num_rows ? load_widened_part(args.rows, offset, count, args.dtype) : broadcast(0.0f);
    }
    transpose(rows);
    for (int64_t i = 0; i < count; i++) values[k + i] = rows[i] * broadcast(args.signs[k + i]);
  }
}

static void rotate(Vec* values, int64_t H, int64_t size) {
  for (int64_t step = 1; step < size; step *= 2) {
    for (int64_t start = 0; start < H; start += 2 * step) {
      for (int64_t k = start; k < start + step; k++) {
        const Vec low = values[k], high = values[k + step];
        values[k] = low + high;
        values[k + step] = low - high;
      }
    }
  }
}

// Write rows of bytes and their scales; `factor` takes the length of the rotation's vectors out of the scales.
static void store_rows(const QuantiseArgs& args, int64_t first, const Vec* values, float factor) {
  const int64_t H = args.hidden_size, num_rows = min_of(LANES, args.num_rows - first);
  const Vec magnitude = of_bits(broadcast_word(INT32_MAX));
  Vec largest = broadcast(0.0f);
  for (int64_t k = 0; k < H; k++) {
    largest = max_keeping_nan(of_bits(both(bits(values[k]), bits(magnitude))), largest);
  }
  float maxima[LANES], inverses[LANES];
  store(maxima, largest);
  for (int i = 0; i < LANES; i++) {
    const bool is_fit = maxima[i] >= LEAST && maxima[i] <= __FLT_MAX__;
    inverses[i] = is_fit ? LARGEST / maxima[i] : 0.0f;
    const float scale = is_fit || maxima[i] == 0.0f ? maxima[i] / LARGEST * factor : __builtin_nanf("");
    if (i < num_rows) args.scales[first + i] = scale;
  }
  const Vec inverse = load(inverses);
  for (int64_t k = 0; k < H; k += 4 * LANES) {
    Vec words[LANES];
    for (int64_t i = 0; i < LANES; i++) {
      Words word = broadcast_word(0);
      for (int64_t j = 0; j < 4 && k + 4 * i + j < H; j++) {
        const Words value = to_nearest(values[k + 4 * i + j] * inverse);
        word = either(word, low_byte(value, static_cast<int>(8 * j)));
      }
      words[i] = of_bits(word);
    }
    transpose(words);
    for (int64_t i = 0; i < num_rows; i++) {
      const int64_t count = min_of(4 * LANES, H - k);
      float part[LANES];
      store(part, words[i]);
      __builtin_memcpy(args.out + (first + i) * H + k, part, static_cast<size_t>(count));
    }
  }
}

int quantise_rows(const QuantiseArgs& args) {
  const int64_t H = args.hidden_size, num_groups = ceil_div(args.num_rows, LANES);
  const int64_t num_threads = max_of(1, min_of(args.num_threads, num_groups));
  const float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(args.rotation_size)));
  Buffer memory(num_threads * H * LANES);
  if (!memory.data) return 1;
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
    Vec* values = reinterpret_cast<Vec*>(memory.data + omp_get_thread_num() * H * LANES);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < num_groups; group++) {
      load_rows(args, group * LANES, values);
      rotate(values, H, args.rotation_size);
      store_rows(args, group * LANES, values, factor);
    }
  }
  return 0;
}

}  // namespace FASTPREF_ISA
