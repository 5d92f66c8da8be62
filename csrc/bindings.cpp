// The module dcar_fast._native: C++ and CUDA kernels behind raw pointers.
//
// No torch header is included, so building needs no torch and an upgrade of torch does not break the module. The
// caller (dcar_fast/ops) passes addresses of contiguous tensors of the stated types; what can be checked of plain
// numbers is checked here, before an address is used, and raises ValueError. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "add_residual.h"
#include "cpu_isa.h"
#include "vq_lookup.h"

namespace py = pybind11;

namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_size(const char* name, int64_t value, int64_t least) {
  if (value < least) fail(std::string(name) + " is " + std::to_string(value) + ", allowed is at least " + std::to_string(least));
}

// Number of elements of an array, or ValueError if 8-byte elements could not be addressed.
int64_t elements(const char* name, std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) {
    if (size != 0 && total > std::numeric_limits<int64_t>::max() / 8 / size)
      fail(std::string(name) + " has more elements than an address can reach");
    total *= size;
  }
  return total;
}

// The address `value` as a pointer to `count` elements; null is allowed for empty arrays only.
template <class T>
T* array(const char* name, uintptr_t value, int64_t count, size_t alignment = alignof(T)) {
  if (count > 0 && value == 0) fail(std::string(name) + " is a null pointer");
  if (value % alignment != 0) fail(std::string(name) + " is not aligned to " + std::to_string(alignment) + " bytes");
  return reinterpret_cast<T*>(value);
}

dcar::OutputType output_type(const std::string& dtype) {
  if (dtype == "float32") return dcar::OutputType::kFloat32;
  if (dtype == "float16") return dcar::OutputType::kFloat16;
  if (dtype == "bfloat16") return dcar::OutputType::kBFloat16;
  fail("dtype is '" + dtype + "', allowed are 'float32', 'float16' and 'bfloat16'");
}

void vq_lookup(uintptr_t z, uintptr_t codebook, uintptr_t ids, uintptr_t codes, uintptr_t residual, int64_t rows,
               int64_t num_codes, int64_t channels, int num_threads, const std::string& isa) {
  check_size("rows", rows, 0);
  check_size("num_codes", num_codes, 1);
  check_size("channels", channels, 1);
  check_size("num_threads", num_threads, 1);
  const auto& isas = dcar::usable_isas();
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
  dcar::vq_lookup(z_data, codebook_data, ids_data, codes_data, residual_data, rows, num_codes, channels, num_threads,
                  isa.empty() ? isas.front() : isa);
}

struct AddResidualArrays {
  const int64_t* ids;
  const float* codebook;
  const float* residual;
  void* out;
  dcar::OutputType type;

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
    out = array<void>("out", out_in, size, type == dcar::OutputType::kFloat32 ? 4 : 2);
  }
};

void add_residual(uintptr_t ids, uintptr_t codebook, uintptr_t residual, uintptr_t out, int64_t batch, int64_t tokens,
                  int64_t num_codes, int64_t channels, const std::string& dtype, int num_threads) {
  const AddResidualArrays a(ids, codebook, residual, out, batch, tokens, num_codes, channels, dtype);
  check_size("num_threads", num_threads, 1);
  py::gil_scoped_release release;
  dcar::add_residual_cpu(a.ids, a.codebook, a.residual, a.out, batch, tokens, num_codes, channels, a.type,
                         num_threads);
}

#ifdef DCAR_FAST_CUDA
void add_residual_cuda(uintptr_t ids, uintptr_t codebook, uintptr_t residual, uintptr_t out, int64_t batch,
                       int64_t tokens, int64_t num_codes, int64_t channels, const std::string& dtype,
                       uintptr_t stream) {
  const AddResidualArrays a(ids, codebook, residual, out, batch, tokens, num_codes, channels, dtype);
  if (batch * tokens > std::numeric_limits<int32_t>::max())
    fail("batch * tokens is " + std::to_string(batch * tokens) + ", allowed is at most 2147483647");
  if (batch * tokens == 0) return;
  std::string error;
  {
    py::gil_scoped_release release;
    error = dcar::add_residual_cuda(a.ids, a.codebook, a.residual, a.out, batch, tokens, num_codes, channels, a.type,
                                    reinterpret_cast<void*>(stream));
  }
  if (!error.empty()) throw std::runtime_error("add_residual: " + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ and CUDA kernels of dcar_fast; arrays are passed as addresses. Use dcar_fast.ops instead.";

  m.def("cpu_isas", &dcar::usable_isas, "Instruction sets usable on this CPU, best first.");
  m.def("cpu_isa", [] { return dcar::usable_isas().front(); }, "The instruction set the CPU kernels run with.");
  m.def("cuda_archs", [] { return std::vector<std::string>{DCAR_FAST_CUDA_ARCHS}; },
        "CUDA architectures compiled in, such as '90a' or '100+PTX'; empty without CUDA.");
#ifdef DCAR_FAST_CUDA
  m.def("cuda_compiled", [] { return true; }, "Whether CUDA kernels were compiled in.");
#else
  m.def("cuda_compiled", [] { return false; }, "Whether CUDA kernels were compiled in.");
#endif
  m.def("cuda_left_out", [] { return std::string(DCAR_FAST_CUDA_LEFT_OUT); },
        "Why CUDA kernels were not compiled in; empty if they were.");

  m.def("vq_lookup", &vq_lookup, py::kw_only(), py::arg("z"), py::arg("codebook"), py::arg("ids"), py::arg("codes"),
        py::arg("residual"), py::arg("rows"), py::arg("num_codes"), py::arg("channels"), py::arg("num_threads"),
        py::arg("isa") = "", "Nearest codes on the CPU; see csrc/vq_lookup.h.");
  m.def("add_residual", &add_residual, py::kw_only(), py::arg("ids"), py::arg("codebook"), py::arg("residual"),
        py::arg("out"), py::arg("batch"), py::arg("tokens"), py::arg("num_codes"), py::arg("channels"),
        py::arg("dtype"), py::arg("num_threads"), "Decoder input on the CPU; see csrc/add_residual.h.");
#ifdef DCAR_FAST_CUDA
  m.def("add_residual_cuda", &add_residual_cuda, py::kw_only(), py::arg("ids"), py::arg("codebook"),
        py::arg("residual"), py::arg("out"), py::arg("batch"), py::arg("tokens"), py::arg("num_codes"),
        py::arg("channels"), py::arg("dtype"), py::arg("stream"),
        "Decoder input on the current CUDA device; raises RuntimeError with CUDA's message.");
#endif
}
