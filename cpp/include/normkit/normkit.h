// normkit: every normalization of deep learning as one formula,
//
//     y = weight * (x - mean_S) / sqrt(var_S + eps) + bias
//
// over any set S of axes. This header is all that a C++ program needs. See cpp/README.md for how a call flows.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "normkit/dtypes.h"
#include "normkit/moments.h"

namespace normkit {

using index_t = std::int64_t;

constexpr int kMaxDims = 16;

// A strided array that somebody else owns. Strides are in bytes and may be negative, zero or misaligned.
// A view whose dtype is `none` stands for an argument that is not given.
struct View {
    void* data = nullptr;
    Dtype dtype = Dtype::none;
    int ndim = 0;
    index_t shape[kMaxDims] = {};
    index_t strides[kMaxDims] = {};

    bool given() const { return dtype != Dtype::none; }
    index_t size() const {
        index_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= shape[i];
        return n;
    }
};

enum class Norm : int { batch, instance, group, layer, rms, axes, axes_rms };
constexpr int kNormCount = 7;

// Which norm, and over what. Only the fields that the norm needs are read.
struct Spec {
    Norm norm = Norm::layer;
    int channel_axis = 1;     // batch, instance, group; 0 <= channel_axis < ndim
    index_t num_groups = 1;   // group
    std::uint32_t axes = 0;   // axes, axes_rms: bit i stands for axis i of x
    int normalized_dims = 1;  // layer, rms: how many trailing axes of x form the set
};

// What is written must not overlap anything else, but for y and dx as they say; of views this is checked.
// Shapes below: "parameters" is (C,) for batch, instance and group, the trailing axes for layer and rms, and anything
// that broadcasts against x for axes. "Statistics" are C-contiguous in the order of the axes of x that are kept:
// (C,), (N, C), (N, G), the leading axes, the axes not reduced.

struct Forward {
    View x;                  // any dtype
    View y;                  // like x; may be x itself; absent: statistics only
    View weight, bias;       // parameters, each of x's dtype, float32 or float64; or absent
    double* mean = nullptr;  // out, or null
    double* rstd = nullptr;  // out, 1 / sqrt(var + eps), or null
    double* M2 = nullptr;    // out, sum of squared deviations, or null
    double eps = 1e-5;
    View running_mean, running_var;  // batch, instance: float32 or float64 (C,), updated in place; both or neither
    double momentum = 0.1;           // weight of the new value
    double ddof = 1;                 // the new variance is divided by n - ddof; 0 <= ddof < n
};

struct Evaluate {
    View x, y, weight, bias;         // as in Forward
    View running_mean, running_var;  // float32 or float64 (C,): the statistics to normalize with; no negative variance
    double* mean = nullptr;          // out: the statistics used, shape as in Forward, or null
    double* rstd = nullptr;
    double eps = 1e-5;
};

struct Backward {
    View dy, x;                    // one dtype, one shape
    const double* mean = nullptr;  // as Forward gave them; mean is not read by the rms norms
    const double* rstd = nullptr;
    View weight;                       // or absent: gamma = 1
    bool constant_statistics = false;  // true: mean and rstd do not depend on x (evaluation, frozen batch norm)
    View dx;                           // like x; may be x or dy itself; or absent
    View dweight, dbias;               // C-contiguous parameters of any dtype, or absent
};

// Each returns false, having changed nothing, when shapes, dtypes, overlaps or values do not fit; true when done.
// They throw std::bad_alloc, having changed nothing, when scratch memory can't be had; Interrupted, see below; and
// nothing else.
bool forward(const Spec& spec, const Forward& args);
bool evaluate(const Spec& spec, const Evaluate& args);
bool backward(const Spec& spec, const Backward& args);

// Number of dimensions of the statistics for x, and of the parameters; -1 where the spec does not fit x. shape receives
// up to kMaxDims extents. For the axes norms the parameters have no shape of their own: -1.
int statistics_shape(const Spec& spec, const View& x, index_t* shape);
int parameter_shape(const Spec& spec, const View& x, index_t* shape);

// Whether a norm has a mean (and a bias): all but the rms norms.
bool has_mean(Norm norm);

// A function that this thread's long calls ask, several times a second, whether to give up; null (the default): they
// are not interrupted. It is called on this thread, and must not throw. A call that is told to give up throws
// Interrupted; results may then be half written, running statistics are as they were.
using ShouldStop = bool (*)();
ShouldStop& this_thread_should_stop();
struct Interrupted : std::exception {
    const char* what() const noexcept override { return "normkit: interrupted"; }
};

// Threads for the calls of this process. 0 restores the default (OMP_NUM_THREADS, or every core).
void set_num_threads(int threads);
int get_num_threads();

// Instruction sets compiled in and present on this machine, worst first, and the one in force. select_isa returns
// false for one that is not available. The environment variable NORMKIT_ISA chooses at start-up. find_isa gives the
// name with static lifetime, or null.
std::vector<std::string> available_isas();
std::string current_isa();
bool select_isa(const std::string& name);
const char* find_isa(const std::string& name);

// Copies n floats with all threads, by ordinary or non-temporal stores: the speed of memory that benchmarks compare
// with.
void copy(const float* from, float* to, index_t n, bool stream);

// For tests and bug reports. None of the choices changes a bit of any result.
struct Choices {                // -1: as the schedule sees fit; 0: no; 1: yes
    int split = -1;             // share one set among several units of work
    int resident = -1;          // moments and apply on one unit while it is in cache
    int stream = -1;            // non-temporal stores, and asking for what is read next
    int by_row = -1;            // the sums of one set beside the writing of another
    const char* isa = nullptr;  // a name of available_isas(), with static lifetime
    int by_sample = -1;         // two sweeps, of some samples before those of the next
};
struct Path {  // what the last call of this thread did
    const char* walk = "";
    const char* isa = "";
    int threads = 0;
    bool split = false, resident = false, stream = false, by_row = false, by_sample = false;
    bool in_eights = false, in_parts = false;
};
Choices& this_thread_choices();
const Path& this_thread_last_path();

}  // namespace normkit
