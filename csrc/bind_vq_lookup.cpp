#include <algorithm>

#include "bindings.h"
#include "cpu_isa.h"
#include "vq_lookup.h"

namespace py = pybind11;

namespace dcar {
namespace {

void run(uintptr_t z, uintptr_t codebook, uintptr_t ids, uintptr_t codes, uintptr_t residual, int64_t rows,
         int64_t num_codes, int64_t channels, int num_threads, const std::string& isa) {
  check_size("rows", rows, 0);
  check_size("num_codes", num_codes, 1);
  check_size("channels", channels, 1);
  check_size("num_threads", num_threads, 1);
  const auto& isas = usable_isas();
  if (!isa.empty() && std::find(isas.begin(), isas.end(), isa) == isas.end())
    fail("isa is '" + isa + "', which is not one of cpu_isas()");
  const int64_t size = elements("z", {rows, channels});
  const auto* z_data = array<const float>("z", z, size);
  const auto* codebook_data =
      array<const float>("codebook", codebook, elements("codebook", {num_codes, channels}));
  auto* ids_data = array<int64_t>("ids", ids, rows);
  auto* codes_data = array<float>("codes", codes, size);
  auto* residual_data = array<float>("residual", residual, size);

  py::gil_scoped_release release;
  vq_lookup(z_data, codebook_data, ids_data, codes_data, residual_data, rows, num_codes, channels, num_threads,
            isa.empty() ? isas.front() : isa);
}

}  // namespace

void bind_vq_lookup(py::module_& m) {
  m.def("vq_lookup", &run, py::kw_only(), py::arg("z"), py::arg("codebook"), py::arg("ids"), py::arg("codes"),
        py::arg("residual"), py::arg("rows"), py::arg("num_codes"), py::arg("channels"), py::arg("num_threads"),
        py::arg("isa") = "", "Nearest codes on the CPU; see csrc/vq_lookup.h.");
}

}  // namespace dcar
