// The CUDA kernels, run on the host by the emulator: every kernel and every way of the planner, in every dtype, against
// the CPU in float64 within the bounds of the contract; and the same bits whatever the device, the order of threads and
// blocks, the alignment, and alone or in a batch.
//
//     normkit_cuda_kernels [-v]    -v: a line for each case

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <new>
#include <random>
#include <set>
#include <string>
#include <vector>

#define NORMKIT_CUDA_EMULATOR "../../tests/cuda_emulator.h"
#include "../src/cuda/operations.h"
#include "../src/cuda/start.h"
#include "cuda_emulator.h"
#include "normkit/cuda.h"
#include "normkit/normkit.h"

namespace normkit::cuda {

index_t most_blocks = INT32_MAX;  // of a launch: with fewer than are planned, each does the work of several

template <class... Arguments>
void run(void (*kernel)(Arguments...), const Launch& launch, const Launches&, Stream, Arguments... arguments) {
    Emulator::get().launch(static_cast<unsigned>(std::min(launch.grid, most_blocks)),
                           static_cast<unsigned>(launch.threads), static_cast<std::size_t>(launch.shared),
                           [&] { kernel(arguments...); });
}

}  // namespace normkit::cuda

#include "../src/cuda/columns.cu"
#include "../src/cuda/rows_backward.cu"
#include "../src/cuda/rows_forward.cu"
#include "../src/cuda/sets.cu"

using namespace normkit;

namespace {

int failures = 0;
bool verbose = false;
std::set<std::string> launched;

class EmulatedMachine : public cuda::Machine {
  public:
    cuda::Device properties;
    std::string kernels;
    int allocations = -1;  // that there is memory for; -1: any number

    cuda::Device device() override { return properties; }
    void* allocate(index_t bytes) override {
        if (allocations-- == 0) throw std::bad_alloc();
        void* p = std::aligned_alloc(256, static_cast<std::size_t>((bytes + 255) / 256 * 256));
        std::memset(p, 0xff, static_cast<std::size_t>(bytes));
        return p;
    }
    void deallocate(void* p) noexcept override { std::free(p); }
    void zero(void* p, index_t bytes) override { std::memset(p, 0, static_cast<std::size_t>(bytes)); }
    void start(const cuda::Launch& launch, const cuda::Launches& all) override {
        kernels += kernels.empty() ? "" : " ";
        kernels += cuda::name_of(launch.kernel);
        launched.insert(cuda::name_of(launch.kernel));
        cuda::start(launch, all, nullptr);
    }
};

// An array in some order of memory, at some distance from an address that is a multiple of 64.
struct Array {
    std::vector<char> memory;
    View view;

    Array() = default;
    Array(const std::vector<index_t>& shape, Dtype dtype, std::vector<int> order = {}, index_t offset = 0,
          index_t gap = 0) {
        view.dtype = dtype;
        view.ndim = static_cast<int>(shape.size());
        if (order.empty()) {
            for (int d = 0; d < view.ndim; ++d) order.push_back(d);
        }
        index_t stride = size_of(dtype);
        for (int i = view.ndim - 1; i >= 0; --i) {
            const int d = order[static_cast<std::size_t>(i)];
            view.shape[d] = shape[static_cast<std::size_t>(d)];
            view.strides[d] = stride;
            stride = stride * view.shape[d] + (i == view.ndim - 1 ? gap * size_of(dtype) : 0);
        }
        memory.assign(static_cast<std::size_t>(stride + 64 + offset), 0);
        char* start = memory.data();
        start += (64 - reinterpret_cast<std::uintptr_t>(start) % 64) % 64;
        view.data = start + offset;
    }
    Array(const Array&) = delete;
    Array(Array&& other) = default;
    Array& operator=(Array&&) = default;

    index_t offset(index_t i) const {
        index_t at = 0;
        for (int d = view.ndim - 1; d >= 0; --d) {
            at += i % view.shape[d] * view.strides[d];
            i /= view.shape[d];
        }
        return at;
    }
    double get(index_t i) const { return read_double(static_cast<char*>(view.data) + offset(i), view.dtype); }
    void set(index_t i, double v) { write_double(static_cast<char*>(view.data) + offset(i), view.dtype, v); }
    index_t size() const { return view.size(); }
};

struct Case {
    const char* name;
    Spec spec;
    std::vector<index_t> shape;
    std::vector<int> order = {};  // of memory; empty: C order
    Dtype dtype = Dtype::float32;
    bool parameters = true;
    Dtype parameter_dtype = Dtype::none;     // none: of the data
    std::vector<index_t> weight_shape = {};  // axes norms
    double mean = 1, std = 1;
    cuda::Device device = {};
    index_t offset = 0, gap = 0;
    bool in_place = false;
    bool sorted = false;
    bool repeated = false;  // the weight has a stride of 0 along its first axis
};

struct Results {
    Array y, dx, dweight, dbias;
    std::vector<double> mean, rstd, M2;
    std::string kernels;
};

struct Inputs {
    Array x, dy, weight, bias;
};

std::vector<index_t> parameter_shape_of(const Case& c, const View& x) {
    if (!c.weight_shape.empty()) return c.weight_shape;
    index_t shape[kMaxDims];
    const int n = parameter_shape(c.spec, x, shape);
    return std::vector<index_t>(shape, shape + std::max(n, 0));
}

Inputs make_inputs(const Case& c, Dtype dtype, index_t offset, index_t gap) {
    Inputs in;
    in.x = Array(c.shape, dtype, c.order, offset, gap);
    in.dy = Array(c.shape, dtype, c.order, offset, gap);
    if (!c.parameters) return in;
    const Dtype own = dtype == Dtype::float64 || c.parameter_dtype == Dtype::none ? dtype : c.parameter_dtype;
    in.weight = Array(parameter_shape_of(c, in.x.view), own);
    in.bias = Array(parameter_shape_of(c, in.x.view), own);
    if (c.repeated) in.weight.view.strides[0] = 0;
    return in;
}

// Numbers as the case's dtypes have them; the float64 copy has the same.
void fill(const Case& c, Inputs* a, Inputs* exact) {
    std::mt19937 random(7);
    std::normal_distribution<double> normal;
    std::vector<double> values(static_cast<std::size_t>(a->x.size()));
    for (double& v : values) v = c.mean + c.std * normal(random);
    if (c.sorted) std::sort(values.begin(), values.end());
    for (index_t i = 0; i < a->x.size(); ++i) a->x.set(i, values[static_cast<std::size_t>(i)]);
    for (Array* p : {&a->dy, &a->weight, &a->bias}) {
        for (index_t i = 0; p->view.given() && i < p->size(); ++i) p->set(i, normal(random));
    }
    const Array* from[] = {&a->x, &a->dy, &a->weight, &a->bias};
    Array* to[] = {&exact->x, &exact->dy, &exact->weight, &exact->bias};
    for (int k = 0; k < 4; ++k) {
        for (index_t i = 0; from[k]->view.given() && i < from[k]->size(); ++i) to[k]->set(i, from[k]->get(i));
    }
}

struct Wanted {
    bool y = true, dx = true, gradients = true;
};

Results compute(const Case& c, Inputs& in, Dtype dtype, cuda::Device* device, index_t offset, index_t gap,
                const Results* statistics, Wanted wanted = {}) {
    Results out;
    if (wanted.y) out.y = Array(c.shape, dtype, c.order, offset, gap);
    if (wanted.dx) out.dx = Array(c.shape, dtype, c.order, offset, gap);
    index_t shape[kMaxDims], sets = 1;
    const int n = statistics_shape(c.spec, in.x.view, shape);
    for (int d = 0; d < n; ++d) sets *= shape[d];
    const std::size_t count = static_cast<std::size_t>(sets);
    out.mean.resize(count);
    out.rstd.resize(count);
    out.M2.resize(count);
    EmulatedMachine machine;
    if (device) machine.properties = *device;

    Array copy(c.shape, dtype, c.order, offset, gap);
    Forward f;
    f.x = in.x.view;
    if (c.in_place && device) {
        for (index_t i = 0; i < in.x.size(); ++i) out.y.set(i, in.x.get(i));
        f.x = out.y.view;
    }
    f.y = out.y.view;
    f.weight = in.weight.view;
    f.bias = has_mean(c.spec.norm) ? in.bias.view : View{};
    f.mean = out.mean.data();
    f.rstd = out.rstd.data();
    f.M2 = out.M2.data();
    bool fits = device ? cuda::forward(c.spec, f, machine) : forward(c.spec, f);
    machine.kernels += " |";

    Backward b;
    b.dy = in.dy.view;
    b.x = in.x.view;
    if (c.in_place && device) {
        for (index_t i = 0; i < in.x.size(); ++i) out.dx.set(i, in.dy.get(i));
        b.dy = out.dx.view;
    }
    const Results& s = statistics ? *statistics : out;
    b.mean = s.mean.data();
    b.rstd = s.rstd.data();
    b.weight = in.weight.view;
    b.dx = out.dx.view;
    if (wanted.gradients && (in.weight.view.given() || !parameter_shape_of(c, in.x.view).empty())) {
        const std::vector<index_t> p = parameter_shape_of(c, in.x.view);
        const Dtype own = dtype == Dtype::float64 ? dtype : Dtype::float32;
        out.dweight = Array(p, own);
        out.dbias = Array(p, own);
        b.dweight = out.dweight.view;
        b.dbias = out.dbias.view;
    }
    fits = fits && (device ? cuda::backward(c.spec, b, machine) : backward(c.spec, b));
    if (!fits) {
        std::printf("%s: the arguments do not fit\n", c.name);
        ++failures;
    }
    out.kernels = machine.kernels;
    return out;
}

// Half a unit in the last place of v.
double rounding(Dtype dtype, double v) {
    const int digits = dtype == Dtype::float16 ? 11 : dtype == Dtype::bfloat16 ? 8 : 0;
    const int least = dtype == Dtype::float16 ? -14 : -126;
    if (digits == 0) return 0;
    const int exponent = v == 0 ? least : std::max(std::ilogb(v), least);
    return 0.501 * std::ldexp(1.0, exponent - digits + 1);
}

class Worst {
  public:
    Worst(const Case& c, const char* what) : c_(c), what_(what) {}
    void see(double got, double right, double bound) {
        if (std::isnan(got) && std::isnan(right)) return;
        const double ratio = got == right ? 0 : std::fabs(got - right) / bound;
        if (!(ratio <= worst_)) {
            worst_ = ratio;
            got_ = got;
            right_ = right;
        }
    }
    ~Worst() {
        if (verbose) std::printf("  %s %.3f", what_, worst_);
        if (worst_ <= 1) return;
        std::printf("\n%s: %s is %.9g, must be %.9g: %.2f times the bound\n", c_.name, what_, got_, right_, worst_);
        ++failures;
    }

  private:
    const Case& c_;
    const char* what_;
    double worst_ = 0, got_ = 0, right_ = 0;
};

// Which set, and which parameter, element i of x belongs to.
struct Membership {
    std::vector<index_t> set, parameter;
};
Membership membership(const Case& c, const Inputs& in) {
    Membership m;
    const View& x = in.x.view;
    const std::vector<index_t> p = parameter_shape_of(c, x);
    for (index_t i = 0; i < x.size(); ++i) {
        index_t at[kMaxDims], rest = i;
        for (int d = x.ndim - 1; d >= 0; --d) {
            at[d] = rest % x.shape[d];
            rest /= x.shape[d];
        }
        const int channel = c.spec.channel_axis;
        index_t set = 0, parameter = 0;
        switch (c.spec.norm) {
            case Norm::batch: set = parameter = at[channel]; break;
            case Norm::instance:
                set = at[0] * x.shape[channel] + at[channel];
                parameter = at[channel];
                break;
            case Norm::group:
                set = at[0] * c.spec.num_groups + at[channel] / (x.shape[channel] / c.spec.num_groups);
                parameter = at[channel];
                break;
            default:
                for (int d = 0; d < x.ndim; ++d) {
                    const bool layer = c.spec.norm == Norm::layer || c.spec.norm == Norm::rms;
                    const bool inner = layer ? d >= x.ndim - c.spec.normalized_dims : c.spec.axes >> d & 1;
                    if (!inner) set = set * x.shape[d] + at[d];
                    const int k = d - (x.ndim - static_cast<int>(p.size()));
                    if (k >= 0)
                        parameter = parameter * p[static_cast<std::size_t>(k)] +
                                    (p[static_cast<std::size_t>(k)] == 1 ? 0 : at[d]);
                }
        }
        m.set.push_back(set);
        m.parameter.push_back(parameter);
    }
    return m;
}

bool same_bits(const Case& c, const char* what, const Results& a, const Results& b) {
    const auto equal = [](const Array& u, const Array& v) {
        for (index_t i = 0; u.view.given() && i < u.size(); ++i) {
            const double s = u.get(i), t = v.get(i);
            if (!(s == t || (std::isnan(s) && std::isnan(t)))) return false;
        }
        return true;
    };
    const auto equal_statistics = [](const std::vector<double>& u, const std::vector<double>& v) {
        for (std::size_t i = 0; i < u.size(); ++i) {
            if (!(u[i] == v[i] || (std::isnan(u[i]) && std::isnan(v[i])))) return false;
        }
        return true;
    };
    std::string differ;
    if (!equal_statistics(a.mean, b.mean) || !equal_statistics(a.rstd, b.rstd)) differ += " statistics";
    if (!equal(a.y, b.y)) differ += " y";
    if (!equal(a.dx, b.dx)) differ += " dx";
    if (!equal(a.dweight, b.dweight) || !equal(a.dbias, b.dbias)) differ += " gradients";
    if (differ.empty()) return true;
    std::printf("%s: other bits %s in%s\n  %s\n  %s\n", c.name, what, differ.c_str(), a.kernels.c_str(),
                b.kernels.c_str());
    ++failures;
    return false;
}

void check(const Case& c, bool thorough) {
    if (verbose) std::printf("%s:", c.name);
    Inputs in = make_inputs(c, c.dtype, c.offset, c.gap), exact = make_inputs(c, Dtype::float64, 0, 0);
    fill(c, &in, &exact);
    Results right = compute(c, exact, Dtype::float64, nullptr, 0, 0, nullptr);
    cuda::Device device = c.device;
    const Results got = compute(c, in, c.dtype, &device, c.offset, c.gap, &right);
    if (verbose) std::printf(" %s\n ", got.kernels.c_str());

    const Membership of = membership(c, in);
    const bool center = has_mean(c.spec.norm);
    const double small = c.dtype == Dtype::float64 ? 1e-7 : 1;
    {
        Worst y(c, "y"), dx(c, "dx"), dweight(c, "dweight"), dbias(c, "dbias"), mean(c, "mean"), rstd(c, "rstd");
        std::vector<double> most_g(right.mean.size(), 0);
        const index_t parameters = got.dweight.view.given() ? got.dweight.size() : 0;
        std::vector<double> terms(static_cast<std::size_t>(parameters)), g_terms(static_cast<std::size_t>(parameters));
        for (index_t i = 0; i < in.x.size(); ++i) {
            const std::size_t k = static_cast<std::size_t>(i), s = static_cast<std::size_t>(of.set[k]);
            const double w = in.weight.view.given() ? in.weight.get(of.parameter[k]) : 1;
            const double b = in.bias.view.given() && center ? in.bias.get(of.parameter[k]) : 0;
            const double xhat = (in.x.get(i) - (center ? right.mean[s] : 0)) * right.rstd[s];
            y.see(got.y.get(i), right.y.get(i),
                  5e-7 * small * std::max(1.0, std::fabs(w * xhat) + std::fabs(b)) + rounding(c.dtype, right.y.get(i)));
            most_g[s] = std::max(most_g[s], std::fabs(w * in.dy.get(i)));
            if (parameters) {
                terms[static_cast<std::size_t>(of.parameter[k])] += std::fabs(in.dy.get(i) * xhat);
                g_terms[static_cast<std::size_t>(of.parameter[k])] += std::fabs(in.dy.get(i));
            }
        }
        for (index_t i = 0; i < in.x.size(); ++i) {
            const std::size_t s = static_cast<std::size_t>(of.set[static_cast<std::size_t>(i)]);
            dx.see(got.dx.get(i), right.dx.get(i),
                   1e-6 * small * right.rstd[s] * most_g[s] + rounding(c.dtype, right.dx.get(i)));
        }
        for (index_t p = 0; p < parameters; ++p) {
            dweight.see(got.dweight.get(p), right.dweight.get(p), 1e-6 * small * terms[static_cast<std::size_t>(p)]);
            dbias.see(got.dbias.get(p), right.dbias.get(p), 1e-6 * small * g_terms[static_cast<std::size_t>(p)]);
        }
        for (std::size_t s = 0; s < right.mean.size(); ++s) {
            if (center)
                mean.see(got.mean[s], right.mean[s], 1e-7 * small / right.rstd[s] + 1e-15 * std::fabs(right.mean[s]));
            rstd.see(got.rstd[s], right.rstd[s], 2.5e-7 * small * right.rstd[s]);
        }
    }
    if (verbose) std::printf("\n");

    // Whatever the device has room for, and whatever comes first.
    cuda::Device split{1, 0, 0}, reload{4, 24 * 1024, 1 << 30}, many{1000000, 232448, 50 << 20};
    cuda::Emulator::get().backwards = true;
    cuda::most_blocks = 2;
    same_bits(c, "split, threads backwards, two blocks", got, compute(c, in, c.dtype, &split, c.offset, c.gap, &right));
    cuda::Emulator::get().backwards = false;
    cuda::most_blocks = 1;
    if (thorough) {
        same_bits(c, "read again, one block", got, compute(c, in, c.dtype, &reload, c.offset, c.gap, &right));
    }
    cuda::most_blocks = INT32_MAX;
    if (!thorough) return;
    same_bits(c, "with many multiprocessors", got, compute(c, in, c.dtype, &many, c.offset, c.gap, &right));
    for (cuda::Device* each : {&device, &split}) {
        const Wanted sums{false, false, true}, no_gradients{true, true, false};
        same_bits(c, "without y and dx", compute(c, in, c.dtype, each, c.offset, c.gap, &right, sums), got);
        same_bits(c, "without gradients", compute(c, in, c.dtype, each, c.offset, c.gap, &right, no_gradients), got);
    }
    if (c.offset == 0 && c.gap == 0) {
        const index_t off = size_of(c.dtype);
        Inputs apart = make_inputs(c, c.dtype, off, 0), unused = make_inputs(c, Dtype::float64, 0, 0);
        fill(c, &apart, &unused);
        same_bits(c, "misaligned", got, compute(c, apart, c.dtype, &device, off, 0, &right));
    }
}

Spec spec_of(Norm norm, index_t groups = 1, int dims = 1) {
    Spec s;
    s.norm = norm;
    s.num_groups = groups;
    s.normalized_dims = dims;
    return s;
}
Spec axes_of(Norm norm, std::uint32_t axes) {
    Spec s;
    s.norm = norm;
    s.axes = axes;
    return s;
}

// Running statistics, evaluation, its backward pass and empty arrays.
void check_running() {
    for (const bool nhwc : {false, true}) {
        Case c{"batch, running", spec_of(Norm::batch), {3, 5, 4, 6}};
        if (nhwc) c.order = {0, 2, 3, 1};
        for (const Norm norm : {Norm::batch, Norm::instance}) {
            c.spec.norm = norm;
            Inputs in = make_inputs(c, c.dtype, 0, 0), exact = make_inputs(c, Dtype::float64, 0, 0);
            fill(c, &in, &exact);
            EmulatedMachine machine;
            std::vector<float> mean(5, 0.5f), var(5, 2.f), mean2 = mean, var2 = var;
            const auto view = [](std::vector<float>& v) {
                View view;
                view.data = v.data();
                view.dtype = Dtype::float32;
                view.ndim = 1;
                view.shape[0] = static_cast<index_t>(v.size());
                view.strides[0] = sizeof(float);
                return view;
            };
            Array y(c.shape, c.dtype, c.order), y2(c.shape, c.dtype, c.order);
            Forward f;
            f.x = in.x.view;
            f.y = y.view;
            f.running_mean = view(mean);
            f.running_var = view(var);
            bool good = cuda::forward(c.spec, f, machine);
            f.y = y2.view;
            f.running_mean = view(mean2);
            f.running_var = view(var2);
            good = good && forward(c.spec, f);
            for (std::size_t i = 0; i < 5; ++i) {
                good = good && std::fabs(mean[i] - mean2[i]) < 1e-6 && std::fabs(var[i] - var2[i]) < 1e-6;
            }
            Evaluate e;
            e.x = in.x.view;
            e.y = y.view;
            e.weight = in.weight.view;
            e.bias = in.bias.view;
            e.running_mean = view(mean2);
            e.running_var = view(var2);
            std::vector<double> m(15), r(15), m2(15), r2(15);
            e.mean = m.data();
            e.rstd = r.data();
            good = good && cuda::evaluate(c.spec, e, machine);
            e.y = y2.view;
            e.mean = m2.data();
            e.rstd = r2.data();
            good = good && evaluate(c.spec, e) && m == m2 && r == r2;
            for (index_t i = 0; i < y.size(); ++i) good = good && std::fabs(y.get(i) - y2.get(i)) < 2e-6;
            Backward b;
            b.x = in.x.view;
            b.dy = in.dy.view;
            b.mean = m.data();
            b.rstd = r.data();
            b.weight = in.weight.view;
            b.constant_statistics = true;
            for (const bool gradients : {true, false}) {
                Array dw({5}, Dtype::float32), db({5}, Dtype::float32), dw2({5}, Dtype::float32),
                    db2({5}, Dtype::float32);
                b.dx = y.view;
                if (gradients) b.dweight = dw.view;
                if (gradients) b.dbias = db.view;
                good = good && cuda::backward(c.spec, b, machine);
                b.dx = y2.view;
                if (gradients) b.dweight = dw2.view;
                if (gradients) b.dbias = db2.view;
                good = good && backward(c.spec, b);
                for (index_t i = 0; i < y.size(); ++i) good = good && std::fabs(y.get(i) - y2.get(i)) < 2e-6;
                for (index_t i = 0; i < 5; ++i) {
                    good = good && std::fabs(dw.get(i) - dw2.get(i)) < 1e-4 && std::fabs(db.get(i) - db2.get(i)) < 1e-4;
                }
                b.dweight = b.dbias = View{};
            }
            if (!good) {
                std::printf("running statistics of norm %d, %s\n", static_cast<int>(norm), machine.kernels.c_str());
                ++failures;
            }
        }
    }
    EmulatedMachine machine;
    Case c{"empty", spec_of(Norm::layer), {3, 0}};
    Inputs in = make_inputs(c, c.dtype, 0, 0);
    std::vector<double> mean(3), rstd(3);
    Forward f;
    f.x = in.x.view;
    f.mean = mean.data();
    f.rstd = rstd.data();
    if (!cuda::forward(c.spec, f, machine) || !std::isnan(mean[2]) || !std::isnan(rstd[0])) {
        std::printf("empty x\n");
        ++failures;
    }
    Case none{"no samples", spec_of(Norm::batch), {0, 3}};
    Inputs of_none = make_inputs(none, none.dtype, 0, 0);
    Array dweight({3}, Dtype::float32), dbias({3}, Dtype::float64);
    for (index_t i = 0; i < 3; ++i) {
        dweight.set(i, 1);
        dbias.set(i, 1);
    }
    Backward b;
    b.x = of_none.x.view;
    b.dy = of_none.dy.view;
    b.mean = mean.data();
    b.rstd = rstd.data();
    b.dweight = dweight.view;
    b.dbias = dbias.view;
    bool zero = cuda::backward(none.spec, b, machine);
    for (index_t i = 0; i < 3; ++i) zero = zero && dweight.get(i) == 0 && dbias.get(i) == 0;
    if (!zero) {
        std::printf("gradients of an empty x\n");
        ++failures;
    }
}

// Where memory runs out, at whatever allocation, nothing has been enqueued.
void check_out_of_memory() {
    Case c{"out of memory", spec_of(Norm::batch), {3, 5, 4, 6}};
    Inputs in = make_inputs(c, c.dtype, 0, 0), exact = make_inputs(c, Dtype::float64, 0, 0);
    fill(c, &in, &exact);
    Array y(c.shape, c.dtype), running({2, 5}, Dtype::float64), gradients({2, 5}, Dtype::float32);
    for (index_t i = 0; i < running.size(); ++i) running.set(i, 1);
    const auto row = [](const Array& of, index_t i) {
        View v = of.view;
        v.ndim = 1;
        v.shape[0] = v.shape[1];
        v.data = static_cast<char*>(v.data) + i * v.strides[0];
        v.strides[0] = v.strides[1];
        return v;
    };
    std::vector<double> mean(5), rstd(5);
    Forward f;
    f.x = in.x.view;
    f.y = y.view;
    f.running_mean = row(running, 0);
    f.running_var = row(running, 1);
    Evaluate e;
    e.x = f.x;
    e.y = f.y;
    e.running_mean = f.running_mean;
    e.running_var = f.running_var;
    e.mean = mean.data();
    e.rstd = rstd.data();
    Backward b;
    b.x = in.x.view;
    b.dy = in.dy.view;
    b.mean = mean.data();
    b.rstd = rstd.data();
    b.dx = y.view;
    b.dweight = row(gradients, 0);
    b.dbias = row(gradients, 1);
    for (int operation = 0; operation < 3; ++operation) {
        for (int allocations = 0;; ++allocations) {
            EmulatedMachine machine;
            machine.properties = {1, 0, 0};
            machine.allocations = allocations;
            try {
                operation == 0   ? cuda::forward(c.spec, f, machine)
                : operation == 1 ? cuda::evaluate(c.spec, e, machine)
                                 : cuda::backward(c.spec, b, machine);
                break;
            } catch (const std::bad_alloc&) {
                if (machine.kernels.empty()) continue;
                std::printf("out of memory after %s\n", machine.kernels.c_str());
                ++failures;
            }
        }
    }
}

// Magnitudes at the ends of the range, NaN and infinity, constant sets.
void check_extremes() {
    for (const Norm norm : {Norm::layer, Norm::batch, Norm::instance}) {
        for (const bool nhwc : {false, true}) {
            for (const double size : {1e-38, 1e-30, 1.0, 1e30, 3e38}) {
                for (const Dtype dtype : {Dtype::float32, Dtype::float64}) {
                    const double factor = dtype == Dtype::float64 && size != 1 ? std::pow(size, 8) : size;
                    Case c{"extreme", spec_of(norm, 1, 3), {2, 8, 6, 50}};
                    if (nhwc) c.order = {0, 2, 3, 1};
                    c.dtype = dtype;
                    c.parameters = false;
                    Inputs in = make_inputs(c, dtype, 0, 0);
                    std::mt19937 random(3);
                    std::uniform_real_distribution<double> uniform(-1, 1);
                    for (index_t i = 0; i < in.x.size(); ++i) {
                        in.x.set(i, i % 400 == 0 ? factor : factor * uniform(random));
                    }
                    for (cuda::Device device : {cuda::Device{}, cuda::Device{1, 0, 0}}) {
                        Array y(c.shape, dtype, c.order), y2(c.shape, dtype, c.order);
                        EmulatedMachine machine;
                        machine.properties = device;
                        std::vector<double> mean(16), rstd(16), M2(16), mean2(16), rstd2(16), M22(16);
                        Forward f;
                        f.x = in.x.view;
                        f.eps = 0;
                        f.y = y.view;
                        f.mean = mean.data();
                        f.rstd = rstd.data();
                        f.M2 = M2.data();
                        bool good = cuda::forward(c.spec, f, machine);
                        f.y = y2.view;
                        f.mean = mean2.data();
                        f.rstd = rstd2.data();
                        f.M2 = M22.data();
                        good = good && forward(c.spec, f);
                        for (index_t i = 0; i < y.size(); ++i) good = good && std::fabs(y.get(i) - y2.get(i)) < 2e-6;
                        for (int i = 0; i < 16; ++i) good = good && std::fabs(rstd[i] - rstd2[i]) <= 1e-6 * rstd2[i];
                        if (!good) {
                            std::printf("magnitude %g, norm %d, %s: %s\n", factor, static_cast<int>(norm),
                                        nhwc ? "NHWC" : "NCHW", machine.kernels.c_str());
                            ++failures;
                        }
                    }
                }
            }
        }
    }
    Case c{"not finite", spec_of(Norm::layer), {4, 3000}};
    c.parameters = false;
    Inputs in = make_inputs(c, c.dtype, 0, 0);
    for (index_t i = 0; i < in.x.size(); ++i) in.x.set(i, i < 3000 ? 7.7 : static_cast<double>(i % 13));
    in.x.set(3000 + 5, NAN);
    in.x.set(6000 + 2999, INFINITY);
    for (cuda::Device device : {cuda::Device{}, cuda::Device{1, 0, 0}}) {
        Array y(c.shape, c.dtype);
        EmulatedMachine machine;
        machine.properties = device;
        std::vector<double> mean(4), rstd(4);
        Forward f;
        f.x = in.x.view;
        f.y = y.view;
        f.mean = mean.data();
        f.rstd = rstd.data();
        bool good = cuda::forward(c.spec, f, machine);
        for (index_t i = 0; i < 3000; ++i) {
            good = good && y.get(i) == 0 && std::isnan(y.get(3000 + i)) && std::isnan(y.get(6000 + i)) &&
                   std::isfinite(y.get(9000 + i));
        }
        good = good && std::isinf(mean[2]) && std::isnan(rstd[2]) && std::isnan(rstd[1]) && mean[0] == in.x.get(0);
        if (!good) {
            std::printf("NaN, infinity or a constant set, %s\n", machine.kernels.c_str());
            ++failures;
        }
    }
}

// A sample alone has the bits that it has in a batch.
void check_batch() {
    for (const Norm norm : {Norm::instance, Norm::group, Norm::layer}) {
        for (const bool nhwc : {false, true}) {
            Case c{"a sample alone", spec_of(norm, 2, 3), {5, 6, 7, 9}};
            if (nhwc) c.order = {0, 2, 3, 1};
            Inputs in = make_inputs(c, c.dtype, 0, 0), exact = make_inputs(c, Dtype::float64, 0, 0);
            fill(c, &in, &exact);
            const Results right = compute(c, exact, Dtype::float64, nullptr, 0, 0, nullptr);
            cuda::Device device;
            const Results all = compute(c, in, c.dtype, &device, 0, 0, &right);
            Case alone = c;
            alone.shape[0] = 1;
            const index_t sample = in.x.size() / 5;
            Inputs one = make_inputs(alone, c.dtype, 0, 0), unused = make_inputs(alone, Dtype::float64, 0, 0);
            fill(alone, &one, &unused);
            for (index_t i = 0; i < sample; ++i) {
                one.x.set(i, in.x.get(3 * sample + i));
                one.dy.set(i, in.dy.get(3 * sample + i));
            }
            for (index_t i = 0; i < one.weight.size(); ++i) {
                one.weight.set(i, in.weight.get(i));
                one.bias.set(i, in.bias.get(i));
            }
            Results of_one;
            of_one.mean.assign(right.mean.begin() + 3 * static_cast<std::ptrdiff_t>(right.mean.size() / 5),
                               right.mean.end());
            of_one.rstd.assign(right.rstd.begin() + 3 * static_cast<std::ptrdiff_t>(right.rstd.size() / 5),
                               right.rstd.end());
            const Results got = compute(alone, one, c.dtype, &device, 0, 0, &of_one);
            bool good = true;
            for (index_t i = 0; i < sample; ++i) {
                good = good && got.y.get(i) == all.y.get(3 * sample + i) && got.dx.get(i) == all.dx.get(3 * sample + i);
            }
            if (!good) {
                std::printf("other bits alone: norm %d, %s\n", static_cast<int>(norm), nhwc ? "NHWC" : "NCHW");
                ++failures;
            }
        }
    }
}

// What the planner asks of a device, for sets and arrays that no test could compute.
class PlanningMachine : public cuda::Machine {
  public:
    cuda::Device properties;
    std::string wrong;

    cuda::Device device() override { return properties; }
    void* allocate(index_t) override { return reinterpret_cast<void*>(index_t{1} << 60); }
    void deallocate(void*) noexcept override {}
    void zero(void*, index_t) override {}
    void start(const cuda::Launch& launch, const cuda::Launches& all) override {
        constexpr index_t kAlwaysThere = 48 * 1024;
        if (!wrong.empty()) return;
        if (launch.shared > std::max(kAlwaysThere, properties.shared_bytes)) wrong = "shared memory";
        if (launch.grid < 1 || launch.grid > INT32_MAX) wrong = "blocks";
        if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32 != 0) wrong = "threads";
        if (all.count > static_cast<int>(std::size(all.list))) wrong = "launches";
        if (!wrong.empty()) wrong += std::string(" of ") + cuda::name_of(launch.kernel);
    }
};

void check_limits() {
    const index_t huge = index_t{1} << 33;
    const std::vector<std::vector<index_t>> shapes = {{1, huge},          {huge, 1, 3},   {5, 1, 1 << 20},
                                                      {3, 1 << 22},       {70000, 70000}, {2, 8, 1 << 23},
                                                      {64, 3, huge / 64}, {huge, 2},      {1000, 64, 1000, 1000}};
    const std::vector<cuda::Device> devices = {
        {1, 0, 0}, {1, 48 * 1024, index_t{1} << 40}, {16, 101376, 128 << 20}, {188, 101376, 128 << 20},
        {132},     {108, 166912, 40 << 20}};
    for (const std::vector<index_t>& shape : shapes) {
        for (const Norm norm : {Norm::layer, Norm::rms, Norm::batch, Norm::instance, Norm::group}) {
            for (const bool channels_last : {false, true}) {
                for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::float16}) {
                    View x;
                    x.dtype = dtype;
                    x.ndim = static_cast<int>(shape.size());
                    x.data = reinterpret_cast<void*>(index_t{1} << 40);
                    index_t stride = size_of(dtype);
                    const auto push = [&](int d) {
                        x.shape[d] = shape[static_cast<std::size_t>(d)];
                        x.strides[d] = stride;
                        stride *= x.shape[d];
                    };
                    if (channels_last) push(1);
                    for (int d = x.ndim - 1; d >= (channels_last ? 2 : 1); --d) push(d);
                    push(0);
                    const Spec spec = spec_of(norm);
                    index_t of_parameter[kMaxDims], of_statistics[kMaxDims];
                    const int parameter_dims = parameter_shape(spec, x, of_parameter);
                    if (parameter_dims < 0 || statistics_shape(spec, x, of_statistics) < 0) continue;
                    const auto beside = [&](int i, Dtype of) {
                        View v;
                        v.dtype = of;
                        v.ndim = parameter_dims;
                        v.data = reinterpret_cast<void*>(index_t{i} << 50);
                        index_t next = size_of(of);
                        for (int d = parameter_dims - 1; d >= 0; --d) {
                            v.shape[d] = of_parameter[d];
                            v.strides[d] = next;
                            next *= v.shape[d];
                        }
                        return v;
                    };
                    const auto like_x = [&](int i) {
                        View v = x;
                        v.data = reinterpret_cast<void*>(index_t{i} << 50);
                        return v;
                    };
                    for (const cuda::Device& device : devices) {
                        PlanningMachine machine;
                        machine.properties = device;
                        Forward f;
                        f.x = x;
                        f.y = like_x(1);
                        f.weight = beside(2, Dtype::float32);
                        if (has_mean(norm)) f.bias = beside(3, Dtype::float64);
                        cuda::forward(spec, f, machine);
                        Backward b;
                        b.x = x;
                        b.dy = like_x(1);
                        b.dx = like_x(4);
                        b.weight = f.weight;
                        b.dweight = beside(5, Dtype::float32);
                        if (has_mean(norm)) b.dbias = beside(6, Dtype::float32);
                        b.mean = b.rstd = reinterpret_cast<const double*>(index_t{7} << 50);
                        cuda::backward(spec, b, machine);
                        if (machine.wrong.empty()) continue;
                        std::printf("norm %d of %lldx%lld%s: too many %s\n", static_cast<int>(norm),
                                    static_cast<long long>(shape[0]), static_cast<long long>(shape[1]),
                                    channels_last ? ", channels last" : "", machine.wrong.c_str());
                        ++failures;
                    }
                }
            }
        }
    }
}

void check_division() {
    std::mt19937_64 random(5);
    for (int i = 0; i < 200000; ++i) {
        const index_t d = static_cast<index_t>(random() >> (20 + random() % 44)) + 1;
        const index_t n = static_cast<index_t>(random() >> (1 + random() % 63));
        const cuda::Division division(d);
        for (const index_t k : {n, n / d * d, n / d * d - 1, index_t{INT32_MAX}, index_t{INT32_MAX} + 1}) {
            if (k < 0 || (division.quotient(k) == k / d && division.remainder(k) == k % d)) continue;
            std::printf("%lld / %lld is not %lld\n", static_cast<long long>(k), static_cast<long long>(d),
                        static_cast<long long>(division.quotient(k)));
            ++failures;
            return;
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    verbose = argc > 1 && std::strcmp(argv[1], "-v") == 0;
    check_division();
    check_limits();

    const std::vector<int> nhwc = {0, 2, 3, 1};
    std::vector<Case> cases = {
        {"layer 5x128", spec_of(Norm::layer), {5, 128}},
        {"layer 7x33", spec_of(Norm::layer), {7, 33}},
        {"layer 3x1", spec_of(Norm::layer), {3, 1}},
        {"layer 3x2", spec_of(Norm::layer), {3, 2}},
        {"layer 150x1000", spec_of(Norm::layer), {150, 1000}},
        {"layer 9x1023", spec_of(Norm::layer), {9, 1023}},
        {"layer 3x8192", spec_of(Norm::layer), {3, 8192}},
        {"layer 5x9216", spec_of(Norm::layer), {5, 9216}},
        {"layer 2x70000", spec_of(Norm::layer), {2, 70000}},
        {"layer 3x(4, 5, 60)", spec_of(Norm::layer, 1, 3), {3, 4, 5, 60}},
        {"layer 3x(4, 5, 60), channels last", spec_of(Norm::layer, 1, 3), {3, 4, 5, 60}, nhwc},
        {"rms 6x300", spec_of(Norm::rms), {6, 300}},
        {"rms 6x2100", spec_of(Norm::rms), {6, 2100}},
        {"batch NCHW", spec_of(Norm::batch), {4, 3, 9, 10}},
        {"batch NCHW 7x7", spec_of(Norm::batch), {33, 4, 7, 7}},
        {"batch NCHW, long", spec_of(Norm::batch), {3, 2, 70, 100}},
        {"batch NHWC", spec_of(Norm::batch), {4, 12, 9, 10}, nhwc},
        {"batch NHWC, 65", spec_of(Norm::batch), {3, 65, 9, 10}, nhwc},
        {"batch NHWC, 3", spec_of(Norm::batch), {3, 3, 40, 30}, nhwc},
        {"batch NHWC, 260", spec_of(Norm::batch), {3, 260, 9, 10}, nhwc},
        {"batch NC", spec_of(Norm::batch), {300, 17}},
        {"instance NCHW", spec_of(Norm::instance), {4, 6, 9, 12}},
        {"instance NHWC", spec_of(Norm::instance), {4, 12, 9, 12}, nhwc},
        {"group NCHW", spec_of(Norm::group, 3), {2, 12, 20, 20}},
        {"group NCHW 7x7", spec_of(Norm::group, 2), {3, 64, 7, 7}},
        {"group NCHW 2x3", spec_of(Norm::group, 2), {3, 8, 2, 3}},
        {"group NCHW, long", spec_of(Norm::group, 2), {2, 6, 64, 64}},
        {"group NHWC", spec_of(Norm::group, 3), {2, 12, 20, 20}, nhwc},
        {"group NHWC, 10", spec_of(Norm::group, 2), {2, 20, 9, 9}, nhwc},
        {"group NHWC, as rows", spec_of(Norm::group, 2), {2, 104, 9, 9}, nhwc},
        {"axes 1 of NCHW", axes_of(Norm::axes, 2), {2, 24, 5, 8}, {}, Dtype::float32, true, Dtype::none, {24, 1, 1}},
        {"axes 1 of NHWC", axes_of(Norm::axes, 2), {2, 24, 5, 8}, nhwc, Dtype::float32, true, Dtype::none, {24, 1, 1}},
        {"axes 0, 2, full weight",
         axes_of(Norm::axes, 5),
         {5, 6, 40},
         {},
         Dtype::float32,
         true,
         Dtype::none,
         {5, 6, 40}},
        {"axes 2, weight of samples",
         axes_of(Norm::axes, 4),
         {5, 6, 40},
         {},
         Dtype::float32,
         true,
         Dtype::none,
         {5, 1, 40}},
        {"axes 2, one weight", axes_of(Norm::axes, 4), {5, 6, 40}, {}, Dtype::float32, true, Dtype::none, {1}},
        {"axes_rms 0", axes_of(Norm::axes_rms, 1), {70, 6, 4}, {}, Dtype::float32, true, Dtype::none, {6, 4}},
        {"axes 1, Fortran order",
         axes_of(Norm::axes, 2),
         {9, 70, 5},
         {2, 1, 0},
         Dtype::float32,
         true,
         Dtype::none,
         {70, 1}},
        {"axes 0, weight repeated down the rows",
         axes_of(Norm::axes, 1),
         {20, 12},
         {},
         Dtype::float32,
         true,
         Dtype::none,
         {20, 12}},
    };
    cases.back().repeated = true;
    const std::size_t kinds = cases.size();
    // Each in the other dtypes.
    for (const Dtype dtype : {Dtype::float64, Dtype::float16, Dtype::bfloat16}) {
        for (std::size_t i = 0; i < kinds; ++i) {
            Case c = cases[i];
            c.dtype = dtype;
            if (i % 3 == 1) c.parameter_dtype = Dtype::float32;
            if (i % 3 == 2) c.parameter_dtype = Dtype::float64;
            cases.push_back(c);
        }
    }
    for (std::size_t i = 0; i < kinds; ++i) {
        Case c = cases[i];
        c.mean = 1e6;
        c.sorted = i % 2 == 0;
        if (i % 4 == 0) c.in_place = true;
        if (i % 4 == 1) c.parameter_dtype = Dtype::float64;
        if (i % 4 == 2) c.gap = 3;
        if (i % 4 == 3) c.parameters = false;
        if (!c.weight_shape.empty()) c.parameters = true;
        cases.push_back(c);
    }
    for (std::size_t i = 0; i < cases.size(); ++i) check(cases[i], i < kinds);
    check_running();
    check_out_of_memory();
    check_extremes();
    check_batch();

#define NORMKIT_ROW(name) \
    if (!launched.count(#name)) ++failures, std::printf("%s was never launched\n", #name);
    NORMKIT_FOR_CUDA_KERNELS(NORMKIT_ROW)
#undef NORMKIT_ROW
    std::printf("%zu cases, %d failures\n", cases.size(), failures);
    return failures > 0;
}
