// Weight or bias in the type of arithmetic, which is what kernels read.
#pragma once

#include <memory>

#include "norms.h"

namespace normkit {

// Parameters of another type are converted once, where there are few of them beside x; else they stay as they are, and
// the walks convert them strip by strip. Which of the two it is follows from the shapes.
class Parameter {
  public:
    // `operand`: weight or bias. Its strides in the problem become those of `data`.
    Parameter(const View& v, const View& x, Operand operand, Problem* problem);

    const char* data;
    Dtype dtype;

  private:
    std::unique_ptr<char[]> converted_;
};

}  // namespace normkit
