"""Checkpoints: exact, on any mesh, whole or not at all."""

import errno
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from numpy.testing import assert_array_equal

from vishwamai import checkpoint
from vishwamai.checkpoint import CheckpointError, Checkpoints
from vishwamai.checkpoint.layers import stack, unstack, unstacked_shardings
from vishwamai.parallel.mesh import MeshConfig


def open_checkpoints(folder, trainer, keep=2):
    return Checkpoints(folder, trainer.abstract, trainer.shardings, keep)


def different(state, value):
    """The state with every float replaced, so that a restored one is not the initial one by chance."""
    return jax.tree.map(lambda x: x + value if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def assert_same(a, b):
    jax.tree.map(assert_array_equal, a, b)


def saved(folder, trainer, *steps):
    """A run with checkpoints at `steps`; the state of step n is the initial one plus n."""
    initial = trainer.initial()
    with open_checkpoints(folder, trainer, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, replace(different(initial, step), step=jnp.int32(step)))
    return initial


def test_one_array_per_layer(trainer_for):
    trainer = trainer_for(training={"trainable": ["layers.*"]})
    parameters = trainer.initial().parameters
    flat = unstack(parameters)
    stacked = parameters["layers"]["self_attn"]["q_proj"]["kernel"].get_value()
    assert stacked.shape == (3, 32, 32)
    assert_array_equal(flat["layers.1.self_attn.q_proj.kernel"], stacked[1])
    assert flat["embed_tokens.embedding"].shape == (64, 32)
    assert_same(stack(flat, parameters), parameters)


def test_a_layer_lies_on_the_mesh_as_its_stack_does(trainer_for):
    trainer = trainer_for(mesh={"fsdp": 4, "tensor": 2})
    shardings = unstacked_shardings(trainer.abstract.trainable, trainer.shardings.trainable)
    assert shardings["layers.1.mlp.down_proj.kernel"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings["embed_tokens.embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_restores_every_bit_onto_another_mesh(tmp_path, trainer_for):
    one = trainer_for(training={"trainable": ["layers.*"]})
    initial = saved(tmp_path, one, 3)
    for mesh in (MeshConfig(), MeshConfig(fsdp=4, tensor=2)):
        other = trainer_for(mesh=mesh, training={"trainable": ["layers.*"]})
        with open_checkpoints(tmp_path, other) as checkpoints:
            restored = checkpoints.restore()
        assert_same(restored, replace(different(initial, 3), step=jnp.int32(3)))
        kernel = restored.trainable["layers"]["mlp"]["up_proj"]["kernel"].get_value()
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert len(kernel.sharding.device_set) == mesh.fsdp * mesh.tensor


def test_saving_survives_donation(tmp_path, trainer_for):
    """The state is overwritten in place while it is still being written."""
    trainer = trainer_for(model={"vocab_size": 60_000})
    state = trainer.initial()
    expected = jax.tree.map(np.array, state.parameters)
    clear = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)
    with open_checkpoints(tmp_path, trainer) as checkpoints:
        checkpoints.save(1, state)
        clear(state)
    with open_checkpoints(tmp_path, trainer) as checkpoints:
        assert_same(checkpoints.restore().parameters, expected)


def test_keeps_the_newest_and_explains_itself(tmp_path, trainer_for):
    trainer = trainer_for()
    state = trainer.initial()
    with open_checkpoints(tmp_path, trainer, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state)
    assert checkpoint.steps(tmp_path) == [2, 3]
    about = json.loads((tmp_path / "checkpoints/3/about/metadata").read_text())
    assert about == {"format_version": 1, "step": 3, "data": {"next_batch": 3}}


def test_no_checkpoint_is_no_state(tmp_path, trainer_for):
    with open_checkpoints(tmp_path, trainer_for()) as checkpoints:
        assert checkpoints.restore() is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.latest_step(tmp_path)


def test_an_unfinished_save_is_ignored_with_a_message(tmp_path, trainer_for, caplog):
    trainer = trainer_for()
    saved(tmp_path, trainer, 2)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "2", folder / "4.orbax-checkpoint-tmp")
    (folder / "4.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    with open_checkpoints(tmp_path, trainer) as checkpoints:
        assert int(checkpoints.restore().step) == 2
    assert "4.orbax-checkpoint-tmp was never finished" in caplog.text


def test_a_copy_that_was_cut_off_is_set_aside(tmp_path, trainer_for, caplog):
    """Orbax counts a folder without its mark as a step, and would skip every save up to it."""
    trainer = trainer_for()
    initial = saved(tmp_path, trainer, 2, 4)
    folder = tmp_path / "checkpoints"
    (folder / "4" / "_CHECKPOINT_METADATA").unlink()
    with open_checkpoints(tmp_path, trainer) as checkpoints:
        restored = checkpoints.restore()
        assert_same(restored.parameters, different(initial, 2).parameters)
        checkpoints.save(3, restored)
        checkpoints.save(4, restored)
    assert "checkpoint 4 cannot be read" in caplog.text and (folder / "4.damaged").is_dir()
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_save_that_would_be_skipped_is_an_error(tmp_path, trainer_for):
    trainer = trainer_for()
    state = saved(tmp_path, trainer, 2, 4)
    with open_checkpoints(tmp_path, trainer) as checkpoints, pytest.raises(CheckpointError, match="step 3 does not"):
        checkpoints.save(3, state)
    with pytest.raises(CheckpointError, match="step 0 does not come after"):
        checkpoint.save_parameters(tmp_path, state.parameters)


@pytest.mark.parametrize("damage", ["arrays", "metadata", "about"])
def test_a_damaged_checkpoint_is_set_aside(tmp_path, trainer_for, caplog, damage):
    trainer = trainer_for()
    initial = saved(tmp_path, trainer, 2, 4)
    folder = tmp_path / "checkpoints"
    if damage == "arrays":
        for path in (folder / "4").glob("parameters/**/d/*"):
            path.write_bytes(path.read_bytes()[:100])
    elif damage == "metadata":
        (folder / "4" / "parameters" / "_METADATA").write_text('{"tree_metadata": {')
    else:
        shutil.rmtree(folder / "4" / "about")
    with open_checkpoints(tmp_path, trainer) as checkpoints:
        restored = checkpoints.restore()
        assert_same(restored.parameters, different(initial, 2).parameters)
        assert "checkpoint 4 cannot be read" in caplog.text
        checkpoints.save(4, restored)  # the step can be saved again
    assert checkpoint.steps(tmp_path) == [2, 4]
    assert (folder / "4.damaged").is_dir()


def test_nothing_readable_left_is_an_error(tmp_path, trainer_for):
    trainer = trainer_for()
    saved(tmp_path, trainer, 2)
    (tmp_path / "checkpoints/2/about/metadata").write_text("")
    with open_checkpoints(tmp_path, trainer) as checkpoints, pytest.raises(CheckpointError, match="start over"):
        checkpoints.restore()


def test_another_model_is_told_by_names_and_shapes(tmp_path, trainer_for):
    saved(tmp_path, trainer_for(), 1)
    other = trainer_for(model={"intermediate_size": 96, "num_hidden_layers": 4, "tie_word_embeddings": False})
    with open_checkpoints(tmp_path, other) as checkpoints, pytest.raises(CheckpointError) as error:
        checkpoints.restore()
    assert "another model" in str(error.value)
    assert "layers.3.input_layernorm.scale (32,) is not in the checkpoint" in str(error.value)
    assert "more" in str(error.value)
    with pytest.raises(CheckpointError, match=r"down_proj.kernel has shape \(64, 32\), the model's is \(96, 32\)"):
        wide = trainer_for(model={"intermediate_size": 96}).abstract.parameters
        checkpoint.load_parameters(tmp_path, 1, wide)


def test_another_format_is_an_error_and_nothing_is_set_aside(tmp_path, trainer_for):
    trainer = trainer_for()
    saved(tmp_path, trainer, 1)
    about = tmp_path / "checkpoints/1/about/metadata"
    about.write_text(about.read_text().replace('"format_version": 1', '"format_version": 99'))
    with open_checkpoints(tmp_path, trainer) as checkpoints, pytest.raises(CheckpointError, match="format version 99"):
        checkpoints.restore()
    assert checkpoint.steps(tmp_path) == [1]


def test_weights_alone(tmp_path, trainer_for):
    trainer = trainer_for()
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trainer.initial().parameters)
    checkpoint.save_parameters(tmp_path, parameters)
    loaded = checkpoint.load_parameters(tmp_path, checkpoint.latest_step(tmp_path), trainer.abstract.parameters)
    assert_same(loaded, parameters)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    with open_checkpoints(tmp_path, trainer) as checkpoints, pytest.raises(CheckpointError, match="init_from"):
        checkpoints.restore()
    with pytest.raises(CheckpointError, match=r"no checkpoint 7; complete are: \[0\]"):
        checkpoint.load_parameters(tmp_path, 7, trainer.abstract.parameters)


def test_a_failing_disk_leaves_the_checkpoint_before_it(tmp_path, trainer_for, monkeypatch):
    trainer = trainer_for()
    saved(tmp_path, trainer, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_checkpoints(tmp_path, trainer) as checkpoints:
        state = trainer.initial()
        monkeypatch.setattr("vishwamai.checkpoint.store.save", full)
        with pytest.raises(CheckpointError, match="(?s)checkpoint 2 .*no space left.*checkpoint 1 is complete"):
            checkpoints.save(2, state)
        monkeypatch.undo()
        checkpoints.save(3, state)
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_a_full_disk_leaves_the_checkpoint_before_it(trainer_for, small_disk):
    trainer = trainer_for(model={"hidden_size": 128})
    state = trainer.initial()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert 1.1e6 < size < 2e6
    with pytest.raises(CheckpointError, match="(?s)checkpoint 2 .*no space left.*checkpoint 1 is complete"):
        with open_checkpoints(small_disk, trainer) as checkpoints:
            state = different(state, jax.random.normal(jax.random.key(0)))
            checkpoints.save(1, state)
            checkpoints.wait()
            filler = small_disk / "filler"
            filler.write_bytes(bytes(int(shutil.disk_usage(small_disk).free - size / 3)))
            checkpoints.save(2, state)
    assert checkpoint.steps(small_disk) == [1]
    assert shutil.disk_usage(small_disk).free > size / 5  # what was half written is gone
    filler.unlink()
    with open_checkpoints(small_disk, trainer) as checkpoints:
        assert_same(checkpoints.restore().parameters, state.parameters)


def test_a_stack_needs_a_name_that_says_so():
    state = nnx.State({"blocks": nnx.Param(jnp.zeros((2, 3)), axes=("norm",))})
    with pytest.raises(ValueError, match="no part of its name ends with 'layers'"):
        unstack(state)
