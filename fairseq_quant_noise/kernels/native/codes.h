// A code as the number of a row of centroids. There is a row for each: 256 for codes of a byte, else 4096.

#pragma once

#include <cstdint>

namespace kernels {

inline int64_t number(uint8_t code) { return code; }
inline int64_t number(int32_t code) { return code & 4095; }

}  // namespace kernels
