// The list of instruction sets, and the choice among them. CMake compiles kernels.cpp once for each.

#include <atomic>
#include <cstdlib>

#if defined(NORMKIT_X86)
#include <cpuid.h>
#endif

#include "kernels.h"

namespace normkit {
namespace cpu {

#define NORMKIT_ROW(dtype, element, arithmetic)             \
    extern const Kernels<element> kernels_baseline_##dtype; \
    extern const Kernels<element> kernels_avx2_##dtype;     \
    extern const Kernels<element> kernels_avx512_##dtype;
NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW

namespace {

bool always() { return true; }
#if defined(NORMKIT_X86)
bool has_avx2() {
    // Clang's __builtin_cpu_supports does not know f16c.
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

// AMD family 1Ah (Zen 5) and later. What was measured before, a Zen 4, waits for too few lines at a time to L1.
bool asks_l1() {
#if defined(NORMKIT_X86)
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || c != signature_AMD_ecx || d != signature_AMD_edx) {
        return false;
    }
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    return (a >> 8 & 0xF) + (a >> 20 & 0xFF) >= 0x1A;
#else
    return false;
#endif
}

bool is_intel() {
#if defined(NORMKIT_X86)
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

#define NORMKIT_BASELINE(dtype, element, arithmetic) &kernels_baseline_##dtype,
#define NORMKIT_AVX2(dtype, element, arithmetic) &kernels_avx2_##dtype,
#define NORMKIT_AVX512(dtype, element, arithmetic) &kernels_avx512_##dtype,

// Worst first.
const Isa kIsas[] = {
    {"baseline", always, NORMKIT_FOR_DTYPES(NORMKIT_BASELINE)},
#if defined(NORMKIT_X86)
    {"avx2", has_avx2, NORMKIT_FOR_DTYPES(NORMKIT_AVX2)},
    {"avx512", has_avx512, NORMKIT_FOR_DTYPES(NORMKIT_AVX512)},
#endif
};

const Isa* find(const std::string& name) {
    for (const Isa& isa : kIsas) {
        if (name == isa.name && isa.available()) return &isa;
    }
    return nullptr;
}

const Isa* best() {
    const Isa* found = nullptr;
    for (const Isa& isa : kIsas) {
        if (isa.available()) found = &isa;
    }
    return found;
}

// At start-up: NORMKIT_ISA where it names one that is here, else the best. The Python module refuses other names.
std::atomic<const Isa*>& chosen() {
    static std::atomic<const Isa*> isa{[] {
        const char* name = std::getenv("NORMKIT_ISA");
        const Isa* named = name ? find(name) : nullptr;
        return named ? named : best();
    }()};
    return isa;
}

}  // namespace

const bool ahead_to_l1 = asks_l1();
const bool dx_beside = is_intel();
const index_t least_ragged_row = is_intel() ? 512 : kLongRow;

const Isa& isa_in_force() {
    const char* forced = this_thread_choices().isa;
    const Isa* isa = forced ? find(forced) : nullptr;
    return isa ? *isa : *chosen();
}

}  // namespace cpu

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const cpu::Isa& isa : cpu::kIsas) {
        if (isa.available()) names.push_back(isa.name);
    }
    return names;
}

std::string current_isa() { return cpu::isa_in_force().name; }

const char* find_isa(const std::string& name) {
    const cpu::Isa* isa = cpu::find(name);
    return isa ? isa->name : nullptr;
}

bool select_isa(const std::string& name) {
    const cpu::Isa* isa = cpu::find(name);
    if (isa) cpu::chosen() = isa;
    return isa != nullptr;
}

}  // namespace normkit
