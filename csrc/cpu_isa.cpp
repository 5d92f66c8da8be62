#include "cpu_isa.h"

namespace dcar {

const std::vector<std::string>& usable_isas() {
  static const std::vector<std::string> isas = [] {
    std::vector<std::string> found;
#ifdef DCAR_FAST_X86
    // __builtin_cpu_supports also asks the operating system (XGETBV), so "yes" means the registers are saved.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) found.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
    found.push_back("generic");
    return found;
  }();
  return isas;
}

bool has_avx512vnni() {
#ifdef DCAR_FAST_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace dcar
