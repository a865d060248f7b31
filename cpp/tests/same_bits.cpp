// A digest of every result of many cases, to compare between instruction sets, architectures and compilers.
//
//     normkit_same_bits            a line for each dtype and norm: this makes same_bits.txt
//     normkit_same_bits --cases    a line for each case, to find the one that differs
//     normkit_same_bits FILE       compares with such a file; exits 1 where a line differs
//
// Data is put together from integers, bit by bit: neither libm nor rounding has a hand in it. NaNs count as equal,
// since their sign and payload are the machine's.

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "normkit/normkit.h"

using namespace normkit;

namespace {

// SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    int below(int n) { return static_cast<int>(next() >> 33) % n; }

  private:
    std::uint64_t state_;
};

struct Format {
    Dtype dtype;
    const char* name;
    int exponent_bits, mantissa_bits;

    int bytes() const { return (1 + exponent_bits + mantissa_bits) / 8; }
    int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    std::uint64_t infinity() const { return ((std::uint64_t{1} << exponent_bits) - 1) << mantissa_bits; }

    // +-mantissa * 2^exponent with 1 <= mantissa < 2, given by the upper bits of `fraction`; subnormal below the least
    // exponent. What is beyond the largest is brought back to it.
    std::uint64_t number(bool negative, int exponent, std::uint64_t fraction) const {
        const int field = std::min(std::max(exponent + bias(), 0), (1 << exponent_bits) - 2);
        return (std::uint64_t{negative} << (exponent_bits + mantissa_bits)) |
               (static_cast<std::uint64_t>(field) << mantissa_bits) | (fraction >> (64 - mantissa_bits));
    }
    std::uint64_t canonical(std::uint64_t number) const {
        const std::uint64_t magnitude = number & ~(std::uint64_t{1} << (exponent_bits + mantissa_bits));
        return magnitude > infinity() ? infinity() + 1 : number;
    }
};

constexpr Format kFloat64 = {Dtype::float64, "float64", 11, 52}, kFloat32 = {Dtype::float32, "float32", 8, 23};
constexpr Format kFormats[] = {
    kFloat64, kFloat32, {Dtype::float16, "float16", 5, 10}, {Dtype::bfloat16, "bfloat16", 8, 7}};

enum class Data { unit, shifted, smallest, largest, constant, special };
constexpr const char* kDataNames[] = {"unit", "shifted", "smallest", "largest", "constant", "special"};

std::uint64_t draw(Random& random, const Format& f, Data data) {
    const std::uint64_t fraction = random.next();
    const bool negative = random.next() >> 63;
    switch (data) {
        case Data::shifted: return f.number(false, 10, fraction >> std::min(9, f.mantissa_bits - 1));
        case Data::smallest: return f.number(negative, random.below(3) - f.bias(), fraction);
        case Data::largest: return f.number(negative, f.bias() - random.below(2), fraction);
        case Data::constant: return f.number(false, 6, std::uint64_t{5} << 61);
        case Data::special: {
            const int one_of = random.below(300);
            if (one_of < 3) return one_of == 0 ? f.infinity() + 1 : f.number(one_of == 1, 0, 0) | f.infinity();
            [[fallthrough]];
        }
        default: return f.number(negative, random.below(5) - 3, fraction);
    }
}

// FNV-1a.
class Digest {
  public:
    void add(std::uint64_t number, int bytes) {
        for (int i = 0; i < bytes; ++i) value_ = (value_ ^ ((number >> (8 * i)) & 0xff)) * 0x100000001b3;
    }
    std::uint64_t value() const { return value_; }

  private:
    std::uint64_t value_ = 0xcbf29ce484222325;
};

enum class Memory { c_order, channels_last, gaps, reversed };
constexpr const char* kMemoryNames[] = {"C", "channels-last", "gaps", "reversed"};

// An array with its own memory. Everything in that memory goes into a digest, gaps included: nobody may write there.
class Array {
  public:
    Array(const Format& f, const std::vector<index_t>& shape, Memory memory = Memory::c_order) : format_(f) {
        view.dtype = f.dtype;
        view.ndim = static_cast<int>(shape.size());
        std::vector<int> order;  // axes, the fastest in memory first
        for (int d = view.ndim - 1; d >= 0; --d) order.push_back(d);
        if (memory == Memory::channels_last && view.ndim > 2) {
            order.erase(order.end() - 2);
            order.insert(order.begin(), 1);
        }
        index_t stride = (memory == Memory::gaps ? 2 : 1) * f.bytes(), first = 0;
        for (const int d : order) {
            view.shape[d] = shape[d];
            view.strides[d] = stride;
            stride *= shape[d];
        }
        bytes_.resize(stride);
        if (memory == Memory::reversed) {
            first = (shape.back() - 1) * view.strides[view.ndim - 1];
            view.strides[view.ndim - 1] *= -1;
        }
        view.data = bytes_.data() + first;
    }
    Array(const Array&) = delete;

    void fill(Random& random, Data data) {
        for (std::size_t i = 0; i < bytes_.size(); i += format_.bytes()) {
            const std::uint64_t number = draw(random, format_, data);
            for (int b = 0; b < format_.bytes(); ++b) bytes_[i + b] = static_cast<unsigned char>(number >> (8 * b));
        }
    }
    void add_to(Digest& digest) const {
        for (std::size_t i = 0; i < bytes_.size(); i += format_.bytes()) {
            std::uint64_t number = 0;
            for (int b = 0; b < format_.bytes(); ++b) number |= std::uint64_t{bytes_[i + b]} << (8 * b);
            digest.add(format_.canonical(number), format_.bytes());
        }
    }
    double* doubles() { return reinterpret_cast<double*>(bytes_.data()); }

    View view;

  private:
    Format format_;
    std::vector<unsigned char> bytes_;
};

struct Case {
    const char* norm;
    Spec spec;
    std::vector<index_t> parameter;  // shape of weight and bias
};

// x is (N, C, ...).
std::vector<Case> cases_of(const std::vector<index_t>& shape) {
    const int ndim = static_cast<int>(shape.size());
    std::vector<Case> cases;
    const auto add = [&](const char* name, Norm norm, std::vector<index_t> parameter) -> Spec& {
        cases.push_back({name, {}, std::move(parameter)});
        cases.back().spec.norm = norm;
        return cases.back().spec;
    };
    const std::vector<index_t> channels = {shape[1]}, sample(shape.begin() + 1, shape.end()), last = {shape.back()};
    std::vector<index_t> channels_of_axes(ndim - 1, 1);
    channels_of_axes[0] = shape[1];
    add("batch", Norm::batch, channels);
    if (ndim > 2) add("instance", Norm::instance, channels);
    add("group", Norm::group, channels).num_groups = 2;
    add("layer", Norm::layer, sample).normalized_dims = ndim - 1;
    add("layer", Norm::layer, last).normalized_dims = 1;
    add("rms", Norm::rms, last).normalized_dims = 1;
    add("axes", Norm::axes, sample).axes = 1u | (ndim > 2 ? 4u : 0u);
    add("axes", Norm::axes, channels_of_axes).axes = 2u;
    add("axes_rms", Norm::axes_rms, channels_of_axes).axes = 2u;
    return cases;
}

[[noreturn]] void refuse(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(2);
}

std::uint64_t digest_of(const Case& c, const std::vector<index_t>& shape, const Format& f, const Format& parameter,
                        Memory memory, Data data, const std::string& name) {
    Random random(shape[0] * 1009 + shape[1] * 31 + static_cast<int>(data));
    const bool rms = c.spec.norm == Norm::rms || c.spec.norm == Norm::axes_rms;
    const bool running = c.spec.norm == Norm::batch || c.spec.norm == Norm::instance;
    Array x(f, shape, memory), dy(f, shape, memory), y(f, shape, memory), dx(f, shape, memory);
    Array weight(parameter, c.parameter), bias(parameter, c.parameter);
    Array dweight(parameter, c.parameter), dbias(parameter, c.parameter);
    x.fill(random, data);
    dy.fill(random, Data::unit);
    weight.fill(random, Data::unit);
    bias.fill(random, Data::unit);

    index_t statistics[kMaxDims];
    const int ndim = statistics_shape(c.spec, x.view, statistics);
    if (ndim < 0) refuse(name + ": the spec does not fit");
    const std::vector<index_t> statistics_shape(statistics, statistics + ndim);
    Array mean(kFloat64, statistics_shape), rstd(kFloat64, statistics_shape), M2(kFloat64, statistics_shape);
    Array running_mean(kFloat32, {shape[1]}), running_var(kFloat64, {shape[1]});

    Digest digest;
    // The smallest data would drown in any eps.
    const double eps = data == Data::smallest ? 0 : 0x1p-17;
    Forward forward_args;
    forward_args.x = x.view;
    forward_args.y = y.view;
    forward_args.weight = weight.view;
    if (!rms) forward_args.bias = bias.view;
    forward_args.mean = mean.doubles();
    forward_args.rstd = rstd.doubles();
    forward_args.M2 = M2.doubles();
    forward_args.eps = eps;
    if (running) {
        forward_args.running_mean = running_mean.view;
        forward_args.running_var = running_var.view;
    }
    if (!forward(c.spec, forward_args)) refuse(name + ": forward refuses its arguments");
    for (const Array* a : {&y, &rstd, &M2, &running_mean, &running_var}) a->add_to(digest);
    if (!rms) mean.add_to(digest);

    for (const bool constant_statistics : {false, true}) {
        if (constant_statistics && !running) continue;
        Backward backward_args;
        backward_args.dy = dy.view;
        backward_args.x = x.view;
        backward_args.mean = mean.doubles();
        backward_args.rstd = rstd.doubles();
        backward_args.weight = weight.view;
        backward_args.constant_statistics = constant_statistics;
        backward_args.dx = dx.view;
        backward_args.dweight = dweight.view;
        if (!rms) backward_args.dbias = dbias.view;
        if (!backward(c.spec, backward_args)) refuse(name + ": backward refuses its arguments");
        for (const Array* a : {&dx, &dweight, &dbias}) a->add_to(digest);
    }
    if (running) {
        Array mean_used(kFloat32, {shape[1]}), var_used(kFloat32, {shape[1]});
        mean_used.fill(random, Data::shifted);
        var_used.fill(random, Data::shifted);
        Evaluate evaluate_args;
        evaluate_args.x = x.view;
        evaluate_args.y = y.view;
        evaluate_args.weight = weight.view;
        evaluate_args.bias = bias.view;
        evaluate_args.running_mean = mean_used.view;
        evaluate_args.running_var = var_used.view;
        evaluate_args.eps = eps;
        if (!evaluate(c.spec, evaluate_args)) refuse(name + ": evaluate refuses its arguments");
        y.add_to(digest);
    }
    return digest.value();
}

std::string line(const std::string& name, std::uint64_t digest) {
    char text[32];
    std::snprintf(text, sizeof text, " %016" PRIx64, digest);
    return name + text;
}

// Odd shapes; the tails of every vector; sets of less than one leaf and of several; blocks of rows for the parameters;
// more images than each has pixels.
const std::vector<index_t> kShapes[] = {{3, 6, 7, 9}, {2, 4, 47, 49}, {601, 34},
                                        {5, 6, 131},  {2, 2, 4200},   {31, 6, 2, 3}};

// Totals by dtype and norm, in the order of their first case.
std::vector<std::string> digests(bool print_cases) {
    std::vector<std::string> names;
    std::vector<Digest> totals;
    int number = 0;
    for (const Format& f : kFormats) {
        for (const std::vector<index_t>& shape : kShapes) {
            for (const Case& c : cases_of(shape)) {
                const std::string total = std::string(f.name) + " " + c.norm;
                const auto place = std::find(names.begin(), names.end(), total) - names.begin();
                if (place == static_cast<std::ptrdiff_t>(names.size())) {
                    names.push_back(total);
                    totals.emplace_back();
                }
                for (int memory = 0; memory < 4; ++memory) {
                    for (int data = 0; data < 6; ++data) {
                        // Parameters of each dtype that goes with x, and one to three threads, take turns.
                        ++number;
                        const Format& parameter = number % 3 == 0 ? f : number % 3 == 1 ? kFloat32 : kFloat64;
                        set_num_threads(1 + number / 3 % 3);
                        std::string name = total;
                        for (const index_t& n : shape) name += (&n == shape.data() ? " " : "x") + std::to_string(n);
                        if (c.spec.norm == Norm::layer) name += " dims:" + std::to_string(c.spec.normalized_dims);
                        if (c.spec.axes) name += " axes:" + std::to_string(c.spec.axes);
                        name += std::string(" ") + kMemoryNames[memory] + " " + kDataNames[data];
                        name += std::string(" parameters:") + parameter.name;
                        const std::uint64_t digest = digest_of(c, shape, f, parameter, static_cast<Memory>(memory),
                                                               static_cast<Data>(data), name);
                        totals[place].add(digest, 8);
                        if (print_cases) std::printf("%s\n", line(name, digest).c_str());
                    }
                }
            }
        }
    }
    std::vector<std::string> lines;
    for (std::size_t i = 0; i < names.size(); ++i) lines.push_back(line(names[i], totals[i].value()));
    return lines;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string argument = argc == 2 ? argv[1] : "";
    const std::vector<std::string> lines = digests(argument == "--cases");
    if (argument == "--cases") return 0;
    if (argument.empty()) {
        for (const std::string& l : lines) std::printf("%s\n", l.c_str());
        return 0;
    }
    std::ifstream file(argument);
    std::vector<std::string> expected;
    for (std::string l; std::getline(file, l);) expected.push_back(l);
    bool same = lines.size() == expected.size();
    for (std::size_t i = 0; i < std::max(lines.size(), expected.size()); ++i) {
        const std::string got = i < lines.size() ? lines[i] : "nothing";
        const std::string wanted = i < expected.size() ? expected[i] : "nothing";
        if (got == wanted) continue;
        same = false;
        std::printf("expected %s, got %s\n", wanted.c_str(), got.c_str());
    }
    std::printf("%zu digests with %s: %s\n", lines.size(), current_isa().c_str(), same ? "the same" : "they differ");
    return same ? 0 : 1;
}
