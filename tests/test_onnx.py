"""The node tests of ONNX for the five operators, to 1e-5 (their reference computes in float32)."""

import warnings
from collections import Counter

import numpy as np
import pytest

import normkit as nk

onnx = pytest.importorskip("onnx", reason="onnx, which brings the node tests, is not installed")

TOLERANCE = 1e-5
# How many node tests of each operator onnx 1.23 has, without those that spell an operator out in smaller ones.
IN_1_23 = {
    "BatchNormalization": 4,
    "InstanceNormalization": 2,
    "GroupNormalization": 2,
    "LayerNormalization": 19,
    "RMSNormalization": 19,
}


def collect():
    """The node tests whose model is one node of the five operators."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other operators' tests overflow on purpose
        cases = collect_testcases(None)
    return {case.name: case for case in cases if case.model.graph.node[0].op_type in IN_1_23}


CASES = collect()


def operator(case):
    (node,) = case.model.graph.node
    return node.op_type


def test_none_is_lost():
    """All of 1.23's; a later onnx may have more, an earlier one may lack the younger operators."""
    counts = Counter(map(operator, CASES.values()))
    version = tuple(int(part) for part in onnx.__version__.split(".")[:2])
    if version == (1, 23):
        assert sum(IN_1_23.values()) == 46
        assert counts == IN_1_23
    for name, least in IN_1_23.items():
        if version > (1, 23):
            assert counts[name] >= least
        else:
            assert (counts[name] > 0) == onnx.defs.has(name)


# Each takes the node's attributes by their ONNX names, with ONNX's defaults; an attribute it does not know is an error.


def batch(x, scale, bias, mean, var, epsilon=1e-5, momentum=0.9, training_mode=0):
    """Outputs y; in training also the new running statistics, where ONNX weights the old ones by its momentum and
    stores the biased variance, normkit weights the new ones and stores the unbiased."""
    if not training_mode:
        return [nk.batch_norm(x, mean, var, scale, bias, training=False, eps=epsilon)]
    mean, new = mean.copy(), np.zeros_like(var)
    more = {"weight": scale, "bias": bias, "training": True, "eps": epsilon}
    y = nk.batch_norm(x, mean, var.copy(), momentum=1 - momentum, **more)
    nk.batch_norm(x, np.zeros_like(mean), new, momentum=1.0, **more)
    n = x.size // x.shape[1]
    return [y, mean, momentum * var + (1 - momentum) * new * ((n - 1) / n)]


def instance(x, scale, bias, epsilon=1e-5):
    return [nk.instance_norm(x, weight=scale, bias=bias, eps=epsilon)]


def group(x, scale, bias, num_groups, epsilon=1e-5, stash_type=1):
    """Opset 21: scale and bias per channel (in opset 18 they were per group)."""
    assert stash_type == 1
    return [nk.group_norm(x, num_groups, scale, bias, epsilon)]


def layer(x, scale, bias=None, axis=-1, epsilon=1e-5, stash_type=1):
    assert stash_type == 1
    axis %= x.ndim
    y, mean, rstd = nk.layer_norm_forward(x, x.shape[axis:], scale, bias, epsilon)
    kept = x.shape[:axis] + (1,) * (x.ndim - axis)
    return [y, mean.reshape(kept), rstd.reshape(kept)]


def rms(x, scale, axis=-1, epsilon=1e-5, stash_type=1):
    assert stash_type == 1
    return [nk.rms_norm(x, x.shape[axis % x.ndim :], scale, epsilon)]


OPERATORS = {
    "BatchNormalization": batch,
    "InstanceNormalization": instance,
    "GroupNormalization": group,
    "LayerNormalization": layer,
    "RMSNormalization": rms,
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_node(name):
    case = CASES[name]
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert case.data_sets
    for inputs, outputs in case.data_sets:
        results = OPERATORS[node.op_type](*inputs, **attributes)
        assert len(outputs) <= len(results)
        for result, output in zip(results, outputs):
            assert result.shape == output.shape
            np.testing.assert_allclose(result.astype(output.dtype), output, rtol=TOLERANCE, atol=TOLERANCE)
