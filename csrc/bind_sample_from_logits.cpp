#include <algorithm>

#include "bindings.h"
#include "cpu_isa.h"
#include "sample_from_logits.h"

namespace py = pybind11;

namespace dcar {
namespace {

LogitType logit_type(const std::string& dtype) {
  if (dtype == "float32") return LogitType::kFloat32;
  if (dtype == "bfloat16") return LogitType::kBFloat16;
  fail("dtype is '" + dtype + "', allowed are 'float32' and 'bfloat16'");
}

void run(uintptr_t cond, uintptr_t uncond, uintptr_t uniforms, uintptr_t seeds, uintptr_t tokens, uintptr_t ids,
         uintptr_t confidence, int64_t rows, int64_t columns, int64_t cond_stride, int64_t uncond_stride,
         const std::string& dtype, int64_t step, double guidance, double softmax_temperature, double tau,
         int num_threads, const std::string& isa) {
  SampleArguments a{};
  a.type = logit_type(dtype);
  check_size("rows", rows, 0);
  check_size("columns", columns, 1);
  check_size("cond_stride", cond_stride, 0);
  check_size("uncond_stride", uncond_stride, 0);
  check_size("num_threads", num_threads, 1);
  if (step < 0 || step > std::numeric_limits<uint32_t>::max())
    fail("step is " + std::to_string(step) + ", allowed are 0..4294967295");
  const auto& isas = usable_isas();
  if (!isa.empty() && std::find(isas.begin(), isas.end(), isa) == isas.end())
    fail("isa is '" + isa + "', which is not one of cpu_isas()");
  const int64_t size = elements("cond", {rows, columns});
  const size_t itemsize = a.type == LogitType::kFloat32 ? 4 : 2;
  a.cond = array<const void>("cond", cond, size, itemsize);
  a.uncond = array<const void>("uncond", uncond, 0, itemsize);        // null: not guided
  a.uniforms = array<const float>("uniforms", uniforms, 0);          // null: counter noise
  const bool counted = tau != 0 && uniforms == 0;
  a.seeds = array<const int64_t>("seeds", seeds, counted ? rows : 0);
  a.tokens = array<const int64_t>("tokens", tokens, counted ? rows : 0);
  a.ids = array<int64_t>("ids", ids, rows);
  a.confidence = array<float>("confidence", confidence, rows);
  a.rows = rows;
  a.columns = columns;
  a.cond_stride = cond_stride;
  a.uncond_stride = uncond_stride;
  a.step = static_cast<uint32_t>(step);
  a.guidance = static_cast<float>(guidance);
  a.softmax_temperature = static_cast<float>(softmax_temperature);
  a.tau = static_cast<float>(tau);

  py::gil_scoped_release release;
  sample_from_logits(a, num_threads, isa.empty() ? isas.front() : isa);
}

}  // namespace

void bind_sample_from_logits(py::module_& m) {
  m.def("sample_from_logits", &run, py::kw_only(), py::arg("cond"), py::arg("uncond"), py::arg("uniforms"),
        py::arg("seeds"), py::arg("tokens"), py::arg("ids"), py::arg("confidence"), py::arg("rows"),
        py::arg("columns"), py::arg("cond_stride"), py::arg("uncond_stride"), py::arg("dtype"), py::arg("step"),
        py::arg("guidance"), py::arg("softmax_temperature"), py::arg("tau"), py::arg("num_threads"),
        py::arg("isa") = "", "One token per row from logits, on the CPU; see csrc/sample_from_logits.h.");
}

}  // namespace dcar
