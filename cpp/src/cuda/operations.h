// The operations on a machine that enqueues launches: a GPU (backend.cpp), or what the tests put in its place.
#pragma once

#include "launch.h"

namespace normkit::cuda {

class Machine {
  public:
    virtual ~Machine() = default;
    virtual Device device() = 0;
    virtual void* allocate(index_t bytes) = 0;
    virtual void deallocate(void* p) noexcept = 0;
    virtual void zero(void* p, index_t bytes) = 0;
    virtual void start(const Launch& launch, const Launches& all) = 0;
};

bool forward(const Spec& spec, const Forward& args, Machine& machine);
bool evaluate(const Spec& spec, const Evaluate& args, Machine& machine);
bool backward(const Spec& spec, const Backward& args, Machine& machine);

}  // namespace normkit::cuda
