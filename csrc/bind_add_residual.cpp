#include <tuple>

#include "add_residual.h"
#include "bindings.h"

namespace py = pybind11;

namespace dcar {
namespace {

using Strides = std::tuple<int64_t, int64_t, int64_t>;  // of (batch, tokens, channels), in elements

// `residual` may be null; its type and strides then mean nothing.
AddResidual checked(uintptr_t ids, uintptr_t codebook, const std::string& codebook_dtype, uintptr_t residual,
                    const std::string& residual_dtype, const Strides& residual_strides, uintptr_t out,
                    const std::string& dtype, int64_t batch, int64_t tokens, int64_t num_codes, int64_t channels) {
  const FloatType codebook_type = float_type("codebook_dtype", codebook_dtype);
  const FloatType residual_type = float_type("residual_dtype", residual_dtype);
  const FloatType out_type = float_type("dtype", dtype);
  check_size("batch", batch, 0);
  check_size("tokens", tokens, 0);
  check_size("num_codes", num_codes, 1);
  check_size("channels", channels, 1);
  const auto [image, token, channel] = residual_strides;
  for (const int64_t stride : {image, token, channel}) check_size("residual stride", stride, 0);
  const int64_t size = elements("out", {batch, tokens, channels});
  return {array<const int64_t>("ids", ids, batch * tokens),
          array<const void>("codebook", codebook, elements("codebook", {num_codes, channels}), bytes_of(codebook_type)),
          codebook_type,
          array<const void>("residual", residual, 0, bytes_of(residual_type)),
          residual_type,
          image,
          token,
          channel,
          array<void>("out", out, size, bytes_of(out_type)),
          out_type,
          batch,
          tokens,
          num_codes,
          channels};
}

void run(uintptr_t ids, uintptr_t codebook, const std::string& codebook_dtype, uintptr_t residual,
         const std::string& residual_dtype, const Strides& residual_strides, uintptr_t out, const std::string& dtype,
         int64_t batch, int64_t tokens, int64_t num_codes, int64_t channels, int num_threads) {
  const AddResidual task = checked(ids, codebook, codebook_dtype, residual, residual_dtype, residual_strides, out,
                                   dtype, batch, tokens, num_codes, channels);
  check_size("num_threads", num_threads, 1);
  py::gil_scoped_release release;
  add_residual_cpu(task, num_threads);
}

#ifdef DCAR_FAST_CUDA
void run_cuda(uintptr_t ids, uintptr_t codebook, const std::string& codebook_dtype, uintptr_t residual,
              const std::string& residual_dtype, const Strides& residual_strides, uintptr_t out,
              const std::string& dtype, int64_t batch, int64_t tokens, int64_t num_codes, int64_t channels,
              uintptr_t stream) {
  const AddResidual task = checked(ids, codebook, codebook_dtype, residual, residual_dtype, residual_strides, out,
                                   dtype, batch, tokens, num_codes, channels);
  if (batch * tokens > std::numeric_limits<int32_t>::max())
    fail("batch * tokens is " + std::to_string(batch * tokens) + ", allowed is at most 2147483647");
  if (batch * tokens == 0) return;
  std::string error;
  {
    py::gil_scoped_release release;
    error = add_residual_cuda(task, reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("add_residual: " + error);
}
#endif

}  // namespace

void bind_add_residual(py::module_& m) {
  m.def("add_residual", &run, py::kw_only(), py::arg("ids"), py::arg("codebook"), py::arg("codebook_dtype"),
        py::arg("residual"), py::arg("residual_dtype"), py::arg("residual_strides"), py::arg("out"), py::arg("dtype"),
        py::arg("batch"), py::arg("tokens"), py::arg("num_codes"), py::arg("channels"), py::arg("num_threads"),
        "Decoder input on the CPU; see csrc/add_residual.h.");
#ifdef DCAR_FAST_CUDA
  m.def("add_residual_cuda", &run_cuda, py::kw_only(), py::arg("ids"), py::arg("codebook"), py::arg("codebook_dtype"),
        py::arg("residual"), py::arg("residual_dtype"), py::arg("residual_strides"), py::arg("out"), py::arg("dtype"),
        py::arg("batch"), py::arg("tokens"), py::arg("num_codes"), py::arg("channels"), py::arg("stream"),
        "Decoder input on the current CUDA device; raises RuntimeError with CUDA's message.");
#endif
}

}  // namespace dcar
