#include "bindings.h"
#include "place_tokens.h"

namespace py = pybind11;

namespace dcar {
namespace {

template <class T>
Rows<T> rows_of(const char* name, uintptr_t address, int64_t stride, int64_t count) {
  check_size((std::string(name) + " stride").c_str(), stride, 0);
  return {array<const T>(name, address, count), stride};
}

PlaceTokens::Noise noise_kind(const std::string& name) {
  if (name == "none") return PlaceTokens::kNone;
  if (name == "counter") return PlaceTokens::kCounter;
  if (name == "uniforms") return PlaceTokens::kUniforms;
  fail("noise is '" + name + "', allowed are 'none', 'counter' and 'uniforms'");
}

// Strides are those of the rows, in elements. rows: null for all positions.
void run(uintptr_t ids, int64_t ids_stride, uintptr_t rows, int64_t rows_stride, uintptr_t chosen,
         int64_t chosen_stride, uintptr_t confidence, int64_t confidence_stride, uintptr_t uniforms,
         int64_t uniforms_stride, uintptr_t seeds, int64_t step, uintptr_t num_masked, int64_t mask_id, double tau,
         uintptr_t new_ids, uintptr_t next_rows, int64_t batch, int64_t tokens, int64_t sampled, int64_t next_open,
         const std::string& noise, int num_threads) {
  check_size("batch", batch, 0);
  check_size("tokens", tokens, 0);
  check_size("sampled", sampled, 0);
  check_size("next_open", next_open, 0);
  check_size("num_threads", num_threads, 1);
  if (next_open > tokens) fail("next_open is " + std::to_string(next_open) + ", allowed is at most tokens");
  if (step < 0 || step > std::numeric_limits<uint32_t>::max())
    fail("step is " + std::to_string(step) + ", allowed are 0..4294967295");
  const int64_t size = elements("ids", {batch, tokens}), given = elements("chosen", {batch, sampled});
  if (rows == 0 && given > size) fail("sampled is " + std::to_string(sampled) + ", allowed is at most tokens");
  PlaceTokens task{};
  task.noise = noise_kind(noise);
  task.ids = rows_of<int64_t>("ids", ids, ids_stride, size);
  task.rows = rows_of<int64_t>("rows", rows, rows_stride, 0);
  task.chosen = rows_of<int64_t>("chosen", chosen, chosen_stride, given);
  task.confidence = rows_of<float>("confidence", confidence, confidence_stride, given);
  const bool counted = task.noise == PlaceTokens::kCounter, recorded = task.noise == PlaceTokens::kUniforms;
  task.uniforms = rows_of<float>("uniforms", uniforms, uniforms_stride, recorded ? size : 0);
  task.num_masked = array<const int64_t>("num_masked", num_masked, counted || recorded ? batch : 0);
  task.seeds = array<const int64_t>("seeds", seeds, counted ? batch : 0);
  task.step = static_cast<uint32_t>(step);
  task.mask_id = mask_id;
  task.tau = static_cast<float>(tau);
  task.new_ids = array<int64_t>("new_ids", new_ids, size);
  task.next_rows = array<int64_t>("next_rows", next_rows, elements("next_rows", {batch, next_open}));
  task.batch = batch;
  task.tokens = tokens;
  task.sampled = sampled;
  task.next_open = next_open;
  py::gil_scoped_release release;
  place_tokens(task, num_threads);
}

}  // namespace

void bind_place_tokens(py::module_& m) {
  m.def("place_tokens", &run, py::kw_only(), py::arg("ids"), py::arg("ids_stride"), py::arg("rows"),
        py::arg("rows_stride"), py::arg("chosen"), py::arg("chosen_stride"), py::arg("confidence"),
        py::arg("confidence_stride"), py::arg("uniforms"), py::arg("uniforms_stride"), py::arg("seeds"),
        py::arg("step"), py::arg("num_masked"), py::arg("mask_id"), py::arg("tau"), py::arg("new_ids"),
        py::arg("next_rows"), py::arg("batch"), py::arg("tokens"), py::arg("sampled"), py::arg("next_open"),
        py::arg("noise"), py::arg("num_threads"), "The end of an unmasking step; see csrc/place_tokens.h.");
}

}  // namespace dcar
