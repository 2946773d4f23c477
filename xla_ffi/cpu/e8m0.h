// What the bytes of e8m0 stand for, as a table.
#ifndef QJAX_XLA_FFI_CPU_E8M0_H_
#define QJAX_XLA_FFI_CPU_E8M0_H_

#include <array>

namespace qjax::cpu {

// OCP MX 1.0, section 5.4.1: 2^(byte - 127), 255 is NaN.
constexpr std::array<float, 256> MakeE8M0Values() {
  std::array<float, 256> values{};
  values[127] = 1;
  for (int byte = 126; byte >= 0; --byte) values[byte] = values[byte + 1] / 2;
  for (int byte = 128; byte < 255; ++byte) values[byte] = values[byte - 1] * 2;
  values[255] = __builtin_nanf("");
  return values;
}

constexpr std::array<float, 256> kE8M0Values = MakeE8M0Values();

}  // namespace qjax::cpu

#endif  // QJAX_XLA_FFI_CPU_E8M0_H_
