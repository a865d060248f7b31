"""PyTorch's functions in float64: a second oracle, written by others, for data of every dtype."""

import numpy as np
import pytest

import bounds
import reference
from cases import NORMS, ids, in_every_dtype, layouts, ratios, with_evaluation

torch = pytest.importorskip("torch", reason="PyTorch, the second oracle, is not installed")
F = torch.nn.functional

EPS = 1e-5


def moved(function):
    """torch has the channels on axis 1 alone."""

    def on_axis_1(x, channel_axis, **arguments):
        return function(x.movedim(channel_axis, 1), **arguments).movedim(1, channel_axis)

    return on_axis_1


def batch(x, weight, bias, running, training, channel_axis):
    f = moved(lambda x: F.batch_norm(x, *running, weight, bias, training, 0.1, EPS))
    return f(x, channel_axis)


def instance(x, weight, bias, running, training, channel_axis):
    f = moved(lambda x: F.instance_norm(x, *running, weight, bias, training, 0.1, EPS))
    return f(x, channel_axis)


def group(x, weight, bias, running, training, num_groups, channel_axis):
    return moved(lambda x: F.group_norm(x, num_groups, weight, bias, EPS))(x, channel_axis)


def layer(x, weight, bias, running, training, normalized_shape):
    return F.layer_norm(x, normalized_shape, weight, bias, EPS)


def rms(x, weight, bias, running, training, normalized_shape):
    return F.rms_norm(x, normalized_shape, weight, EPS)


TORCH = {"batch": batch, "instance": instance, "group": group, "layer": layer, "rms": rms}
CASES = in_every_dtype(
    [
        case
        for case in with_evaluation(layouts(norms=tuple(TORCH)))
        if case.memory != "channels first" or case.options.get("channel_axis") == -1
    ],
    7,
)


def test_every_named_norm_has_its_oracle():
    """`normalize` is the library's own; torch has no function for it."""
    assert set(TORCH) == {norm for norm in NORMS if NORMS[norm].function != "normalize"}


def double(a):
    return None if a is None else torch.from_numpy(np.ascontiguousarray(a, np.float64))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_forward_and_backward(rng, case, far):
    # torch's group_norm takes the variance from E[x^2] - E[x]^2: exact enough to judge float64 near zero only.
    farthest = 10.0 if bounds.is_double(case.dtype) else min(ratios(case.dtype)[-1], 1e3)
    ratio = farthest if far else 0.0
    x, dy = case.random(rng, ratio), case.random(rng)
    weight, bias = case.parameters(rng)
    running, more, theirs = None, {}, [None, None]
    if case.row.evaluation is not None:
        running = case.running(rng, ratio)
        more, theirs = {"running_mean": running[0], "running_var": running[1]}, [double(a).clone() for a in running]
    tensors = [double(a) for a in (x, weight, bias)]
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    expected = TORCH[case.norm](*tensors, theirs, case.training, **case.options)
    expected.backward(double(dy))

    view, axes, parameter = case.sets
    mean64, rstd64 = case.exact_statistics(x, EPS, None if case.training else running)
    gamma = np.asarray(weight, np.float64).reshape(parameter)
    beta = np.asarray(bias, np.float64).reshape(parameter) if case.row.has_bias else 0.0
    _, xhat64 = reference.normalize(x.reshape(view), mean64, rstd64)
    y, mean, rstd = case.forward(x, weight, bias, eps=EPS, **more)
    bounds.assert_forward(y.reshape(view), expected.detach().numpy().reshape(view), xhat64, gamma, beta)
    if running is not None:
        # The variance has twice the relative error of its root, and up to twice the value where it is unbiased.
        spread = (1 / rstd64).max()
        bounds.assert_running("running_mean", running[0], theirs[0].numpy(), spread, case.dtype)
        bounds.assert_running("running_var", running[1], theirs[1].numpy(), 4 * spread**2, case.dtype)

    dx, dweight, dbias = case.backward(dy, x, mean, rstd, weight)
    gradients = [leaf.grad.numpy() for leaf in leaves]
    dy = dy.reshape(view).astype(np.float64)
    bounds.assert_dx(dx.reshape(view), gradients[0].reshape(view), rstd64, gamma * dy, axes)
    moved = np.abs(dy) * np.maximum(1.0, np.abs(xhat64))  # torch has statistics of its own
    for ours, exact, *terms in zip((dweight, dbias), gradients[1:], (dy * xhat64, dy), (moved, 0.0 * dy)):
        absolute, by_statistics = (reference.sum_to(np.abs(t), parameter).reshape(ours.shape) for t in terms)
        bounds.assert_param_grad(ours, exact, absolute, by_statistics, case.dtype)
