#include <algorithm>

#include "bindings.h"
#include "vq_lookup.h"

namespace py = pybind11;

namespace dcar {
namespace {

VqType type_named(const char* argument, const std::string& name) {
  if (name == "float32") return VqType::kFloat32;
  if (name == "float16") return VqType::kFloat16;
  if (name == "bfloat16") return VqType::kBFloat16;
  fail(std::string(argument) + " is '" + name + "', allowed are 'float32', 'float16' and 'bfloat16'");
}

VqVectors vectors(const char* name, uintptr_t address, VqType type, int64_t count, int64_t channels) {
  const size_t alignment = type == VqType::kFloat32 ? 4 : 2;
  return {array<const void>(name, address, elements(name, {count, channels}), alignment), type, count, channels};
}

void run(uintptr_t z, uintptr_t codebook, uintptr_t ids, uintptr_t codes, uintptr_t residual, int64_t rows,
         int64_t num_codes, int64_t channels, const std::string& z_dtype, const std::string& codebook_dtype,
         int num_threads, const std::string& isa) {
  check_size("rows", rows, 0);
  check_size("num_codes", num_codes, 1);
  check_size("channels", channels, 1);
  check_size("num_threads", num_threads, 1);
  const auto& isas = vq_lookup_isas();
  if (!isa.empty() && std::find(isas.begin(), isas.end(), isa) == isas.end())
    fail("isa is '" + isa + "', which is not one of vq_lookup_isas()");
  const VqVectors z_data = vectors("z", z, type_named("z_dtype", z_dtype), rows, channels);
  const VqVectors codebook_data =
      vectors("codebook", codebook, type_named("codebook_dtype", codebook_dtype), num_codes, channels);
  auto* ids_data = array<int64_t>("ids", ids, rows);
  auto* codes_data = array<float>("codes", codes, rows * channels);
  auto* residual_data = array<float>("residual", residual, rows * channels);

  py::gil_scoped_release release;
  vq_lookup(z_data, codebook_data, ids_data, codes_data, residual_data, num_threads,
            isa.empty() ? isas.front() : isa);
}

}  // namespace

void bind_vq_lookup(py::module_& m) {
  m.def("vq_lookup_isas", &vq_lookup_isas, "How vq_lookup can run on this CPU, best first.");
  m.def("vq_lookup", &run, py::kw_only(), py::arg("z"), py::arg("codebook"), py::arg("ids"), py::arg("codes"),
        py::arg("residual"), py::arg("rows"), py::arg("num_codes"), py::arg("channels"), py::arg("z_dtype"),
        py::arg("codebook_dtype"), py::arg("num_threads"), py::arg("isa") = "",
        "Nearest codes on the CPU; see csrc/vq_lookup.h.");
}

}  // namespace dcar
