#include "bindings.h"
#include "philox.h"
#include "philox_words.h"

namespace py = pybind11;

namespace dcar {
namespace {

struct PhiloxArrays {
  const uint32_t *counters, *keys;
  uint32_t* words;

  PhiloxArrays(uintptr_t counters_in, uintptr_t keys_in, uintptr_t words_in, int64_t count) {
    check_size("count", count, 0);
    const int64_t size = elements("words", {count, 4});
    counters = array<const uint32_t>("counters", counters_in, size);
    keys = array<const uint32_t>("keys", keys_in, 2 * count);
    words = array<uint32_t>("words", words_in, size);
  }
};

void run(uintptr_t counters, uintptr_t keys, uintptr_t words, int64_t count) {
  const PhiloxArrays a(counters, keys, words, count);
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t* c = a.counters + 4 * i;
    const PhiloxWords drawn = philox4x32({{c[0], c[1], c[2], c[3]}}, a.keys[2 * i], a.keys[2 * i + 1]);
    for (int w = 0; w < 4; ++w) a.words[4 * i + w] = drawn.word[w];
  }
}

#ifdef DCAR_FAST_CUDA
void run_cuda(uintptr_t counters, uintptr_t keys, uintptr_t words, int64_t count, uintptr_t stream) {
  const PhiloxArrays a(counters, keys, words, count);
  if (count > std::numeric_limits<int32_t>::max())
    fail("count is " + std::to_string(count) + ", allowed is at most 2147483647");
  if (count == 0) return;
  const std::string error = philox_words_cuda(a.counters, a.keys, a.words, count, reinterpret_cast<void*>(stream));
  if (!error.empty()) throw std::runtime_error("philox: " + error);
}
#endif

}  // namespace

void bind_philox(py::module_& m) {
  m.def("philox", &run, py::kw_only(), py::arg("counters"), py::arg("keys"), py::arg("words"), py::arg("count"),
        "Words (count, 4) of Philox4x32-10 for counters (count, 4) and keys (count, 2), all uint32.");
#ifdef DCAR_FAST_CUDA
  m.def("philox_cuda", &run_cuda, py::kw_only(), py::arg("counters"), py::arg("keys"), py::arg("words"),
        py::arg("count"), py::arg("stream"), "The same on the current CUDA device.");
#endif
}

}  // namespace dcar
