"""Which keys a query sees: a small value that says it, and the boolean array it stands for.

Positions: query i stands at `q_offset + i`, key j at j. Key j is visible to query i when all of these hold:
  * it is there: j < kv_length, and its segment is the query's, not 0 (segment 0 is padding and sees nothing);
  * the order allows it: not `causal`, or 0 <= i - j (< window), or j < prefix_length, or both lie in the same
    non-zero block of `block_ids`.
"""

import operator
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Index = Any  # a Python int where known at trace time, else an int array
ENDLESS = 2**30  # no text is longer, and int32 holds a position plus this


@dataclass(frozen=True, eq=False)
class Mask:
    """A description of visibility; `None` or the default in every field is full attention.

    A pytree: arrays and NumPy's numbers are leaves; `causal`, `window` and every Python int are static, so that kernels
    can skip what they rule out. Passing an offset that changes from call to call? Make it an array, or each value
    compiles anew.

    Args:
        causal: keys behind the query's position are hidden.
        window: with `causal`, the number of latest keys that stay visible, the query's own included. From 2^30 on it
            hides nothing and is None.
        prefix_length: int or int `B`; keys before it are visible to every query, whatever `causal` says.
        q_segment_ids: int `B T`; a query sees the keys of its own segment. 0 is padding: such a query sees nothing,
            such a key is never seen, and what it holds (NaN too) reaches nothing.
        kv_segment_ids: int `B S`; left out, it is `q_segment_ids` (then T must equal S).
        kv_length: int or int `B`; keys from there on are absent.
        q_offset: int or int `B`, within ±2^30; the position of query 0 (the number of keys cached before it).
        block_ids: int `B T` with T = S and no `q_offset`; a query also sees the keys of its own non-zero block
            (images that look both ways), never across segments.

    Raises:
        ValueError: window without causal or below 1; kv_segment_ids without q_segment_ids.
        TypeError: causal or window that are no bool and int, or not known when tracing.
    """

    causal: bool = False
    window: int | None = None
    prefix_length: Index | None = None
    q_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    kv_length: Index | None = None
    q_offset: Index = 0
    block_ids: jax.Array | None = None

    def __post_init__(self):
        if not isinstance(self.causal, bool | np.bool_):
            raise TypeError(f"Mask.causal must be True or False, found {self.causal!r}")
        try:
            window = None if self.window is None else operator.index(self.window)
        except TypeError as error:
            raise TypeError(f"Mask.window must be an int that is known when tracing, found {self.window!r}") from error
        if window is not None and not self.causal:
            raise ValueError(f"window={window} needs causal=True: a window counts back from the query")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 (the query's own key), found {window}")
        if self.kv_segment_ids is not None and self.q_segment_ids is None:
            raise ValueError("kv_segment_ids came without q_segment_ids: give both, or q_segment_ids alone when T = S")
        values = {"causal": bool(self.causal), "window": None if window is None or window >= ENDLESS else window}
        values |= {name: _bounded(getattr(self, name)) for name in ("prefix_length", "kv_length")}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def key_segments(self) -> jax.Array | None:
        return self.q_segment_ids if self.kv_segment_ids is None else self.kv_segment_ids


def _bounded(length: Index | None) -> Index | None:
    return min(length, ENDLESS) if isinstance(length, int) else length


def _flatten(mask: Mask):
    values = {field.name: getattr(mask, field.name) for field in fields(mask)}
    static = {name: value for name, value in values.items() if isinstance(value, bool | int | None)}
    arrays = {name: value for name, value in values.items() if name not in static}
    return tuple(arrays.values()), (tuple(arrays), tuple(static.items()))


def _unflatten(layout, leaves) -> Mask:
    names, static = layout
    mask = object.__new__(Mask)  # leaves may be anything while JAX handles the tree: no checks here
    for name, value in (*zip(names, leaves, strict=True), *static):
        object.__setattr__(mask, name, value)
    return mask


jax.tree_util.register_pytree_node(Mask, _flatten, _unflatten)


def check(mask: Mask, batch: int, num_queries: int, num_keys: int) -> None:
    """Raises ValueError where a field does not fit `B`, `T`, `S`, or a number int32; TypeError for non-integers."""
    shapes = {
        "q_segment_ids": (batch, num_queries),
        "kv_segment_ids": (batch, num_keys),
        "block_ids": (batch, num_queries),
    }
    for field in ("prefix_length", "kv_length", "q_offset", *shapes):
        value = getattr(mask, field)
        if value is None:
            continue
        if isinstance(value, list | tuple):
            raise TypeError(f"Mask.{field} must be an int or an array, found {value}")
        if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"Mask.{field} must hold integers, found {jnp.result_type(value)}")
        if isinstance(value, int | np.ndarray | np.integer) and not _fits_int32(value):
            raise ValueError(f"Mask.{field} must hold numbers that fit int32, found {np.min(value)} to {np.max(value)}")
        allowed = [shapes[field]] if field in shapes else [(), (batch,)]
        if np.shape(value) not in allowed:
            raise ValueError(f"Mask.{field} must have shape {' or '.join(map(str, allowed))}, found {np.shape(value)}")
    offset = mask.q_offset
    if isinstance(offset, int | np.ndarray | np.integer) and np.max(np.abs(np.asarray(offset, np.int64))) > ENDLESS:
        raise ValueError(
            f"Mask.q_offset must lie within -2^30 and 2^30, as positions are counted in int32, found {np.min(offset)} "
            f"to {np.max(offset)}"
        )
    if mask.q_segment_ids is not None and mask.kv_segment_ids is None and num_queries != num_keys:
        raise ValueError(f"{num_queries} queries against {num_keys} keys: segments need kv_segment_ids too")
    if mask.block_ids is not None and (num_queries != num_keys or not isinstance(mask.q_offset, int) or mask.q_offset):
        raise ValueError(
            f"block_ids needs as many keys as queries and q_offset=0, found {num_queries} queries, {num_keys} keys, "
            f"q_offset={mask.q_offset}"
        )


def _fits_int32(value: int | np.ndarray) -> bool:
    """Known numbers only; those of no more than 32 bits are not looked at."""
    value, limits = np.asarray(value), np.iinfo(np.int32)
    if value.dtype.itemsize <= 4 or not value.size:
        return True
    return limits.min <= value.min() and value.max() <= limits.max


def in_int32(mask: Mask) -> Mask:
    """Its arrays as every backend counts with them: lengths of 8 bits would wrap, and so would what hides padding."""
    return jax.tree.map(lambda x: x.astype(np.int32), mask)


def _per_row(value: Index) -> Index:
    """An int, or an int array `B` (or scalar), to broadcast against `B R C`."""
    return value if isinstance(value, int) else jnp.reshape(value, (-1, 1, 1))


def _piece(ids: jax.Array, start: Index, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(jnp.asarray(ids), start, size, axis=1)


def visible(mask: Mask, q_start: Index, num_queries: int, kv_start: Index, num_keys: int) -> jax.Array | None:
    """Bool `B R C` (or `1 R C`) for queries q_start + [0, R) and keys kv_start + [0, C); None where all is visible."""
    query = (q_start + lax.iota(jnp.int32, num_queries))[None, :, None]
    key = (kv_start + lax.iota(jnp.int32, num_keys))[None, None, :]
    allowed = None
    if mask.causal:
        distance = query + _per_row(mask.q_offset) - key
        allowed = distance >= 0
        if mask.window is not None:
            allowed &= distance < mask.window
        if mask.prefix_length is not None:
            allowed |= key < _per_row(mask.prefix_length)
        if mask.block_ids is not None:
            block = _piece(mask.block_ids, q_start, num_queries)[:, :, None]
            allowed |= (block == _piece(mask.block_ids, kv_start, num_keys)[:, None, :]) & (block != 0)
    if mask.q_segment_ids is not None:
        segment = _piece(mask.q_segment_ids, q_start, num_queries)[:, :, None]
        same = (segment == _piece(mask.key_segments, kv_start, num_keys)[:, None, :]) & (segment != 0)
        allowed = same if allowed is None else allowed & same
    if mask.kv_length is not None:
        there = key < _per_row(mask.kv_length)
        allowed = there if allowed is None else allowed & there
    return allowed


def key_range(mask: Mask, q_start: int, q_stop: int, num_keys: int) -> tuple[int, int]:
    """Static [low, high), never empty: the keys outside are hidden from every query in [q_start, q_stop)."""
    low, high = 0, num_keys
    if isinstance(mask.kv_length, int):
        high = min(high, mask.kv_length)
    ordered = mask.causal and mask.block_ids is None and isinstance(mask.q_offset, int)
    if ordered and isinstance(mask.prefix_length, int | None):
        high = min(high, max(mask.q_offset + q_stop, mask.prefix_length or 0))
        if mask.window is not None and not mask.prefix_length:
            low = mask.q_offset + q_start - mask.window + 1
    high = max(high, 1)
    return min(max(low, 0), high - 1), high


def all_see_themselves(mask: Mask, num_queries: int, num_keys: int) -> bool:
    """Whether it is known when tracing that every query sees a key: that of its own position."""
    known = mask.q_segment_ids is None and mask.kv_length is None and isinstance(mask.q_offset, int)
    return known and 0 <= mask.q_offset <= num_keys - num_queries


def clear_padding(mask: Mask, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v with zeros in padding rows and behind kv_length: 0 · NaN must not reach a live row, nor its gradient."""
    live_queries, live_keys = None, None
    if mask.q_segment_ids is not None:
        live_queries, live_keys = jnp.asarray(mask.q_segment_ids) != 0, jnp.asarray(mask.key_segments) != 0
    if mask.kv_length is not None:
        there = lax.iota(jnp.int32, k.shape[1])[None] < jnp.reshape(mask.kv_length, (-1, 1))
        live_keys = there if live_keys is None else live_keys & there

    def clear(x, live):
        return x if live is None else jnp.where(live[:, :, None, None], x, 0)

    return clear(q, live_queries), clear(k, live_keys), clear(v, live_keys)
