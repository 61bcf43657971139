"""What a traced program makes, whether or not it is ever run."""

from collections.abc import Iterator

import jax
import jax.extend
import numpy as np


def precisions(jaxpr) -> Iterator[jax.lax.Precision]:
    """Of both operands of every matrix product, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from equation.params["precision"] or (jax.lax.Precision.DEFAULT,)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from precisions(inner)


def array_sizes(jaxpr) -> Iterator[int]:
    """How many numbers each array holds that a jaxpr computes, inner programs (loops, branches) included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(variable.aval.shape)) for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)
