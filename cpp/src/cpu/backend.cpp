// The CPU behind the seam: schedule, walk, kernels of the instruction set in force, and the record of what was done.

#include "walks.h"

namespace normkit {
namespace {

thread_local Choices choices;
thread_local Path last_path;

}  // namespace

Choices& this_thread_choices() { return choices; }
const Path& this_thread_last_path() { return last_path; }

namespace cpu {
namespace {

void record(const Plan& plan, const Schedule& s, const Isa& isa) {
    last_path = {plan.walk == Walk::rows ? "rows" : "columns",
                 isa.name,
                 s.threads,
                 s.split,
                 s.resident,
                 s.stream,
                 s.by_row,
                 s.by_sample,
                 s.in_eights,
                 s.in_parts};
}

}  // namespace

void forward(const Plan& plan, const ForwardCall& call) {
    const Isa& isa = isa_in_force();
    const Schedule schedule = make_schedule(plan, size_of(call.dtype), 1, call.y != nullptr, call.in_place, call.given);
    with_dtype(call.dtype, [&](auto x) {
        using X = decltype(x);
        const KernelPair<X> kernels{kernels_of<X>(isa), kernels_of<Compute<X>>(isa), isa};
        (plan.walk == Walk::rows ? rows_forward<X> : columns_forward<X>)(plan, call, kernels, schedule);
    });
    record(plan, schedule, isa);
}

void backward(const Plan& plan, const BackwardCall& call) {
    const Isa& isa = isa_in_force();
    const Schedule schedule =
        make_schedule(plan, size_of(call.dtype), 2, call.dx != nullptr, call.in_place, call.constant_statistics);
    with_dtype(call.dtype, [&](auto x) {
        using X = decltype(x);
        const KernelPair<X> kernels{kernels_of<X>(isa), kernels_of<Compute<X>>(isa), isa};
        (plan.walk == Walk::rows ? rows_backward<X> : columns_backward<X>)(plan, call, kernels, schedule);
    });
    record(plan, schedule, isa);
}

}  // namespace cpu

void copy(const float* from, float* to, index_t n, bool stream) {
    const auto& kernels = cpu::kernels_of<float>(cpu::isa_in_force());
    const index_t piece = cpu::kPieceBytes / index_t{sizeof(float)};
    cpu::parallel_for((n + piece - 1) / piece, get_num_threads(), [&](index_t i) {
        kernels.copy({reinterpret_cast<const char*>(from + i * piece)}, {reinterpret_cast<char*>(to + i * piece)}, 1,
                     n - i * piece < piece ? n - i * piece : piece, stream);
    });
}

}  // namespace normkit
