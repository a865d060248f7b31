// The public operations: check everything, plan, hand over to the backend, look after running statistics.

#include "normkit/normkit.h"

#include <cmath>
#include <cstring>

#include "operation.h"

namespace normkit {
namespace {

index_t magnitude(index_t v) { return v < 0 ? -v : v; }

// The bytes that a view can touch: [begin, end).
struct Range {
    const char *begin, *end;
};
Range range_of(const View& v) {
    const char *low = static_cast<const char*>(v.data), *high = low;
    for (int d = 0; d < v.ndim; ++d) {
        if (v.shape[d] == 0) return {nullptr, nullptr};
        const index_t reach = (v.shape[d] - 1) * v.strides[d];
        (reach < 0 ? low : high) += reach;
    }
    return {low, high + (v.dtype == Dtype::float64 ? 8 : 4)};
}

bool overlap(const View& a, const View& b) {
    if (!a.given() || !b.given()) return false;
    const Range ra = range_of(a), rb = range_of(b);
    return ra.begin < rb.end && rb.begin < ra.end;
}

// Statistics as the core takes them: `count` doubles in a row.
View statistics_view(const double* data, index_t count) {
    View v;
    if (!data) return v;
    v.data = const_cast<double*>(data);
    v.dtype = Dtype::float64;
    v.ndim = 1;
    v.shape[0] = count;
    v.strides[0] = sizeof(double);
    return v;
}

bool same(const View& a, const View& b) {
    if (a.data != b.data || a.dtype != b.dtype || a.ndim != b.ndim) return false;
    for (int d = 0; d < a.ndim; ++d) {
        if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.strides[d] != b.strides[d])) return false;
    }
    return true;
}

// Whether no two elements share memory: going up in stride, each axis must step over all that lies inside it.
// Sufficient, and necessary for every array one is likely to write to.
bool writable_once(const View& v) {
    if (v.size() == 0) return true;  // NumPy gives empty arrays strides of zero
    bool done[kMaxDims] = {};
    index_t inside = v.dtype == Dtype::float64 ? 8 : 4;
    for (int n = 0; n < v.ndim; ++n) {
        int least = -1;
        for (int d = 0; d < v.ndim; ++d) {
            if (!done[d] && (least < 0 || magnitude(v.strides[d]) < magnitude(v.strides[least]))) least = d;
        }
        done[least] = true;
        if (v.shape[least] <= 1) continue;
        if (magnitude(v.strides[least]) < inside) return false;
        inside += (v.shape[least] - 1) * magnitude(v.strides[least]);
    }
    return true;
}

// A result may take the place of an input exactly, but not overlap one otherwise.
bool result_fits(const View& result, std::initializer_list<const View*> in_place,
                 std::initializer_list<const View*> in) {
    if (!result.given()) return true;
    if (!writable_once(result)) return false;
    for (const View* v : in_place) {
        if (overlap(result, *v) && !same(result, *v)) return false;
    }
    for (const View* v : in) {
        if (overlap(result, *v)) return false;
    }
    return true;
}

// Channels, and whether running statistics of this shape fit. Both or neither.
bool running_fits(const Spec& spec, const View& x, const View& mean, const View& var) {
    if (mean.given() != var.given()) return false;
    if (!mean.given()) return true;
    if (spec.norm != Norm::batch && spec.norm != Norm::instance) return false;
    for (const View* v : {&mean, &var}) {
        if (v->ndim != 1 || v->shape[0] != x.shape[spec.channel_axis]) return false;
    }
    return true;
}

double get(const View& v, index_t i) {
    const char* p = static_cast<const char*>(v.data) + i * v.strides[0];
    if (v.dtype == Dtype::float64) {
        double value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

void set(const View& v, index_t i, double value) {
    char* p = static_cast<char*>(v.data) + i * v.strides[0];
    if (v.dtype == Dtype::float64) {
        std::memcpy(p, &value, sizeof value);
    } else {
        const float rounded = static_cast<float>(value);
        std::memcpy(p, &rounded, sizeof rounded);
    }
}

// A set of one value has no variance to learn from. Layer and rms norm of one element give bias.
bool enough_values(const Spec& spec, const Problem& p) {
    if (!has_channels(spec.norm)) return true;
    index_t set_size = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (p.axes.axis[i].reduced) set_size *= p.axes.axis[i].extent;
    }
    return set_size != 1;
}

// Empty x: statistics of empty sets are NaN, and there is nothing else to do.
void fill_empty(const Problem& p, std::initializer_list<double*> statistics) {
    index_t sets = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (!p.axes.axis[i].reduced) sets *= p.axes.axis[i].extent;
    }
    for (double* s : statistics) {
        for (index_t i = 0; s && i < sets; ++i) s[i] = std::nan("");
    }
}

// running = (1 - momentum) * running + momentum * new, the new variance divided by n - 1: torch's rule. Instance norm
// averages over the samples.
void update_running(const Forward& args, index_t channels, index_t samples, index_t set_size, const double* mean,
                    const double* m2) {
    for (index_t c = 0; c < channels; ++c) {
        double new_mean = 0, new_var = 0;
        for (index_t n = 0; n < samples; ++n) {
            new_mean += mean[n * channels + c] / samples;
            new_var += m2[n * channels + c] / (set_size - 1) / samples;
        }
        const double old = 1 - args.momentum;
        set(args.running_mean, c, old * get(args.running_mean, c) + args.momentum * new_mean);
        set(args.running_var, c, old * get(args.running_var, c) + args.momentum * new_var);
    }
}

// The arrays that forward and evaluate have in common.
template <class Args>
ForwardCall call_on(const Args& args) {
    ForwardCall call;
    call.x = static_cast<const char*>(args.x.data);
    call.y = static_cast<char*>(args.y.data);
    call.weight = static_cast<const char*>(args.weight.data);
    call.bias = static_cast<const char*>(args.bias.data);
    call.in_place = args.y.data == args.x.data;
    return call;
}

bool eps_fits(double eps) { return std::isfinite(eps) && eps >= 0; }

}  // namespace

int statistics_shape(const Spec& spec, const View& x, index_t* shape) {
    Problem p;
    if (!make_problem(spec, x, &p)) return -1;
    int n = 0, axis = 0;
    for (int d = 0; d < x.ndim; ++d) {
        // Of the two axes of the channels only the groups are ever kept.
        if (!p.axes.axis[axis].reduced) shape[n++] = p.axes.axis[axis].extent;
        axis += has_channels(spec.norm) && d == spec.channel_axis ? 2 : 1;
    }
    return n;
}

bool forward(const Spec& spec, const Forward& args) {
    Problem p;
    if (args.x.dtype != Dtype::float32 || !make_problem(spec, args.x, &p)) return false;
    if (args.y.given() && !add_array(spec, args.y, args.x, kY, &p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, &p)) return false;
    if (!add_parameter(spec, args.bias, args.x, kBias, &p)) return false;
    if (!eps_fits(args.eps) || !std::isfinite(args.momentum)) return false;
    if (!running_fits(spec, args.x, args.running_mean, args.running_var)) return false;
    if (!result_fits(args.y, {&args.x}, {&args.weight, &args.bias})) return false;
    for (const View* running : {&args.running_mean, &args.running_var}) {
        if (!result_fits(*running, {}, {&args.x, &args.y, &args.weight, &args.bias})) return false;
    }
    if (overlap(args.running_mean, args.running_var)) return false;
    if (args.x.size() == 0) {
        fill_empty(p, {args.mean, args.rstd, args.m2});
        return true;
    }
    if (!enough_values(spec, p)) return false;

    const Plan plan = make_plan(p);
    ForwardCall call = call_on(args);
    call.eps = args.eps;
    call.mean = args.mean;
    call.rstd = args.rstd;
    call.m2 = args.m2;
    std::vector<double> moments;
    if (args.running_mean.given()) {
        moments.resize(2 * plan.sets);
        if (!call.mean) call.mean = moments.data();
        if (!call.m2) call.m2 = moments.data() + plan.sets;
    }
    cpu::forward(plan, call);
    if (args.running_mean.given()) {
        const index_t channels = args.x.shape[spec.channel_axis];
        update_running(args, channels, plan.sets / channels, plan.set_size, call.mean, call.m2);
    }
    return true;
}

bool evaluate(const Spec& spec, const Evaluate& args) {
    Problem p;
    if (args.x.dtype != Dtype::float32 || !make_problem(spec, args.x, &p)) return false;
    if (!args.y.given() || !add_array(spec, args.y, args.x, kY, &p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, &p)) return false;
    if (!add_parameter(spec, args.bias, args.x, kBias, &p)) return false;
    if (!eps_fits(args.eps)) return false;
    if (!args.running_mean.given() || !running_fits(spec, args.x, args.running_mean, args.running_var)) return false;
    if (!result_fits(args.y, {&args.x}, {&args.weight, &args.bias, &args.running_mean, &args.running_var})) {
        return false;
    }
    const index_t channels = args.x.shape[spec.channel_axis];
    index_t sets = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (!p.axes.axis[i].reduced) sets *= p.axes.axis[i].extent;
    }
    std::vector<double> statistics(2 * sets);
    double *mean = statistics.data(), *rstd = mean + sets;
    for (index_t i = 0; i < sets; ++i) {
        mean[i] = get(args.running_mean, i % channels);
        rstd[i] = 1 / std::sqrt(get(args.running_var, i % channels) + args.eps);
    }
    if (args.x.size() > 0) {
        ForwardCall call = call_on(args);
        call.given = true;
        call.mean = mean;
        call.rstd = rstd;
        cpu::forward(make_plan(p), call);
    }
    for (index_t i = 0; i < sets; ++i) {
        if (args.mean) args.mean[i] = mean[i];
        if (args.rstd) args.rstd[i] = rstd[i];
    }
    return true;
}

bool backward(const Spec& spec, const Backward& args) {
    Problem p;
    if (args.x.dtype != Dtype::float32 || !make_problem(spec, args.x, &p)) return false;
    if (!add_array(spec, args.dy, args.x, kDy, &p)) return false;
    if (args.dx.given() && !add_array(spec, args.dx, args.x, kY, &p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, &p)) return false;
    if (!args.rstd || (p.center && !args.mean)) return false;
    if (args.constant_statistics && spec.norm != Norm::batch && spec.norm != Norm::instance) return false;
    index_t sets = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (!p.axes.axis[i].reduced) sets *= p.axes.axis[i].extent;
    }
    const View mean = statistics_view(p.center ? args.mean : nullptr, sets), rstd = statistics_view(args.rstd, sets);
    if (!result_fits(args.dx, {&args.x, &args.dy}, {&args.weight, &mean, &rstd})) return false;
    if (args.dx.given() && overlap(args.dx, args.x) && overlap(args.dx, args.dy) && !same(args.x, args.dy))
        return false;

    const index_t parameters = add_gradient(spec, args.weight, args.x, &p);
    const bool wants_parameters = (args.dweight || args.dbias) && parameters > 0;
    if (args.x.size() > 0) {
        if (!args.constant_statistics && !enough_values(spec, p)) return false;
        BackwardCall call;
        call.dy = static_cast<const char*>(args.dy.data);
        call.x = static_cast<const char*>(args.x.data);
        call.weight = static_cast<const char*>(args.weight.data);
        call.mean = p.center ? args.mean : nullptr;
        call.rstd = args.rstd;
        call.constant_statistics = args.constant_statistics;
        call.dx = static_cast<char*>(args.dx.data);
        call.in_place = args.dx.data == args.x.data || args.dx.data == args.dy.data;
        if (wants_parameters) {
            call.parameters = parameters;
            call.dweight = args.dweight;
            call.dbias = args.dbias;
        }
        cpu::backward(make_plan(p), call);
        return true;
    }
    for (float* gradient : {args.dweight, args.dbias}) {
        for (index_t i = 0; gradient && i < parameters; ++i) gradient[i] = 0;  // sums over nothing
    }
    return true;
}

}  // namespace normkit
