"""Learn to read handwritten digits, with and without normalization.

The network is the one of section 4.1 of the batch-norm paper (Ioffe and Szegedy, 2015): three hidden layers of 100
sigmoids, ten outputs, softmax and cross-entropy, plain gradient descent on mini-batches of 60. It is trained five
times: as it is, and with batch, layer, group and RMS norm in front of every sigmoid. All five start from the same
random weights and see the same mini-batches in the same order, at the same learning rate; only the norm differs. The
rate, 0.5, is a compromise: of 0.1, 0.2, 0.3, 0.5, 1 and 2, the network without normalization learns fastest at 1 and 2
(--lr 1), while the normalized ones reach the same accuracy at all of them and are steadier at the smaller ones.

There is no framework here: every layer is a small class with ``forward`` and ``backward``, written with NumPy, and the
norms are the functions of normkit.

    python examples/digits.py                      the 1,797 digits of 8 x 8 pixels that come with scikit-learn
    python examples/digits.py --mnist DIR          the 70,000 digits of 28 x 28 pixels; DIR holds the four IDX files
"""

from __future__ import annotations

import argparse
import gzip
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import normkit as nk

CLASSES = 10
HIDDEN = (100, 100, 100)
BATCH = 60
GROUPS = 5  # group norm: 100 features in 5 groups of 20
PERCENTILES = (15, 50, 85)


# ---------------------------------------------------------------------------------------------------------------------
# Layers. forward() keeps what backward() will need. backward() takes the gradient of the loss with respect to the
# layer's output, stores the gradients of the parameters in self.grads, and returns the gradient of the layer's input.


class Layer:
    """Parameters and their gradients, by name; most layers here have a weight and a bias."""

    def __init__(self, **params):
        self.params = params
        self.grads = {}

    def forward(self, x, training):
        raise NotImplementedError

    def backward(self, dy):
        raise NotImplementedError


class Linear(Layer):
    """y = x W + b, with W drawn from a Gaussian so narrow that y has about the scale of x."""

    def __init__(self, rng, inputs, outputs):
        weight = rng.normal(0, 1 / np.sqrt(inputs), (inputs, outputs))
        super().__init__(weight=weight.astype(np.float32), bias=np.zeros(outputs, np.float32))

    def forward(self, x, training):
        self.x = x
        return x @ self.params["weight"] + self.params["bias"]

    def backward(self, dy):
        self.grads = {"weight": self.x.T @ dy, "bias": dy.sum(axis=0)}
        return dy @ self.params["weight"].T


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), written with tanh, which cannot overflow."""

    def forward(self, x, training):
        self.y = 0.5 + 0.5 * np.tanh(0.5 * x)
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class NormLayer(Layer):
    """What the four norms share: they start as the plain normalized values, weight 1 and bias 0."""

    def __init__(self, features):
        super().__init__(weight=np.ones(features, np.float32), bias=np.zeros(features, np.float32))
        self.features = features


class BatchNorm(NormLayer):
    """Every feature over the mini-batch. For testing it needs statistics that do not depend on the company an image
    is in, so training keeps running ones."""

    def __init__(self, features):
        super().__init__(features)
        self.running = np.zeros(features, np.float32), np.ones(features, np.float32)  # mean, variance

    def forward(self, x, training):
        weight, bias = self.params["weight"], self.params["bias"]
        if not training:
            return nk.batch_norm(x, *self.running, weight, bias)
        self.x = x
        y, self.mean, self.rstd = nk.batch_norm_forward(x, *self.running, weight, bias, training=True)
        return y

    def backward(self, dy):
        dx, dweight, dbias = nk.batch_norm_backward(dy, self.x, self.mean, self.rstd, self.params["weight"])
        self.grads = {"weight": dweight, "bias": dbias}
        return dx


class LayerNorm(NormLayer):
    """Every image over its 100 features: the same in training and testing."""

    def forward(self, x, training):
        self.x = x
        y, self.mean, self.rstd = nk.layer_norm_forward(x, self.features, self.params["weight"], self.params["bias"])
        return y

    def backward(self, dy):
        dx, dweight, dbias = nk.layer_norm_backward(
            dy, self.x, self.mean, self.rstd, self.features, self.params["weight"]
        )
        self.grads = {"weight": dweight, "bias": dbias}
        return dx


class GroupNorm(NormLayer):
    """Every image over each of a few groups of its features."""

    def forward(self, x, training):
        self.x = x
        y, self.mean, self.rstd = nk.group_norm_forward(x, GROUPS, self.params["weight"], self.params["bias"])
        return y

    def backward(self, dy):
        dx, dweight, dbias = nk.group_norm_backward(dy, self.x, self.mean, self.rstd, GROUPS, self.params["weight"])
        self.grads = {"weight": dweight, "bias": dbias}
        return dx


class RMSNorm(NormLayer):
    """Every image divided by the root mean square of its features; nothing is subtracted, and there is no bias."""

    def __init__(self, features):
        super().__init__(features)
        del self.params["bias"]

    def forward(self, x, training):
        self.x = x
        y, self.rstd = nk.rms_norm_forward(x, self.features, self.params["weight"])
        return y

    def backward(self, dy):
        dx, dweight = nk.rms_norm_backward(dy, self.x, self.rstd, self.features, self.params["weight"])
        self.grads = {"weight": dweight}
        return dx


NORMS = {"none": None, "batch": BatchNorm, "layer": LayerNorm, "group": GroupNorm, "rms": RMSNorm}


# ---------------------------------------------------------------------------------------------------------------------
# The network is a list of layers.


def build(norm, inputs, rng):
    """Linear, norm, sigmoid, three times; then a linear layer that gives one score per digit."""
    layers = []
    for outputs in HIDDEN:
        layers.append(Linear(rng, inputs, outputs))
        if NORMS[norm] is not None:
            layers.append(NORMS[norm](outputs))
        layers.append(Sigmoid())
        inputs = outputs
    return [*layers, Linear(rng, inputs, CLASSES)]


def forward(layers, x, training=False):
    for layer in layers:
        x = layer.forward(x, training)
    return x


def backward(layers, dy):
    for layer in reversed(layers):
        dy = layer.backward(dy)
    return dy


def cross_entropy(scores, labels):
    """Mean of -log softmax(scores) at the right digit, and its gradient with respect to the scores."""
    shifted = scores - scores.max(axis=1, keepdims=True)  # softmax does not change, exp cannot overflow
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    loss = -log_p[rows, labels].mean()
    dscores = np.exp(log_p)
    dscores[rows, labels] -= 1
    return loss, dscores / np.float32(len(labels))


def descend(layers, lr):
    """One step of plain gradient descent."""
    for layer in layers:
        for name, param in layer.params.items():
            param -= np.float32(lr) * layer.grads[name]


# ---------------------------------------------------------------------------------------------------------------------
# Training, and what we watch meanwhile.


@dataclass
class History:
    """What was seen while one network learned."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # on the test images, one per entry of steps
    sigmoid_input: list[np.ndarray] = field(default_factory=list)  # PERCENTILES of one sigmoid's input, likewise
    epoch_accuracy: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0  # training alone, without the watching


def watch(layers, history, step, test):
    """Test accuracy, and the distribution of what enters the first sigmoid of the last hidden layer."""
    images, labels = test
    before_sigmoid = forward(layers[:-2], images)
    scores = forward(layers[-2:], before_sigmoid)
    history.steps.append(step)
    history.accuracy.append(float((scores.argmax(axis=1) == labels).mean()))
    history.sigmoid_input.append(np.percentile(before_sigmoid[:, 0], PERCENTILES))
    return history.accuracy[-1]


def train(norm, data, *, epochs, lr, seed, progress=lambda: None):
    """Train one network; `data` is (images, labels) for training, then (images, labels) for testing."""
    (images, labels), test = data
    rng = np.random.default_rng(seed)
    layers = build(norm, images.shape[1], rng)
    history = History()
    steps_per_epoch = len(images) // BATCH  # what is left over waits for the next shuffle
    every = max(1, epochs * steps_per_epoch // 200)  # 200 points make a smooth curve
    step = 0
    watch(layers, history, step, test)
    for epoch in range(1, epochs + 1):
        order = rng.permutation(len(images))
        for batch in order[: steps_per_epoch * BATCH].reshape(-1, BATCH):
            start = time.perf_counter()
            scores = forward(layers, images[batch], training=True)
            _, dscores = cross_entropy(scores, labels[batch])
            backward(layers, dscores)
            descend(layers, lr)
            history.seconds += time.perf_counter() - start
            step += 1
            if step % every == 0:
                watch(layers, history, step, test)
            progress()
        history.epoch_accuracy[epoch] = watch(layers, history, step, test)
    return layers, history


# ---------------------------------------------------------------------------------------------------------------------
# Data: float32 images of shape (count, pixels) with values from 0 to 1, and integer labels.


def load_digits(seed):
    """The digits of scikit-learn, shuffled; one in five is kept for testing."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    held_out = len(images) // 5
    return (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


def read_idx(path):
    """Read one IDX file, the format of the original MNIST: two zero bytes, a type code (8: unsigned bytes), the number
    of dimensions, each dimension as a big-endian 32-bit integer, and then the data. Gzip or not."""
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise ValueError(f"{path} ends inside its header")
    shape = tuple(np.frombuffer(raw[4:header], dtype=">u4").tolist())
    data = np.frombuffer(raw[header:], dtype=np.uint8)
    if data.size != math.prod(shape):
        raise ValueError(f"{path} announces {shape} but holds {data.size} bytes")
    return data.reshape(shape)


def load_mnist(folder):
    """The four files of the original MNIST, under their original names, each with or without .gz at the end."""

    def read(name):
        for candidate in (Path(folder) / name, Path(folder) / f"{name}.gz"):
            if candidate.exists():
                return read_idx(candidate)
        raise FileNotFoundError(f"neither {name} nor {name}.gz is in {folder}")

    def pair(prefix):
        images, labels = read(f"{prefix}-images-idx3-ubyte"), read(f"{prefix}-labels-idx1-ubyte")
        if len(images) != len(labels):
            raise ValueError(f"{prefix}: {len(images)} images but {len(labels)} labels")
        return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(int)

    return pair("train"), pair("t10k")


# ---------------------------------------------------------------------------------------------------------------------
# What comes out: a table and a picture.


def table(histories):
    """Test accuracy after 1, 5, 20 and all epochs, and the seconds spent on training."""
    last = max(next(iter(histories.values())).epoch_accuracy)
    epochs = sorted({epoch for epoch in (1, 5, 20) if epoch < last} | {last})
    lines = [f"{'norm':<6}" + "".join(f"{f'epoch {epoch}':>11}" for epoch in epochs) + f"{'seconds':>11}"]
    for norm, history in histories.items():
        accuracies = "".join(f"{100 * history.epoch_accuracy[epoch]:>9.1f} %" for epoch in epochs)
        lines.append(f"{norm:<6}{accuracies}{history.seconds:>11.1f}")
    return "\n".join(lines)


def draw(histories, path):
    """Accuracy of all networks, and what enters one sigmoid without and with batch norm (figure 1 of the paper)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # draws into a file, needs no screen
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, without, with_batch = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    with_batch.sharey(without)

    for norm, history in histories.items():
        curves.plot(history.steps, history.accuracy, label=norm)
    curves.set(title="test accuracy", xlabel="training steps", ylim=(0, 1))
    curves.legend(title="norm", loc="lower right")

    for axes, norm, title in ((without, "none", "without normalization"), (with_batch, "batch", "with batch norm")):
        history = histories[norm]
        for values, percentile in zip(np.transpose(history.sigmoid_input), PERCENTILES, strict=True):
            axes.plot(history.steps, values, color="C0" if norm == "none" else "C1", lw=2 if percentile == 50 else 1)
            axes.annotate(f"{percentile} %", (history.steps[-1], values[-1]), (3, -3), textcoords="offset points")
        axes.set(title=f"percentiles of one sigmoid's input,\n{title}", xlabel="training steps")
        axes.set_xlim(right=1.3 * history.steps[-1])  # room for the labels
    figure.savefig(path, dpi=110)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Train the digit network of the batch-norm paper with every norm.")
    parser.add_argument("--mnist", metavar="DIR", help="folder of the original IDX files; else scikit-learn's digits")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: 60; 20 with --mnist)")
    parser.add_argument("--lr", type=float, default=0.5, help="learning rate, the same for all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, mini-batches and split (default: %(default)s)")
    parser.add_argument("--out", default="digits.png", help="where the picture goes (default: %(default)s)")
    options = parser.parse_args(arguments)
    epochs = (20 if options.mnist else 60) if options.epochs is None else options.epochs
    if epochs < 1:
        parser.error("--epochs must be at least 1")

    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    data = load_mnist(options.mnist) if options.mnist else load_digits(options.seed)
    count = len(data[0][0])
    print(f"{count:,} images for training, {len(data[1][0]):,} for testing; {epochs} epochs at rate {options.lr:g}")
    histories = {}
    # One thread multiplies matrices this small as fast as two, which on a busy machine wait for each other: measured
    # 0.4 s on one thread and 14 s on two for the network without normalization.
    with (
        threadpool_limits(1, user_api="blas"),
        tqdm(total=len(NORMS) * epochs * (count // BATCH), unit="step") as bar,
    ):
        for norm in NORMS:
            bar.set_description(f"{norm:<5}")
            _, histories[norm] = train(norm, data, epochs=epochs, lr=options.lr, seed=options.seed, progress=bar.update)
    print(table(histories))
    draw(histories, options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
