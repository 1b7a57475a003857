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

static int64_t columns_per_packing(int64_t H, int64_t chunk_columns) {
  return min_of(chunk_columns, max_of(1, PACKED_FLOATS / (H * TILE_COLUMNS)) * TILE_COLUMNS);
}

template <bool WITH_STATS>
struct StatsLanes {};

template <>
struct StatsLanes<true> {
  Vec moment, total;
};

// A row's running result over the columns of a chunk.
template <bool WITH_STATS>
struct RowState : StatsLanes<WITH_STATS> {
  Vec sum;           // of exp(z - shift)
  float max;         // -inf before the first logit; NaN once a logit was NaN
  float shift;       // the maximum, or 0 while that is -inf
  float mass_scale;  // exp(shift - bound)
  float target;      // NaN until the label's column came
};

template <bool WITH_STATS>
static void reset(RowState<WITH_STATS>& row, float bound) {
  row.sum = broadcast(0.0f);
  row.max = -__builtin_inff();
  row.shift = 0.0f;
  // Logits of -inf have no mass above a finite bound; above any other bound nothing is known.
  row.mass_scale = __builtin_isfinite(bound) ? 0.0f : __builtin_nanf("");
  row.target = __builtin_nanf("");
  if constexpr (WITH_STATS) row.moment = row.total = broadcast(0.0f);
}

// Take the maximum of one row of a tile as the row's new one; a NaN counts as the largest.
template <bool WITH_STATS>
__attribute__((noinline)) static void raise_max(RowState<WITH_STATS>& row, const float* z, float bound) {
  const bool is_first = row.max == -__builtin_inff();
  float max = row.max;
  for (int c = 0; c < TILE_COLUMNS; c++) max = z[c] > max || z[c] != z[c] ? z[c] : max;
  // The sums of no logit yet are 0; times exp(0 - max), which may overflow, they would not stay it.
  const double gap = is_first ? 0.0 : static_cast<double>(row.shift) - max;
  const Vec factor = broadcast(static_cast<float>(__builtin_exp(gap)));
  if constexpr (WITH_STATS) row.moment = factor * (row.moment + broadcast(static_cast<float>(gap)) * row.sum);
  row.sum = factor * row.sum;
  row.max = row.shift = max;
  row.mass_scale = static_cast<float>(__builtin_exp(static_cast<double>(max) - bound));
}

// Add one row of a tile. `is_column` holds 1 for columns of the vocabulary, 0 behind the last.
template <bool WITH_STATS, bool WITH_MASS>
static inline void add_logits(RowState<WITH_STATS>& row, const float* z, const float* is_column, float bound,
                              float* mass) {
  bool is_beyond = false;
  for (int v = 0; v < TILE_VECS; v++) is_beyond |= any_not_le(load(z + v * LANES), broadcast(row.max));
  if (__builtin_expect(is_beyond, 0)) raise_max(row, z, bound);
  for (int v = 0; v < TILE_VECS; v++) {
    const Vec logits = load(z + v * LANES), gap = logits - broadcast(row.shift), numerators = exp(gap);
    row.sum = row.sum + numerators;
    if constexpr (WITH_MASS) {
      store(mass + v * LANES, fma(numerators, broadcast(row.mass_scale), load(mass + v * LANES)));
    }
    if constexpr (WITH_STATS) {
      const Vec zero = broadcast(0.0f);
      row.moment = fma(numerators, max_or_second_if_nan(broadcast(LOWEST_GAP), gap), row.moment);
      row.total = row.total + (load(is_column + v * LANES) != zero ? logits : zero);
    }
  }
}

// Write a row's partials over one chunk, field by field `stride` apart.
template <bool WITH_STATS>
static void finish_row(const RowState<WITH_STATS>& row, int64_t num_columns, int64_t stride, double* out) {
  out[FIELD_MAX * stride] = row.max;
  out[FIELD_SUM * stride] = sum_lanes(row.sum);
  out[FIELD_TARGET * stride] = row.target;
  if constexpr (WITH_STATS) {
    out[FIELD_MOMENT * stride] = sum_lanes(row.moment);
    out[FIELD_TOTAL * stride] = sum_lanes(row.total);
    out[FIELD_SIZE * stride] = static_cast<double>(num_columns);
  }
}

// The shape of a forward pass and its memory.
struct Pass {
  const ForwardArgs& args;
  int64_t num_fields, chunk_columns, num_chunks, packed_columns;
  Panel* x_panels;
  double* parts;  // [chunks, F, R]

  explicit Pass(const ForwardArgs& forward)
      : args(forward),
        num_fields(forward.with_stats ? NUM_FIELDS_WITH_STATS : NUM_FIELDS),
        chunk_columns(columns_per_chunk(forward.product.num_columns)),
        num_chunks(ceil_div(forward.product.num_columns, chunk_columns)),
        packed_columns(columns_per_packing(forward.product.hidden_size, chunk_columns)),
        x_panels(nullptr),
        parts(nullptr) {}
};

// A thread's own memory for the columns at hand.
struct Packing {
  float* weight;  // what `panels` point to
  float* bias;    // [panels, TILE_COLUMNS]
  float* mass;    // [panels, TILE_COLUMNS]
  Panel* panels;
};

// Run all rows over the packed columns [first, stop).
template <bool WITH_STATS, bool WITH_MASS>
static void run_rows(const Pass& pass, const Packing& packing, int64_t first, int64_t stop,
                     RowState<WITH_STATS>* states) {
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
        RowState<WITH_STATS>& row = states[top + i];
        const float* z = tile + i * TILE_COLUMNS;
        // Unsigned: one comparison for both bounds.
        const uint64_t label_place = static_cast<uint64_t>(product.labels[top + i]) - static_cast<uint64_t>(column);
        if (label_place < static_cast<uint64_t>(num_columns)) row.target = z[label_place];
        const float bound = WITH_MASS ? pass.args.bound[top + i] : 0.0f;
        add_logits<WITH_STATS, WITH_MASS>(row, z, is_column, bound, packing.mass + place);
      }
    }
  }
}

template <bool WITH_STATS, bool WITH_MASS>
static void run_chunk(const Pass& pass, const Packing& packing, int64_t chunk, RowState<WITH_STATS>* states) {
  const Product& product = pass.args.product;
  const int64_t R = product.num_rows, H = product.hidden_size;
  const int64_t start = chunk * pass.chunk_columns, stop = min_of(start + pass.chunk_columns, product.num_columns);
  for (int64_t r = 0; r < R; r++) reset(states[r], WITH_MASS ? pass.args.bound[r] : 0.0f);
  for (int64_t first = start; first < stop; first += pass.packed_columns) {
    const int64_t end = min_of(first + pass.packed_columns, stop);
    for (int64_t column = first; column < end; column += TILE_COLUMNS) {
      const int64_t place = column - first;
      packing.panels[place / TILE_COLUMNS] = pack_weight_panel(product, column, packing.weight + panel_floats(H, place));
      pack_bias_panel(product, column, packing.bias + place);
    }
    if constexpr (WITH_MASS) __builtin_memset(packing.mass, 0, sizeof(float) * static_cast<size_t>(pass.packed_columns));
    run_rows<WITH_STATS, WITH_MASS>(pass, packing, first, end, states);
    if constexpr (WITH_MASS) {
      __builtin_memcpy(pass.args.mass + first, packing.mass, sizeof(float) * static_cast<size_t>(end - first));
    }
  }
  double* part = pass.parts + chunk * pass.num_fields * R;
  for (int64_t r = 0; r < R; r++) finish_row(states[r], stop - start, R, part + r);
}

// Merge one row's chunks, first to last; the rule of fastpref/kernels/partials.py.
static void merge_row(const Pass& pass, int64_t r) {
  const int64_t R = pass.args.product.num_rows;
  double* out = pass.args.partials + r;
  double max = -__builtin_inf();
  for (int64_t chunk = 0; chunk < pass.num_chunks; chunk++) {
    const double value = pass.parts[(chunk * pass.num_fields + FIELD_MAX) * R + r];
    if (value > max || value != value) max = value;
    if (max != max) break;
  }
  const double shift = max == -__builtin_inf() ? 0.0 : max;
  for (int64_t field = 0; field < pass.num_fields; field++) out[field * R] = 0.0;
  out[FIELD_MAX * R] = max;
  out[FIELD_TARGET * R] = __builtin_nan("");
  for (int64_t chunk = 0; chunk < pass.num_chunks; chunk++) {
    const double* part = pass.parts + chunk * pass.num_fields * R + r;
    const double gap = part[FIELD_MAX * R] - shift, factor = __builtin_exp(gap), sum = part[FIELD_SUM * R];
    out[FIELD_SUM * R] += factor * sum;
    if (part[FIELD_TARGET * R] == part[FIELD_TARGET * R]) out[FIELD_TARGET * R] = part[FIELD_TARGET * R];
    if (pass.num_fields == NUM_FIELDS_WITH_STATS) {
      out[FIELD_MOMENT * R] += factor * (part[FIELD_MOMENT * R] + (sum == 0.0 ? 0.0 : gap * sum));
      out[FIELD_TOTAL * R] += part[FIELD_TOTAL * R];
      out[FIELD_SIZE * R] += part[FIELD_SIZE * R];
    }
  }
}

template <bool WITH_STATS, bool WITH_MASS>
static int run_pass(const ForwardArgs& args) {
  Pass pass(args);
  const int64_t R = args.product.num_rows, H = args.product.hidden_size;
  const int64_t num_threads = max_of(1, min_of(args.num_threads, pass.num_chunks));
  // Whole cache lines each: packed columns with bias, mass and panels, then the rows' running results.
  const int64_t weight_floats = panel_floats(H, pass.packed_columns), panel_size = sizeof(Panel) / sizeof(float);
  const int64_t num_panels = pass.packed_columns / TILE_COLUMNS;
  const int64_t packing_floats = ceil_div(weight_floats + 2 * pass.packed_columns + num_panels * panel_size, 16) * 16;
  const int64_t state_floats = R * static_cast<int64_t>(sizeof(RowState<WITH_STATS>) / sizeof(float));
  Buffer x_memory(panel_floats(H, R)), x_panels(ceil_div(R, TILE_ROWS) * panel_size);
  Buffer parts(2 * pass.num_chunks * pass.num_fields * R), scratch(num_threads * (packing_floats + state_floats));
  if (!x_memory.data || !x_panels.data || !parts.data || !scratch.data) return 1;
  pass.x_panels = reinterpret_cast<Panel*>(x_panels.data);
  pass.parts = reinterpret_cast<double*>(parts.data);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
    float* own = scratch.data + omp_get_thread_num() * (packing_floats + state_floats);
    float *bias = own + weight_floats, *mass = bias + pass.packed_columns;
    const Packing packing = {own, bias, mass, reinterpret_cast<Panel*>(mass + pass.packed_columns)};
    RowState<WITH_STATS>* states = reinterpret_cast<RowState<WITH_STATS>*>(own + packing_floats);
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < R; top += TILE_ROWS) {
      pass.x_panels[top / TILE_ROWS] = pack_x_panel(args.product, top, x_memory.data + panel_floats(H, top));
    }
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < pass.num_chunks; chunk++) {
      run_chunk<WITH_STATS, WITH_MASS>(pass, packing, chunk, states);
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r++) merge_row(pass, r);
  }
  return 0;
}

int forward_rows(const ForwardArgs& args) {
  if (args.mass == nullptr) return args.with_stats ? run_pass<true, false>(args) : run_pass<false, false>(args);
  return args.with_stats ? run_pass<true, true>(args) : run_pass<false, true>(args);
}

}  // namespace FASTPREF_ISA
