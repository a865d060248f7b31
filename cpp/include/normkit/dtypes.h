// The dtypes of data. This is the one list of them: the enumeration, the kernels, the walks and the Python module
// follow from it.
#pragma once

#include <cstdint>

namespace normkit {

// Numbers of 16 bits, as they lie in memory: IEEE 754 binary16, and the upper half of a binary32.
struct float16 {
    std::uint16_t bits;
};
struct bfloat16 {
    std::uint16_t bits;
};

//      name      element   arithmetic
#define NORMKIT_FOR_DTYPES(ROW)  \
    ROW(float64, double, double) \
    ROW(float32, float, float)   \
    ROW(float16, float16, float) \
    ROW(bfloat16, bfloat16, float)

enum class Dtype : std::uint8_t {
    none,
#define NORMKIT_ROW(name, element, arithmetic) name,
    NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW
};

}  // namespace normkit
