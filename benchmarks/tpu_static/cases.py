"""Every case: a problem, the public ways to compute it, ours."""

from typing import NamedTuple

from benchmarks.tpu_static.measure import Candidate
from benchmarks.tpu_static.ours import OurAttention, OurExperts
from benchmarks.tpu_static.public import grouped_settings, splash_settings
from benchmarks.tpu_static.shapes import ATTENTION, EXPERTS


class Case(NamedTuple):
    name: str
    public: tuple[Candidate, ...]
    ours: Candidate


CASES = (
    *(
        Case(f"{name} {'gradient' if backward else 'forward'}", splash_settings(shape, backward), ours)
        for name, shape in ATTENTION.items()
        for backward in (False, True)
        for ours in [OurAttention(shape, backward)]
    ),
    *(Case(name, grouped_settings(shape), OurExperts(shape)) for name, shape in EXPERTS.items()),
)
