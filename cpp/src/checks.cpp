// What the public operations check before anything is done.

#include "checks.h"

#include <cmath>
#include <initializer_list>

#include "dtype.h"

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

index_t size_of_set(const Problem& p) {
    index_t size = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (p.axes.axis[i].reduced) size *= p.axes.axis[i].extent;
    }
    return size;
}

// A set of one value has no variance to learn from. Layer and rms norm of one element give bias.
bool enough_values(const Spec& spec, const Problem& p) { return !has_channels(spec.norm) || size_of_set(p) != 1; }

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

index_t number_of_sets(const Problem& p) {
    index_t sets = 1;
    for (int i = 0; i < p.axes.n; ++i) {
        if (!p.axes.axis[i].reduced) sets *= p.axes.axis[i].extent;
    }
    return sets;
}

bool forward_fits(const Spec& spec, const Forward& args, Problem* p) {
    if (!possible({&args.x, &args.y, &args.weight, &args.bias, &args.running_mean, &args.running_var})) return false;
    if (!args.x.given() || !make_problem(spec, args.x, p)) return false;
    if (args.y.given() && !add_array(spec, args.y, args.x, kY, p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, p)) return false;
    if (!add_parameter(spec, args.bias, args.x, kBias, p)) return false;
    if (!eps_fits(args.eps) || !std::isfinite(args.momentum)) return false;
    if (!std::isfinite(args.ddof) || args.ddof < 0) return false;
    if (!running_fits(spec, args.x, args.running_mean, args.running_var)) return false;
    if (!result_fits(args.y, {&args.x}, {&args.weight, &args.bias})) return false;
    for (const View* running : {&args.running_mean, &args.running_var}) {
        if (!result_fits(*running, {}, {&args.x, &args.y, &args.weight, &args.bias})) return false;
    }
    if (overlap(args.running_mean, args.running_var)) return false;
    if (args.x.size() == 0) return true;
    if (!enough_values(spec, *p)) return false;
    return !args.running_mean.given() || args.ddof < static_cast<double>(size_of_set(*p));
}

bool evaluate_fits(const Spec& spec, const Evaluate& args, Problem* p) {
    if (!possible({&args.x, &args.y, &args.weight, &args.bias, &args.running_mean, &args.running_var})) return false;
    if (!args.x.given() || !make_problem(spec, args.x, p)) return false;
    if (!args.y.given() || !add_array(spec, args.y, args.x, kY, p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, p)) return false;
    if (!add_parameter(spec, args.bias, args.x, kBias, p)) return false;
    if (!eps_fits(args.eps)) return false;
    if (!args.running_mean.given() || !running_fits(spec, args.x, args.running_mean, args.running_var)) return false;
    if (!result_fits(args.y, {&args.x}, {&args.weight, &args.bias, &args.running_mean, &args.running_var})) {
        return false;
    }
    return true;
}

bool backward_fits(const Spec& spec, const Backward& args, Problem* p, index_t* parameters) {
    if (!possible({&args.dy, &args.x, &args.weight, &args.dx, &args.dweight, &args.dbias})) return false;
    if (!args.x.given() || !make_problem(spec, args.x, p)) return false;
    if (!add_array(spec, args.dy, args.x, kDy, p)) return false;
    if (args.dx.given() && !add_array(spec, args.dx, args.x, kY, p)) return false;
    if (!add_parameter(spec, args.weight, args.x, kWeight, p)) return false;
    if (!args.rstd || (p->center && !args.mean)) return false;
    if (args.constant_statistics && spec.norm != Norm::batch && spec.norm != Norm::instance) return false;
    const index_t sets = number_of_sets(*p);
    const View mean = statistics_view(p->center ? args.mean : nullptr, sets), rstd = statistics_view(args.rstd, sets);
    if (!result_fits(args.dx, {&args.x, &args.dy}, {&args.weight, &mean, &rstd})) return false;
    if (args.dx.given() && overlap(args.dx, args.x) && overlap(args.dx, args.dy) && !same(args.x, args.dy))
        return false;
    for (const View* gradient : {&args.dweight, &args.dbias}) {
        if (!gradient_fits(spec, *gradient, args.weight, args.x)) return false;
        if (!result_fits(*gradient, {}, {&args.x, &args.dy, &args.dx, &args.weight, &mean, &rstd})) return false;
    }
    if (overlap(args.dweight, args.dbias)) return false;

    *parameters = add_gradient(spec, args.weight, args.x, p);
    return args.x.size() == 0 || args.constant_statistics || enough_values(spec, *p);
}

}  // namespace normkit
