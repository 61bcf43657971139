"""What products of groups and their gradients are, in NumPy and float64."""

import numpy as np


def exact(x, w, sizes, dy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, dx and dw; rows beyond the last group are 0."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def exact_gated(x, gate, up, sizes, dy) -> tuple[np.ndarray, ...]:
    """Of silu(x @ gate) * (x @ up): y, dx, dgate and dup."""
    gated, raised = (exact(x, w, sizes, dy)[0] for w in (gate, up))
    sigmoid = 1 / (1 + np.exp(-gated))
    silu, slope = gated * sigmoid, sigmoid * (1 + gated * (1 - sigmoid))
    dy = np.asarray(dy, np.float64)
    _, dx_gate, dgate = exact(x, gate, sizes, dy * raised * slope)
    _, dx_up, dup = exact(x, up, sizes, dy * silu)
    return silu * raised, dx_gate + dx_up, dgate, dup
