"""Largest error of y in float32 by mean/std of the data: normkit beside torch (where it is installed).

    python bench/exactness.py

Rows of 1,024 normal values (64 of them; for the norms of images, 4x64 channels of 32x32), against the formula in
float64 on the same float32 values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import normkit as nk

RATIOS = (0.0, 1e2, 1e3, 1e4, 1e6)


def exact(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    x64 = x.astype(np.float64)
    d = x64 - x64.mean(axes, keepdims=True)
    return np.asarray(d / np.sqrt((d * d).mean(axes, keepdims=True) + 1e-5))


def main() -> None:
    rows: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Any], Any]]] = {
        "normkit layer_norm": ((64, 1024), (1,), lambda x: nk.layer_norm(x, 1024)),
        "normkit batch_norm NHWC": (
            (4, 32, 32, 64),
            (0, 1, 2),
            lambda x: nk.batch_norm(x, training=True, channel_axis=-1),
        ),
        "normkit instance_norm NHWC": ((4, 32, 32, 64), (1, 2), lambda x: nk.instance_norm(x, channel_axis=-1)),
    }
    try:
        import torch
        from torch.nn import functional
    except ImportError:
        print("torch is not installed: normkit alone")
    else:
        last = torch.channels_last

        def image(x: np.ndarray) -> Any:
            return torch.from_numpy(x).movedim(-1, 1).contiguous(memory_format=last)

        def back(y: Any) -> np.ndarray:
            return np.asarray(y.movedim(1, -1))

        rows |= {
            "torch layer_norm": (
                (64, 1024),
                (1,),
                lambda x: functional.layer_norm(torch.from_numpy(x), (1024,)).numpy(),
            ),
            "torch batch_norm NHWC": (
                (4, 32, 32, 64),
                (0, 1, 2),
                lambda x: back(functional.batch_norm(image(x), None, None, training=True)),
            ),
            # One group a channel: instance norm by the group norm code, which has a path for channels_last.
            "torch group_norm NHWC": ((4, 32, 32, 64), (1, 2), lambda x: back(functional.group_norm(image(x), 64))),
        }
    print("| max error of y, mean/std = | " + " | ".join(f"{r:.0e}" if r else "0" for r in RATIOS) + " |")
    print("|---" * (len(RATIOS) + 1) + "|")
    for name, (shape, axes, call) in rows.items():
        cells = []
        for ratio in RATIOS:
            x = (np.random.default_rng(0).standard_normal(shape) + ratio).astype(np.float32)
            cells.append(f"{np.abs(call(x) - exact(x, axes)).max():.1e}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
