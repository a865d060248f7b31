// What follows from the list of dtypes: sizes, the type that arithmetic is done in, and single numbers in and out of
// memory. Vectors of them are in cpu/simd.h.
#pragma once

#include <cstring>
#include <limits>

#include "normkit/normkit.h"

namespace normkit {

// What the list says of an element X, and the way back from a dtype.
template <class X>
struct RowOf;
template <Dtype>
struct Element;
#define NORMKIT_ROW(name, element, arithmetic)       \
    template <>                                      \
    struct RowOf<element> {                          \
        using Arithmetic = arithmetic;               \
        static constexpr Dtype kDtype = Dtype::name; \
    };                                               \
    template <>                                      \
    struct Element<Dtype::name> {                    \
        using type = element;                        \
    };
NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW

template <class X>
constexpr Dtype kDtype = RowOf<X>::kDtype;
template <class X>
using Compute = typename RowOf<X>::Arithmetic;
template <Dtype dtype>
using ElementOf = typename Element<dtype>::type;

// Calls f(X{}) with the element type of a dtype that is not `none`.
template <class F>
auto with_dtype(Dtype dtype, F f) {
    switch (dtype) {
#define NORMKIT_ROW(name, element, arithmetic) \
    case Dtype::name: return f(element{});
        NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW
        case Dtype::none: break;
    }
    __builtin_unreachable();
}

inline index_t size_of(Dtype dtype) {
    return with_dtype(dtype, [](auto x) { return index_t{sizeof x}; });
}

// The dtype that arithmetic on this one is done in.
inline Dtype arithmetic_of(Dtype dtype) {
    return with_dtype(dtype, [](auto x) { return kDtype<Compute<decltype(x)>>; });
}

// Conversions of single numbers. To 16 bits: to the nearest, ties to even; beyond the range, infinity.
inline double to_double(double v) { return v; }
inline double to_double(float v) { return v; }
inline double to_double(bfloat16 v) {
    const std::uint32_t bits = std::uint32_t{v.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline double to_double(float16 v) {
    const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    const double magnitude =
        exponent == 31 ? (fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity())
        : exponent == 0 ? fraction * 0x1p-24
                        : (1024 + fraction) * 0x1p-25 * static_cast<double>(1u << exponent);
    return v.bits >> 15 ? -magnitude : magnitude;
}

inline void from_double(double v, double* out) { *out = v; }
inline void from_double(double v, float* out) { *out = static_cast<float>(v); }

// Bits of the fraction, and the exponents of normal numbers.
template <class X>
struct Format;
template <>
struct Format<float16> {
    static constexpr int kFraction = 10, kLeastExponent = -14, kMostExponent = 15;
};
template <>
struct Format<bfloat16> {
    static constexpr int kFraction = 7, kLeastExponent = -126, kMostExponent = 127;
};

// A double is taken to 16 bits at once, not by way of a float: two roundings are not one.
template <class X>
NORMKIT_HOST_DEVICE std::uint16_t rounded_to_16_bits(double v) {
    constexpr int kFraction = Format<X>::kFraction, kLeastExponent = Format<X>::kLeastExponent,
                  kMostExponent = Format<X>::kMostExponent;
    std::uint64_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    const std::uint16_t sign = static_cast<std::uint16_t>(bits >> 48 & 0x8000);
    bits &= ~std::uint64_t{0} >> 1;
    constexpr std::uint64_t kInfinity = std::uint64_t{2047} << 52;
    constexpr unsigned inf = (kMostExponent - kLeastExponent + 2u) << kFraction;
    if (bits > kInfinity) return static_cast<std::uint16_t>(sign | inf | 1u << (kFraction - 1));
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    if (exponent > kMostExponent) return static_cast<std::uint16_t>(sign | inf);
    // Below the least normal number the last place stays where it is.
    int drop = 52 - kFraction + (exponent < kLeastExponent ? kLeastExponent - exponent : 0);
    if (drop > 54) drop = 54;
    const std::uint64_t significand = (bits & ((std::uint64_t{1} << 52) - 1)) | std::uint64_t{1} << 52;
    std::uint64_t kept = significand >> drop;
    const std::uint64_t rest = significand & ((std::uint64_t{1} << drop) - 1), half = std::uint64_t{1} << (drop - 1);
    if (rest > half || (rest == half && (kept & 1))) ++kept;
    // The leading bit, present in normal numbers only, counts as one more exponent; so does a carry.
    if (exponent >= kLeastExponent) kept += std::uint64_t(exponent - kLeastExponent) << kFraction;
    return static_cast<std::uint16_t>(sign | kept);
}
inline void from_double(double v, float16* out) { out->bits = rounded_to_16_bits<float16>(v); }
inline void from_double(double v, bfloat16* out) { out->bits = rounded_to_16_bits<bfloat16>(v); }

template <class X>
X read(const char* p) {
    X v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline double read_double(const char* p, Dtype dtype) {
    return with_dtype(dtype, [p](auto x) { return to_double(read<decltype(x)>(p)); });
}
inline void write_double(char* p, Dtype dtype, double v) {
    with_dtype(dtype, [p, v](auto x) {
        from_double(v, &x);
        std::memcpy(p, &x, sizeof x);
    });
}

}  // namespace normkit
