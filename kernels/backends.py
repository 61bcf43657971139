"""Which implementation of a kernel runs: a table read from the top, and one line in the log that says which and why."""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

logger = logging.getLogger("kernels")


class Backend(NamedTuple):
    """One implementation of a kernel.

    platforms: where it runs ("cpu", "tpu", "gpu"); empty: anywhere, but it has to be asked for.
    run: takes the kernel's checked arguments.
    refusal: takes the same; why it can't do that, None where it can.
    untried: it has never run where it is for, and whether it ends there is not known: "auto" takes it only where the
        environment says `KERNELS_UNTRIED=1`.
    """

    platforms: tuple[str, ...]
    run: Callable
    refusal: Callable[..., str | None] = lambda *arguments, **options: None
    untried: bool = False


EVERYWHERE = ("cpu", "tpu", "gpu")
UNTRIED = "KERNELS_UNTRIED"


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
    platform, refused = target(), ""
    if asked != "auto":
        if asked not in table:
            raise ValueError(f"{kernel} has no backend {asked!r}; there are: auto, {', '.join(table)}")
        chosen = table[asked]
        if reason := _not_here(chosen, platform, table) or chosen.refusal(*arguments, **options):
            raise ValueError(f"{kernel}'s backend {asked!r} can't do this: {reason}")
        return chosen.run
    for name, backend in table.items():
        if platform not in backend.platforms:
            continue
        if reason := backend.refusal(*arguments, **options):
            refused += f", as {name} can't: {reason}"
        elif backend.untried and os.environ.get(UNTRIED) != "1":
            refused += f", as {name} has never run on one: {UNTRIED}=1 takes it"
        else:
            _say_once(f"{kernel} on {platform}: backend {name}{refused}")
            return backend.run
    raise ValueError(f"{kernel} has no backend for {platform}{refused}")


def _not_here(chosen: Backend, platform: str, table: Mapping[str, Backend]) -> str | None:
    """Why it can't run on this platform, None where it can."""
    if not chosen.platforms or platform in chosen.platforms or ("tpu" in chosen.platforms and _interpreted()):
        return None
    others = ", ".join(name for name, backend in table.items() if platform in backend.platforms)
    return (
        f"it is for {' or '.join(chosen.platforms)}, and this is compiled for {platform}; ask for auto or for one of: "
        f"{others}. To compile for devices that are not here, put a mesh of them in context (jax.set_mesh, or an "
        "abstract one with an abstract_device)"
    )


def _interpreted() -> bool:
    """Whether TPU kernels are interpreted here (`pltpu.force_tpu_interpret_mode`), as tests do on any platform."""
    from jax.experimental import pallas as pl

    # Only a traced call says in public which mode is on.
    call = pl.pallas_call(lambda out: None, out_shape=jax.ShapeDtypeStruct((8, 128), "float32"))
    return any(equation.params.get("interpret") for equation in jax.make_jaxpr(call)().eqns)


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)
