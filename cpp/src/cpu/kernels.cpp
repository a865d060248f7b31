// The kernels, compiled once per instruction set and dtype: CMake defines NORMKIT_ISA_NAME and NORMKIT_DTYPE_NAME. Read
// kernels.h first. Elements of x, y, dy and dx are of type X, everything else is of type T = Compute<X>.
//
// Same bits on every instruction set: sums run in a fixed number of virtual lanes (along: kStep, for the one sum of
// squares twice that) or one lane each (down), partial vectors select and never multiply, -ffp-contract=off, and where
// arrays begin decides on stores and on where vectors begin, which changes no sum (for_steps_behind).

#include "kernels.h"

#include "kernels_beside.h"
#include "kernels_convert.h"
#include "kernels_down.h"
#include "kernels_eights.h"

// `kernels_avx2_float32`, for NORMKIT_ISA_NAME = avx2, NORMKIT_DTYPE_NAME = float32.
#define NORMKIT_JOIN(isa, dtype) kernels_##isa##_##dtype
#define NORMKIT_EXPAND(isa, dtype) NORMKIT_JOIN(isa, dtype)
#define NORMKIT_TABLE NORMKIT_EXPAND(NORMKIT_ISA_NAME, NORMKIT_DTYPE_NAME)

namespace {

template <class X>
constexpr Kernels<X> table() {
    return {
        moments_along<X>,
        {moments_beside<X, false>, moments_beside<X, true>},
        moments_down<X>,
        {apply_along<X, false>, apply_along<X, true>},
        {apply_down<X, false>, apply_down<X, true>},
        {sums_along<X, false>, sums_along<X, true>},
        sums_beside<X>,
        sums_across<X>,
        {dx_along<X, false>, dx_along<X, true>},
        backward_rows<X>,
        forward_in_eights<X>,
        backward_in_eights<X>,
        {{backward_down<X, false, false>, backward_down<X, false, true>},
         {backward_down<X, true, false>, backward_down<X, true, true>}},
        backward_of_block<X>,
        widen<X>,
        narrow<X>,
        copy<X>,
    };
}

}  // namespace

namespace normkit::cpu {

using Element = ElementOf<Dtype::NORMKIT_DTYPE_NAME>;
extern const Kernels<Element> NORMKIT_TABLE;
const Kernels<Element> NORMKIT_TABLE = table<Element>();

}  // namespace normkit::cpu
