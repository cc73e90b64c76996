"""A quantized model whose parameters fully_shard has sharded, here over one process; over two: test_training_loops."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from qswin.calib.data.images import Preprocessing
from qswin.qat.checkpoint import Description, load_checkpoint, save_checkpoint
from qswin.qat.quant.quantizers import quantizers
from qswin.qat.quant.recipe import named_recipe
from tests.helpers import SMALL, V1, V2, small_swin, twin_of

SLOW_CASES = ((V1, False), (V2, False), (V2, True))
SETTINGS = {**SMALL, "drop_path_rate": 0.0}


@pytest.fixture
def group(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def description(name: str) -> Description:
    arguments = {"name": name, "num_classes": 5, **SETTINGS}
    return Description(arguments, "qat", Preprocessing(size=(32, 32)), recipe=named_recipe("full"))


def shard(model: torch.nn.Module, **options) -> torch.nn.Module:
    for stage in model.layers:
        for block in stage.blocks:
            fully_shard(block, **options)
    return fully_shard(model, **options)


def train(model: torch.nn.Module, images: torch.Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), torch.arange(len(images))).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "learned"), [(V1, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_it_trains_as_the_whole_model_does_and_is_saved_whole(group, images, tmp_path, name, learned):
    models = [twin_of(images, "full", name=name, **SETTINGS) for _ in range(2)]
    if learned:
        for quantizer in (quantizer for model in models for quantizer in quantizers(model)):
            quantizer.learn_range()
    whole, sharded = models[0], shard(models[1])
    for model, file in ((whole, "whole"), (sharded, "sharded")):
        train(model, images)
        save_checkpoint(tmp_path / f"{file}.safetensors", model, description(name))
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    expected, found = (load_checkpoint(tmp_path / f"{file}.safetensors")[0] for file in ("whole", "sharded"))
    for (key, one), other in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=key)
    with torch.no_grad():
        torch.testing.assert_close(found(images), whole.eval()(images), rtol=1e-4, atol=1e-5)


def test_a_learned_range_that_is_sharded_is_not_frozen_but_saved(group, images):
    model = twin_of(images, "gemm", **SETTINGS)
    quantizer = next(quantizers(model))
    quantizer.learn_range()
    shard(model)
    with pytest.raises(ValueError, match="patch_embed: its learned range is sharded; save_checkpoint saves it"):
        quantizer.freeze_range()


def test_it_trains_under_autocast(group, images):
    model = shard(twin_of(images, "full", **SETTINGS))
    with torch.autocast("cpu", torch.bfloat16):
        train(model, images, steps=1)
    assert all(bool(parameter.grad.full_tensor().isfinite().all()) for parameter in model.parameters())


@pytest.mark.slow
def test_fsdps_own_bfloat16_does_not_suit_timms_swin(group, images):
    """Not the float model either: shift masks are buffers, which stay float32. The page says to use autocast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"):
        train(shard(small_swin(**SETTINGS), mp_policy=policy), images, steps=1)
