#include "add_residual.h"
#include "bindings.h"

namespace py = pybind11;

namespace dcar {
namespace {

OutputType output_type(const std::string& dtype) {
  if (dtype == "float32") return OutputType::kFloat32;
  if (dtype == "float16") return OutputType::kFloat16;
  if (dtype == "bfloat16") return OutputType::kBFloat16;
  fail("dtype is '" + dtype + "', allowed are 'float32', 'float16' and 'bfloat16'");
}

struct AddResidualArrays {
  const int64_t* ids;
  const float* codebook;
  const float* residual;
  void* out;
  OutputType type;

  AddResidualArrays(uintptr_t ids_in, uintptr_t codebook_in, uintptr_t residual_in, uintptr_t out_in, int64_t batch,
                    int64_t tokens, int64_t num_codes, int64_t channels, const std::string& dtype)
      : type(output_type(dtype)) {
    check_size("batch", batch, 0);
    check_size("tokens", tokens, 0);
    check_size("num_codes", num_codes, 1);
    check_size("channels", channels, 1);
    const int64_t size = elements("out", {batch, tokens, channels});
    ids = array<const int64_t>("ids", ids_in, batch * tokens);
    codebook = array<const float>("codebook", codebook_in, elements("codebook", {num_codes, channels}));
    residual = array<const float>("residual", residual_in, 0);  // null: no residual
    out = array<void>("out", out_in, size, type == OutputType::kFloat32 ? 4 : 2);
  }
};

void run(uintptr_t ids, uintptr_t codebook, uintptr_t residual, uintptr_t out, int64_t batch, int64_t tokens,
         int64_t num_codes, int64_t channels, const std::string& dtype, int num_threads) {
  const AddResidualArrays a(ids, codebook, residual, out, batch, tokens, num_codes, channels, dtype);
  check_size("num_threads", num_threads, 1);
  py::gil_scoped_release release;
  add_residual_cpu(a.ids, a.codebook, a.residual, a.out, batch, tokens, num_codes, channels, a.type, num_threads);
}

#ifdef DCAR_FAST_CUDA
void run_cuda(uintptr_t ids, uintptr_t codebook, uintptr_t residual, uintptr_t out, int64_t batch, int64_t tokens,
              int64_t num_codes, int64_t channels, const std::string& dtype, uintptr_t stream) {
  const AddResidualArrays a(ids, codebook, residual, out, batch, tokens, num_codes, channels, dtype);
  if (batch * tokens > std::numeric_limits<int32_t>::max())
    fail("batch * tokens is " + std::to_string(batch * tokens) + ", allowed is at most 2147483647");
  if (batch * tokens == 0) return;
  std::string error;
  {
    py::gil_scoped_release release;
    error = add_residual_cuda(a.ids, a.codebook, a.residual, a.out, batch, tokens, num_codes, channels, a.type,
                              reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("add_residual: " + error);
}
#endif

}  // namespace

void bind_add_residual(py::module_& m) {
  m.def("add_residual", &run, py::kw_only(), py::arg("ids"), py::arg("codebook"), py::arg("residual"), py::arg("out"),
        py::arg("batch"), py::arg("tokens"), py::arg("num_codes"), py::arg("channels"), py::arg("dtype"),
        py::arg("num_threads"), "Decoder input on the CPU; see csrc/add_residual.h.");
#ifdef DCAR_FAST_CUDA
  m.def("add_residual_cuda", &run_cuda, py::kw_only(), py::arg("ids"), py::arg("codebook"), py::arg("residual"),
        py::arg("out"), py::arg("batch"), py::arg("tokens"), py::arg("num_codes"), py::arg("channels"),
        py::arg("dtype"), py::arg("stream"),
        "Decoder input on the current CUDA device; raises RuntimeError with CUDA's message.");
#endif
}

}  // namespace dcar
