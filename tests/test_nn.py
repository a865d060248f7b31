"""The layers: values beside the reference and PyTorch's layers, and the state that they keep."""

import copy
import doctest
import inspect
import pickle
import re
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import bounds
import normkit as nk
import reference
from cases import Case, random
from normkit import nn

EPS = 0.01  # not the default: a layer that forgets it is seen
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Row:
    """A layer: how it and PyTorch's are made, and the case whose functions it calls."""

    ours: Callable[..., nn.Layer]
    theirs: str  # in torch.nn
    sizes: tuple[Any, ...]
    case: Case
    affine: str = "affine"  # the argument that asks for weight and bias

    @property
    def variants(self):
        """Options: with and without parameters, and running statistics where the layer may have them."""
        tracked = [{"track_running_stats": track} for track in (True, False)] if self.case.norm in TRACKING else [{}]
        return [{self.affine: affine, **more} for affine in (True, False) for more in tracked]

    def make(self, **options):
        return self.ours(*self.sizes, **{self.affine: True, **options})

    def torch(self, **options):
        return getattr(need("torch").nn, self.theirs)(*self.sizes, **{self.affine: True, **options})


IMAGES = (3, 6, 5, 4)
LAYERS = {
    "batch": Row(nn.BatchNorm, "BatchNorm2d", (6,), Case("batch", IMAGES, {"channel_axis": 1})),
    "instance": Row(nn.InstanceNorm, "InstanceNorm2d", (6,), Case("instance", IMAGES, {"channel_axis": 1})),
    "group": Row(nn.GroupNorm, "GroupNorm", (3, 6), Case("group", IMAGES, {"num_groups": 3, "channel_axis": 1})),
    "layer": Row(
        nn.LayerNorm, "LayerNorm", ((5, 4),), Case("layer", IMAGES, {"normalized_shape": (5, 4)}), "elementwise_affine"
    ),
    "rms": Row(nn.RMSNorm, "RMSNorm", (4,), Case("rms", IMAGES, {"normalized_shape": (4,)}), "elementwise_affine"),
}
TRACKING = {
    "batch": (LAYERS["batch"], {}),
    "instance": (LAYERS["instance"], {"track_running_stats": True}),
}

every_layer = pytest.mark.parametrize("row", LAYERS.values(), ids=LAYERS)
every_tracking_layer = pytest.mark.parametrize(("row", "options"), TRACKING.values(), ids=TRACKING)


def need(module):
    return pytest.importorskip(module, reason=f"{module}, which this compares with, is not installed")


def dtype_named(name):
    if name == "bfloat16":
        need("ml_dtypes")
    return np.dtype(name)


def randomize(rng, layer):
    """Parameters and running statistics as training might leave them."""
    for name, array in layer.state_dict().items():
        values = rng.uniform(0.5, 2, array.shape) if name == "running_var" else rng.standard_normal(array.shape)
        array[...] = 3 if name == "num_batches_tracked" else values
    return layer


def snapshot(layer):
    """A copy of all numbers that a layer holds."""
    arrays = {**layer.state_dict(), **{f"d{name}": array for name, array in layer.gradients().items()}}
    return {name: array.copy() for name, array in arrays.items()}


def spread(case, x):
    """The largest standard deviation of a set."""
    return (1 / case.exact_statistics(x, 0.0)[1]).max()


def assert_running(layer, mean, var, spread):
    """`spread`: the largest standard deviation of a set that went in; a variance has twice its relative error."""
    bounds.assert_running("running_mean", layer.running_mean, mean, spread)
    bounds.assert_running("running_var", layer.running_var, var, 4 * spread**2)


def assert_same_state(layer, expected):
    found = snapshot(layer)
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def double(a):
    """A torch tensor of float64."""
    return need("torch").from_numpy(np.ascontiguousarray(a, np.float64))


def torch_twin(row, layer, **options):
    """PyTorch's layer with equal parameters and statistics, in float64."""
    torch = need("torch")
    twin = row.torch(**options).double()
    twin.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in layer.state_dict().items()})
    return twin


# --- values -------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("ratio", [0.0, 1e6])
def test_against_the_reference(rng, row, ratio):
    case, layer = row.case, randomize(rng, row.make(eps=EPS))
    x, dy = random(rng, case.shape, ratio), random(rng, case.shape)
    case.check_forward(layer(x), x, layer.weight, layer.bias, EPS)
    statistics = case.forward(x, layer.weight, layer.bias, eps=EPS)[1:]
    dx = layer.backward(dy)
    case.check_backward((dx, layer.dweight, layer.dbias), dy, x, statistics, layer.weight, EPS)


def assert_step_of_torch(rng, layer, twin, case, running=None):
    """y, dx and the gradients of the parameters of one step. running: what both evaluate with."""
    case = replace(case, training=running is None)
    view, axes, parameter = case.sets
    x, dy = random(rng, case.shape, 10.0), random(rng, case.shape)
    gamma, beta = (
        default if array is None else array.astype(np.float64).reshape(parameter)
        for array, default in ((layer.weight, 1.0), (layer.bias, 0.0))
    )
    mean64, rstd64 = case.exact_statistics(x, EPS, running)
    _, xhat64 = reference.normalize(x.reshape(view), mean64, rstd64)

    twin.zero_grad()
    x_there = double(x).requires_grad_()
    y_there = twin(x_there)
    y_there.backward(double(dy))
    layer.zero_grad()
    bounds.assert_forward(layer(x).reshape(view), y_there.detach().numpy().reshape(view), xhat64, gamma, beta)
    dx, dy = layer.backward(dy).reshape(view), dy.reshape(view).astype(np.float64)
    bounds.assert_dx(dx, x_there.grad.numpy().reshape(view), rstd64, gamma * dy, axes)

    gradients_there = {name: tensor.grad.numpy() for name, tensor in twin.named_parameters()}
    assert list(layer.gradients()) == list(gradients_there)
    terms = {"weight": dy * xhat64, "bias": dy}
    moved = {"weight": np.abs(dy) * np.maximum(1, np.abs(xhat64)), "bias": 0 * dy}  # torch has statistics of its own
    for name, gradient in layer.gradients().items():
        sums = (reference.sum_to(np.abs(t[name]), parameter).reshape(gradient.shape) for t in (terms, moved))
        bounds.assert_param_grad(gradient, gradients_there[name], *sums)


def assert_evaluation_of_torch(rng, layer, twin, case):
    """In torch's eval() with gradients, which is ours frozen; and in ours."""
    running = None
    if getattr(layer, "running_mean", None) is not None:
        running = layer.running_mean, layer.running_var
        # The same float32 numbers for both: each has rounded its own.
        twin.running_mean, twin.running_var = map(double, running)
        layer.frozen = True
    twin.eval()
    assert_step_of_torch(rng, layer, twin, case, running)
    x = random(rng, case.shape, 10.0)
    bounds.assert_same_bits(copy.deepcopy(layer).eval()(x), layer(x))


@every_layer
def test_against_torch(rng, row):
    for options in row.variants:
        layer = randomize(rng, row.make(eps=EPS, **options))
        twin = torch_twin(row, layer, eps=EPS, **options)
        for _ in range(3):
            assert_step_of_torch(rng, layer, twin, row.case)
        assert_evaluation_of_torch(rng, layer, twin, row.case)


@every_tracking_layer
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_running_statistics_are_those_of_torch(rng, row, options, momentum):
    layer = randomize(rng, row.make(momentum=momentum, **options))
    twin = torch_twin(row, layer, momentum=momentum, **options)
    for _ in range(4):
        x = random(rng, row.case.shape, 10.0)
        layer(x)
        twin(double(x))
    assert_running(layer, twin.running_mean.numpy(), twin.running_var.numpy(), spread(row.case, x))
    assert layer.num_batches_tracked == 3 + 4
    if row is LAYERS["batch"]:  # torch's instance norm does not count
        assert layer.num_batches_tracked == twin.num_batches_tracked.item()


@every_tracking_layer
@pytest.mark.parametrize("ddof", [0, 1])
def test_cumulative_average(rng, row, options, ddof):
    """momentum=None: after k batches, the plain averages of their statistics, as PyTorch documents it."""
    layer = row.make(momentum=None, ddof=ddof, **options)
    means, variances = [], []
    for k in range(1, 6):
        x = random(rng, row.case.shape, 10.0) * np.float32(k)
        layer(x)
        mean, rstd = row.case.exact_statistics(x, 0.0)
        n = row.case.set_size
        over = tuple(i for i in range(4) if i != 1)
        means.append(mean.mean(over))
        variances.append((n / (n - ddof) / rstd**2).mean(over))
        assert_running(layer, np.mean(means, axis=0), np.mean(variances, axis=0), spread(row.case, x))
        assert layer.num_batches_tracked == k


def test_cumulative_average_of_torch(rng):
    row = LAYERS["batch"]
    layer = row.make(momentum=None)
    twin = torch_twin(row, layer, momentum=None)
    for _ in range(3):
        x = random(rng, row.case.shape, 10.0)
        layer(x)
        twin(double(x))
    assert_running(layer, twin.running_mean.numpy(), twin.running_var.numpy(), spread(row.case, x))


@every_tracking_layer
def test_evaluation_uses_the_running_statistics(rng, row, options):
    layer = randomize(rng, row.make(eps=EPS, **options)).eval()
    x = random(rng, row.case.shape)
    before = snapshot(layer)
    y = layer(x)
    assert_same_state(layer, before)
    row.case.check_forward(y, x, layer.weight, layer.bias, EPS, running=(layer.running_mean, layer.running_var))


@every_tracking_layer
def test_evaluation_without_running_statistics(rng, row, options):
    """As in torch: the statistics of the batch."""
    layer = randomize(rng, row.make(eps=EPS, track_running_stats=False))
    assert layer.running_mean is None and layer.running_var is None and layer.num_batches_tracked is None
    x = random(rng, row.case.shape)
    in_training = layer(x)
    bounds.assert_same_bits(layer.eval()(x), in_training)
    row.case.check_forward(in_training, x, layer.weight, layer.bias, EPS)


@every_tracking_layer
def test_frozen(rng, row, options):
    """What torch has in eval(): given statistics, which do not move, and gradients that take them as constants."""
    case, layer = row.case, randomize(rng, row.make(eps=EPS, **options))
    layer.frozen = True
    before = snapshot(layer)
    x, dy = random(rng, case.shape), random(rng, case.shape)
    y = layer.train()(x)
    assert_same_state(layer, before)
    bounds.assert_same_bits(y, copy.deepcopy(layer).eval()(x))
    dx = layer.backward(dy)
    running = layer.running_mean, layer.running_var
    given = Case(case.norm, case.shape, case.options, training=False)
    statistics = given.forward(x, layer.weight, eps=EPS, running_mean=running[0], running_var=running[1])[1:]
    given.check_backward((dx, layer.dweight, layer.dbias), dy, x, statistics, layer.weight, EPS, running)

    layer.frozen = False
    bounds.assert_same_bits(layer(x), case.plain(x, layer.weight, layer.bias, eps=EPS))
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


@every_tracking_layer
def test_frozen_needs_running_statistics(rng, row, options):
    layer = row.make(track_running_stats=False)
    x = random(rng, row.case.shape)
    layer.frozen = True
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"^frozen = True needs running statistics, got a layer without them; "):
            layer.train(mode)(x)
    layer.frozen = False
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("axis", [2, -1])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_channel_axis(rng, norm, axis):
    row, shape = LAYERS[norm], (4, 5, 6)
    case = Case(norm, shape, {**row.case.options, "channel_axis": axis})
    layer = randomize(rng, row.make(channel_axis=axis))
    x, dy = random(rng, shape), random(rng, shape)
    case.check_forward(layer(x), x, layer.weight, layer.bias)
    statistics = case.forward(x, layer.weight, layer.bias)[1:]
    case.check_backward((layer.backward(dy), layer.dweight, layer.dbias), dy, x, statistics, layer.weight)


@every_layer
@pytest.mark.parametrize("name", ["float64", "float32", *HALF])
def test_dtypes(rng, row, name):
    """The layer is its functions, on data of each dtype; what adds up has at least float32."""
    dtype = dtype_named(name)
    wide = np.dtype(np.float64 if name == "float64" else np.float32)
    layer = randomize(rng, row.make(dtype=dtype))
    assert layer.dtype == dtype
    assert all(array.dtype == dtype for array in layer.parameters().values())
    assert all(array.dtype == wide for array in layer.gradients().values())
    if isinstance(layer, nn.BatchNorm):
        assert layer.running_mean.dtype == layer.running_var.dtype == wide
    x, dy = (random(rng, row.case.shape).astype(dtype) for _ in range(2))
    expected, *statistics = row.case.forward(x, layer.weight, layer.bias)
    y = layer(x)
    dx = layer.backward(dy)
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(y, expected)
    gradients = row.case.backward(dy, x, *statistics, layer.weight, grad_dtype=wide.type)
    for found, expected in zip((dx, layer.dweight, layer.dbias), gradients):
        assert (found is None) == (expected is None)
        if found is not None:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", HALF)
def test_gradients_of_half_parameters_add_up(name):
    """In float16 a sum of ones stops at 2048, in bfloat16 at 256."""
    dtype = dtype_named(name)
    layer = nn.LayerNorm(2, dtype=dtype)
    x = np.tile(np.array([[-1, 1]], dtype), (3001, 1))
    for k in (1, 2):
        layer(x)
        layer.backward(np.ones_like(x))
        np.testing.assert_array_equal(layer.dbias, [3001.0 * k] * 2)


@pytest.mark.parametrize("name", HALF)
def test_float32_parameters_with_half_data(rng, name):
    """What mixed precision does: data of a half type, parameters and their gradients in float32."""
    dtype = dtype_named(name)
    layer = randomize(rng, nn.LayerNorm(8))
    x = random(rng, (5, 8)).astype(dtype)
    y = layer(x)
    np.testing.assert_array_equal(y, nk.layer_norm(x, 8, layer.weight, layer.bias))
    assert y.dtype == layer.backward(y).dtype == dtype
    assert layer.dweight.dtype == np.float32


@pytest.mark.parametrize("name", ["float64", "float32", *HALF])
def test_optimizer_in_place(rng, name):
    """The loop of the module's docstring, for each dtype: the layer sees what an optimizer writes."""
    layer = nn.RMSNorm(4, dtype=dtype_named(name))
    x = random(rng, (3, 4)).astype(name)
    weight = layer.weight
    layer(x)
    layer.backward(x)
    expected = (1.0 - 0.5 * layer.dweight.astype(np.float64)).astype(name)
    for key, parameter in layer.parameters().items():
        parameter -= 0.5 * layer.gradients()[key]
    assert layer.weight is weight
    np.testing.assert_array_equal(weight, expected)


# --- gradients ----------------------------------------------------------------------------------------------------


@every_layer
def test_gradients_accumulate_until_zero_grad(rng, row):
    layer = randomize(rng, row.make())
    once = copy.deepcopy(layer)
    arrays = layer.gradients()
    total = {name: np.zeros_like(array) for name, array in arrays.items()}
    for _ in range(3):
        x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
        layer(x)
        layer.backward(dy)
        once.zero_grad()
        once(x)
        once.backward(dy)
        for name in total:
            total[name] += once.gradients()[name]
            assert np.all(once.gradients()[name] != 0)
    for name, array in layer.gradients().items():
        assert array is arrays[name]
        bounds.assert_same_bits(array, total[name])
    layer.zero_grad()
    assert all(not array.any() for array in arrays.values())
    assert layer.gradients().keys() == arrays.keys() and layer.dweight is arrays["weight"]


@every_layer
@pytest.mark.parametrize("needs", [("x",), ("weight",), ("bias", "x"), ["weight", "bias"], ()], ids=str)
def test_needs(rng, row, needs):
    """The gradients asked for have the same bits; the others do not move. A layer may lack what is asked for."""
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    for affine in (True, False):
        layer = randomize(rng, row.make(**{row.affine: affine}))
        other = copy.deepcopy(layer)
        layer(x)
        other(x)
        dx, other_dx = layer.backward(dy), other.backward(dy, needs=needs)
        assert (other_dx is not None) == ("x" in needs)
        if other_dx is not None:
            bounds.assert_same_bits(other_dx, dx)
        for name, gradient in other.gradients().items():
            if name in needs:
                bounds.assert_same_bits(gradient, layer.gradients()[name])
                assert gradient.any()
            else:
                assert not gradient.any()


@every_layer
def test_out(rng, row):
    layer = row.make()
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    layer(x)
    expected = layer.backward(dy)
    layer(x)
    assert layer.backward(dy, out=dy) is dy
    bounds.assert_same_bits(dy, expected)


@every_layer
def test_backward_without_its_forward(rng, row):
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    layer = row.make()
    subject = "backward must follow a forward in training, got "
    with pytest.raises(RuntimeError, match=f"^{subject}none; call forward\\(x\\) first$"):
        layer.backward(dy)
    layer(x)
    layer.backward(dy)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=f"^{subject}one that backward has used, and freed; call forward"):
        layer.backward(dy)
    layer(x)
    layer.eval()(x)
    with pytest.raises(
        RuntimeError, match=f"^{subject}one in evaluation, which saves nothing; call train\\(\\)"
    ) as raised:
        layer.backward(dy)
    assert ("frozen = True" in str(raised.value)) == isinstance(layer, nn.BatchNorm | nn.InstanceNorm)
    for name in ("dweight", "dbias"):
        np.testing.assert_array_equal(getattr(layer, name), before.get(name))


@every_layer
def test_what_is_kept(rng, row):
    """x, not a copy of it, from a forward in training to its backward; nothing in evaluation."""
    layer = row.make()
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    x_ref = weakref.ref(x)
    layer(x)
    del x
    assert x_ref() is not None
    layer.backward(dy)
    assert x_ref() is None
    x = random(rng, row.case.shape)
    x_ref = weakref.ref(x)
    layer.eval()(x)
    del x
    assert x_ref() is None


def test_train_and_eval(rng):
    layer = nn.LayerNorm(4)
    assert layer.training is True
    assert layer.eval() is layer and layer.training is False
    assert layer.train() is layer and layer.training is True
    assert layer.train(False) is layer and layer.training is False
    with pytest.raises(TypeError, match=r"^mode must be a bool, got str$"):
        layer.train("eval")
    assert layer.training is False


@every_layer
def test_call_is_forward(rng, row):
    class Doubled(row.ours):
        def forward(self, x):
            return 2 * super().forward(x)

    x = random(rng, row.case.shape)
    bounds.assert_same_bits(Doubled(*row.sizes)(x), 2 * row.ours(*row.sizes)(x))


# --- calls that raise -----------------------------------------------------------------------------------------------


@every_layer
def test_forward_that_raises_changes_nothing(rng, row):
    """Neither statistics nor counts nor what the forward before has saved for backward."""
    layer = randomize(rng, row.make(**({"track_running_stats": True} if row.case.norm == "instance" else {})))
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    layer(x)
    before, other = snapshot(layer), copy.deepcopy(layer)
    wrong = {
        "dtype": x.astype(np.int32),
        "list": x.tolist(),
        "shape": x[:, :-1, :-1, :-1],
        "one dimension": x[0, 0, 0, :1],
    }
    for bad in wrong.values():
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
        assert_same_state(layer, before)
    dx = layer.backward(dy)
    other(x)
    bounds.assert_same_bits(dx, other.backward(dy))


def test_single_value_per_channel(rng):
    layer = randomize(rng, nn.BatchNorm(6))
    before = snapshot(layer)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(random(rng, (1, 6)))
    assert_same_state(layer, before)


@every_tracking_layer
def test_the_way_out_of_a_single_value_is_one_of_layers(rng, row, options):
    x = random(rng, (1, 6, 1))
    more = {"batch": "samples", "instance": "space"}[row.case.norm]
    layer = row.make(**options)
    with pytest.raises(ValueError, match=rf"got x of shape \(1, 6, 1\); use more {more}, or eval\(\)$"):
        layer(x)
    assert np.isfinite(layer.eval()(x)).all()
    layer = row.make(track_running_stats=False)
    with pytest.raises(ValueError, match=rf"; use more {more}, or track_running_stats=True and eval\(\)$"):
        layer.eval()(x)


@every_layer
def test_backward_that_raises_may_be_repeated(rng, row):
    layer, other = (row.make() for _ in range(2))
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    layer(x)
    other(x)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"^dy must have shape \(3, 6, 5, 4\), got \(3, 6, 5\)"):
        layer.backward(dy[..., 0])
    with pytest.raises(TypeError, match=r'^needs must be a tuple of names out of "x", "weight", "bias", got "weight"'):
        layer.backward(dy, needs="weight")
    with pytest.raises(ValueError, match=r'^needs must name gradients out of "x", "weight", "bias", got '):
        layer.backward(dy, needs=("x", "running_mean"))
    assert_same_state(layer, before)
    bounds.assert_same_bits(layer.backward(dy), other.backward(dy))


@pytest.mark.parametrize("affine", [True, False])
def test_channels(rng, affine):
    """Even where there is no weight to compare with."""
    layers = nn.BatchNorm(6, affine=affine, track_running_stats=affine), nn.InstanceNorm(6, affine=affine)
    for layer in (*layers, nn.GroupNorm(2, 6, affine=affine)):
        with pytest.raises(ValueError, match=r"^x must have 6 channels on axis 1, got shape \(2, 4, 6\)$"):
            layer(random(rng, (2, 4, 6)))


@every_tracking_layer
@pytest.mark.parametrize("momentum", [0.1, None])
def test_empty_batch(rng, row, options, momentum):
    """It has no statistics: it moves none and does not count."""
    layer = randomize(rng, row.make(momentum=momentum, **options))
    before = snapshot(layer)
    empty = np.zeros((0, *row.case.shape[1:]), np.float32)
    assert layer(empty).shape == empty.shape
    assert_same_state(layer, before)
    assert layer.backward(empty).shape == empty.shape
    assert_same_state(layer, before)


CONSTRUCTORS = [
    (lambda: nn.BatchNorm(0), ValueError, "num_features must be at least 1, got 0"),
    (lambda: nn.BatchNorm(2.0), TypeError, "num_features must be an int, got float"),
    (lambda: nn.BatchNorm(2, eps=-1.0), ValueError, "eps must be finite and at least 0, got -1.0"),
    (lambda: nn.BatchNorm(2, eps="small"), TypeError, "eps must be a float, got str"),
    (lambda: nn.LayerNorm(2, eps=None), TypeError, "eps must be a float, got NoneType"),
    (lambda: nn.BatchNorm(2, momentum=float("nan")), ValueError, "momentum must be finite, got nan"),
    (lambda: nn.BatchNorm(2, channel_axis=None), TypeError, "channel_axis must be an int, got NoneType"),
    (lambda: nn.BatchNorm(2, ddof=float("inf")), ValueError, "ddof must be finite and at least 0, got inf"),
    (lambda: nn.BatchNorm(2, affine=1), TypeError, "affine must be a bool, got int"),
    (lambda: nn.BatchNorm(2, track_running_stats=None), TypeError, "track_running_stats must be a bool, got NoneType"),
    (lambda: nn.LayerNorm(2, bias=np.zeros(2)), TypeError, "bias must be a bool, got ndarray"),
    (lambda: nn.RMSNorm(2, elementwise_affine="no"), TypeError, "elementwise_affine must be a bool, got str"),
    (
        lambda: nn.InstanceNorm(2, dtype=np.int64),
        TypeError,
        "dtype must be float64, float32, float16 or bfloat16, got <class 'numpy.int64'>",
    ),
    (
        lambda: nn.InstanceNorm(2, dtype=None),
        TypeError,
        "dtype must be float64, float32, float16 or bfloat16, got None",
    ),
    (
        lambda: nn.InstanceNorm(2, dtype=">f4"),
        TypeError,
        "dtype must be float64, float32, float16 or bfloat16, got '>f4'",
    ),
    (
        lambda: nn.InstanceNorm(2, dtype="half a float"),
        TypeError,
        "dtype must be float64, float32, float16 or bfloat16, got 'half a float'",
    ),
    (lambda: nn.GroupNorm(4, 6), ValueError, "num_groups must divide num_channels, 6, got 4"),
    (lambda: nn.GroupNorm(0, 6), ValueError, "num_groups must be at least 1, got 0"),
    (lambda: nn.GroupNorm(1, -6), ValueError, "num_channels must be at least 1, got -6"),
    (lambda: nn.LayerNorm(()), ValueError, "normalized_shape must not be empty, got ()"),
    (lambda: nn.LayerNorm((3, 0)), ValueError, "normalized_shape must hold extents of at least 1, got (3, 0)"),
    (lambda: nn.LayerNorm(1.5), TypeError, "normalized_shape must be an int or a sequence of ints, got float"),
    (lambda: nn.RMSNorm(4, eps=float("inf")), ValueError, "eps must be finite and at least 0, got inf"),
]


@pytest.mark.parametrize(("make", "error", "sentence"), CONSTRUCTORS, ids=[row[2] for row in CONSTRUCTORS])
def test_constructor_errors(make, error, sentence):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == sentence


# --- state dicts ----------------------------------------------------------------------------------------------------


@every_layer
def test_state_dict_has_the_keys_of_torch(row):
    for options in row.variants:
        ours, theirs = row.make(**options).state_dict(), row.torch(**options).state_dict()
        assert list(ours) == list(theirs)
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name].numpy(), strict=True)


@every_layer
def test_state_dict_round_trip(rng, row):
    layer, other = randomize(rng, row.make()), row.make()
    arrays = other.state_dict()
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    assert_same_state(other, snapshot(layer))
    for name, array in other.state_dict().items():
        assert array is arrays[name] is getattr(other, name)
        assert not np.shares_memory(array, getattr(layer, name))


def test_state_dict_shares_the_arrays(rng):
    """As torch's does; loading a layer's own leaves it as it is."""
    layer = randomize(rng, nn.BatchNorm(3))
    before = snapshot(layer)
    state = layer.state_dict()
    layer.load_state_dict(state)
    assert_same_state(layer, before)
    layer(random(rng, (4, 3)))
    np.testing.assert_array_equal(state["running_mean"], layer.running_mean)
    assert state["num_batches_tracked"] == 4


def test_npz_round_trip(rng, tmp_path):
    """np.load gives a mapping that reads from its file."""
    layer, other = randomize(rng, nn.BatchNorm(3)), nn.BatchNorm(3)
    np.savez(tmp_path / "state.npz", **layer.state_dict(prefix="norm."))
    with np.load(tmp_path / "state.npz") as state:
        assert other.load_state_dict(state, prefix="norm.") == ([], [])
    assert_same_state(other, snapshot(layer))


def test_prefix(rng):
    first, second = (randomize(rng, nn.LayerNorm(3)) for _ in range(2))
    model = {**first.state_dict(prefix="encoder.norm1."), **second.state_dict(prefix="encoder.norm2.")}
    assert list(model) == [f"encoder.norm{i}.{name}" for i in (1, 2) for name in ("weight", "bias")]
    layer = nn.LayerNorm(3)
    layer.load_state_dict(model, prefix="encoder.norm2.")
    assert_same_state(layer, snapshot(second))
    with pytest.raises(ValueError, match=r"missing 'encoder\.weight', 'encoder\.bias' and unexpected 'encoder\.n"):
        layer.load_state_dict(model, prefix="encoder.")


def test_strict(rng):
    layer = randomize(rng, nn.BatchNorm(3))
    before = snapshot(layer)
    state = {"weight": np.float32([1, 2, 3]), "head": np.zeros(5)}
    with pytest.raises(ValueError, match="exactly") as raised:
        layer.load_state_dict(state)
    assert str(raised.value) == (
        "state must have exactly the keys 'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked', got "
        "missing 'bias', 'running_mean', 'running_var', 'num_batches_tracked' and unexpected 'head'; pass prefix= for "
        "one layer of a model, or strict=False to load what there is"
    )
    assert_same_state(layer, before)
    keys = layer.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["bias", "running_mean", "running_var", "num_batches_tracked"]
    assert keys.unexpected_keys == ["head"]
    assert_same_state(layer, {**before, "weight": state["weight"]})
    with pytest.raises(ValueError, match=r"unexpected 'w0', .* 'w7' and 92 more; "):
        nn.LayerNorm(3, elementwise_affine=False).load_state_dict({f"w{i}": np.zeros(1) for i in range(100)})


REFUSED = [
    ("weight", np.zeros(4, np.float32), ValueError, "weight must have shape (3,), got (4,)"),
    ("weight", np.zeros((), np.float32), ValueError, "weight must have shape (3,), got ()"),
    (
        "bias",
        np.zeros(3),
        TypeError,
        "bias must be float32, or exact in it, got float64; convert it with .astype('float32'), or make the layer "
        "with dtype='float64'",
    ),
    (
        "running_var",
        np.ones(3, np.int16),
        TypeError,
        "running_var must be float32, or exact in it, got int16; convert it with .astype('float32')",
    ),
    (
        "running_var",
        [1.0, 1.0, 1.0],
        TypeError,
        "running_var must be a numpy.ndarray, got list; convert it with np.asarray",
    ),
    (
        "num_batches_tracked",
        np.zeros(()),
        TypeError,
        "num_batches_tracked must be int64, or exact in it, got float64; convert it with .astype('int64')",
    ),
    (
        "num_batches_tracked",
        np.zeros((), bool),
        TypeError,
        "num_batches_tracked must be int64, or exact in it, got bool; convert it with .astype('int64')",
    ),
    (
        "weight",
        np.zeros(3, "V2"),  # bfloat16 that went through an .npz file
        TypeError,
        "weight must be float32, or exact in it, got |V2; if these are bfloat16, view them with "
        "weight.view(ml_dtypes.bfloat16)",
    ),
    ("num_batches_tracked", np.zeros(1, np.int64), ValueError, "num_batches_tracked must have shape (), got (1,)"),
    (
        "num_batches_tracked",
        np.array(-1),
        ValueError,
        "num_batches_tracked must be at least 0, got -1; it is a count",
    ),
    (
        "bias",
        np.ma.masked_array(np.zeros(3, np.float32), [0, 1, 0]),
        TypeError,
        "bias must be a plain numpy.ndarray, got MaskedArray; fill it with bias.filled(value)",
    ),
    (
        "bias",
        np.zeros((1, 3), np.float32).view(np.matrix),
        TypeError,
        "bias must be a plain numpy.ndarray, got matrix; view it with np.asarray(bias)",
    ),
]


@pytest.mark.parametrize(("key", "value", "error", "sentence"), REFUSED, ids=[f"{r[0]}-{r[3][-30:]}" for r in REFUSED])
def test_load_refuses(rng, key, value, error, sentence):
    layer = randomize(rng, nn.BatchNorm(3))
    before = snapshot(layer)
    state = {name: np.zeros_like(array) for name, array in before.items() if name not in ("dweight", "dbias")}
    with pytest.raises(error) as raised:
        layer.load_state_dict({**state, key: value})
    assert str(raised.value) == sentence
    assert_same_state(layer, before)


def test_load_into_a_read_only_array(rng):
    """Seen before anything is written."""
    layer = randomize(rng, nn.BatchNorm(3))
    layer.running_var.flags.writeable = False
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"^the layer's own running_var must be writable, got a read-only array; set "):
        layer.load_state_dict({name: np.zeros_like(array) for name, array in layer.state_dict().items()})
    assert_same_state(layer, before)


def test_load_the_own_arrays_under_other_keys(rng):
    layer = randomize(rng, nn.LayerNorm(3))
    before = snapshot(layer)
    layer.load_state_dict({"weight": layer.bias, "bias": layer.weight})
    assert_same_state(layer, {**before, "weight": before["bias"], "bias": before["weight"]})


def test_load_refuses_what_is_no_mapping():
    with pytest.raises(TypeError, match=r"^state must be a mapping of names to arrays, got list$"):
        nn.BatchNorm(3).load_state_dict([("weight", np.ones(3, np.float32))])


@pytest.mark.parametrize("name", HALF)
def test_load_widens_exactly(rng, name):
    """What `model.half()` in torch writes: running statistics of the half type, too."""
    layer = nn.BatchNorm(3, dtype=dtype_named(name))
    expected = randomize(rng, nn.BatchNorm(3)).state_dict()
    state = {key: array if array.ndim == 0 else array.astype(name) for key, array in expected.items()}
    layer.load_state_dict(state)
    for key, array in layer.state_dict().items():
        np.testing.assert_array_equal(array.astype(np.float64), state[key].astype(np.float64))
    with pytest.raises(
        TypeError, match=f"^weight must be {name}, or exact in it, got float32; convert it with .astype"
    ):
        layer.load_state_dict(expected)


def test_load_other_byte_order_and_integers():
    layer = nn.BatchNorm(2)
    state = layer.state_dict()
    more = {"weight": np.array([1.5, 2.5], ">f4"), "num_batches_tracked": np.array(7, ">i4")}
    layer.load_state_dict({**state, **more})
    np.testing.assert_array_equal(layer.weight, np.float32([1.5, 2.5]), strict=True)
    np.testing.assert_array_equal(layer.num_batches_tracked, np.array(7, np.int64), strict=True)


def test_file_written_by_torch(rng, tmp_path):
    """A whole model, trained and saved by torch: outputs and gradients are those of torch's layers in float64."""
    torch, numpy_loader, torch_saver = need("torch"), need("safetensors.numpy"), need("safetensors.torch")
    rows = {name: (row, TRACKING[name][1] if name in TRACKING else {}) for name, row in LAYERS.items()}
    model = torch.nn.ModuleDict({name: row.torch(eps=EPS, **options) for name, (row, options) in rows.items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(random(rng, tuple(parameter.shape))))
    for name in TRACKING:
        model[name](torch.from_numpy(random(rng, IMAGES, 10.0)))
    torch_saver.save_file(torch.nn.ModuleDict({"encoder": model}).state_dict(), tmp_path / "model.safetensors")
    tensors = numpy_loader.load_file(tmp_path / "model.safetensors")
    for name, (row, options) in rows.items():
        layer = row.make(eps=EPS, **options)
        assert layer.load_state_dict(tensors, prefix=f"encoder.{name}.") == ([], [])
        twin = model[name].double()
        for key, tensor in twin.state_dict().items():
            np.testing.assert_array_equal(layer.state_dict()[key], tensor.numpy())
        assert_step_of_torch(rng, layer, twin, row.case)
        assert_evaluation_of_torch(rng, layer, twin, row.case)


@pytest.mark.parametrize("name", HALF)
def test_half_file_written_by_torch(rng, tmp_path, name):
    torch, numpy_loader, torch_saver = need("torch"), need("safetensors.numpy"), need("safetensors.torch")
    dtype = dtype_named(name)
    twin = torch.nn.BatchNorm2d(6).to(getattr(torch, name))
    twin(torch.from_numpy(random(rng, IMAGES, 10.0)).to(getattr(torch, name)))
    torch_saver.save_file(twin.state_dict(), tmp_path / "half.safetensors")
    layer = nn.BatchNorm(6, dtype=dtype)
    layer.load_state_dict(numpy_loader.load_file(tmp_path / "half.safetensors"))
    assert layer.num_batches_tracked == 1
    for key, array in layer.state_dict().items():
        np.testing.assert_array_equal(array.astype(np.float64), twin.state_dict()[key].double().numpy())


def test_file_read_by_torch(rng, tmp_path):
    """And the other way."""
    torch, numpy_saver, torch_loader = need("torch"), need("safetensors.numpy"), need("safetensors.torch")
    layer = randomize(rng, nn.BatchNorm(6))
    numpy_saver.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    twin = torch.nn.BatchNorm2d(6)
    twin.load_state_dict(torch_loader.load_file(tmp_path / "layer.safetensors"))
    for key, tensor in twin.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), layer.state_dict()[key], strict=True)


# --- copies, repr, threads ------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"])
def test_copies(rng, row, copied):
    """They hold the same numbers in arrays of their own, and go on as the original would; x stays behind."""
    layer = randomize(rng, row.make())
    x, dy = random(rng, row.case.shape), random(rng, row.case.shape)
    layer(x)
    layer.backward(dy)
    layer(x)
    other = copied(layer)
    assert repr(other) == repr(layer) and other.training
    assert_same_state(other, snapshot(layer))
    with pytest.raises(RuntimeError, match="got none; call forward"):
        other.backward(dy)
    layer.backward(dy)
    for each in (layer, other):
        each.zero_grad()
        each(x)
    bounds.assert_same_bits(other.backward(dy), layer.backward(dy))
    assert_same_state(other, snapshot(layer))
    before = snapshot(other)
    for array in layer.state_dict().values():
        array[...] = 9
    assert_same_state(other, before)
    assert copied(layer.eval()).training is False


REPRS = [
    (nn.BatchNorm(64), "BatchNorm(64, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"),
    (
        nn.BatchNorm(2, 1e-3, None, False, False, channel_axis=-1, dtype=np.float16, ddof=0),
        "BatchNorm(2, eps=0.001, momentum=None, affine=False, track_running_stats=False, channel_axis=-1, "
        "dtype='float16', ddof=0)",
    ),
    (nn.InstanceNorm(8), "InstanceNorm(8, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False)"),
    (nn.GroupNorm(2, 8), "GroupNorm(2, 8, eps=1e-05, affine=True)"),
    (nn.LayerNorm(8), "LayerNorm((8,), eps=1e-05, elementwise_affine=True, bias=True)"),
    (nn.LayerNorm([3, 4], bias=False), "LayerNorm((3, 4), eps=1e-05, elementwise_affine=True, bias=False)"),
    (nn.LayerNorm(8, 1e-6, False), "LayerNorm((8,), eps=1e-06, elementwise_affine=False, bias=False)"),
    (nn.RMSNorm(8, dtype=float), "RMSNorm((8,), eps=None, elementwise_affine=True, dtype='float64')"),
]


@pytest.mark.parametrize(("layer", "expected"), REPRS, ids=[expected for _, expected in REPRS])
def test_repr(layer, expected):
    """It makes the layer again."""
    assert repr(layer) == expected
    again = eval(expected, vars(nn))
    assert repr(again) == expected
    assert_same_state(again, snapshot(layer))


def test_evaluation_in_threads(rng):
    layer = randomize(rng, nn.BatchNorm(16)).eval()
    batches = [random(rng, (32, 16, 20)) for _ in range(32)]
    expected = [layer(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        for a, b in zip(pool.map(layer, batches), expected):
            bounds.assert_same_bits(a, b)


# --- the public surface ---------------------------------------------------------------------------------------------

NAMES = ("BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm", "RMSNorm")


@every_layer
def test_constructor_is_that_of_torch(row):
    """Names, order and defaults of the positional arguments; ours alone are by keyword."""
    theirs = inspect.signature(getattr(need("torch").nn, row.theirs)).parameters
    ours = inspect.signature(row.ours).parameters.values()
    positional = [p for p in ours if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in positional] == list(theirs)[: len(positional)]
    assert [p.default for p in positional] == [theirs[p.name].default for p in positional]
    assert {p.name for p in ours if p.kind is p.KEYWORD_ONLY} <= {"channel_axis", "dtype", "ddof"}


@pytest.mark.parametrize("name", NAMES)
def test_docstring(name):
    layer = getattr(nn, name)
    doc = inspect.getdoc(layer)
    assert ".. math::" in doc and "https://arxiv.org/abs/" in doc
    sections = re.split(r"^(\w+)\n-+\n", doc, flags=re.MULTILINE)
    parameters = dict(zip(sections[1::2], sections[2::2]))["Parameters"]
    documented = re.findall(r"^(\w[\w, ]*?)(?: :|$)", parameters, re.MULTILINE)
    assert ", ".join(documented).split(", ") == list(inspect.signature(layer).parameters)
    for method in ("forward", "backward", "train", "eval", "zero_grad", "state_dict", "load_state_dict"):
        assert inspect.getdoc(getattr(layer, method))


def test_examples():
    found = doctest.DocTestFinder().find(nn, "nn", globs={})
    with_examples = [test for test in found if test.examples]
    assert {f"nn.{name}" for name in NAMES} | {"nn", "nn.Layer.load_state_dict"} == {t.name for t in with_examples}
    log = []
    for test in with_examples:
        doctest.DocTestRunner().run(test, out=log.append)
    assert not log, "".join(log)
