// One block of the logits' gradient, written from the same tiles of logits as the forward pass reduces.
#include "tile.h"

namespace FASTPREF_ISA {

// Columns that a thread takes at once: few, so that threads end together, and they fit the second-level cache.
constexpr int64_t CHUNK_COLUMNS = 64;

struct Row {
  float coefficient;  // of the onehot, logit scale included
  float factor;       // of exp(z - max)
  float max;
  uint64_t label_place;  // in the tile; at least TILE_COLUMNS where it is elsewhere
};

// Turn one row of logits into the gradient and return the sum of its numerators; `z` is overwritten.
static float differentiate(const Row& row, float softcap, float* z) {
  Vec slope[TILE_VECS], sum = broadcast(0.0f);
  for (int v = 0; v < TILE_VECS; v++) {
    const Vec logits = load(z + v * LANES), numerators = exp(logits - broadcast(row.max));
    const Vec capped = logits / broadcast(softcap);
    slope[v] = broadcast(1.0f) - capped * capped;
    sum = sum + numerators;
    store(z + v * LANES, numerators * broadcast(row.factor));
  }
  if (row.label_place < TILE_COLUMNS) z[row.label_place] += row.coefficient;
  if (softcap != 0.0f) {
    for (int v = 0; v < TILE_VECS; v++) store(z + v * LANES, load(z + v * LANES) * slope[v]);
  }
  return static_cast<float>(sum_lanes(sum));
}

// Write the columns [first, stop) of all rows; `sums_R` gets the rows' numerators.
static void run_columns(const GradientArgs& args, const Panel* x_panels, int64_t first, int64_t stop, float* packing,
                        float* sums_R) {
  const Product& product = args.product;
  const int64_t R = product.num_rows, V = product.num_columns;
  float bias[CHUNK_COLUMNS];
  Panel panels[CHUNK_COLUMNS / TILE_COLUMNS];
  for (int64_t column = first; column < stop; column += TILE_COLUMNS) {
    const int64_t place = column - first;
    panels[place / TILE_COLUMNS] = pack_weight_panel(product, column, packing + panel_floats(product, place));
    pack_bias_panel(product, column, bias + place);
  }
  alignas(64) float tile[TILE_ROWS * TILE_COLUMNS];
  for (int64_t r = 0; r < R; r++) sums_R[r] = 0.0f;
  for (int64_t top = 0; top < R; top += TILE_ROWS) {
    const int num_rows = static_cast<int>(min_of(TILE_ROWS, R - top));
    for (int64_t column = first; column < stop; column += TILE_COLUMNS) {
      const int64_t place = column - first, num_columns = min_of(TILE_COLUMNS, stop - column);
      const size_t bytes = sizeof(float) * static_cast<size_t>(num_columns);
      logit_tile(product, x_panels[top / TILE_ROWS], num_rows, panels[place / TILE_COLUMNS], bias + place, num_columns,
                 tile);
      for (int i = 0; i < num_rows; i++) {
        const int64_t r = top + i;
        float *z = tile + i * TILE_COLUMNS, *out = args.out + r * V + column;
        if (args.coefficients[r] == 0.0f) {
          // By selection: whatever a dead row holds, NaN included, it reaches no gradient.
          __builtin_memset(out, 0, bytes);
          continue;
        }
        const float coefficient = args.coefficients[r] * product.logit_scale;
        const uint64_t label_place = static_cast<uint64_t>(product.labels[r]) - static_cast<uint64_t>(column);
        const Row row = {coefficient, -coefficient / args.row_sum[r], args.row_max[r],
                         label_place < static_cast<uint64_t>(num_columns) ? label_place : TILE_COLUMNS};
        sums_R[r] += differentiate(row, product.softcap, z);
        __builtin_memcpy(out, z, bytes);
      }
    }
  }
}

int logit_gradient(const GradientArgs& args) {
  const Product& product = args.product;
  const int64_t R = product.num_rows, V = product.num_columns;
  const int64_t num_chunks = ceil_div(V, CHUNK_COLUMNS);
  const int64_t num_threads = max_of(1, min_of(args.num_threads, num_chunks));
  const int64_t packing_floats = panel_floats(product, CHUNK_COLUMNS), panel_size = sizeof(Panel) / sizeof(float);
  Buffer x_memory(panel_floats(product, R)), x_buffer(ceil_div(R, TILE_ROWS) * panel_size);
  Buffer packings(num_threads * packing_floats), sums(num_chunks * R);
  if (!x_memory.data || !x_buffer.data || !packings.data || !sums.data) return 1;
  Panel* x_panels = reinterpret_cast<Panel*>(x_buffer.data);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
#pragma omp for schedule(dynamic)
    for (int64_t top = 0; top < R; top += TILE_ROWS) {
      x_panels[top / TILE_ROWS] = pack_x_panel(product, top, x_memory.data + panel_floats(product, top));
    }
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
      const int64_t first = chunk * CHUNK_COLUMNS;
      run_columns(args, x_panels, first, min_of(first + CHUNK_COLUMNS, V),
                  packings.data + omp_get_thread_num() * packing_floats, sums.data + chunk * R);
    }
    if (args.covered != nullptr) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < R; r++) {
        double sum = 0.0;
        for (int64_t chunk = 0; chunk < num_chunks; chunk++) sum += sums.data[chunk * R + r];
        if (args.coefficients[r] != 0.0f) args.covered[r] += static_cast<float>(sum / args.row_sum[r]);
      }
    }
  }
  return 0;
}

}  // namespace FASTPREF_ISA
