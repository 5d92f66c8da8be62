#include "bindings.h"
#include "cpu_isa.h"
#include "latent_noise.h"

#include <algorithm>

namespace py = pybind11;

namespace dcar {
namespace {

void run(uintptr_t seeds, uintptr_t tokens, uintptr_t out, int64_t rows, int64_t channels, int64_t step, bool initial,
         int num_threads, const std::string& isa) {
  check_size("rows", rows, 0);
  check_size("channels", channels, 1);
  check_size("num_threads", num_threads, 1);
  if (step < 0 || step > std::numeric_limits<uint32_t>::max())
    fail("step is " + std::to_string(step) + ", allowed are 0..4294967295");
  const auto& isas = usable_isas();
  if (!isa.empty() && std::find(isas.begin(), isas.end(), isa) == isas.end())
    fail("isa is '" + isa + "', which is not one of cpu_isas()");
  const LatentNoise task{array<const int64_t>("seeds", seeds, rows),
                         array<const int64_t>("tokens", tokens, rows),
                         rows,
                         channels,
                         static_cast<uint32_t>(step),
                         initial,
                         array<float>("out", out, elements("out", {rows, channels}))};
  py::gil_scoped_release release;
  latent_noise(task, num_threads, isa.empty() ? isas.front() : isa);
}

}  // namespace

void bind_latent_noise(py::module_& m) {
  m.def("latent_noise", &run, py::kw_only(), py::arg("seeds"), py::arg("tokens"), py::arg("out"), py::arg("rows"),
        py::arg("channels"), py::arg("step"), py::arg("initial"), py::arg("num_threads"), py::arg("isa") = "",
        "Standard normals for rows of latents; see csrc/latent_noise.h.");
}

}  // namespace dcar
