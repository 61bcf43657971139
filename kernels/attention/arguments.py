"""What `attention` and `decode_attention` ask of their arguments alike."""

from kernels.attention.mask import Mask
from kernels.attention.mask import check as check_mask

DTYPES = ("bfloat16", "float32", "float64")


def check(q, k, v, mask: Mask, logit_softcap: float | None, sinks, *, heads_first: bool = False) -> None:
    """Raises ValueError where shapes or values do not fit, TypeError for what is no mask or holds no integers.

    heads_first: k and v are `B K S H` and `B K S V`, else `B S K H` and `B S K V`.
    """
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a kernels.Mask, found {type(mask).__name__}: T x S booleans are not taken, say what "
            "they hide as Mask(causal=..., q_segment_ids=..., ...)"
        )
    layout = "B K S {}" if heads_first else "B S K {}"
    slots, heads = (2, 1) if heads_first else (1, 2)
    found = f"found q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must be B T N H, {layout.format('H')} and {layout.format('V')}, {found}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"q, k and v must not be empty, {found}")
    batch, num_queries, num_heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q, k and v must share B, k and v also S and K, q and k also H (k is {layout.format('H')}), {found}"
        )
    if num_heads % k.shape[heads]:
        raise ValueError(f"the query heads must be a multiple of the key heads (k is {layout.format('H')}), {found}")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap must be positive, found {logit_softcap}")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must have shape ({num_heads},), one logit per query head, found {sinks.shape}")
    check_mask(mask, batch, num_queries, k.shape[slots])
