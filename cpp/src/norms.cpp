#include "norms.h"

namespace normkit {
namespace {

// What an axis of x is to a norm. The channel axis is two: groups, and the channels of a group.
enum Role : unsigned { kSample = 1, kGroup = 2, kChannel = 4, kInner = 8 };

enum class Groups { none, channels, num_groups };

struct Row {
    Norm norm;
    Groups groups;    // none: trailing (or named) axes are kInner, the others kSample
    unsigned set;     // S: the roles that share one mean and variance
    unsigned params;  // P: the roles along which weight and bias vary
    bool center;
};

constexpr unsigned kC = kGroup | kChannel;

//  norm           channel axis        S                  P       center
constexpr Row kNorms[kNormCount] = {
    {Norm::batch, Groups::channels, kSample | kInner, kC, true},
    {Norm::instance, Groups::channels, kChannel | kInner, kC, true},
    {Norm::group, Groups::num_groups, kChannel | kInner, kC, true},
    {Norm::layer, Groups::none, kInner, kInner, true},
    {Norm::rms, Groups::none, kInner, kInner, false},
    {Norm::axes, Groups::none, kInner, kSample | kInner, true},  // P: as weight and bias broadcast
    {Norm::axes_rms, Groups::none, kInner, kSample | kInner, false},
};

const Row& row_of(Norm norm) { return kNorms[static_cast<int>(norm)]; }

bool broadcasts(Norm norm) { return norm == Norm::axes || norm == Norm::axes_rms; }

unsigned role_of(const Spec& spec, const View& x, int dim) {
    switch (spec.norm) {
        case Norm::layer:
        case Norm::rms: return dim >= x.ndim - spec.normalized_dims ? kInner : kSample;
        case Norm::axes:
        case Norm::axes_rms: return spec.axes >> dim & 1 ? kInner : kSample;
        default: return dim == 0 ? kSample : kInner;
    }
}

bool spec_fits(const Spec& spec, const View& x) {
    if (x.ndim < 1 || x.ndim > kMaxDims) return false;
    switch (spec.norm) {
        case Norm::batch: return x.ndim >= 2 && spec.channel_axis >= 0 && spec.channel_axis < x.ndim;
        case Norm::instance: return x.ndim >= 3 && spec.channel_axis > 0 && spec.channel_axis < x.ndim;
        case Norm::group:
            return x.ndim >= 2 && spec.channel_axis > 0 && spec.channel_axis < x.ndim && spec.num_groups >= 1 &&
                   x.shape[spec.channel_axis] % spec.num_groups == 0;
        case Norm::layer:
        case Norm::rms: return spec.normalized_dims >= 1 && spec.normalized_dims <= x.ndim;
        default: return spec.axes != 0 && (spec.axes >> x.ndim) == 0;
    }
}

// Calls f(first axis of the problem, dimension of x) for each dimension, in order.
template <class F>
void for_dims(const Spec& spec, const View& x, F f) {
    int axis = 0;
    for (int d = 0; d < x.ndim; ++d) {
        f(axis, d);
        axis += has_channels(spec.norm) && d == spec.channel_axis ? 2 : 1;
    }
}

// Sets the strides of an operand along dimension d of x, whose element stride is `stride`.
void set_stride(const Spec& spec, int axis, int d, Operand operand, index_t stride, Problem* p) {
    if (has_channels(spec.norm) && d == spec.channel_axis) {
        p->axes.axis[axis].stride[operand] = stride * p->axes.axis[axis + 1].extent;
        ++axis;
    }
    p->axes.axis[axis].stride[operand] = stride;
}

bool carries_parameters(const Spec& spec, const View& x, int d) {
    const bool channel = has_channels(spec.norm) && d == spec.channel_axis;
    return row_of(spec.norm).params & (channel ? kC : role_of(spec, x, d));
}

}  // namespace

bool has_channels(Norm norm) { return row_of(norm).groups != Groups::none; }
bool has_mean(Norm norm) { return row_of(norm).center; }

int parameter_shape_of(const Spec& spec, const View& x, index_t* shape) {
    if (broadcasts(spec.norm)) return -1;
    int n = 0;
    for (int d = 0; d < x.ndim; ++d) {
        if (carries_parameters(spec, x, d)) shape[n++] = x.shape[d];
    }
    return n;
}

bool make_problem(const Spec& spec, const View& x, Problem* out) {
    if (!spec_fits(spec, x)) return false;
    const Row& row = row_of(spec.norm);
    out->center = row.center;
    for (int d = 0; d < x.ndim; ++d) {
        Axis a;
        a.extent = x.shape[d];
        unsigned role = role_of(spec, x, d);
        if (has_channels(spec.norm) && d == spec.channel_axis) {
            Axis groups;
            groups.extent = row.groups == Groups::channels ? a.extent : spec.num_groups;
            groups.reduced = row.set & kGroup;
            out->axes.push(groups);
            a.extent = groups.extent ? a.extent / groups.extent : 1;
            a.grouped = row.groups == Groups::num_groups;
            role = kChannel;
        }
        a.reduced = row.set & role;
        out->axes.push(a);
    }
    for_dims(spec, x, [&](int axis, int d) { set_stride(spec, axis, d, kX, x.strides[d], out); });
    index_t next = 1;
    for (int i = out->axes.n - 1; i >= 0; --i) {
        Axis& a = out->axes.axis[i];
        if (a.reduced) continue;
        a.stride[kStatistic] = next;
        next *= a.extent;
    }
    return true;
}

bool add_array(const Spec& spec, const View& a, const View& x, Operand operand, Problem* out) {
    if (a.dtype != x.dtype || a.ndim != x.ndim) return false;
    for (int d = 0; d < x.ndim; ++d) {
        if (a.shape[d] != x.shape[d]) return false;
    }
    for_dims(spec, x, [&](int axis, int d) { set_stride(spec, axis, d, operand, a.strides[d], out); });
    return true;
}

bool add_parameter(const Spec& spec, const View& parameter, const View& x, Operand operand, Problem* out) {
    if (!parameter.given()) return true;
    if (parameter.dtype != x.dtype && parameter.dtype != Dtype::float32 && parameter.dtype != Dtype::float64) {
        return false;
    }
    int next = parameter.ndim - 1;  // parameters align with the last dimensions that carry them
    bool fits = true;
    for (int d = x.ndim - 1; d >= 0; --d) {
        if (!carries_parameters(spec, x, d)) continue;
        if (next < 0) {
            fits = fits && broadcasts(spec.norm);
            continue;
        }
        const index_t extent = parameter.shape[next];
        const bool one = broadcasts(spec.norm) && extent == 1;
        fits = fits && (one || extent == x.shape[d]);
        const index_t stride = one ? 0 : parameter.strides[next];
        for_dims(spec, x, [&](int axis, int e) {
            if (e == d) set_stride(spec, axis, d, operand, stride, out);
        });
        --next;
    }
    return fits && next < 0;
}

index_t add_gradient(const Spec& spec, const View& weight, const View& x, Problem* out) {
    if (broadcasts(spec.norm) && !weight.given()) return 0;
    index_t count = 1;
    int next = weight.ndim - 1;
    for (int d = x.ndim - 1; d >= 0; --d) {
        if (!carries_parameters(spec, x, d)) continue;
        if (broadcasts(spec.norm) && (next < 0 || (weight.shape[next] == 1 && x.shape[d] != 1))) {
            --next;
            continue;
        }
        for_dims(spec, x, [&](int axis, int e) {
            if (e == d) set_stride(spec, axis, d, kGradient, count, out);
        });
        count *= x.shape[d];
        --next;
    }
    return count;
}

}  // namespace normkit
