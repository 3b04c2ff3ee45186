// Which kernels this CPU can run. Decided at run time from CPUID; nothing here is compiled for more than the baseline.
#include <cstring>

#include "kernels.h"

namespace sterna {

const Kernels* scalar_table();
#if defined(STERNA_X86)
const Kernels* avx2_table();
const Kernels* avx512_table();
#endif

const Kernels* scalar_kernels() { return scalar_table(); }

const Kernels* avx2_kernels() {
#if defined(STERNA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return avx2_table();
  }
#endif
  return nullptr;
}

const Kernels* avx512_kernels() {
#if defined(STERNA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")) {
    return avx512_table();
  }
#endif
  return nullptr;
}

const Kernels* find_kernels(const char* name) {
  const bool automatic = std::strcmp(name, "auto") == 0;
  if (automatic || std::strcmp(name, "avx512") == 0) {
    if (const Kernels* k = avx512_kernels()) return k;
    if (!automatic) return nullptr;
  }
  if (automatic || std::strcmp(name, "avx2") == 0) {
    if (const Kernels* k = avx2_kernels()) return k;
    if (!automatic) return nullptr;
  }
  return automatic || std::strcmp(name, "scalar") == 0 ? scalar_kernels() : nullptr;
}

}  // namespace sterna
