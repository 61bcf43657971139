"""What a traced program makes, whether or not it is ever run."""

from collections.abc import Iterator

import jax.extend
import numpy as np


def array_sizes(jaxpr) -> Iterator[int]:
    """How many numbers each array holds that a jaxpr computes, inner programs (loops, branches) included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(variable.aval.shape)) for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)
