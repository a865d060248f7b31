// Times the C++ API: every case of bench/cases.py in every dtype, on one thread and on all.
//
//     normkit_bench [--threads=1,2] [--break-check=OUTPUT] [flags of google-benchmark, e.g. --benchmark_filter=REGEX]
//
// All arrays are given, outputs too. Before a call is timed, all its results are compared with the formula in float64;
// --break-check falsifies one of an output (y, mean, rstd, dx, dweight, dbias), to show that the comparison sees it.
//
// bytes_per_second counts the fewest bytes that the case has to move; `roofline` is that over the speed of a copy of
// the same working set, the median of ten turns of calls and copies. The label says which path the call took.

#include <benchmark/benchmark.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "normkit/normkit.h"

using namespace normkit;

namespace {

using Shape = std::vector<index_t>;

enum class Pass { forward, evaluate, backward };
enum class Layout { nchw, nhwc, rows };

struct Case {
    const char* name;  // without dtype
    Norm norm;
    Pass pass;
    Layout layout;
    index_t num_groups;
    index_t passes_over_memory[3];  // for elements of 2, 4 and 8 bytes
    Shape shape;                    // (N, C, ...) in either layout of images, or (rows, D)
};

const Case kCases[] = {
#define NORMKIT_CASE(name, norm, pass, layout, num_groups, passes2, passes4, passes8, ...) \
    {name, Norm::norm, Pass::pass, Layout::layout, num_groups, {passes2, passes4, passes8}, {__VA_ARGS__}},
#include "cases.inc"
#undef NORMKIT_CASE
};

constexpr std::pair<Dtype, const char*> kDtypes[] = {
#define NORMKIT_ROW(name, element, arithmetic) {Dtype::name, #name},
    NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW
};

constexpr double kEps = 1e-5;

std::string broken_output;  // of --break-check
bool any_failed = false;

// ---- arrays ---------------------------------------------------------------------------------------------------------

// A C-contiguous array with a name, or none. The threads of the library are the first to touch its memory, so that it
// lies near them.
class Array {
  public:
    Array() = default;
    Array(const char* name_, Dtype dtype, const Shape& shape) : name(name_), itemsize_(size_of(dtype)) {
        view.dtype = dtype;
        view.ndim = static_cast<int>(shape.size());
        index_t stride = itemsize_;
        for (int axis = view.ndim - 1; axis >= 0; --axis) {
            view.shape[axis] = shape[static_cast<std::size_t>(axis)];
            view.strides[axis] = stride;
            stride *= view.shape[axis];
        }
        memory_.reset(std::aligned_alloc(kAlignment, bytes()));
        if (!memory_) throw std::bad_alloc();
        view.data = memory_.get();
#if defined(__linux__)
        // NumPy asks for huge pages from 4 MiB on. Without them some cases take half as long again.
        if (bytes() >= std::size_t{1} << 22) {
            const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(view.data), page = (begin + 0xffff) & ~0xffff;
            madvise(reinterpret_cast<void*>(page), begin + bytes() - page, MADV_HUGEPAGE);
        }
#endif
    }

    // About a normal distribution with variance 1: the sum of four uniform numbers, which are the quarters of one from
    // SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    void fill(std::uint64_t seed, double mean) {
        std::vector<char> numbers(bytes());
        for (index_t i = 0; i < size(); ++i) {
            std::uint64_t z = seed += 0x9e3779b97f4a7c15;
            z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
            z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
            z ^= z >> 31;
            double sum = -2;
            for (int quarter = 0; quarter < 4; ++quarter) sum += double(z >> (16 * quarter) & 0xffff) * 0x1p-16;
            write_double(&numbers[static_cast<std::size_t>(i * itemsize_)], view.dtype, mean + std::sqrt(3) * sum);
        }
        normkit::copy(reinterpret_cast<const float*>(numbers.data()), floats(), bytes() / sizeof(float), false);
    }

    index_t size() const { return view.given() ? view.size() : 0; }
    double operator[](index_t i) const { return read_double(place(i), view.dtype); }
    void set(index_t i, double value) { write_double(place(i), view.dtype, value); }
    float* floats() { return static_cast<float*>(view.data); }
    double* doubles() { return static_cast<double*>(view.data); }

    const char* name = "";
    View view;

  private:
    static constexpr std::size_t kAlignment = 64;
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };

    std::size_t bytes() const {
        return (static_cast<std::size_t>(size() * itemsize_) + kAlignment - 1) / kAlignment * kAlignment;
    }
    char* place(index_t i) const { return static_cast<char*>(view.data) + i * itemsize_; }

    index_t itemsize_ = 0;
    std::unique_ptr<void, Free> memory_;
};

// ---- the formula ----------------------------------------------------------------------------------------------------

// Which set an element belongs to: all that the norms differ in. Its parameters are those of its channel; a row is a
// sample whose elements are the channels.
struct Sets {
    explicit Sets(const Case& c) : samples(c.shape[0]), channels(c.shape[1]), channels_last(c.layout == Layout::nhwc) {
        for (std::size_t axis = 2; axis < c.shape.size(); ++axis) pixels *= c.shape[axis];
        switch (c.norm) {
            case Norm::batch: of_a_sample = 0, width = 1; break;  // every sample has the same
            case Norm::instance: of_a_sample = channels, width = 1; break;
            case Norm::group: of_a_sample = c.num_groups, width = channels / c.num_groups; break;
            default: of_a_sample = 1, width = channels;
        }
    }

    index_t size() const { return samples * channels * pixels; }
    index_t count() const { return of_a_sample ? samples * of_a_sample : channels; }
    double elements() const { return static_cast<double>(size() / count()); }  // of one set

    // f(element, set, channel), in the order of memory.
    template <class F>
    void for_each(F f) const {
        index_t i = 0;
        for (index_t n = 0; n < samples; ++n) {
            for (index_t outer = 0; outer < (channels_last ? pixels : channels); ++outer) {
                for (index_t inner = 0; inner < (channels_last ? channels : pixels); ++inner) {
                    const index_t channel = channels_last ? inner : outer;
                    f(i++, n * of_a_sample + channel / width, channel);
                }
            }
        }
    }

    index_t samples, channels, pixels = 1;
    bool channels_last;
    index_t of_a_sample, width;  // sets of a sample; neighbouring channels of a set
};

double rounded_to(Dtype dtype, double v) {
    char memory[sizeof v];
    write_double(memory, dtype, v);
    return read_double(memory, dtype);
}

// A call with all its arrays, and the formula for its results.
class Problem {
  public:
    Problem(const Case& c, Dtype dtype) : pass_(c.pass), centred_(has_mean(c.norm)), sets_(c) {
        Shape shape = c.shape;
        if (sets_.channels_last) std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
        spec_.norm = c.norm;
        spec_.num_groups = c.num_groups;
        spec_.channel_axis = sets_.channels_last ? static_cast<int>(shape.size()) - 1 : 1;

        x_ = Array("x", dtype, shape);
        x_.fill(1, 1);
        weight_ = Array("weight", dtype, {sets_.channels});
        weight_.fill(2, 1);
        if (centred_) {
            bias_ = Array("bias", dtype, {sets_.channels});
            bias_.fill(3, 0);
        }
        find_statistics();
        switch (pass_) {
            case Pass::forward:
                y_ = Array("y", dtype, shape);
                if (centred_) mean_ = Array("mean", Dtype::float64, {sets_.count()});
                rstd_ = Array("rstd", Dtype::float64, {sets_.count()});
                forward_.x = x_.view;
                forward_.y = y_.view;
                forward_.weight = weight_.view;
                forward_.bias = bias_.view;
                forward_.mean = mean_.doubles();
                forward_.rstd = rstd_.doubles();
                forward_.eps = kEps;
                break;
            case Pass::evaluate:
                y_ = Array("y", dtype, shape);
                evaluate_.x = x_.view;
                evaluate_.y = y_.view;
                evaluate_.weight = weight_.view;
                evaluate_.bias = bias_.view;
                evaluate_.running_mean = exact_mean_.view;
                evaluate_.running_var = exact_var_.view;
                evaluate_.eps = kEps;
                break;
            case Pass::backward:
                dy_ = Array("dy", dtype, shape);
                dy_.fill(4, 0);
                dx_ = Array("dx", dtype, shape);
                dweight_ = Array("dweight", dtype, {sets_.channels});
                if (centred_) dbias_ = Array("dbias", dtype, {sets_.channels});
                backward_.dy = dy_.view;
                backward_.x = x_.view;
                backward_.mean = exact_mean_.doubles();
                backward_.rstd = exact_rstd_.doubles();
                backward_.weight = weight_.view;
                backward_.dx = dx_.view;
                backward_.dweight = dweight_.view;
                backward_.dbias = dbias_.view;
        }
    }

    bool call() {
        switch (pass_) {
            case Pass::forward: return forward(spec_, forward_);
            case Pass::evaluate: return evaluate(spec_, evaluate_);
            case Pass::backward: return backward(spec_, backward_);
        }
        return false;
    }

    // Calls, and compares every result. What is wrong first, or an empty string.
    std::string check() {
        if (!call()) return "normkit refuses the arguments";
        // Again on outputs of NaN: memory that was freed by another problem may hold the right values.
        Array* const outputs[] = {&y_, &mean_, &rstd_, &dx_, &dweight_, &dbias_};
        for (Array* output : outputs) {
            for (index_t i = 0; i < output->size(); ++i) output->set(i, NAN);
        }
        call();
        for (Array* output : outputs) {
            const index_t middle = output->size() / 2;
            if (output->size() && output->name == broken_output) output->set(middle, 1.02 * (*output)[middle] + 0.02);
        }
        if (pass_ == Pass::backward) {
            compare_gradients();
        } else {
            compare_results();
        }
        return fault_;
    }

  private:
    void find_statistics() {
        for (Array* statistic : {&exact_mean_, &exact_var_, &exact_rstd_}) {
            *statistic = Array("statistic", Dtype::float64, {sets_.count()});
            std::fill_n(statistic->doubles(), sets_.count(), 0.0);
        }
        double *mean = exact_mean_.doubles(), *var = exact_var_.doubles();
        const double n = sets_.elements();
        if (centred_) sets_.for_each([&](index_t i, index_t set, index_t) { mean[set] += x_[i] / n; });
        sets_.for_each([&](index_t i, index_t set, index_t) { var[set] += std::pow(x_[i] - mean[set], 2) / n; });
        for (index_t set = 0; set < sets_.count(); ++set) {
            // Running statistics are not those of x.
            if (pass_ == Pass::evaluate) {
                mean[set] += 0.5;
                var[set] *= 2;
            }
            exact_rstd_.doubles()[set] = 1 / std::sqrt(var[set] + kEps);
        }
    }

    double xhat(index_t i, index_t set) const { return (x_[i] - exact_mean_[set]) * exact_rstd_[set]; }

    void compare_results() {
        sets_.for_each([&](index_t i, index_t set, index_t channel) {
            const double scaled = weight_[channel] * xhat(i, set), b = centred_ ? bias_[channel] : 0;
            compare(y_, i, scaled + b, std::max(1.0, std::fabs(scaled) + std::fabs(b)));
        });
        for (index_t set = 0; pass_ == Pass::forward && set < sets_.count(); ++set) {
            if (centred_) compare(mean_, set, exact_mean_[set], 1 / exact_rstd_[set]);
            compare(rstd_, set, exact_rstd_[set], exact_rstd_[set]);
        }
    }

    void compare_gradients() {
        struct OfSet {
            double mean_g = 0, mean_g_xhat = 0, largest_g = 0;
        };
        struct OfChannel {
            double dweight = 0, dweight_terms = 0, dbias = 0, dbias_terms = 0;  // terms: the sum of their magnitudes
        };
        std::vector<OfSet> of_set(sets_.count());
        std::vector<OfChannel> of_channel(sets_.channels);
        const double n = sets_.elements();
        sets_.for_each([&](index_t i, index_t set, index_t channel) {
            const double dy = dy_[i], g = weight_[channel] * dy, xh = xhat(i, set);
            OfSet& s = of_set[set];
            if (centred_) s.mean_g += g / n;
            s.mean_g_xhat += g * xh / n;
            s.largest_g = std::max(s.largest_g, std::fabs(g));
            OfChannel& p = of_channel[channel];
            p.dweight += dy * xh;
            p.dweight_terms += std::fabs(dy * xh);
            p.dbias += dy;
            p.dbias_terms += std::fabs(dy);
        });
        sets_.for_each([&](index_t i, index_t set, index_t channel) {
            const OfSet& s = of_set[set];
            const double g = weight_[channel] * dy_[i], rstd = exact_rstd_[set];
            compare(dx_, i, rstd * (g - s.mean_g - xhat(i, set) * s.mean_g_xhat), rstd * s.largest_g);
        });
        for (index_t channel = 0; channel < sets_.channels; ++channel) {
            const OfChannel& p = of_channel[channel];
            compare(dweight_, channel, p.dweight, p.dweight_terms);
            if (centred_) compare(dbias_, channel, p.dbias, p.dbias_terms);
        }
    }

    // Before it is rounded to its dtype, a result may be off by 1e-6 (float64: 1e-10) of the scale. These are the
    // bounds of tests/bounds.py for gradients; forward keeps half of them.
    void compare(const Array& output, index_t i, double expected, double scale) {
        const double got = output[i], bound = (x_.view.dtype == Dtype::float64 ? 1e-10 : 1e-6) * scale;
        const Dtype dtype = output.view.dtype;
        if (rounded_to(dtype, expected - bound) <= got && got <= rounded_to(dtype, expected + bound)) return;
        if (!fault_.empty()) return;
        char text[128];
        std::snprintf(text, sizeof text, "%s[%lld] must be %.9g within %.2g, got %.9g", output.name,
                      static_cast<long long>(i), expected, bound, got);
        fault_ = text;
    }

    Pass pass_;
    bool centred_;
    Sets sets_;
    Spec spec_;
    Forward forward_;
    Evaluate evaluate_;
    Backward backward_;
    Array x_, dy_, weight_, bias_, exact_mean_, exact_var_, exact_rstd_;
    Array y_, mean_, rstd_, dx_, dweight_, dbias_;
    std::string fault_;
};

// ---- timing ---------------------------------------------------------------------------------------------------------

using Clock = std::chrono::steady_clock;

constexpr index_t kTurns = 10;  // of calls and copies

// Seconds of a call, the mean of `repeats`.
template <class F>
double seconds_of(F call, index_t repeats) {
    const Clock::time_point start = Clock::now();
    for (index_t i = 0; i < repeats; ++i) call();
    return std::chrono::duration<double>(Clock::now() - start).count() / static_cast<double>(repeats);
}

// A copy between two arrays of `bytes` in all, by the kind of store that is faster at the time.
class Copy {
  public:
    explicit Copy(index_t bytes)
        : n_(bytes / 2 / index_t{sizeof(float)}), from_("from", Dtype::float32, {n_}), to_("to", Dtype::float32, {n_}) {
        from_.fill(5, 0);
        once(false);  // the first touch of `to`
        seconds_of_one_ = seconds_of([this] { once(false); }, 1);
    }

    // Of one copy, as `at_least` seconds of either kind tell.
    double seconds(double at_least) {
        const index_t repeats = 1 + static_cast<index_t>(at_least / seconds_of_one_);
        const auto by = [=](bool stream) {
            if (repeats > 1) once(stream);  // brings the arrays back into the caches, where they fit
            return seconds_of([=] { once(stream); }, repeats);
        };
        return std::min(by(false), by(true));
    }

  private:
    void once(bool stream) { copy(from_.floats(), to_.floats(), n_, stream); }

    index_t n_;
    Array from_, to_;
    double seconds_of_one_;
};

std::string path_taken() {
    const Path& path = this_thread_last_path();
    return std::string(path.walk) + (path.split ? " split" : "") + (path.resident ? " resident" : "") +
           (path.stream ? " stream" : "") + (path.by_sample ? " by_sample" : "") +
           (path.in_eights  ? " in_eights"
            : path.in_parts ? " in_parts"
            : path.by_row   ? " by_row"
                            : "");
}

void run(benchmark::State& state, const std::string& name, const Case& c, Dtype dtype, int threads) {
    set_num_threads(threads);
    const index_t itemsize = size_of(dtype), bytes_of_x = Sets(c).size() * itemsize;
    const index_t fewest_bytes = c.passes_over_memory[itemsize / 4] * bytes_of_x;
    const index_t bytes_of_copy = (c.pass == Pass::backward ? 3 : 2) * bytes_of_x;

    // This function is called several times, with more iterations each time. What it works on is made and checked at
    // the first, and freed when another benchmark begins.
    static std::string current, fault;
    static std::unique_ptr<Problem> problem;
    static std::unique_ptr<Copy> copied;
    if (current != name) {
        current = name;
        problem.reset();
        copied.reset();
        problem = std::make_unique<Problem>(c, dtype);
        fault = problem->check();
        copied = std::make_unique<Copy>(bytes_of_copy);
    }
    if (!fault.empty()) {
        any_failed = true;
        state.SkipWithError(fault.c_str());
        return;
    }
    // Calls and copies take turns, because the speed of memory drifts where others use it too.
    const index_t turn = std::max<index_t>(1, static_cast<index_t>(state.max_iterations) / kTurns);
    std::vector<double> rooflines;
    while (state.KeepRunningBatch(turn)) {
        const double seconds = seconds_of([] { problem->call(); }, turn);
        state.PauseTiming();
        const double at_least = std::min(0.003, seconds * static_cast<double>(turn) / 4);
        rooflines.push_back(copied->seconds(at_least) / seconds);
        if (turn > 1) problem->call();
        state.ResumeTiming();
    }
    const auto median = rooflines.begin() + rooflines.size() / 2;
    std::nth_element(rooflines.begin(), median, rooflines.end());
    state.SetBytesProcessed(state.iterations() * fewest_bytes);
    state.counters["roofline"] = *median * static_cast<double>(fewest_bytes) / static_cast<double>(bytes_of_copy);
    state.SetLabel(path_taken());
}

// ---- the command line -----------------------------------------------------------------------------------------------

// Positive numbers with commas between; none where it is anything else.
std::vector<int> numbers_in(const std::string& text) {
    std::vector<int> numbers;
    const char* p = text.c_str();
    do {
        char* end;
        const long number = std::strtol(p, &end, 10);
        if (end == p || number < 1 || number > 1024 || (*end && *end != ',')) return {};
        numbers.push_back(static_cast<int>(number));
        p = end + 1;
    } while (p[-1]);
    return numbers;
}

[[noreturn]] void refuse(const std::string& what) {
    std::fprintf(stderr, "normkit_bench: %s\n", what.c_str());
    std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
    benchmark::Initialize(&argc, argv);  // takes its own flags out of argv
    std::vector<int> threads = {1};
    if (get_num_threads() > 1) threads.push_back(get_num_threads());
    const std::string threads_flag = "--threads=", break_flag = "--break-check=";
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        if (argument.rfind(threads_flag, 0) == 0) {
            threads = numbers_in(argument.substr(threads_flag.size()));
            if (threads.empty())
                refuse("--threads must be numbers from 1 to 1024, as in --threads=1,4; got " + argument);
        } else if (argument.rfind(break_flag, 0) == 0) {
            broken_output = argument.substr(break_flag.size());
            const auto names = {"y", "mean", "rstd", "dx", "dweight", "dbias"};
            if (std::find(names.begin(), names.end(), broken_output) == names.end())
                refuse("--break-check must be y, mean, rstd, dx, dweight or dbias, got " + broken_output);
        } else {
            refuse("expected --threads=N,..., --break-check=OUTPUT or a flag that --help lists, got " + argument);
        }
    }

    for (const Case& c : kCases) {
        for (const auto& [dtype, dtype_name] : kDtypes) {
            for (const int n : threads) {
                const std::string name = std::string(c.name) + "/" + dtype_name + "/threads:" + std::to_string(n);
                const auto function = [=, &c, dtype = dtype](benchmark::State& state) {
                    run(state, name, c, dtype, n);
                };
                benchmark::RegisterBenchmark(name.c_str(), function)->UseRealTime()->Unit(benchmark::kMicrosecond);
            }
        }
    }
    benchmark::AddCustomContext("normkit instruction set", current_isa());
    return benchmark::RunSpecifiedBenchmarks() == 0 || any_failed;
}
