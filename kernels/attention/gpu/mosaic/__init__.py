"""Flash attention for Hopper GPUs in Pallas Mosaic, for the masks that cuDNN lacks. Pallas is imported late.

It has never run on a GPU: this project has had none. Two proofs stand for it. It is compiled for an H100 down to
machine code, where ptxas tells what each kernel spills. And in Pallas' GPU interpreter, with plain products in place of
the tensor cores', its numbers agree with float64, forward and backward, no thread waits for ever, and no race is found.

Two ids of segments and blocks are its own, the lowest two that int32 holds: who has them sees too little or too much.
"""

import jax.numpy as jnp

from kernels import hopper, varying
from kernels.attention.mask import Mask
from kernels.backends import left_to_xla

MAX_HEAD_DIM = 256


def refusal(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks) -> str | None:
    """Why the kernel can't do this; None where it can."""
    if left_to_xla():
        return "XLA can't split a kernel over a mesh: give attention a spec"
    if reason := varying.refusal((q, k, v, mask, sinks)):
        return reason
    if q.dtype != jnp.bfloat16:
        return f"its tensor cores take bfloat16, not {q.dtype}"
    width, v_width = q.shape[-1], v.shape[-1]
    if width > MAX_HEAD_DIM or v_width > width:
        return f"head dims must be at most {MAX_HEAD_DIM}, that of v no larger than q's, not {width} and {v_width}"
    if not scale > 0:
        return f"the scale must be positive, found {scale}"
    return hopper.refusal()


def attention(q, k, v, mask: Mask, scale: float, logit_softcap: float | None, sinks):
    """As `reference.attention`, for what `refusal` lets pass; memory grows with T + S."""
    from kernels.attention.gpu.mosaic import flash

    return flash.attention(q, k, v, mask, scale, logit_softcap, sinks)
