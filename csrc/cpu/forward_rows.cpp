// The forward pass: logits tile by tile, each reduced while it is in the first-level cache.
//
// Chunks of columns are handed to threads; a chunk meets all rows in order and keeps one running result per row and
// vector lane. Chunks depend on V alone, and are merged in order in fp64: the thread count changes no bit.
#include "tile.h"

namespace FASTPREF_ISA {

// At most so many chunks: enough for the cores of one machine, few enough to keep every row's partials of each.
constexpr int64_t MAX_CHUNKS = 128, MIN_CHUNK_COLUMNS = 256;
// Packed columns stay in a second-level cache of 1 MiB, with room for a panel of rows.
constexpr int64_t PACKED_FLOATS = 128 * 1024;
// As in the PyTorch engine: keeps 0 * -inf out of the moment.
constexpr float LOWEST_GAP = -700.0f;

static int64_t columns_per_chunk(int64_t V) {
  return max_of(MIN_CHUNK_COLUMNS, ceil_div(ceil_div(V, MAX_CHUNKS), TILE_COLUMNS) * TILE_COLUMNS);
}

static int64_t columns_per_packing(const Product& product, int64_t chunk_columns) {
  const int64_t num_floats = product.dtype == INT8 ? words_of(product.hidden_size) : product.hidden_size;
  return min_of(chunk_columns, max_of(1, PACKED_FLOATS / (num_floats * TILE_COLUMNS)) * TILE_COLUMNS);
}

// What a pass computes beside log-probabilities: bits of the template parameter EXTRAS.
constexpr int MASS = 1, MOMENT = 2, TOTAL = 4, ALL_EXTRAS = MASS | MOMENT | TOTAL;

static int extras_of(const ForwardArgs& args) {
  return (args.mass ? MASS : 0) | (args.partials[FIELD_MOMENT] ? MOMENT : 0) | (args.partials[FIELD_TOTAL] ? TOTAL : 0);
}

template <bool IS_WANTED>
struct MomentLanes {};

template <>
struct MomentLanes<true> {
  Vec moment;
};

template <bool IS_WANTED>
struct TotalLanes {};

template <>
struct TotalLanes<true> {
  Vec total;
};

// A row's running result over the columns of a chunk.
template <int EXTRAS>
struct RowState : MomentLanes<(EXTRAS & MOMENT) != 0>, TotalLanes<(EXTRAS & TOTAL) != 0> {
  Vec sum;           // of exp(z - shift)
  float max;         // -inf before the first logit; NaN once a logit was NaN
  float shift;       // the maximum, or 0 while that is -inf
  float mass_scale;  // exp(shift - bound)
  float target;      // NaN until the label's column came
};

template <int EXTRAS>
static void reset(RowState<EXTRAS>& row, float bound) {
  row.sum = broadcast(0.0f);
  row.max = -__builtin_inff();
  row.shift = 0.0f;
  // Logits of -inf have no mass above a finite bound; above any other bound nothing is known.
  row.mass_scale = __builtin_isfinite(bound) ? 0.0f : __builtin_nanf("");
  row.target = __builtin_nanf("");
  if constexpr (EXTRAS & MOMENT) row.moment = broadcast(0.0f);
  if constexpr (EXTRAS & TOTAL) row.total = broadcast(0.0f);
}

// Take the maximum of one row of a tile as the row's new one; a NaN counts as the largest.
template <int EXTRAS>
__attribute__((noinline)) static void raise_max(RowState<EXTRAS>& row, const float* z, float bound) {
  const bool is_first = row.max == -__builtin_inff();
  float max = row.max;
  for (int c = 0; c < TILE_COLUMNS; c++) max = z[c] > max || z[c] != z[c] ? z[c] : max;
  // The sums of no logit yet are 0; times exp(0 - max), which may overflow, they would not stay it.
  const double gap = is_first ? 0.0 : static_cast<double>(row.shift) - max;
  const Vec factor = broadcast(static_cast<float>(__builtin_exp(gap)));
  if constexpr (EXTRAS & MOMENT) row.moment = factor * (row.moment + broadcast(static_cast<float>(gap)) * row.sum);
  row.sum = factor * row.sum;
  row.max = row.shift = max;
  row.mass_scale = static_cast<float>(__builtin_exp(static_cast<double>(max) - bound));
}

// Add one row of a tile. `is_column` holds 1 for columns of the vocabulary, 0 behind the last.
template <int EXTRAS>
static inline void add_logits(RowState<EXTRAS>& row, const float* z, const float* is_column, float bound, float* mass) {
  bool is_beyond = false;
  for (int v = 0; v < TILE_VECS; v++) is_beyond |= any_not_le(load(z + v * LANES), broadcast(row.max));
  if (__builtin_expect(is_beyond, 0)) raise_max(row, z, bound);
  for (int v = 0; v < TILE_VECS; v++) {
    const Vec logits = load(z + v * LANES), gap = logits - broadcast(row.shift), numerators = exp(gap);
    row.sum = row.sum + numerators;
    if constexpr (EXTRAS & MASS) {
      store(mass + v * LANES, fma(numerators, broadcast(row.mass_scale), load(mass + v * LANES)));
    }
    if constexpr (EXTRAS & MOMENT) {
      row.moment = fma(numerators, max_or_second_if_nan(broadcast(LOWEST_GAP), gap), row.moment);
    }
    if constexpr (EXTRAS & TOTAL) {
      const Vec zero = broadcast(0.0f);
      row.total = row.total + (load(is_column + v * LANES) != zero ? logits : zero);
    }
  }
}

// Write a row's partials over one chunk.
template <int EXTRAS>
static void finish_row(const RowState<EXTRAS>& row, double* const* parts, int64_t place) {
  parts[FIELD_MAX][place] = row.max;
  parts[FIELD_SUM][place] = sum_lanes(row.sum);
  parts[FIELD_TARGET][place] = row.target;
  if constexpr (EXTRAS & MOMENT) parts[FIELD_MOMENT][place] = sum_lanes(row.moment);
  if constexpr (EXTRAS & TOTAL) parts[FIELD_TOTAL][place] = sum_lanes(row.total);
}

// The shape of a forward pass and its memory.
struct Pass {
  const ForwardArgs& args;
  int64_t chunk_columns, num_chunks, packed_columns;
  Panel* x_panels;
  double* parts[NUM_FIELDS];  // [chunks, R] each, or null

  explicit Pass(const ForwardArgs& forward)
      : args(forward),
        chunk_columns(columns_per_chunk(forward.product.num_columns)),
        num_chunks(ceil_div(forward.product.num_columns, chunk_columns)),
        packed_columns(columns_per_packing(forward.product, chunk_columns)),
        x_panels(nullptr),
        parts() {}
};

// A thread's own memory for the columns at hand.
struct Packing {
  float* weight;  // what `panels` point to
  float* bias;    // [panels, TILE_COLUMNS]
  float* mass;    // [panels, TILE_COLUMNS]
  Panel* panels;
};

// Run all rows over the packed columns [first, stop).
template <int EXTRAS>
static void run_rows(const Pass& pass, const Packing& packing, int64_t first, int64_t stop, RowState<EXTRAS>* states) {
  const Product& product = pass.args.product;
  const int64_t R = product.num_rows;
  alignas(64) float tile[TILE_ROWS * TILE_COLUMNS];
  for (int64_t top = 0; top < R; top += TILE_ROWS) {
    const int num_rows = static_cast<int>(min_of(TILE_ROWS, R - top));
    for (int64_t column = first; column < stop; column += TILE_COLUMNS) {
      const int64_t place = column - first, num_columns = min_of(TILE_COLUMNS, stop - column);
      logit_tile(product, pass.x_panels[top / TILE_ROWS], num_rows, packing.panels[place / TILE_COLUMNS],
                 packing.bias + place, num_columns, tile);
      float is_column[TILE_COLUMNS];
      for (int c = 0; c < TILE_COLUMNS; c++) is_column[c] = c < num_columns ? 1.0f : 0.0f;
      for (int i = 0; i < num_rows; i++) {
        RowState<EXTRAS>& row = states[top + i];
        const float* z = tile + i * TILE_COLUMNS;
        // Unsigned: one comparison for both bounds.
        const uint64_t label_place = static_cast<uint64_t>(product.labels[top + i]) - static_cast<uint64_t>(column);
        if (label_place < static_cast<uint64_t>(num_columns)) row.target = z[label_place];
        const float bound = EXTRAS & MASS ? pass.args.bound[top + i] : 0.0f;
        add_logits(row, z, is_column, bound, packing.mass + place);
      }
    }
  }
}

template <int EXTRAS>
static void run_chunk(const Pass& pass, const Packing& packing, int64_t chunk, RowState<EXTRAS>* states) {
  const Product& product = pass.args.product;
  const int64_t R = product.num_rows;
  const int64_t start = chunk * pass.chunk_columns, stop = min_of(start + pass.chunk_columns, product.num_columns);
  for (int64_t r = 0; r < R; r++) reset(states[r], EXTRAS & MASS ? pass.args.bound[r] : 0.0f);
  for (int64_t first = start; first < stop; first += pass.packed_columns) {
    const int64_t end = min_of(first + pass.packed_columns, stop);
    for (int64_t column = first; column < end; column += TILE_COLUMNS) {
      const int64_t place = column - first;
      packing.panels[place / TILE_COLUMNS] = pack_weight_panel(product, column, packing.weight + panel_floats(product, place));
      pack_bias_panel(product, column, packing.bias + place);
    }
    if constexpr (EXTRAS & MASS) {
      __builtin_memset(packing.mass, 0, sizeof(float) * static_cast<size_t>(pass.packed_columns));
    }
    run_rows(pass, packing, first, end, states);
    if constexpr (EXTRAS & MASS) {
      __builtin_memcpy(pass.args.mass + first, packing.mass, sizeof(float) * static_cast<size_t>(end - first));
    }
  }
  for (int64_t r = 0; r < R; r++) finish_row(states[r], pass.parts, chunk * R + r);
}

// Merge one row's chunks, first to last; the rules of fastpref/kernels/outputs.py.
template <int EXTRAS>
static void merge_row(const Pass& pass, int64_t r) {
  const int64_t R = pass.args.product.num_rows;
  double* const* parts = pass.parts;
  double max = -__builtin_inf();
  for (int64_t chunk = 0; chunk < pass.num_chunks; chunk++) {
    const double value = parts[FIELD_MAX][chunk * R + r];
    if (value > max || value != value) max = value;
    if (max != max) break;
  }
  const double shift = max == -__builtin_inf() ? 0.0 : max;
  double merged[NUM_FIELDS] = {max, 0.0, __builtin_nan("")};
  for (int64_t chunk = 0; chunk < pass.num_chunks; chunk++) {
    const int64_t place = chunk * R + r;
    const double gap = parts[FIELD_MAX][place] - shift, factor = __builtin_exp(gap), sum = parts[FIELD_SUM][place];
    const double target = parts[FIELD_TARGET][place];
    merged[FIELD_SUM] += factor * sum;
    if (target == target) merged[FIELD_TARGET] = target;
    if constexpr (EXTRAS & MOMENT) {
      merged[FIELD_MOMENT] += factor * (parts[FIELD_MOMENT][place] + (sum == 0.0 ? 0.0 : gap * sum));
    }
    if constexpr (EXTRAS & TOTAL) merged[FIELD_TOTAL] += parts[FIELD_TOTAL][place];
  }
  merged[FIELD_SIZE] = static_cast<double>(pass.args.product.num_columns);
  for (int64_t field = 0; field < NUM_FIELDS; field++) {
    double* out = pass.args.partials[field];
    if (out != nullptr) out[r] = merged[field];
  }
}

template <int EXTRAS>
static int run_pass(const ForwardArgs& args) {
  Pass pass(args);
  const Product& product = args.product;
  const int64_t R = product.num_rows;
  const int64_t num_threads = max_of(1, min_of(args.num_threads, pass.num_chunks));
  // Whole cache lines each: packed columns with bias, mass and panels, then the rows' running results.
  const int64_t weight_floats = panel_floats(product, pass.packed_columns), panel_size = sizeof(Panel) / sizeof(float);
  const int64_t num_panels = pass.packed_columns / TILE_COLUMNS;
  const int64_t packing_floats = ceil_div(weight_floats + 2 * pass.packed_columns + num_panels * panel_size, 16) * 16;
  const int64_t state_floats = R * static_cast<int64_t>(sizeof(RowState<EXTRAS>) / sizeof(float));
  Buffer x_memory(panel_floats(product, R)), x_panels(ceil_div(R, TILE_ROWS) * panel_size);
  const int64_t num_parts = pass.num_chunks * R;
  int64_t num_wanted = 0;
  for (const double* field : args.partials) num_wanted += field != nullptr;
  Buffer parts(2 * num_wanted * num_parts), scratch(num_threads * (packing_floats + state_floats));
  if (!x_memory.data || !x_panels.data || !parts.data || !scratch.data) return 1;
  pass.x_panels = reinterpret_cast<Panel*>(x_panels.data);
  double* rest = reinterpret_cast<double*>(parts.data);
  for (int64_t field = 0; field < NUM_FIELDS; field++) {
    const bool is_wanted = args.partials[field] != nullptr;
    pass.parts[field] = is_wanted ? rest : nullptr;
    if (is_wanted) rest += num_parts;
  }
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
    float* own = scratch.data + omp_get_thread_num() * (packing_floats + state_floats);
    float *bias = own + weight_floats, *mass = bias + pass.packed_columns;
    const Packing packing = {own, bias, mass, reinterpret_cast<Panel*>(mass + pass.packed_columns)};
    RowState<EXTRAS>* states = reinterpret_cast<RowState<EXTRAS>*>(own + packing_floats);
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < R; top += TILE_ROWS) {
      pass.x_panels[top / TILE_ROWS] = pack_x_panel(product, top, x_memory.data + panel_floats(product, top));
    }
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < pass.num_chunks; chunk++) {
      run_chunk(pass, packing, chunk, states);
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) merge_row<EXTRAS>(pass, r);
  }
  return 0;
}

template <int EXTRAS = 0>
static int run_pass_with(int extras, const ForwardArgs& args) {
  if constexpr (EXTRAS < ALL_EXTRAS) {
    if (extras != EXTRAS) return run_pass_with<EXTRAS + 1>(extras, args);
  }
  return run_pass<EXTRAS>(args);
}

int forward_rows(const ForwardArgs& args) { return run_pass_with(extras_of(args), args); }

}  // namespace FASTPREF_ISA
