// The C interface of the CPU engine, mirrored field by field in fastpref/kernels/native.py.
//
// Dims: R rows, H hidden, V vocabulary. All sizes and strides count elements.
#pragma once

#include <stdint.h>

// Raise it with every change of this file: the loader refuses a library of another version.
#define FASTPREF_ABI_VERSION 3

enum DType : int64_t { FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3 };

// What is left of a row's logits; the fields of fastpref/kernels/outputs.py, in that order.
enum Field : int64_t { FIELD_MAX, FIELD_SUM, FIELD_TARGET, FIELD_MOMENT, FIELD_TOTAL, FIELD_SIZE, NUM_FIELDS };

// x [R, H] and weight [V, H] of one dtype with contiguous rows; z = scale * (x @ weight.T + bias), then the softcap.
// Rows of INT8 stand for numbers once multiplied by their scale; those of -128 are not among them.
struct Product {
  const void* x;
  const void* weight;
  const void* bias;            // [V] in `dtype`, FP32 for INT8, or null
  const float* x_scales;       // [R] for INT8, else null
  const float* weight_scales;  // [V] for INT8, else null
  const int64_t* labels;  // [R], a column; any value outside [0, V) means "not here"
  int64_t num_rows, num_columns, hidden_size;
  int64_t x_stride, weight_stride;
  int64_t dtype;
  float logit_scale;
  float softcap;  // 0 = none
};

struct ForwardArgs {
  Product product;
  const float* bound;            // [R] lower bounds of the log-sum-exp, read for masses only
  double* partials[NUM_FIELDS];  // out [R] each, or null; never null are the first three
  float* mass;                   // out [V], or null
  int64_t num_threads;
};

struct GradientArgs {
  Product product;  // FP32
  const float* coefficients;
  const float* row_max;
  const float* row_sum;
  float* out;      // [R, V] contiguous
  float* covered;  // [R], the rows' softmax mass in these columns is added; or null
  int64_t num_threads;
};

// Rows [N, H] to INT8; see fastpref/kernels/screening.py.
struct QuantiseArgs {
  const void* rows;
  int64_t num_rows, hidden_size, stride, dtype;
  const float* signs;     // [H]
  int64_t rotation_size;  // numbers that a rotation mixes, a power of two that divides H
  int8_t* out;            // [N, H] contiguous
  float* scales;          // out [N]; NaN where a row has none
  int64_t num_threads;
};

// Each returns 0, or 1 when memory for its buffers could not be had; nothing is written then.
using ForwardRows = int (*)(const ForwardArgs&);
using LogitGradient = int (*)(const GradientArgs&);
using QuantiseRows = int (*)(const QuantiseArgs&);
