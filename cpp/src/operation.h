// The seam between the public functions and a backend: a planned operation on raw pointers. Everything is checked.
#pragma once

#include "plan.h"

namespace normkit {

struct ForwardCall {
    const char* x = nullptr;
    char* y = nullptr;             // null: statistics only
    const char* weight = nullptr;  // null: 1
    const char* bias = nullptr;    // null: 0
    Dtype dtype = Dtype::none, weight_dtype = Dtype::none, bias_dtype = Dtype::none;
    bool in_place = false;
    double eps = 0;
    // By statistic number. given: mean and rstd are read, else any that is not null is written.
    bool given = false;
    double* mean = nullptr;
    double* rstd = nullptr;
    double* M2 = nullptr;
};

struct BackwardCall {
    const char* dy = nullptr;
    const char* x = nullptr;
    const char* weight = nullptr;  // null: 1
    Dtype dtype = Dtype::none, weight_dtype = Dtype::none;
    const double* mean = nullptr;  // null: 0
    const double* rstd = nullptr;
    bool constant_statistics = false;
    char* dx = nullptr;  // null: not wanted
    bool in_place = false;
    index_t parameters = 0;   // length of the gradients; 0: none is wanted
    char* dweight = nullptr;  // null: not wanted
    char* dbias = nullptr;
    Dtype dweight_dtype = Dtype::none, dbias_dtype = Dtype::none;
};

namespace cpu {
void forward(const Plan& plan, const ForwardCall& call);
void backward(const Plan& plan, const BackwardCall& call);
}  // namespace cpu

}  // namespace normkit
