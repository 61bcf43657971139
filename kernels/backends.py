"""Which implementation of a kernel runs: a table read from the top, and one line in the log that says which and why."""

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

logger = logging.getLogger("kernels")


class Backend(NamedTuple):
    """One implementation of a kernel.

    platforms: where "auto" may take it ("cpu", "tpu", "gpu"); empty: never, it has to be asked for.
    run: takes the kernel's checked arguments.
    refusal: takes the same; why it can't do that, None where it can.
    """

    platforms: tuple[str, ...]
    run: Callable
    refusal: Callable[..., str | None] = lambda *arguments, **options: None


EVERYWHERE = ("cpu", "tpu", "gpu")


def target() -> str:
    """The platform that is compiled for: the mesh's, where one is set (it may be one that is not here)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def left_to_xla() -> bool:
    """Whether XLA will split what is traced over a mesh: not in a shard_map. It can't split a Pallas kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not mesh.are_all_axes_manual


def lazily(module: str, name: str) -> Callable:
    """A function of a module that is imported when it is first called: Pallas takes a second."""
    return lambda *arguments, **options: getattr(importlib.import_module(module), name)(*arguments, **options)


def choose(kernel: str, table: Mapping[str, Backend], asked: str, *arguments, **options) -> Callable:
    """The `run` of the backend that was asked for; of "auto", of the first that is for this platform and can.

    Raises ValueError: an unknown name, or what was asked for can't do it (with its reason).
    """
    if asked != "auto":
        if asked not in table:
            raise ValueError(f"{kernel} has no backend {asked!r}; there are: auto, {', '.join(table)}")
        if reason := table[asked].refusal(*arguments, **options):
            raise ValueError(f"{kernel}'s backend {asked!r} can't do this: {reason}")
        return table[asked].run
    platform, refused = target(), ""
    for name, backend in table.items():
        if platform not in backend.platforms:
            continue
        reason = backend.refusal(*arguments, **options)
        if reason is None:
            _say_once(f"{kernel} on {platform}: backend {name}{refused}")
            return backend.run
        refused += f", as {name} can't: {reason}"
    raise ValueError(f"{kernel} has no backend for {platform}{refused}")


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
