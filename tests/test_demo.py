"""The demo: its network differentiates correctly, learns, and prints and draws what it says."""

import gzip
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parents[1]
NORMS = ["none", "batch", "layer", "group", "rms"]


def load_demo():
    spec = importlib.util.spec_from_file_location("digits_demo", ROOT / "examples" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.fixture(autouse=True)
def one_blas_thread():
    """As in the demo's main()."""
    with threadpool_limits(1, user_api="blas"):
        yield


def normalize64(x, center, eps):
    """Over the last axis."""
    x = x - x.mean(axis=-1, keepdims=True) if center else x
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def loss64(layers, params, images, labels):
    """The loss of the network in float64, from the formulas, with neither the demo's code nor normkit."""
    x = images
    for layer, p in zip(layers, params, strict=True):
        kind = type(layer).__name__
        if kind == "Linear":
            x = x @ p["weight"] + p["bias"]
        elif kind == "Sigmoid":
            x = 1 / (1 + np.exp(-x))
        elif kind == "BatchNorm":
            x = normalize64(x.T, True, 1e-5).T * p["weight"] + p["bias"]
        elif kind == "LayerNorm":
            x = normalize64(x, True, 1e-5) * p["weight"] + p["bias"]
        elif kind == "GroupNorm":
            grouped = normalize64(x.reshape(len(x), demo.GROUPS, -1), True, 1e-5)
            x = grouped.reshape(x.shape) * p["weight"] + p["bias"]
        else:
            assert kind == "RMSNorm"
            x = normalize64(x, False, np.finfo(np.float32).eps) * p["weight"]
    return np.mean(np.log(np.exp(x).sum(axis=1)) - x[np.arange(len(x)), labels])


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_the_whole_network(norm):
    rng = np.random.default_rng(5)
    images = rng.random((60, 64), np.float32)
    labels = rng.integers(0, 10, 60)
    layers = demo.build(norm, 64, rng)
    for layer in layers:  # away from the special starting values 1 and 0
        for param in layer.params.values():
            param += rng.normal(0, 0.1, param.shape).astype(np.float32)

    loss, dscores = demo.cross_entropy(demo.forward(layers, images, training=True), labels)
    demo.backward(layers, dscores)
    params = [{name: p.astype(np.float64) for name, p in layer.params.items()} for layer in layers]
    assert loss == pytest.approx(loss64(layers, params, images.astype(np.float64), labels), rel=1e-5)

    images = images.astype(np.float64)
    step = 1e-5
    for layer, p in zip(layers, params, strict=True):
        assert layer.grads.keys() == layer.params.keys()
        # Measured: 1e-6. The scale is the layer's, not the parameter's, because batch norm subtracts what the bias
        # before it adds: the gradient of that bias is zero, and only the rounding of its terms is left.
        tolerance = 5e-6 * max((np.abs(grad).max() for grad in layer.grads.values()), default=0)
        for name, values in p.items():
            grad = layer.grads[name]
            assert grad.shape == values.shape and grad.dtype == np.float32
            picked = rng.choice(values.size, 8, replace=False)
            expected = []
            for index in picked:
                kept = values.flat[index]
                values.flat[index] = kept + step
                above = loss64(layers, params, images, labels)
                values.flat[index] = kept - step
                expected.append((above - loss64(layers, params, images, labels)) / (2 * step))
                values.flat[index] = kept
            np.testing.assert_allclose(grad.flat[picked], expected, rtol=0, atol=tolerance, err_msg=name)


def test_same_start_and_same_batches_for_every_norm():
    weights = {norm: demo.build(norm, 64, np.random.default_rng(3)) for norm in NORMS}
    linear = {n: [layer for layer in layers if isinstance(layer, demo.Linear)] for n, layers in weights.items()}
    for norm in NORMS:
        for ours, plain in zip(linear[norm], linear["none"], strict=True):
            np.testing.assert_array_equal(ours.params["weight"], plain.params["weight"])


def test_data_split():
    (images, labels), (test_images, test_labels) = demo.load_digits(seed=0)
    assert images.shape == (1438, 64) and test_images.shape == (359, 64)
    assert images.dtype == np.float32 and images.min() == 0 and images.max() == 1
    assert len(labels) == 1438 and sorted(set(test_labels)) == list(range(10))


# About 0.76, 0.97, 0.89, 0.87, 0.94 are reached; chance is 0.1.
@pytest.mark.parametrize(("norm", "epochs"), [("none", 30), ("batch", 10), ("layer", 10), ("group", 10), ("rms", 10)])
def test_learns(norm, epochs):
    layers, history = demo.train(norm, demo.load_digits(seed=0), epochs=epochs, lr=0.5, seed=0)
    assert list(history.epoch_accuracy) == list(range(1, epochs + 1))
    assert max(history.epoch_accuracy.values()) > 0.5
    assert history.accuracy[0] < 0.25
    assert history.steps[0] == 0 and history.steps[-1] == epochs * 23
    assert np.shape(history.sigmoid_input) == (len(history.steps), 3)
    assert (np.diff(history.sigmoid_input, axis=1) >= 0).all()
    if norm == "batch":  # running statistics follow the data they have seen
        mean, var = layers[1].running
        assert np.abs(mean).max() > 0.1 and (var > 0).all() and np.abs(var - 1).max() > 0.1


def test_main_prints_the_table_and_draws(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    demo.main(["--epochs", "2", "--seed", "1", "--lr", "0.3", "--out", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["norm", "epoch", "1", "epoch", "2", "seconds"]
    _, history = demo.train("batch", demo.load_digits(seed=1), epochs=2, lr=0.3, seed=1)
    rows = {line.split()[0]: [float(n) for n in re.findall(r"[\d.]+", line)] for line in lines[2:7]}
    assert list(rows) == NORMS
    assert rows["batch"][:2] == [round(100 * history.epoch_accuracy[e], 1) for e in (1, 2)]

    from matplotlib.image import imread

    pixels = imread(picture)
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 10  # something was drawn on the white


def test_epochs_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--epochs", "0"])
    assert "at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The reader of the original MNIST files, on files made here.


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize("shape", [(7,), (3, 28, 28), (0, 28, 28)])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_reader(tmp_path, shape, compress):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    raw = idx_bytes(array)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(raw) if compress else raw)
    read = demo.read_idx(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x89PNG....", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\0", "not an IDX file"),  # floats
        (b"\0\0\x08\x01\0\0\0\x05abc", re.escape("announces (5,) but holds 3 bytes")),
        (b"\0\0\x08\x03\0\0\0\x05", "ends inside its header"),
    ],
)
def test_idx_reader_refuses(tmp_path, raw, message):
    path = tmp_path / "file"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        demo.read_idx(path)


def write_mnist(folder):
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", 130), ("t10k", 20)):
        arrays[prefix] = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8), np.arange(count, dtype=np.uint8) % 10
        images, labels = map(idx_bytes, arrays[prefix])
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return arrays


def test_mnist_folder(tmp_path):
    arrays = write_mnist(tmp_path)
    for (images, labels), prefix in zip(demo.load_mnist(tmp_path), ("train", "t10k"), strict=True):
        assert images.dtype == np.float32
        np.testing.assert_allclose(images.reshape(-1, 28, 28) * 255, arrays[prefix][0], rtol=1e-6)
        np.testing.assert_array_equal(labels, arrays[prefix][1])

    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="20 images but 3 labels"):
        demo.load_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="neither train-labels-idx1-ubyte nor"):
        demo.load_mnist(tmp_path)


def test_main_on_mnist_files(tmp_path, capsys):
    write_mnist(tmp_path)
    demo.main(["--mnist", str(tmp_path), "--epochs", "1", "--out", str(tmp_path / "picture.png")])
    assert capsys.readouterr().out.startswith("130 images for training, 20 for testing; 1 epochs at rate 0.5")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_readme_example():
    """The lines under "Use it" run as they stand, and give what they name."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    names = {}
    exec(code, names)
    assert names["dx"].shape == names["x"].shape
    assert names["mean"].shape == (32, 8)
    # dy = y = xhat, so dweight sums xhat squared: 1 on average, but for eps over a group, and nearly over a channel.
    np.testing.assert_allclose(names["dweight"], 32 * 56 * 56, rtol=0.1)
    np.testing.assert_allclose(names["dweight"].mean(), 32 * 56 * 56, rtol=1e-4)
