"""What attention and its gradients are, in NumPy and float64: nothing in common with the kernels but the description.

Hidden keys are left out, not masked, so that what they hold (NaN too) reaches nothing here.
"""

import jax
import numpy as np

from kernels import Mask

NAMES = ("out", "lse", "d_q", "d_k", "d_v", "d_sinks")


def sees(mask: Mask, row: int, i: int, j: int) -> bool:
    """Whether query i sees key j of the same row, word by word as `Mask` says it."""

    def of_row(value):
        return value if np.ndim(value) == 0 else value[row]

    if mask.kv_length is not None and j >= of_row(mask.kv_length):
        return False
    if mask.q_segment_ids is not None:
        keys = mask.q_segment_ids if mask.kv_segment_ids is None else mask.kv_segment_ids
        if mask.q_segment_ids[row, i] == 0 or mask.q_segment_ids[row, i] != keys[row, j]:
            return False
    if not mask.causal:
        return True
    behind = of_row(mask.q_offset) + i - j
    if 0 <= behind and (mask.window is None or behind < mask.window):
        return True
    if mask.prefix_length is not None and j < of_row(mask.prefix_length):
        return True
    return mask.block_ids is not None and mask.block_ids[row, i] == mask.block_ids[row, j] != 0


def exact(qkv, mask: Mask, cotangents, scale=None, logit_softcap=None, sinks=None) -> dict[str, np.ndarray]:
    """Output, log-sum-exp and what `cotangents` (of both) give for q, k, v and sinks; equations of the softmax's
    gradient as in FlashAttention-2 (arXiv 2307.08691, section 2.2).
    """
    q, k, v, d_out, d_lse = (np.asarray(x).astype(np.float64) for x in (*qkv, *cotangents))
    mask = jax.tree.map(np.asarray, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads_per_key_head = q.shape[2] // k.shape[2]
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    d_q, d_k, d_v, d_sinks = (np.zeros(x.shape) for x in (q, k, v, np.arange(q.shape[2])))
    for b, i in np.ndindex(*q.shape[:2]):
        keys = [j for j in range(k.shape[1]) if sees(mask, b, i, j)]
        for n in range(q.shape[2]):
            head = b, keys, n // heads_per_key_head
            logits = scale * (k[head] @ q[b, i, n]) if keys else np.zeros(0)
            slope = np.full_like(logits, scale)
            if logit_softcap is not None:
                slope *= 1 - np.tanh(logits / logit_softcap) ** 2
                logits = logit_softcap * np.tanh(logits / logit_softcap)
            with_sink = logits if sinks is None else np.append(logits, sinks[n])
            if not with_sink.size:
                continue
            lse[b, i, n] = with_sink.max() + np.log(np.exp(with_sink - with_sink.max()).sum())
            weights, no_value = np.exp(logits - lse[b, i, n]), -d_lse[b, i, n]
            if keys:
                out[b, i, n] = weights @ v[head]
                delta = d_out[b, i, n] @ out[b, i, n] - d_lse[b, i, n]
                d_logits = weights * (v[head] @ d_out[b, i, n] - delta) * slope
                d_q[b, i, n] = d_logits @ k[head]
                np.add.at(d_k, head, np.outer(d_logits, q[b, i, n]))
                np.add.at(d_v, head, np.outer(weights, d_out[b, i, n]))
                no_value = delta
            if sinks is not None:
                d_sinks[n] -= np.exp(sinks[n] - lse[b, i, n]) * no_value
    values = (out, lse, d_q, d_k, d_v) + (() if sinks is None else (d_sinks,))
    return dict(zip(NAMES, values, strict=False))


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    """No value is off by more than `tolerance` times the largest of its array."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours = np.asarray(found[name]).astype(np.float64)
        np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(value), err_msg=name)
        ours, value = (np.where(np.isneginf(value), 0, x) for x in (ours, value))
        # A sum that cancels to (almost) nothing is measured against the size of what it sums.
        error, size = np.abs(ours - value).max(), max(np.abs(value).max(), 0.1)
        assert error <= tolerance * size, f"{name}: off by {error:.2e}, largest value {size:.2e}"
