"""Programs for chips that are not here stay out of the tests' cache of programs."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """JAX compiles here without its cache on disk: it could not read such programs again, nor would ptxas speak."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once in a process whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        reset_cache()
