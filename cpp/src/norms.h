// The table of norms: which axes of x form a set S, and which carry parameters P. Everything else follows from it.
#pragma once

#include "nest.h"

namespace normkit {

// A norm on given arrays: axes in the order of x's dimensions, and what is not an axis.
struct Problem {
    Nest axes;
    bool center = true;  // false: the rms norms, moments about zero
};

// Fills axes, extents, `reduced` and the strides of x, statistic and gradient. False where spec does not fit x.
bool make_problem(const Spec& spec, const View& x, Problem* out);

// Add one operand's strides; false where its shape does not fit. For the axes norms `gradient` follows the weight.
bool add_array(const Spec& spec, const View& a, const View& x, Operand operand, Problem* out);
bool add_parameter(const Spec& spec, const View& parameter, const View& x, Operand operand, Problem* out);

// C-contiguous strides for the gradient of the parameters; returns how many there are. For the axes norms they have
// the shape of `weight`, and none where there is no weight.
index_t add_gradient(const Spec& spec, const View& weight, const View& x, Problem* out);

// The shape of the parameters where the norm alone says it; -1 for the axes norms.
int parameter_shape_of(const Spec& spec, const View& x, index_t* shape);

bool has_channels(Norm norm);

}  // namespace normkit
