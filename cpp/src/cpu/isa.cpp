// The list of instruction sets, and the choice among them. CMake compiles kernels.cpp once for each.

#include <atomic>
#include <cstdlib>

#include "kernels.h"

namespace normkit {
namespace cpu {

#define NORMKIT_DECLARE(isa) extern const Kernels<float> kernels_##isa##_float32;
NORMKIT_DECLARE(baseline)
#if defined(NORMKIT_X86)
NORMKIT_DECLARE(avx2)
NORMKIT_DECLARE(avx512)
#endif

namespace {

bool always() { return true; }
#if defined(NORMKIT_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2"); }
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

// Worst first.
const Isa kIsas[] = {
    {"baseline", always, &kernels_baseline_float32},
#if defined(NORMKIT_X86)
    {"avx2", has_avx2, &kernels_avx2_float32},
    {"avx512", has_avx512, &kernels_avx512_float32},
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
