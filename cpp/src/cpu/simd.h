// Vectors of the native width of whichever instruction set this translation unit is compiled for, as GCC/Clang vector
// extensions: the arithmetic is plain C++. Only part-filled vectors and non-temporal stores need intrinsics.
//
// Everything lives in an anonymous namespace: each instruction set keeps its own copy, and the linker never picks an
// AVX-512 one for a machine without it (the hazard is described in numpy#25274).
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
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

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <class T>
NK_INLINE Vec<T> splat(T s) {
    return s - Vec<T>{};  // not s + 0: that would turn -0 into +0
}

template <class T>
NK_INLINE Vec<T> load(const char* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
NK_INLINE void store(char* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Requires p aligned to the vector.
template <class T>
NK_INLINE void stream(char* p, Vec<T> v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
    store<T>(p, v);
#endif
}

// The first n lanes, 0 < n < kWidth<T>; no byte beyond them is touched. The other lanes of a load are zero.
template <class T>
NK_INLINE Vec<T> load_first(const char* p, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    } else {
        return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
    }
#else
    Vec<T> v = {};
    for (int i = 0; i < n; ++i) {
        T lane;
        __builtin_memcpy(&lane, p + i * sizeof(T), sizeof(T));
        v[i] = lane;
    }
    return v;
#endif
}

template <class T>
NK_INLINE void store_first(char* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    } else {
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
    }
#else
    for (int i = 0; i < n; ++i) {
        const T lane = v[i];
        __builtin_memcpy(p + i * sizeof(T), &lane, sizeof(T));
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

// The same, straight from memory: the conversion then costs no instruction of its own beside the load, and a sum of
// doubles runs at twice the time of one of floats (0.55 ns against 0.31 ns for 16 elements on a Zen 4).
template <class T>
NK_INLINE Widened<T> load_widened(const char* p) {
#if defined(__AVX512F__) || defined(__AVX__)
    if constexpr (sizeof(T) == 4) {
        const float* f = reinterpret_cast<const float*>(p);
#if defined(__AVX512F__)
        return {
            {(Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(f)), (Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(f + 8))}};
#else
        return {{(Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(f)), (Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(f + 4))}};
#endif
    }
#endif
    return widened<T>(load<T>(p));
}

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

// Selects, and never multiplies: what lies in the lanes from n on may be NaN.
template <class T>
NK_INLINE Vec<T> keep_first(Vec<T> v, int n) {
    using Index = typename IndexOf<T>::type;
    Vec<Index> lane;
    for (int i = 0; i < kWidth<T>; ++i) lane[i] = i;
    return lane < splat<Index>(n) ? v : Vec<T>{};
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
// of lanes only, never on the width of a vector.
template <class T, int K>
NK_INLINE T sum_by_halves(const Vec<T> (&v)[K]) {
    if constexpr (K == 1) {
        return sum_lanes_by_halves<T, kWidth<T>>(v[0]);
    } else {
        Vec<T> half[K / 2];
#pragma GCC unroll 16
        for (int i = 0; i < K / 2; ++i) half[i] = v[i] + v[i + K / 2];
        return sum_by_halves<T, K / 2>(half);
    }
}

}  // namespace
