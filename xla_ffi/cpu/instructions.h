// The kernels, compiled once for each set of instructions, and which of the sets this machine has.
#ifndef QJAX_XLA_FFI_CPU_INSTRUCTIONS_H_
#define QJAX_XLA_FFI_CPU_INSTRUCTIONS_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "product.h"

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 takes its own _mm512_undefined_ps() for a mistake.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define QJAX_INLINE inline __attribute__((always_inline))

#if defined(__clang__)
#define QJAX_TEXT_OF_PRAGMA(x) _Pragma(#x)
#define QJAX_COMPILE_FOR(set) QJAX_TEXT_OF_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define QJAX_COMPILE_FOR_ALL _Pragma("clang attribute pop")
#else
#define QJAX_TEXT_OF_PRAGMA(x) _Pragma(#x)
#define QJAX_COMPILE_FOR(set) _Pragma("GCC push_options") QJAX_TEXT_OF_PRAGMA(GCC target(set))
#define QJAX_COMPILE_FOR_ALL _Pragma("GCC pop_options")
#endif

namespace qjax::cpu {
namespace {

#if defined(__x86_64__)
namespace avx512_vnni {
QJAX_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")
#define QJAX_VNNI 1
#include "simd_avx512.h"
#include "weight_rows.h"
#include "kernels_int8.h"
#undef QJAX_VNNI
QJAX_COMPILE_FOR_ALL
}  // namespace avx512_vnni

namespace avx512 {
QJAX_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx2,fma,f16c")
#define QJAX_VNNI 0
#include "simd_avx512.h"
#include "weight_rows.h"
#include "kernels.h"
#include "nibbles.h"
#include "quantize_rows.h"
#include "kernels_int8.h"
#undef QJAX_VNNI
QJAX_COMPILE_FOR_ALL
}  // namespace avx512

namespace avx512_bf16 {
QJAX_COMPILE_FOR("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma,f16c")
using namespace avx512;
#include "kernels_bf16.h"
QJAX_COMPILE_FOR_ALL
}  // namespace avx512_bf16

namespace avx2 {
QJAX_COMPILE_FOR("avx2,fma,f16c")
#include "simd_avx2.h"
#include "weight_rows.h"
#include "kernels.h"
#include "nibbles.h"
#include "quantize_rows.h"
#include "kernels_int8.h"
QJAX_COMPILE_FOR_ALL
}  // namespace avx2
#endif

namespace portable {
#include "simd_portable.h"
#include "weight_rows.h"
#include "kernels.h"
#include "nibbles.h"
#include "quantize_rows.h"
#include "kernels_int8.h"
}  // namespace portable

bool Always() { return true; }
#if defined(__x86_64__)
bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }  // and F16C, all of them
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
bool HasBf16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }
bool HasVnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// Best first: for x as floats, and for x as int8.
constexpr Instructions kForFloats[] = {
#if defined(__x86_64__)
    {"avx512_bf16", HasBf16, avx512_bf16::Prepare, avx512_bf16::Multiply, avx512::PackNibbles,
     avx512::QuantizeRow},
    {"avx512", HasAvx512, avx512::Prepare, avx512::Multiply, avx512::PackNibbles,
     avx512::QuantizeRow},
    {"avx2", HasAvx2, avx2::Prepare, avx2::Multiply, avx2::PackNibbles,
     avx2::QuantizeRow},
#endif
    {"portable", Always, portable::Prepare, portable::Multiply, portable::PackNibbles,
     portable::QuantizeRow},
};
constexpr Instructions kForInt8[] = {
#if defined(__x86_64__)
    {"avx512_vnni", HasVnni, avx512_vnni::PrepareCodes, avx512_vnni::MultiplyInt8, nullptr, nullptr},
    {"avx512", HasAvx512, avx512::PrepareCodes, avx512::MultiplyInt8, nullptr, nullptr},
    {"avx2", HasAvx2, avx2::PrepareCodes, avx2::MultiplyInt8, nullptr, nullptr},
#endif
    {"portable", Always, portable::PrepareCodes, portable::MultiplyInt8, nullptr, nullptr},
};

template <size_t kCount>
const Instructions* Find(const Instructions (&sets)[kCount], std::string_view name) {
  for (const Instructions& set : sets)
    if ((name.empty() || name == set.name) && set.available()) return &set;
  return nullptr;
}

template <size_t kCount>
std::string NamesOf(const Instructions (&sets)[kCount]) {
  std::string found;
  for (const Instructions& set : sets)
    if (set.available()) found += (found.empty() ? "" : " ") + std::string(set.name);
  return found;
}

}  // namespace
}  // namespace qjax::cpu

#endif  // QJAX_XLA_FFI_CPU_INSTRUCTIONS_H_
