// The exported functions; built for the baseline, so that it runs where the kernels do not.
#include <string.h>

#include "abi.h"

namespace avx512_bf16 {
int forward_rows(const ForwardArgs& args);
int logit_gradient(const GradientArgs& args);
int quantise_rows(const QuantiseArgs& args);
}  // namespace avx512_bf16

namespace avx512_vnni {
int forward_rows(const ForwardArgs& args);
int logit_gradient(const GradientArgs& args);
int quantise_rows(const QuantiseArgs& args);
}  // namespace avx512_vnni

namespace avx512 {
int forward_rows(const ForwardArgs& args);
int logit_gradient(const GradientArgs& args);
int quantise_rows(const QuantiseArgs& args);
}  // namespace avx512

namespace avx_vnni {
int forward_rows(const ForwardArgs& args);
int logit_gradient(const GradientArgs& args);
int quantise_rows(const QuantiseArgs& args);
}  // namespace avx_vnni

namespace avx2 {
int forward_rows(const ForwardArgs& args);
int logit_gradient(const GradientArgs& args);
int quantise_rows(const QuantiseArgs& args);
}  // namespace avx2

namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

// Best first. The flags of each build are in setup.py.
struct Isa {
  const char* name;
  bool (*runs_here)();
  ForwardRows forward_rows;
  LogitGradient logit_gradient;
  QuantiseRows quantise_rows;
};
const Isa ISAS[] = {
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::forward_rows, avx512_bf16::logit_gradient, avx512_bf16::quantise_rows},
    {"avx512_vnni", has_avx512_vnni, avx512_vnni::forward_rows, avx512_vnni::logit_gradient, avx512_vnni::quantise_rows},
    {"avx512", has_avx512, avx512::forward_rows, avx512::logit_gradient, avx512::quantise_rows},
    {"avx_vnni", has_avx_vnni, avx_vnni::forward_rows, avx_vnni::logit_gradient, avx_vnni::quantise_rows},
    {"avx2", has_avx2, avx2::forward_rows, avx2::logit_gradient, avx2::quantise_rows},
};
constexpr int NUM_ISAS = sizeof(ISAS) / sizeof(ISAS[0]);

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int fastpref_abi_version() { return FASTPREF_ABI_VERSION; }

// The number of the build of that name, or for a null name of the best one; -1 where this processor cannot run it.
__attribute__((visibility("default"))) int fastpref_find_isa(const char* name) {
  __builtin_cpu_init();
  for (int isa = 0; isa < NUM_ISAS; isa++) {
    if ((name == nullptr || strcmp(name, ISAS[isa].name) == 0) && ISAS[isa].runs_here()) return isa;
  }
  return -1;
}

__attribute__((visibility("default"))) int fastpref_forward_rows(int isa, const ForwardArgs* args) {
  return ISAS[isa].forward_rows(*args);
}

__attribute__((visibility("default"))) int fastpref_logit_gradient(int isa, const GradientArgs* args) {
  return ISAS[isa].logit_gradient(*args);
}

__attribute__((visibility("default"))) int fastpref_quantise_rows(int isa, const QuantiseArgs* args) {
  return ISAS[isa].quantise_rows(*args);
}

}  // extern "C"
