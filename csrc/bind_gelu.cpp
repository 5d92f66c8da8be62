#include "bindings.h"
#include "cpu_isa.h"
#include "gelu.h"

#include <algorithm>

namespace py = pybind11;

namespace dcar {
namespace {

void run(uintptr_t x, uintptr_t out, int64_t count, const std::string& dtype, int num_threads, const std::string& isa) {
  const FloatType type = float_type("dtype", dtype);
  if (type == FloatType::kFloat16) fail("dtype is 'float16', allowed are 'float32' and 'bfloat16'");
  check_size("count", count, 0);
  check_size("num_threads", num_threads, 1);
  const auto& isas = usable_isas();
  if (!isa.empty() && std::find(isas.begin(), isas.end(), isa) == isas.end())
    fail("isa is '" + isa + "', which is not one of cpu_isas()");
  const int64_t size = elements("x", {count});
  const void* from = array<const void>("x", x, size, bytes_of(type));
  void* to = array<void>("out", out, size, bytes_of(type));
  py::gil_scoped_release release;
  gelu(from, to, count, type, num_threads, isa.empty() ? isas.front() : isa);
}

}  // namespace

void bind_gelu(py::module_& m) {
  m.def("gelu", &run, py::kw_only(), py::arg("x"), py::arg("out"), py::arg("count"), py::arg("dtype"),
        py::arg("num_threads"), py::arg("isa") = "", "The tanh-approximated GELU; see csrc/gelu.h.");
}

}  // namespace dcar
