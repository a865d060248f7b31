// Layer norm over the channels of images in NHWC memory, forward and backward, with buffers of our own. The gradients
// are checked against differences of the loss: the program fails where they do not agree.

#include <cmath>
#include <cstdio>
#include <vector>

#include "normkit/normkit.h"

using normkit::index_t;

namespace {

constexpr index_t N = 2, H = 8, W = 8, C = 32;

// normkit never owns data: a View says where it lies. This one is C-contiguous.
normkit::View view(std::vector<float>& data, const std::vector<index_t>& shape) {
    normkit::View v;
    v.data = data.data();
    v.dtype = normkit::Dtype::float32;
    v.ndim = static_cast<int>(shape.size());
    index_t stride = sizeof(float);  // bytes
    for (int axis = v.ndim - 1; axis >= 0; --axis) {
        v.shape[axis] = shape[static_cast<std::size_t>(axis)];
        v.strides[axis] = stride;
        stride *= v.shape[axis];
    }
    return v;
}

// A few waves, to have data.
std::vector<float> waves(index_t n, double step, double offset) {
    std::vector<float> data(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < data.size(); ++i)
        data[i] = static_cast<float>(offset + std::sin(step * double(i * i % 997)));
    return data;
}

struct Layer {
    normkit::Spec spec;
    std::vector<float> x = waves(N * H * W * C, 0.37, 100), weight = waves(C, 0.11, 1), bias = waves(C, 0.23, 0);
    std::vector<float> y = std::vector<float>(x.size());
    std::vector<double> mean = std::vector<double>(N * H * W), rstd = mean;  // one of each per pixel

    Layer() {
        spec.norm = normkit::Norm::layer;
        spec.normalized_dims = 1;  // the last axis: C
    }

    bool forward() {
        normkit::Forward args;
        args.x = view(x, {N, H, W, C});
        args.y = view(y, {N, H, W, C});
        args.weight = view(weight, {C});
        args.bias = view(bias, {C});
        args.mean = mean.data();
        args.rstd = rstd.data();
        return normkit::forward(spec, args);
    }

    // loss = sum(dy * y), so dy is the gradient that comes from above.
    double loss(const std::vector<float>& dy) {
        if (!forward()) return NAN;
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) sum += double{dy[i]} * double{y[i]};
        return sum;
    }
};

}  // namespace

int main() {
    Layer layer;
    std::vector<float> dy = waves(N * H * W * C, 0.53, 0);
    const double loss = layer.loss(dy);

    std::vector<float> dx(dy.size()), dweight(C), dbias(C);
    normkit::Backward args;
    args.dy = view(dy, {N, H, W, C});
    args.x = view(layer.x, {N, H, W, C});
    args.mean = layer.mean.data();
    args.rstd = layer.rstd.data();
    args.weight = view(layer.weight, {C});
    args.dx = view(dx, {N, H, W, C});
    args.dweight = view(dweight, {C});
    args.dbias = view(dbias, {C});
    // False where shapes, dtypes or overlaps do not fit; nothing has changed then.
    if (!normkit::backward(layer.spec, args)) {
        std::puts("the arguments of backward do not fit");
        return 1;
    }

    // Move x, weight and bias a little along their gradients and back: the loss rises by the squared length of each.
    struct {
        const char* name;
        std::vector<float>& value;
        const std::vector<float>& gradient;
    } const checks[] = {{"dx", layer.x, dx}, {"dweight", layer.weight, dweight}, {"dbias", layer.bias, dbias}};
    bool right = std::isfinite(loss);
    std::printf("loss %.6f\n", loss);
    for (const auto& check : checks) {
        const std::vector<float> start = check.value;
        double length = 0, largest = 0;
        for (const float g : check.gradient) {
            length += double{g} * double{g};
            largest = std::fmax(largest, std::fabs(double{g}));
        }
        const double step = 0.01 / largest;
        double losses[2];
        for (int side = 0; side < 2; ++side) {
            for (std::size_t i = 0; i < start.size(); ++i) {
                check.value[i] =
                    static_cast<float>(double{start[i]} + (side ? step : -step) * double{check.gradient[i]});
            }
            losses[side] = layer.loss(dy);
        }
        check.value = start;
        const double measured = (losses[1] - losses[0]) / (2 * step);
        const double error = std::fabs(measured / length - 1);
        std::printf("%-8s |gradient|^2 %12.6f, by differences %12.6f, relative error %.1e\n", check.name, length,
                    measured, error);
        right = right && error < 1e-3;
    }
    std::puts(right ? "right" : "wrong");
    return right ? 0 : 1;
}
