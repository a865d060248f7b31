// The core by itself, as a C++ program uses it: group norm forward and backward against the formula in plain double
// loops, on one thread and on several, and a call that is interrupted. Built with and without OpenMP.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "normkit/normkit.h"

using namespace normkit;

namespace {

constexpr index_t N = 3, C = 12, L = 3000, G = 4, kPerGroup = C / G;

View view(std::vector<float>& data, std::vector<index_t> shape) {
    View v;
    v.data = data.data();
    v.dtype = Dtype::float32;
    v.ndim = static_cast<int>(shape.size());
    index_t stride = sizeof(float);
    for (int d = v.ndim - 1; d >= 0; --d) {
        v.shape[d] = shape[d];
        v.strides[d] = stride;
        stride *= shape[d];
    }
    return v;
}

int failures = 0;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("failed: %s\n", what);
    ++failures;
}

}  // namespace

int main() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(1000.f, 1.f), gradient;
    std::vector<float> x(N * C * L), dy(N * C * L), weight(C), bias(C);
    for (float& v : x) v = normal(random);
    for (auto* values : {&dy, &weight, &bias}) {
        for (float& v : *values) v = gradient(random);
    }
    Spec spec;
    spec.norm = Norm::group;
    spec.num_groups = G;

    std::vector<float> first_y, first_dx, first_dweight;
    for (int threads : {1, 2, 5}) {
        set_num_threads(threads);
        std::vector<float> y(x.size()), dx(x.size()), dweight(C), dbias(C);
        std::vector<double> mean(N * G), rstd(N * G);
        Forward f;
        f.x = view(x, {N, C, L});
        f.y = view(y, {N, C, L});
        f.weight = view(weight, {C});
        f.bias = view(bias, {C});
        f.mean = mean.data();
        f.rstd = rstd.data();
        expect(forward(spec, f), "forward is done");
        Backward b;
        b.x = f.x;
        b.dy = view(dy, {N, C, L});
        b.weight = f.weight;
        b.mean = mean.data();
        b.rstd = rstd.data();
        b.dx = view(dx, {N, C, L});
        b.dweight = view(dweight, {C});
        b.dbias = view(dbias, {C});
        expect(backward(spec, b), "backward is done");

        const double count = kPerGroup * L;
        for (index_t s = 0; s < N * G; ++s) {
            const index_t begin = s * kPerGroup * L;
            double mu = 0, var = 0, mean_g = 0, mean_g_xhat = 0, largest = 0;
            for (index_t i = 0; i < kPerGroup * L; ++i) mu += x[begin + i] / count;
            for (index_t i = 0; i < kPerGroup * L; ++i) var += (x[begin + i] - mu) * (x[begin + i] - mu) / count;
            const double r = 1 / std::sqrt(var + f.eps);
            const auto channel = [&](index_t i) { return s % G * kPerGroup + i / L; };
            for (index_t i = 0; i < kPerGroup * L; ++i) {
                const double g = double{weight[channel(i)]} * dy[begin + i];
                mean_g += g / count;
                mean_g_xhat += g * (x[begin + i] - mu) * r / count;
                largest = std::fmax(largest, std::fabs(g));
            }
            for (index_t i = 0; i < kPerGroup * L; ++i) {
                const double w = weight[channel(i)], xhat = (x[begin + i] - mu) * r;
                const double bound = 5e-7 * std::fmax(1, std::fabs(w * xhat) + std::fabs(bias[channel(i)]));
                expect(std::fabs(y[begin + i] - (w * xhat + bias[channel(i)])) <= bound, "y within the contract");
                const double dx64 = r * (w * dy[begin + i] - mean_g - xhat * mean_g_xhat);
                expect(std::fabs(dx[begin + i] - dx64) <= 1e-6 * r * largest, "dx within the contract");
            }
        }
        if (threads == 1) {
            first_y = y;
            first_dx = dx;
            first_dweight = dweight;
        }
        expect(y == first_y && dx == first_dx && dweight == first_dweight, "same bits for any number of threads");
    }
    spec.num_groups = 5;
    Forward wrong;
    wrong.x = wrong.y = view(x, {N, C, L});
    expect(!forward(spec, wrong), "5 groups of 12 channels are refused");

    // Moments only of 2^36 elements that lie on top of each other: a minute's work, but it asks whether to go on.
    Forward endless;
    endless.x = view(x, {1, 1, 1});
    endless.x.shape[2] = index_t{1} << 36;
    endless.x.strides[2] = 0;
    static int questions = 0;
    this_thread_should_stop() = [] { return ++questions == 2; };
    bool interrupted = false;
    try {
        spec.num_groups = 1;
        forward(spec, endless);
    } catch (const Interrupted&) {
        interrupted = true;
    }
    this_thread_should_stop() = nullptr;
    expect(interrupted && questions == 2, "a long call can be interrupted");
    if (failures == 0) std::printf("ok\n");
    return failures != 0;
}
