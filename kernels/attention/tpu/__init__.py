"""Flash attention for TPUs in Pallas Mosaic, forward and backward. Pallas is imported when it is called."""

from kernels import varying
from kernels.attention.mask import Mask
from kernels.backends import left_to_xla


def refusal(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks) -> str | None:
    """Why the kernel can't do this; None where it can."""
    if left_to_xla():
        return "XLA can't split a kernel over a mesh: give attention a spec"
    if reason := varying.refusal((q, k, v, mask, sinks)):
        return reason
    if q.dtype == "float64":
        return "the TPU has no float64"
    if q.shape[-1] % 8 or v.shape[-1] % 8:
        return f"head dims must be multiples of 8, found {q.shape[-1]} and {v.shape[-1]}"
    if not scale > 0:
        return f"the scale must be positive, found {scale}"
    from kernels.attention.tpu import blocks, tuning

    sizes = tuning.backward(q, k, v, mask), tuning.forward(q, k, v, mask)
    extents = [blocks.Extent(q.shape[1], k.shape[1], *size[:2]) for size in sizes]
    reasons = (blocks.refusal(mask, q.shape[0], extent) for extent in extents)
    return next((reason for reason in reasons if reason), None)


def attention(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks, max_logit=None):
    """As `reference.attention`, for what `refusal` lets pass; memory grows with T + S.

    max_logit: float or float32 scalar that no |logit| exceeds, after scale and soft cap; see `kernels.attention`.
    """
    from kernels.attention.tpu import flash

    return flash.attention(q, k, v, mask, scale, logit_softcap, sinks, max_logit)
