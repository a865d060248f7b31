// The public operations on a GPU: the checks of checks.h, plan, launches. No pointer of the caller is followed here.
#include "operations.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../checks.h"
#include "normkit/cuda.h"

namespace normkit::cuda {
namespace {

thread_local Path last_path;

class Memory {
  public:
    Memory(Machine& machine, index_t bytes) : machine_(machine), p_(bytes > 0 ? machine.allocate(bytes) : nullptr) {}
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() {
        if (p_) machine_.deallocate(p_);  // in the order of the stream: after the kernels
    }
    template <class E>
    E* get() const {
        return static_cast<E*>(p_);
    }

  private:
    Machine& machine_;
    void* p_;
};

bool reads_x(Kernel k) { return k >= Kernel::rows_forward && k <= Kernel::columns_dx; }

void start_all(Launches* launches, const Memory& workspace, Machine& machine) {
    launches->place(workspace.get<char>());
    last_path = {};
    last_path.launches = launches->count;
    last_path.vector = launches->work.vector || launches->work.lanes_vector;
    for (int i = 0; i < launches->count; ++i) {
        const Launch& launch = launches->list[i];
        machine.start(launch, *launches);
        if (!reads_x(launch.kernel)) continue;
        if (!*last_path.kernel) last_path.kernel = name_of(launch.kernel);
        last_path.last = name_of(launch.kernel);
    }
}

// A kernel beside the planned ones.
void start_one(Kernel kernel, index_t threads, Launches* launches, Machine& machine) {
    launches->count = 0;
    launches->add(kernel, std::min<index_t>(std::max<index_t>((threads + kBlock - 1) / kBlock, 1), INT32_MAX), kBlock);
    machine.start(launches->list[0], *launches);
}

template <class Args>
ForwardCall call_on(const Args& args) {
    ForwardCall call;
    call.x = static_cast<const char*>(args.x.data);
    call.y = static_cast<char*>(args.y.data);
    call.weight = static_cast<const char*>(args.weight.data);
    call.bias = static_cast<const char*>(args.bias.data);
    call.dtype = args.x.dtype;
    call.weight_dtype = args.weight.dtype;
    call.bias_dtype = args.bias.dtype;
    call.in_place = args.y.data == args.x.data;
    call.eps = args.eps;
    call.mean = args.mean;
    call.rstd = args.rstd;
    if (!args.y.given()) call.y = nullptr;
    if (!args.weight.given()) call.weight = nullptr;
    if (!args.bias.given()) call.bias = nullptr;
    return call;
}

// A GPU reads no element that lies across the multiples of its size.
bool lie_well(std::initializer_list<const View*> views) {
    for (const View* v : views) {
        if (!v->given() || v->size() == 0) continue;
        const index_t size = size_of(v->dtype);
        if (reinterpret_cast<std::uintptr_t>(v->data) % static_cast<std::uintptr_t>(size) != 0) return false;
        for (int d = 0; d < v->ndim; ++d) {
            if (v->shape[d] > 1 && v->strides[d] % size != 0) return false;
        }
    }
    return true;
}

Running running_of(const View& mean, const View& var) {
    Running r{};
    r.mean = static_cast<char*>(mean.data);
    r.var = static_cast<char*>(var.data);
    r.mean_dtype = mean.dtype;
    r.var_dtype = var.dtype;
    r.mean_stride = mean.strides[0];
    r.var_stride = var.strides[0];
    return r;
}

}  // namespace

const Path& this_thread_last_path() { return last_path; }

bool forward(const Spec& spec, const Forward& args, Machine& machine) {
    Problem p;
    if (!forward_fits(spec, args, &p)) return false;
    if (!lie_well({&args.x, &args.y, &args.weight, &args.bias, &args.running_mean, &args.running_var})) return false;
    Launches launches;
    if (args.x.size() == 0) {
        launches.fill = {{args.mean, args.rstd, args.M2}, number_of_sets(p)};
        last_path = {};
        if (launches.fill.count > 0 && (args.mean || args.rstd || args.M2)) {
            start_one(Kernel::fill_with_nan, launches.fill.count, &launches, machine);
        }
        return true;
    }
    const Plan plan = make_plan(p);
    ForwardCall call = call_on(args);
    call.M2 = args.M2;
    const bool running = args.running_mean.given();
    const Memory moments(machine, running ? 2 * plan.sets * index_t{sizeof(double)} : 0);
    if (running && !call.mean) call.mean = moments.get<double>();
    if (running && !call.M2) call.M2 = moments.get<double>() + plan.sets;
    plan_forward(plan, call, machine.device(), &launches);
    const Memory workspace(machine, launches.workspace);
    start_all(&launches, workspace, machine);
    if (running) {
        Running& r = launches.running;
        r = running_of(args.running_mean, args.running_var);
        r.channels = args.x.shape[spec.channel_axis];
        r.samples = plan.sets / r.channels;
        r.set_size = plan.set_size;
        r.momentum = args.momentum;
        r.ddof = args.ddof;
        r.new_mean = call.mean;
        r.new_M2 = call.M2;
        start_one(Kernel::update_running, r.channels, &launches, machine);
        ++last_path.launches;
    }
    return true;
}

bool evaluate(const Spec& spec, const Evaluate& args, Machine& machine) {
    Problem p;
    if (!evaluate_fits(spec, args, &p)) return false;
    if (!lie_well({&args.x, &args.y, &args.weight, &args.bias, &args.running_mean, &args.running_var})) return false;
    const index_t channels = args.x.shape[spec.channel_axis], sets = number_of_sets(p);
    last_path = {};
    if (sets == 0) return true;
    ForwardCall call = call_on(args);
    const Memory statistics(machine, 2 * sets * index_t{sizeof(double)});
    if (!call.mean) call.mean = statistics.get<double>();
    if (!call.rstd) call.rstd = statistics.get<double>() + sets;
    // All that can fail for want of memory comes before the first launch, which writes results.
    Launches launches, before;
    if (args.x.size() > 0) {
        call.given = true;
        plan_forward(make_plan(p), call, machine.device(), &launches);
    }
    const Memory workspace(machine, launches.workspace);
    Running& r = before.running;
    r = running_of(args.running_mean, args.running_var);
    r.channels = channels;
    r.samples = sets / channels;
    r.eps = args.eps;
    r.out_mean = call.mean;
    r.out_rstd = call.rstd;
    start_one(Kernel::use_running, sets, &before, machine);
    if (args.x.size() > 0) start_all(&launches, workspace, machine);
    ++last_path.launches;
    return true;
}

bool backward(const Spec& spec, const Backward& args, Machine& machine) {
    Problem p;
    index_t parameters;
    if (!backward_fits(spec, args, &p, &parameters)) return false;
    if (!lie_well({&args.x, &args.dy, &args.dx, &args.weight, &args.dweight, &args.dbias})) return false;
    last_path = {};
    if (args.x.size() == 0) {
        for (const View* gradient : {&args.dweight, &args.dbias}) {
            if (!gradient->given() || parameters == 0) continue;
            machine.zero(gradient->data, parameters * size_of(gradient->dtype));
        }
        return true;
    }
    BackwardCall call;
    call.dy = static_cast<const char*>(args.dy.data);
    call.x = static_cast<const char*>(args.x.data);
    call.weight = args.weight.given() ? static_cast<const char*>(args.weight.data) : nullptr;
    call.dtype = args.x.dtype;
    call.weight_dtype = args.weight.dtype;
    call.mean = p.center ? args.mean : nullptr;
    call.rstd = args.rstd;
    call.constant_statistics = args.constant_statistics;
    call.dx = args.dx.given() ? static_cast<char*>(args.dx.data) : nullptr;
    if (parameters > 0) {
        call.parameters = parameters;
        call.dweight = args.dweight.given() ? static_cast<char*>(args.dweight.data) : nullptr;
        call.dbias = args.dbias.given() ? static_cast<char*>(args.dbias.data) : nullptr;
        call.dweight_dtype = args.dweight.dtype;
        call.dbias_dtype = args.dbias.dtype;
    }
    Launches launches;
    plan_backward(make_plan(p), call, machine.device(), &launches);
    const Memory workspace(machine, launches.workspace);
    start_all(&launches, workspace, machine);
    return true;
}

}  // namespace normkit::cuda
