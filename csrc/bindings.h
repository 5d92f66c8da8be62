// What the bindings of the ops share. An op's bind_<op>.cpp defines bind_<op>, which bindings.cpp calls.
//
// The caller (dcar_fast/ops) passes addresses of contiguous tensors of the stated types; what can be checked of plain
// numbers is checked here, before an address is used, and raises ValueError. The GIL is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "float_type.h"

namespace dcar {

void bind_add_residual(pybind11::module_& m);
void bind_gelu(pybind11::module_& m);
void bind_latent_noise(pybind11::module_& m);
void bind_philox(pybind11::module_& m);
void bind_place_tokens(pybind11::module_& m);
void bind_remask(pybind11::module_& m);
void bind_sample_from_logits(pybind11::module_& m);
void bind_vq_lookup(pybind11::module_& m);

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void check_size(const char* name, int64_t value, int64_t least) {
  if (value < least) fail(std::string(name) + " is " + std::to_string(value) + ", allowed is at least " + std::to_string(least));
}

// The type named `dtype`, which `argument` has; float64 only where it is allowed.
inline FloatType float_type(const char* argument, const std::string& dtype, bool float64 = false) {
  if (dtype == "float16") return FloatType::kFloat16;
  if (dtype == "bfloat16") return FloatType::kBFloat16;
  if (dtype == "float32") return FloatType::kFloat32;
  if (dtype == "float64" && float64) return FloatType::kFloat64;
  fail(std::string(argument) + " is '" + dtype + "', allowed are 'float16', 'bfloat16', 'float32'" +
       (float64 ? " and 'float64'" : ""));
}

// Number of elements of an array, or ValueError if 8-byte elements could not be addressed.
inline int64_t elements(const char* name, std::initializer_list<int64_t> sizes) {
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

}  // namespace dcar
