// The public operations: check everything (checks.h), plan, hand over to the backend, look after running statistics.

#include "normkit/normkit.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "checks.h"
#include "dtype.h"
#include "operation.h"
#include "parameter.h"

namespace normkit {
namespace {

double get(const View& v, index_t i) {
    return read_double(static_cast<const char*>(v.data) + i * v.strides[0], v.dtype);
}

void get_all(const View& v, double* out) {
    with_dtype(v.dtype, [&](auto element) {
        using E = decltype(element);
        const char* p = static_cast<const char*>(v.data);
        const index_t stride = v.strides[0];
        if (stride == sizeof(E)) {  // becomes vector code
            for (index_t i = 0; i < v.shape[0]; ++i) out[i] = to_double(read<E>(p + i * index_t{sizeof(E)}));
        } else {
            for (index_t i = 0; i < v.shape[0]; ++i) out[i] = to_double(read<E>(p + i * stride));
        }
    });
}

void set(const View& v, index_t i, double value) {
    write_double(static_cast<char*>(v.data) + i * v.strides[0], v.dtype, value);
}

// A vector of more would throw std::length_error.
constexpr index_t kMostStatistics = PTRDIFF_MAX / 32;

// Empty x: statistics of empty sets are NaN, and there is nothing else to do.
void fill_empty(const Problem& p, std::initializer_list<double*> statistics) {
    const index_t sets = number_of_sets(p);
    for (double* s : statistics) {
        for (index_t i = 0; s && i < sets; ++i) s[i] = std::nan("");
    }
}

// running = (1 - momentum) * running + momentum * new, the new variance divided by n - ddof. Instance norm averages
// over the samples.
void update_running(const Forward& args, index_t channels, index_t samples, index_t set_size, const double* mean,
                    const double* M2) {
    for (index_t c = 0; c < channels; ++c) {
        double new_mean = 0, new_var = 0;
        for (index_t n = 0; n < samples; ++n) {
            new_mean += mean[n * channels + c] / samples;
            new_var += M2[n * channels + c] / (set_size - args.ddof) / samples;
        }
        const double old = 1 - args.momentum;
        set(args.running_mean, c, old * get(args.running_mean, c) + args.momentum * new_mean);
        set(args.running_var, c, old * get(args.running_var, c) + args.momentum * new_var);
    }
}

// What forward and evaluate have in common.
template <class Args>
ForwardCall call_on(const Args& args, const Parameter& weight, const Parameter& bias) {
    ForwardCall call;
    call.x = static_cast<const char*>(args.x.data);
    call.y = static_cast<char*>(args.y.data);
    call.weight = weight.data;
    call.bias = bias.data;
    call.dtype = args.x.dtype;
    call.weight_dtype = weight.dtype;
    call.bias_dtype = bias.dtype;
    call.in_place = args.y.data == args.x.data;
    return call;
}

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

int parameter_shape(const Spec& spec, const View& x, index_t* shape) {
    Problem p;
    if (!make_problem(spec, x, &p)) return -1;
    return parameter_shape_of(spec, x, shape);
}

bool forward(const Spec& spec, const Forward& args) {
    Problem p;
    if (!forward_fits(spec, args, &p)) return false;
    if (args.x.size() == 0) {
        fill_empty(p, {args.mean, args.rstd, args.M2});
        return true;
    }

    const Parameter weight(args.weight, args.x, kWeight, &p), bias(args.bias, args.x, kBias, &p);
    const Plan plan = make_plan(p);
    ForwardCall call = call_on(args, weight, bias);
    call.eps = args.eps;
    call.mean = args.mean;
    call.rstd = args.rstd;
    call.M2 = args.M2;
    std::vector<double> moments;
    if (args.running_mean.given()) {
        if (plan.sets > kMostStatistics) throw std::bad_alloc();
        moments.resize(2 * plan.sets);
        if (!call.mean) call.mean = moments.data();
        if (!call.M2) call.M2 = moments.data() + plan.sets;
    }
    cpu::forward(plan, call);
    if (args.running_mean.given()) {
        const index_t channels = args.x.shape[spec.channel_axis];
        update_running(args, channels, plan.sets / channels, plan.set_size, call.mean, call.M2);
    }
    return true;
}

bool evaluate(const Spec& spec, const Evaluate& args) {
    Problem p;
    if (!evaluate_fits(spec, args, &p)) return false;
    // Instance norm: every sample has the statistics of its channels.
    const index_t channels = args.x.shape[spec.channel_axis], sets = number_of_sets(p);
    const index_t length = sets > channels ? sets : channels;
    if (length > kMostStatistics) throw std::bad_alloc();
    const std::unique_ptr<double[]> statistics(new double[2 * length]);
    double *mean = statistics.get(), *rstd = mean + length;
    get_all(args.running_mean, mean);
    get_all(args.running_var, rstd);
    // Two loops, and a count as wide as what is compared: both become vector code.
    index_t negative = 0;
    for (index_t c = 0; c < channels; ++c) negative += rstd[c] < 0;
    if (negative > 0) return false;
    for (index_t c = 0; c < channels; ++c) rstd[c] = 1 / std::sqrt(rstd[c] + args.eps);
    for (index_t i = channels; i < sets; ++i) {
        mean[i] = mean[i - channels];
        rstd[i] = rstd[i - channels];
    }
    if (args.x.size() > 0) {
        const Parameter weight(args.weight, args.x, kWeight, &p), bias(args.bias, args.x, kBias, &p);
        ForwardCall call = call_on(args, weight, bias);
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
    index_t parameters;
    if (!backward_fits(spec, args, &p, &parameters)) return false;
    const bool wants_parameters = (args.dweight.given() || args.dbias.given()) && parameters > 0;
    if (args.x.size() > 0) {
        const Parameter weight(args.weight, args.x, kWeight, &p);
        BackwardCall call;
        call.dy = static_cast<const char*>(args.dy.data);
        call.x = static_cast<const char*>(args.x.data);
        call.weight = weight.data;
        call.dtype = args.x.dtype;
        call.weight_dtype = weight.dtype;
        call.mean = p.center ? args.mean : nullptr;
        call.rstd = args.rstd;
        call.constant_statistics = args.constant_statistics;
        call.dx = static_cast<char*>(args.dx.data);
        call.in_place = args.dx.data == args.x.data || args.dx.data == args.dy.data;
        if (wants_parameters) {
            call.parameters = parameters;
            call.dweight = static_cast<char*>(args.dweight.data);
            call.dweight_dtype = args.dweight.dtype;
            call.dbias = static_cast<char*>(args.dbias.data);
            call.dbias_dtype = args.dbias.dtype;
        }
        cpu::backward(make_plan(p), call);
        return true;
    }
    for (const View* gradient : {&args.dweight, &args.dbias}) {
        if (!gradient->given()) continue;
        char* to = static_cast<char*>(gradient->data);
        const index_t element = size_of(gradient->dtype);
        for (index_t i = 0; i < parameters; ++i) write_double(to + i * element, gradient->dtype, 0);  // of nothing
    }
    return true;
}

}  // namespace normkit
