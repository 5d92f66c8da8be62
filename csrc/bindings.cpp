// The module dcar_fast._native: C++ and CUDA kernels behind raw pointers.
//
// No torch header is included, so building needs no torch and an upgrade of torch does not break the module.
#include "bindings.h"

#include <vector>

#include "cpu_isa.h"
#include "cuda_version.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ and CUDA kernels of dcar_fast; arrays are passed as addresses. Use dcar_fast.ops instead.";

  m.def("cpu_isas", &dcar::usable_isas, "Instruction sets usable on this CPU, best first.");
  m.def("cpu_isa", [] { return dcar::usable_isas().front(); }, "The instruction set the CPU kernels run with.");
  m.def("cuda_archs", [] { return std::vector<std::string>{DCAR_FAST_CUDA_ARCHS}; },
        "CUDA architectures compiled in, such as '90a' or '100+PTX'; empty without CUDA.");
#ifdef DCAR_FAST_CUDA
  m.def("cuda_compiled", [] { return true; }, "Whether CUDA kernels were compiled in.");
  m.def("cuda_versions", &dcar::cuda_versions,
        "(CUDA built with, newest CUDA of the driver) as 1000 * major + 10 * minor; the second is 0 without a driver.");
#else
  m.def("cuda_compiled", [] { return false; }, "Whether CUDA kernels were compiled in.");
#endif
  m.def("cuda_left_out", [] { return std::string(DCAR_FAST_CUDA_LEFT_OUT); },
        "Why CUDA kernels were not compiled in; empty if they were.");

  dcar::bind_add_residual(m);
  dcar::bind_gelu(m);
  dcar::bind_latent_noise(m);
  dcar::bind_philox(m);
  dcar::bind_place_tokens(m);
  dcar::bind_remask(m);
  dcar::bind_sample_from_logits(m);
  dcar::bind_vq_lookup(m);
}
