"""Every case: a problem, the public ways to compute it, ours."""

from typing import NamedTuple

from benchmarks.tpu_static.attention import OurAttention, splash_settings
from benchmarks.tpu_static.decode import OurDecode
from benchmarks.tpu_static.experts import PRODUCTS, OurExperts, grouped_settings
from benchmarks.tpu_static.measure import Candidate
from benchmarks.tpu_static.shapes import ATTENTION, DECODE, EXPERTS


class Case(NamedTuple):
    """aim: what share of the best public one's time ours shall take at most; None: none was set."""

    name: str
    public: tuple[Candidate, ...]
    ours: Candidate
    aim: float | None


AIMS = {
    "qwen3-4k forward": 1.0,
    "qwen3-4k gradient": 1.0,
    "siglip-1024 forward": 0.9,
    "siglip-1024 gradient": 0.95,
    "packed-4k forward": 0.6,
    "experts-512 forward": 0.9,
}


def _case(name: str, public: tuple[Candidate, ...], ours: Candidate) -> Case:
    return Case(name, public, ours, AIMS.get(name))


CASES = (
    *(
        _case(
            f"{name} {'gradient' if backward else 'forward'}",
            splash_settings(shape, backward),
            OurAttention(shape, backward),
        )
        for name, shape in ATTENTION.items()
        for backward in (False, True)
    ),
    *(
        _case(f"{name} {product}", grouped_settings(shape, product), OurExperts(shape, product))
        for name, shape in EXPERTS.items()
        for product in PRODUCTS
    ),
    *(_case(name, (), OurDecode(shape)) for name, shape in DECODE.items()),
)
