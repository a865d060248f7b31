// What the public operations of every backend check, and the problem that comes of it. Nothing here reads what a
// pointer points to: it may be memory of a device.
#pragma once

#include "norms.h"

namespace normkit {

// False: the arguments do not fit. Else the problem has the strides of all that is given.
bool forward_fits(const Spec& spec, const Forward& args, Problem* p);
bool evaluate_fits(const Spec& spec, const Evaluate& args, Problem* p);
// `parameters`: length of the gradients; 0 where the norm has none.
bool backward_fits(const Spec& spec, const Backward& args, Problem* p, index_t* parameters);

index_t number_of_sets(const Problem& p);

}  // namespace normkit
