#include "bindings.h"
#include "remask.h"

namespace py = pybind11;

namespace dcar {
namespace {

// Strides are those of (rows, tokens), in elements.
Remask checked(uintptr_t ids, std::pair<int64_t, int64_t> ids_strides, uintptr_t confidence,
               std::pair<int64_t, int64_t> confidence_strides, const std::string& dtype, uintptr_t num_masked,
               int64_t num_masked_stride, int64_t mask_id, uintptr_t out, int64_t rows, int64_t tokens) {
  const FloatType type = float_type("dtype", dtype, true);
  check_size("rows", rows, 0);
  check_size("tokens", tokens, 0);
  for (const int64_t stride : {ids_strides.first, ids_strides.second}) check_size("ids stride", stride, 0);
  for (const int64_t stride : {confidence_strides.first, confidence_strides.second})
    check_size("confidence stride", stride, 0);
  check_size("num_masked stride", num_masked_stride, 0);
  const int64_t size = elements("out", {rows, tokens});
  return {array<const int64_t>("ids", ids, size),
          ids_strides.first,
          ids_strides.second,
          array<const void>("confidence", confidence, size, bytes_of(type)),
          confidence_strides.first,
          confidence_strides.second,
          type,
          array<const int64_t>("num_masked", num_masked, rows),
          num_masked_stride,
          mask_id,
          array<int64_t>("out", out, size),
          rows,
          tokens};
}

void run(uintptr_t ids, std::pair<int64_t, int64_t> ids_strides, uintptr_t confidence,
         std::pair<int64_t, int64_t> confidence_strides, const std::string& dtype, uintptr_t num_masked,
         int64_t num_masked_stride, int64_t mask_id, uintptr_t out, int64_t rows, int64_t tokens, int num_threads) {
  const Remask task = checked(ids, ids_strides, confidence, confidence_strides, dtype, num_masked, num_masked_stride,
                              mask_id, out, rows, tokens);
  check_size("num_threads", num_threads, 1);
  py::gil_scoped_release release;
  remask_cpu(task, num_threads);
}

#ifdef DCAR_FAST_CUDA
void run_cuda(uintptr_t ids, std::pair<int64_t, int64_t> ids_strides, uintptr_t confidence,
              std::pair<int64_t, int64_t> confidence_strides, const std::string& dtype, uintptr_t num_masked,
              int64_t num_masked_stride, int64_t mask_id, uintptr_t out, int64_t rows, int64_t tokens,
              uintptr_t stream) {
  const Remask task = checked(ids, ids_strides, confidence, confidence_strides, dtype, num_masked, num_masked_stride,
                              mask_id, out, rows, tokens);
  for (const auto& [name, size] : {std::pair{"rows", rows}, std::pair{"tokens", tokens}})
    if (size > std::numeric_limits<int32_t>::max())
      fail(std::string(name) + " is " + std::to_string(size) + ", allowed is at most 2147483647");
  if (rows == 0 || tokens == 0) return;
  std::string error;
  {
    py::gil_scoped_release release;
    error = remask_cuda(task, reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("remask: " + error);
}
#endif

}  // namespace

void bind_remask(py::module_& m) {
  m.def("remask", &run, py::kw_only(), py::arg("ids"), py::arg("ids_strides"), py::arg("confidence"),
        py::arg("confidence_strides"), py::arg("dtype"), py::arg("num_masked"), py::arg("num_masked_stride"),
        py::arg("mask_id"), py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("num_threads"),
        "Re-masking on the CPU; see csrc/remask.h.");
#ifdef DCAR_FAST_CUDA
  m.def("remask_cuda", &run_cuda, py::kw_only(), py::arg("ids"), py::arg("ids_strides"), py::arg("confidence"),
        py::arg("confidence_strides"), py::arg("dtype"), py::arg("num_masked"), py::arg("num_masked_stride"),
        py::arg("mask_id"), py::arg("out"), py::arg("rows"), py::arg("tokens"), py::arg("stream"),
        "Re-masking on the current CUDA device; raises RuntimeError with CUDA's message.");
#endif
}

}  // namespace dcar
