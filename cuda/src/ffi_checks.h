// What handlers share: saying what XLA handed over, and refusing it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>

#include "gemm.h"
#include "quantize.h"
#include "xla/ffi/api/ffi.h"

namespace jaxfp8 {
namespace ffi = xla::ffi;

inline std::string shape_of(ffi::AnyBuffer const& buffer) {
  std::ostringstream text;
  text << buffer.element_type() << '[';
  char const* separator = "";
  for (int64_t size : buffer.dimensions()) {
    text << separator << size;
    separator = ",";
  }
  text << ']';
  return text.str();
}

template <class... Parts>
ffi::Error refuse(Parts const&... parts) {
  std::ostringstream text;
  text << "jaxfp8: ";
  (text << ... << parts);
  return ffi::Error::InvalidArgument(text.str());
}

inline bool is_matrix(ffi::AnyBuffer const& b, ffi::DataType type) {
  return b.element_type() == type && b.dimensions().size() == 2;
}

// A float32 operand of no axes, or of `size` elements along one of its `rank` axes.
inline bool is_scale(ffi::AnyBuffer const& b, int64_t size, size_t rank) {
  if (b.element_type() != ffi::F32) return false;
  if (b.dimensions().size() == 0) return true;
  return b.dimensions().size() == rank && static_cast<int64_t>(b.element_count()) == size;
}

inline bool is_shaped_as(ffi::AnyBuffer const& a, ffi::AnyBuffer const& b) {
  auto const of_a = a.dimensions(), of_b = b.dimensions();
  return std::equal(of_a.begin(), of_a.end(), of_b.begin(), of_b.end());
}

inline bool is_vector_or_empty(ffi::AnyBuffer const& b, int64_t size) {
  if (b.element_type() != ffi::F32) return false;
  auto const count = static_cast<int64_t>(b.element_count());
  return count == 0 || (b.dimensions().size() == 1 && count == size);
}

inline bool is_scalar_or_empty(ffi::AnyBuffer const& b) {
  return b.element_type() == ffi::F32 &&
         (b.element_count() == 0 || b.dimensions().size() == 0);
}

inline bool find_out(ffi::DataType type, Out* out) {
  if (type == ffi::BF16) *out = Out::kBF16;
  else if (type == ffi::F16) *out = Out::kF16;
  else if (type == ffi::F32) *out = Out::kF32;
  else if (type == ffi::F8E4M3FN) *out = Out::kE4M3;
  else return false;
  return true;
}

inline bool find_in(ffi::DataType type, In* in) {
  if (type == ffi::BF16) *in = In::kBF16;
  else if (type == ffi::F16) *in = In::kF16;
  else if (type == ffi::F32) *in = In::kF32;
  else return false;
  return true;
}

}  // namespace jaxfp8

// The macro declares an extern "C" function; this makes it visible outside the library.
#define JAXFP8_HANDLER(name, function, binding, ...)                                             \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*);      \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding __VA_OPT__(, ) __VA_ARGS__)
