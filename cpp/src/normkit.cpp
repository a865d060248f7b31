// The public operations: check everything, plan, hand over to the backend, look after running statistics.

#include "normkit/normkit.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "dtype.h"
#include "operation.h"
#include "parameter.h"

namespace normkit {
namespace {

index_t magnitude(index_t v) { return v < 0 ? -v : v; }

// Dimensions that can be: a view comes from anywhere.
bool possible(const View& v) {
    if (v.ndim < 0 || v.ndim > kMaxDims) return false;
    for (int d = 0; d < v.ndim; ++d) {
        if (v.shape[d] < 0) return false;
    }
    return true;
}

bool possible(std::initializer_list<const View*> views) {
    for (const View* v : views) {
        if (v->given() && !possible(*v)) return false;
    }
    return true;
}

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
    return {low, high + size_of(v.dtype)};
}

bool overlap(const Range& a, const View& b) {
    if (!b.given()) return false;
    const Range of_b = range_of(b);
    return a.begin < of_b.end && of_b.begin < a.end;
}
bool overlap(const View& a, const View& b) { return a.given() && overlap(range_of(a), b); }

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
    index_t inside = size_of(v.dtype);
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
    const Range range = range_of(result);
    for (const View* v : in_place) {
        if (overlap(range, *v) && !same(result, *v)) return false;
    }
    for (const View* v : in) {
        if (overlap(range, *v)) return false;
    }
    return true;
}

// Channels, and whether running statistics of this shape fit. Both or neither.
bool running_fits(const Spec& spec, const View& x, const View& mean, const View& var) {
    if (mean.given() != var.given()) return false;
    if (!mean.given()) return true;
    if (spec.norm != Norm::batch && spec.norm != Norm::instance) return false;
    for (const View* v : {&mean, &var}) {
        if (v->dtype != Dtype::float32 && v->dtype != Dtype::float64) return false;
        if (v->ndim != 1 || v->shape[0] != x.shape[spec.channel_axis]) return false;
    }
    return true;
}

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

index_t number_of_sets(const Problem& p) {
    index_t sets = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (!p.axes.axis[i].reduced) sets *= p.axes.axis[i].extent;
    }
    return sets;
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

// A gradient has the shape of the weight, or where there is none that of the norm's parameters, in C order.
bool gradient_fits(const Spec& spec, const View& gradient, const View& weight, const View& x) {
    if (!gradient.given()) return true;
    index_t shape[kMaxDims];
    const int ndim = weight.given() ? weight.ndim : parameter_shape_of(spec, x, shape);
    if (gradient.ndim != ndim) return false;
    index_t stride = size_of(gradient.dtype);
    bool in_order = true;
    for (int d = ndim - 1; d >= 0; --d) {
        const index_t extent = weight.given() ? weight.shape[d] : shape[d];
        if (gradient.shape[d] != extent) return false;
        in_order = in_order && (extent <= 1 || gradient.strides[d] == stride);
        stride *= extent;
    }
    return in_order || gradient.size() == 0;
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

int parameter_shape(const Spec& spec, const View& x, index_t* shape) {
    Problem p;
    if (!make_problem(spec, x, &p)) return -1;
    return parameter_shape_of(spec, x, shape);
}

bool forward(const Spec& spec, const Forward& args) {
    Problem p;
    if (!possible({&args.x, &args.y, &args.weight, &args.bias, &args.running_mean, &args.running_var})) return false;
    if (!args.x.given() || !make_problem(spec, args.x, &p)) return false;
    if (args.y.given() && !add_array(spec, args.y, args.x, kY, &p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, &p)) return false;
    if (!add_parameter(spec, args.bias, args.x, kBias, &p)) return false;
    if (!eps_fits(args.eps) || !std::isfinite(args.momentum)) return false;
    if (!std::isfinite(args.ddof) || args.ddof < 0) return false;
    if (!running_fits(spec, args.x, args.running_mean, args.running_var)) return false;
    if (!result_fits(args.y, {&args.x}, {&args.weight, &args.bias})) return false;
    for (const View* running : {&args.running_mean, &args.running_var}) {
        if (!result_fits(*running, {}, {&args.x, &args.y, &args.weight, &args.bias})) return false;
    }
    if (overlap(args.running_mean, args.running_var)) return false;
    if (args.x.size() == 0) {
        fill_empty(p, {args.mean, args.rstd, args.M2});
        return true;
    }
    if (!enough_values(spec, p)) return false;

    const Parameter weight(args.weight, args.x, kWeight, &p), bias(args.bias, args.x, kBias, &p);
    const Plan plan = make_plan(p);
    if (args.running_mean.given() && !(args.ddof < static_cast<double>(plan.set_size))) return false;
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
    if (!possible({&args.x, &args.y, &args.weight, &args.bias, &args.running_mean, &args.running_var})) return false;
    if (!args.x.given() || !make_problem(spec, args.x, &p)) return false;
    if (!args.y.given() || !add_array(spec, args.y, args.x, kY, &p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, &p)) return false;
    if (!add_parameter(spec, args.bias, args.x, kBias, &p)) return false;
    if (!eps_fits(args.eps)) return false;
    if (!args.running_mean.given() || !running_fits(spec, args.x, args.running_mean, args.running_var)) return false;
    if (!result_fits(args.y, {&args.x}, {&args.weight, &args.bias, &args.running_mean, &args.running_var})) {
        return false;
    }
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
    if (!possible({&args.dy, &args.x, &args.weight, &args.dx, &args.dweight, &args.dbias})) return false;
    if (!args.x.given() || !make_problem(spec, args.x, &p)) return false;
    if (!add_array(spec, args.dy, args.x, kDy, &p)) return false;
    if (args.dx.given() && !add_array(spec, args.dx, args.x, kY, &p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, &p)) return false;
    if (!args.rstd || (p.center && !args.mean)) return false;
    if (args.constant_statistics && spec.norm != Norm::batch && spec.norm != Norm::instance) return false;
    const index_t sets = number_of_sets(p);
    const View mean = statistics_view(p.center ? args.mean : nullptr, sets), rstd = statistics_view(args.rstd, sets);
    if (!result_fits(args.dx, {&args.x, &args.dy}, {&args.weight, &mean, &rstd})) return false;
    if (args.dx.given() && overlap(args.dx, args.x) && overlap(args.dx, args.dy) && !same(args.x, args.dy))
        return false;
    for (const View* gradient : {&args.dweight, &args.dbias}) {
        if (!gradient_fits(spec, *gradient, args.weight, args.x)) return false;
        if (!result_fits(*gradient, {}, {&args.x, &args.dy, &args.dx, &args.weight, &mean, &rstd})) return false;
    }
    if (overlap(args.dweight, args.dbias)) return false;

    const index_t parameters = add_gradient(spec, args.weight, args.x, &p);
    const bool wants_parameters = (args.dweight.given() || args.dbias.given()) && parameters > 0;
    if (args.x.size() > 0) {
        if (!args.constant_statistics && !enough_values(spec, p)) return false;
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
