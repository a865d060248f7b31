// Vectors of the native width of whichever instruction set this translation unit is compiled for, as GCC/Clang vector
// extensions: the arithmetic is plain C++. Only part-filled vectors and non-temporal stores need intrinsics.
//
// Everything lives in an anonymous namespace: each instruction set keeps its own copy, and the linker never picks an
// AVX-512 one for a machine without it (the hazard is described in numpy#25274).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../dtype.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NK_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Elements are of type X in memory and of type Compute<X> in registers: Vec<X> is a vector of those, and loading and
// storing convert.
template <class X>
using Compute = normkit::Compute<X>;

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class X>
using Vec = typename VectorOf<Compute<X>>::type;

template <class X>
constexpr int kWidth = kVectorBytes / sizeof(Compute<X>);

// What a vector takes in memory.
template <class X>
constexpr int kMemoryBytes = kWidth<X> * sizeof(X);

template <class X>
NK_INLINE Vec<X> splat(Compute<X> s) {
    return s - Vec<X>{};  // not s + 0: that would turn -0 into +0
}

// ------------------------------------------------------------------------------------------- conversions of 16 bits

typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t Signed __attribute__((vector_size(kVectorBytes)));

// What lies in memory as one Raw<X> a vector: the vector itself, or half a vector of 16-bit numbers.
template <class X>
struct RawOf {
    using type = Vec<X>;
};
template <>
struct RawOf<normkit::float16> {
    using type = Halves;
};
template <>
struct RawOf<normkit::bfloat16> {
    using type = Halves;
};
template <class X>
using Raw = typename RawOf<X>::type;

#if !defined(__F16C__) && !defined(__aarch64__)
// float16 by integers, as functions of their own: in every loop they would be half of what there is to compile.

inline __attribute__((noinline)) Vec<float> decoded_float16(Halves raw) {
    // The exponent is rebased from 15 to 127. Infinity and NaN need the step once more; a subnormal number gets the
    // leading bit 2^-14 that it lacks, and loses it again in a subtraction, which is exact.
    const Bits bits = __builtin_convertvector(raw, Bits);
    const Bits sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13, exponent = magnitude & (31u << 23);
    const Bits normal = magnitude + (112u << 23);
    const Bits subnormal = (Bits)((Vec<float>)(normal + (1u << 23)) - splat<float>(0x1p-14f));
    const Bits infinite = normal + (112u << 23);
    return (Vec<float>)(sign | (exponent == 0u ? subnormal : exponent == (31u << 23) ? infinite : normal));
}

inline __attribute__((noinline)) Halves encoded_float16(Vec<float> v) {
    // Half a unit less one is added below the last bit that is kept, and one more where that bit is odd. Below 2^-14
    // the sum with 0.5, whose last place is that of a subnormal float16, does the rounding.
    const Bits bits = (Bits)v, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Bits subnormal = (Bits)((Vec<float>)magnitude + splat<float>(0.5f)) - (126u << 23);
    const Signed order = (Signed)magnitude;
    const Bits finite = order < (113 << 23) ? subnormal : normal;
    const Bits infinity = Bits{} + 0x7c00;
    const Bits all = order >= (143 << 23) ? infinity : finite;
    return __builtin_convertvector(sign | (v == v ? all : infinity | 0x200), Halves);
}
#endif

template <class X>
NK_INLINE Vec<X> decoded(Raw<X> raw) {
    if constexpr (std::is_same_v<X, normkit::bfloat16>) {
        // Intrinsics, because GCC 12 widens half a vector at a time and joins them.
#if defined(__AVX512F__)
        return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)raw), 16);
#elif defined(__AVX2__)
        return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)raw), 16);
#else
        return (Vec<float>)(__builtin_convertvector(raw, Bits) << 16);
#endif
    } else if constexpr (std::is_same_v<X, normkit::float16>) {
#if defined(__AVX512F__)
        return (Vec<float>)_mm512_cvtph_ps((__m256i)raw);
#elif defined(__F16C__)
        return (Vec<float>)_mm256_cvtph_ps((__m128i)raw);
#elif defined(__aarch64__)
        return (Vec<float>)vcvt_f32_f16((float16x4_t)raw);
#else
        return decoded_float16(raw);
#endif
    } else {
        return raw;
    }
}

#if defined(__AVX512BW__)
NK_INLINE __m512i upper_halves() {
    return _mm512_castsi256_si512(_mm256_setr_epi16(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
}
#endif

// To the nearest, ties to even.
template <class X>
NK_INLINE Raw<X> encoded(Vec<X> v) {
    if constexpr (std::is_same_v<X, normkit::bfloat16>) {
        // Half a unit less one is added below the last bit that is kept, and one more where that bit is odd. Not to a
        // NaN: that would carry into the sign. Its upper half is a NaN as well, since it is quiet or was decoded.
        const Bits bits = (Bits)v;
#if defined(__AVX512BW__)
        const __m512i half = _mm512_mask_blend_epi32(_mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(0x10000)),
                                                     _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
        const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
        const __m512i nearest = _mm512_mask_add_epi32((__m512i)bits, number, (__m512i)bits, half);
        // One instruction in place of a shift and a narrowing of two.
        return (Halves)_mm512_castsi512_si256(_mm512_permutexvar_epi16(upper_halves(), nearest));
#else
        const Bits nearest = bits + 0x7fff + (bits >> 16 & 1);
        return __builtin_convertvector((v == v ? nearest : bits) >> 16, Halves);
#endif
    } else if constexpr (std::is_same_v<X, normkit::float16>) {
#if defined(__AVX512F__)
        return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
        return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
        return (Halves)vcvt_f16_f32((float32x4_t)v);
#else
        return encoded_float16(v);
#endif
    } else {
        return v;
    }
}

// ------------------------------------------------------------------------------------------------- loads and stores

template <class X>
NK_INLINE Vec<X> load(const char* p) {
    Raw<X> raw;
    __builtin_memcpy(&raw, p, sizeof raw);
    return decoded<X>(raw);
}

template <class X>
NK_INLINE void store(char* p, Vec<X> v) {
    const Raw<X> raw = encoded<X>(v);
    __builtin_memcpy(p, &raw, sizeof raw);
}

// Requires p aligned to kMemoryBytes<X>.
template <class X>
NK_INLINE void stream_raw(char* p, Raw<X> raw) {
#if defined(__SSE2__)
    if constexpr (sizeof raw == 8) {
        long long bits;
        __builtin_memcpy(&bits, &raw, sizeof bits);
        _mm_stream_si64(reinterpret_cast<long long*>(p), bits);
        return;
    } else if constexpr (sizeof raw == 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)raw);
        return;
    }
#endif
#if defined(__AVX__)
    if constexpr (sizeof raw == 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)raw);
        return;
    }
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof raw == 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)raw);
        return;
    }
#endif
    __builtin_memcpy(p, &raw, sizeof raw);
}
template <class X>
NK_INLINE void stream(char* p, Vec<X> v) {
    stream_raw<X>(p, encoded<X>(v));
}

// n elements, 0 < n < kWidth<X>, as the lanes from `first` on; no byte beside them is touched, and other lanes are
// zero.
template <class X>
NK_INLINE Vec<X> load_part(const char* p, int first, int n) {
#if defined(__AVX512F__)
    const unsigned lanes = ((1u << n) - 1) << first;
    p -= first * static_cast<int>(sizeof(X));
    if constexpr (sizeof(X) == 2) {
        return decoded<X>((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
    } else if constexpr (sizeof(X) == 4) {
        return (Vec<X>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
    } else {
        return (Vec<X>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p);
    }
#else
    Raw<X> raw = {};
    for (int i = 0; i < n; ++i) {
        auto lane = raw[0];
        __builtin_memcpy(&lane, p + i * sizeof(X), sizeof(X));
        raw[first + i] = lane;
    }
    return decoded<X>(raw);
#endif
}
template <class X>
NK_INLINE Vec<X> load_first(const char* p, int n) {
    return load_part<X>(p, 0, n);
}
template <class X>
NK_INLINE Vec<X> load_last(const char* p, int n) {
    return load_part<X>(p, kWidth<X> - n, n);
}

// P slots of a vector, as long as each other, of which the first n lanes come from memory, `step` bytes from slot to
// slot, and the others are zero; so are all of a slot that is not there. No byte beside them is touched.
template <class X, int P>
class Slots {
  public:
    static constexpr int kLanes = kWidth<X> / P;  // n at most

    NK_INLINE Slots(int n, int there) {
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) {
            slot_[i] = i < there ? (1u << n) - 1 : 0;
            lanes_[i] = slot_[i] << i * kLanes;
        }
    }
    NK_INLINE Vec<X> load(const char* p, std::ptrdiff_t step) const {
        Raw<X> raw = {};
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i, p += step) add(raw, p, i);
        return decoded<X>(raw);
    }

  private:
#if defined(__AVX512F__)
    // A load as long as the part and a shuffle: one as long as a vector, all but the part masked, mostly crosses a
    // line.
    NK_INLINE void add(Raw<X>& raw, const char* p, int i) const {
        if constexpr (sizeof(X) == 2) {
            p -= i * kLanes * static_cast<int>(sizeof(X));
            raw = (Halves)_mm256_mask_loadu_epi16((__m256i)raw, static_cast<__mmask16>(lanes_[i]), p);
        } else if constexpr (sizeof(X) == 4) {
            const auto mask = static_cast<__mmask16>(lanes_[i]);
            const auto slot = static_cast<__mmask8>(slot_[i]);
            if constexpr (kLanes == 8) {
                raw = (Vec<X>)_mm512_mask_broadcast_f32x8((__m512)raw, mask, _mm256_maskz_loadu_ps(slot, p));
            } else if constexpr (kLanes == 4) {
                raw = (Vec<X>)_mm512_mask_broadcast_f32x4((__m512)raw, mask, _mm_maskz_loadu_ps(slot, p));
            } else {
                static_assert(kLanes == 2);
                raw = (Vec<X>)_mm512_mask_broadcast_f32x2((__m512)raw, mask, _mm_maskz_loadu_ps(slot, p));
            }
        } else {
            const auto mask = static_cast<__mmask8>(lanes_[i]), slot = static_cast<__mmask8>(slot_[i]);
            if constexpr (kLanes == 4) {
                raw = (Vec<X>)_mm512_mask_broadcast_f64x4((__m512d)raw, mask, _mm256_maskz_loadu_pd(slot, p));
            } else if constexpr (kLanes == 2) {
                raw = (Vec<X>)_mm512_mask_broadcast_f64x2((__m512d)raw, mask, _mm_maskz_loadu_pd(slot, p));
            } else {
                static_assert(kLanes == 1);
                raw = (Vec<X>)_mm512_mask_broadcastsd_pd((__m512d)raw, mask, _mm_maskz_loadu_pd(slot, p));
            }
        }
    }
#else
    NK_INLINE void add(Raw<X>& raw, const char* p, int i) const {
        for (int k = 0; slot_[i] >> k != 0; ++k) {
            auto lane = raw[0];
            __builtin_memcpy(&lane, p + k * static_cast<int>(sizeof(X)), sizeof(X));
            raw[i * kLanes + k] = lane;
        }
    }
#endif

    unsigned slot_[P], lanes_[P];  // masks
};

// The first n lanes; no byte beyond them is touched.
template <class X>
NK_INLINE void store_first(char* p, Vec<X> v, int n) {
#if defined(__AVX512F__)
    const unsigned lanes = (1u << n) - 1;
    if constexpr (sizeof(X) == 2) {
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes), (__m256i)encoded<X>(v));
    } else if constexpr (sizeof(X) == 4) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), (__m512)v);
    } else {
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), (__m512d)v);
    }
#else
    const Raw<X> raw = encoded<X>(v);
    for (int i = 0; i < n; ++i) {
        const auto lane = raw[i];
        __builtin_memcpy(p + i * sizeof(X), &lane, sizeof(X));
    }
#endif
}

// A vector's lanes as doubles: the first half of them, then the second. For double it is the vector itself.
template <class T>
struct Widened {
    static constexpr int kVectors = sizeof(double) / sizeof(T);
    Vec<double> v[kVectors];
};
template <class T>
NK_INLINE Widened<T> widened(Vec<T> v) {
    if constexpr (sizeof(T) == sizeof(double)) {
        return {{v}};
    } else {
        // Intrinsics, because GCC 12 widens half a vector in two quarters and joins them.
#if defined(__AVX512F__)
        return {{(Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
                 (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))}};
#elif defined(__AVX__)
        return {{(Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
                 (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))}};
#else
        return {{__builtin_convertvector(__builtin_shufflevector(v, v, 0, 1), Vec<double>),
                 __builtin_convertvector(__builtin_shufflevector(v, v, 2, 3), Vec<double>)}};
#endif
    }
}

// Back, rounded to the nearest.
template <class T>
NK_INLINE Vec<T> narrowed(Widened<T> w) {
    if constexpr (sizeof(T) == sizeof(double)) {
        return w.v[0];
    } else {
#if defined(__AVX512F__)
        return (Vec<T>)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)w.v[0])),
                                          _mm512_cvtpd_ps((__m512d)w.v[1]), 1);
#elif defined(__AVX__)
        return (Vec<T>)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)w.v[1]), _mm256_cvtpd_ps((__m256d)w.v[0]));
#else
        constexpr int N = kWidth<double>;
        typedef T Half __attribute__((vector_size(N * sizeof(T))));
        return __builtin_shufflevector(__builtin_convertvector(w.v[0], Half), __builtin_convertvector(w.v[1], Half), 0,
                                       1, 2, 3);
#endif
    }
}

// The same, straight from memory: the conversion then costs no instruction of its own beside the load, and a sum of
// doubles runs at twice the time of one of floats (0.55 ns against 0.31 ns for 16 elements on a Zen 4).
template <class X>
NK_INLINE Widened<Compute<X>> load_widened(const char* p) {
#if defined(__AVX512F__) || defined(__AVX__)
    if constexpr (std::is_same_v<X, float>) {
        const float* f = reinterpret_cast<const float*>(p);
#if defined(__AVX512F__)
        return {
            {(Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(f)), (Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(f + 8))}};
#else
        return {{(Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(f)), (Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(f + 4))}};
#endif
    }
#endif
    return widened<Compute<X>>(load<X>(p));
}

// Doubles to 16 bits in one rounding, as rounded_to_16_bits of one number: what lies below the last bit that is kept is
// rounded by an addition; below the least normal number the sum with a power of two, whose last place is that of a
// subnormal number, does it.
typedef std::uint16_t Narrow __attribute__((vector_size(kVectorBytes / sizeof(double) * sizeof(std::uint16_t))));
template <class X>
NK_INLINE Narrow rounded_to_16_bits(Vec<double> v) {
    using Format = normkit::Format<X>;
    typedef std::int64_t Integers __attribute__((vector_size(kVectorBytes)));
    constexpr int kDrop = 52 - Format::kFraction;
    constexpr std::int64_t kOne = std::int64_t{1} << 52;  // of the exponent, whose bias is 1023
    constexpr auto power = [](int exponent) { return (exponent + 1023) * kOne; };
    constexpr std::int64_t kFirst = power(Format::kLeastExponent - Format::kFraction + 52);
    constexpr std::int64_t kInfinity = std::int64_t{Format::kMostExponent - Format::kLeastExponent + 2}
                                       << Format::kFraction;
    const Integers bits = (Integers)v, magnitude = bits & ~(std::int64_t{1} << 63);
    const Integers first = Integers{} + kFirst;
    const Integers normal = (magnitude - power(Format::kLeastExponent - 1) + ((std::int64_t{1} << (kDrop - 1)) - 1) +
                             (magnitude >> kDrop & 1)) >>
                            kDrop;
    const Integers subnormal = (Integers)((Vec<double>)magnitude + (Vec<double>)first) - kFirst;
    const Integers finite = magnitude < power(Format::kLeastExponent) ? subnormal : normal;
    const Integers number = magnitude >= power(Format::kMostExponent + 1) ? Integers{} + kInfinity : finite;
    const Integers any = magnitude > power(1024) ? Integers{} + (kInfinity | 1 << (Format::kFraction - 1)) : number;
    return __builtin_convertvector(any | (bits >> 48 & 0x8000), Narrow);
}

// Additions by the units that multiply. Zen 4 has two that add, which convert and subtract as well, and two that
// multiply and add in one; v * 1 + sum is sum + v to the bit. Sums of doubles that were floats take 0.8 of the time so.
template <class T>
struct Adder {
    Vec<T> one = splat<T>(1);

    NK_INLINE Adder() {
#if defined(__AVX512F__)
        asm("" : "+v"(one));  // to a compiler that knew it, this would be an addition
#endif
    }
    NK_INLINE Vec<T> operator()(Vec<T> sum, Vec<T> v) const {
#if defined(__AVX512F__)
        // Named, although it is the rounding in force: tests/check_objects.py knows by it that no compiler has fused.
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        if constexpr (sizeof(T) == sizeof(float)) {
            return (Vec<T>)_mm512_fmadd_round_ps((__m512)v, (__m512)one, (__m512)sum, kNearest);
        } else {
            return (Vec<T>)_mm512_fmadd_round_pd((__m512d)v, (__m512d)one, (__m512d)sum, kNearest);
        }
#else
        return sum + v;
#endif
    }
    // Every other one of vectors i = 0, 1, ..., where all of them would be too many.
    NK_INLINE Vec<T> by_turns(int i, Vec<T> sum, Vec<T> v) const { return i % 2 ? (*this)(sum, v) : sum + v; }
};

template <class T>
struct IndexOf;
template <>
struct IndexOf<float> {
    using type = std::int32_t;
};
template <>
struct IndexOf<double> {
    using type = std::int64_t;
};

// The first n lanes of `a`, the others of `b`.
template <class T>
NK_INLINE Vec<T> join_at(Vec<T> a, Vec<T> b, int n) {
    using Index = typename IndexOf<T>::type;
    typename VectorOf<Index>::type lane;
    for (int i = 0; i < kWidth<T>; ++i) lane[i] = i;
    return lane < Index{n} ? a : b;
}

// Selects, and never multiplies: what lies in the lanes from n on may be NaN.
template <class T>
NK_INLINE Vec<T> keep_first(Vec<T> v, int n) {
    return join_at<T>(v, Vec<T>{}, n);
}

template <class T>
NK_INLINE Vec<T> keep_last(Vec<T> v, int n) {
    return join_at<T>(Vec<T>{}, v, kWidth<T> - n);
}

template <class T, int N>
struct Lanes {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <class T, int N>
NK_INLINE T sum_lanes_by_halves(typename Lanes<T, N>::type v) {
    if constexpr (N == 16) {
        return sum_lanes_by_halves<T, 8>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                                         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
    } else if constexpr (N == 8) {
        return sum_lanes_by_halves<T, 4>(__builtin_shufflevector(v, v, 0, 1, 2, 3) +
                                         __builtin_shufflevector(v, v, 4, 5, 6, 7));
    } else if constexpr (N == 4) {
        return (v[0] + v[2]) + (v[1] + v[3]);
    } else {
        return v[0] + v[1];
    }
}

// The sum of K * kWidth lanes by halves: lane i takes lane i + half. The order of the additions depends on the number
// of lanes only, never on the width of a vector. First down to one vector,
template <class V, int K>
NK_INLINE V vectors_by_halves(const V (&v)[K]) {
    if constexpr (K == 1) {
        return v[0];
    } else {
        V half[K / 2];
#pragma GCC unroll 16
        for (int i = 0; i < K / 2; ++i) half[i] = v[i] + v[i + K / 2];
        return vectors_by_halves(half);
    }
}
// and then to one number,
template <class T, int K>
NK_INLINE T sum_by_halves(const Vec<T> (&v)[K]) {
    return sum_lanes_by_halves<T, kWidth<T>>(vectors_by_halves(v));
}
// or eight vectors to a number each.
template <class T>
using Eight = typename Lanes<T, 8>::type;
template <class T>
NK_INLINE Eight<T> lanes_by_halves(const Vec<T> (&v)[8]) {
#if defined(__AVX512F__)
    // Quarters of vectors change places, whatever their lanes, and then halves of quarters; of floats a step is left.
    const auto halves = [&](int a, int b) {
        const __m512d va = (__m512d)v[a], vb = (__m512d)v[b];
        return (__m512d)((Vec<T>)_mm512_shuffle_f64x2(va, vb, 0x44) + (Vec<T>)_mm512_shuffle_f64x2(va, vb, 0xee));
    };
    const auto quarters = [](__m512d a, __m512d b) {
        return (__m512d)((Vec<T>)_mm512_shuffle_f64x2(a, b, 0x88) + (Vec<T>)_mm512_shuffle_f64x2(a, b, 0xdd));
    };
    const __m512d even = quarters(halves(0, 2), halves(4, 6)), odd = quarters(halves(1, 3), halves(5, 7));
    const Vec<T> sums = (Vec<T>)_mm512_unpacklo_pd(even, odd) + (Vec<T>)_mm512_unpackhi_pd(even, odd);
    if constexpr (sizeof(T) == sizeof(double)) {
        return sums;
    } else {
        const Vec<T> ones = sums + (Vec<T>)_mm512_movehdup_ps((__m512)sums);
        return (Eight<T>)_mm512_cvtepi64_epi32((__m512i)ones);  // those of even lanes
    }
#else
    Eight<T> sums;
    for (int i = 0; i < 8; ++i) sums[i] = sum_lanes_by_halves<T, kWidth<T>>(v[i]);
    return sums;
#endif
}

// ------------------------------------------------------------------------------- eight numbers, whatever a vector is

// Intrinsics, because GCC 12 converts halves and joins them.
NK_INLINE Eight<float> narrowed(Eight<double> v) {
#if defined(__AVX512F__)
    return (Eight<float>)_mm512_cvtpd_ps((__m512d)v);
#else
    return __builtin_convertvector(v, Eight<float>);
#endif
}
NK_INLINE Eight<double> widened(Eight<float> v) {
#if defined(__AVX512F__)
    return (Eight<double>)_mm512_cvtps_pd((__m256)v);
#else
    return __builtin_convertvector(v, Eight<double>);
#endif
}

template <class T>
NK_INLINE Eight<T> load_eight(const T* p) {
    Eight<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
NK_INLINE void store_eight(T* p, const Eight<T>& v) {
    __builtin_memcpy(p, &v, sizeof v);
}

NK_INLINE Eight<double> square_roots(Eight<double> v) {
#if defined(__AVX512F__)
    return (Eight<double>)_mm512_sqrt_pd((__m512d)v);
#else
    for (int i = 0; i < 8; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
#endif
}

// Of a comparison.
NK_INLINE bool all_of(Eight<std::int64_t> mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi64_mask((__m512i)mask) == 0xff;
#else
    std::int64_t all = -1;
    for (int i = 0; i < 8; ++i) all &= mask[i];
    return all != 0;
#endif
}

}  // namespace
