"""What is read of a file of weights, and what is refused."""

import collections
import io
import zipfile

import pytest
import safetensors.torch
import torch

from qswin.models.checkpoints.state_dicts import check_state, read_state

WEIGHT = torch.ones(2, 3)


def nested(depth: int) -> dict:
    state = {"a": WEIGHT}
    for _ in range(depth):
        state = {"model": state}
    return state


def itself() -> dict:
    state: dict = {}
    state["model"] = state
    return state


def compressed() -> bytes:
    stored, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(10000)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    return packed.getvalue()


ODD = {
    "complex": (lambda: {"a": WEIGHT.to(torch.complex64)}, "a is a torch.strided torch.complex64 tensor; save dense"),
    "sparse": (lambda: {"a": WEIGHT.to_sparse()}, "a is a sparse tensor"),
    "sparse rows": (lambda: {"a": WEIGHT.to_sparse_csr()}, "a is a torch.sparse_csr torch.float32 tensor"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)}, "a is a quantized tensor"),
    "meta": (lambda: {"a": WEIGHT.to("meta")}, "a is a meta tensor"),
    "too large for float32": (lambda: {"a": WEIGHT.double() * 1e300}, "a holds values beyond float32"),
    "NaN": (lambda: {"b": WEIGHT, "a": WEIGHT * float("nan")}, "a holds NaN or infinite values"),
    "infinity": (lambda: {"model": {"a": WEIGHT.half() * float("inf")}}, "a holds NaN or infinite values"),
    "expanded": (lambda: {"a": torch.zeros(1, dtype=torch.half).expand(10**6, 10**6)}, "repeats few values"),
    "twice": (lambda: {"module.a": WEIGHT, "a": WEIGHT}, "a is there twice, once as module.a"),
    "deep": (lambda: nested(5), "wrapped more than 4 deep"),
    "itself": (itself, "wrapped more than 4 deep"),
    "list": (lambda: [WEIGHT], "not a checkpoint but a list"),
}


@pytest.mark.filterwarnings("ignore:.*(CSR|quantize_per_tensor|TypedStorage)")
@pytest.mark.parametrize("case", ODD)
def test_odd_weights_are_refused_by_name(tmp_path, case):
    make, words = ODD[case]
    torch.save(make(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: .*{words}") as error:
        read_state(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


def test_nested_tensors_are_refused(tmp_path):
    torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: "):
        read_state(tmp_path / "a.pth")


def test_a_file_larger_inside_than_outside_is_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(compressed())
    with pytest.raises(ValueError, match="a.pth: .*it is compressed"):
        read_state(tmp_path / "a.pth")


def test_weights_that_are_not_finite_are_refused_in_safetensors_too(tmp_path):
    safetensors.torch.save_file({"a": WEIGHT / 0}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: a holds NaN or infinite values"):
        read_state(tmp_path / "a.safetensors")


def test_ordinary_weights_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = collections.OrderedDict(
        {"module.a": base.half(), "b": base.T, "c": base[1], "d": torch.tensor(3), "e": "x"}
    )
    torch.save({"state_dict": {"model": state}}, tmp_path / "a.pth")
    found = read_state(tmp_path / "a.pth")
    assert list(found) == ["a", "b", "c", "d"] and found["a"].dtype == torch.float32
    assert torch.equal(found["b"], base.T) and torch.equal(found["c"], base[1])


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    torch.save({f"{prefix}{name}": WEIGHT for name in ("a.model.b", "net")}, tmp_path / "a.pth")
    assert list(read_state(tmp_path / "a.pth")) == ["a.model.b", "net"]


def test_a_prefix_of_some_tensors_is_part_of_their_names(tmp_path):
    torch.save({"model.a": WEIGHT, "b": WEIGHT}, tmp_path / "a.pth")
    assert list(read_state(tmp_path / "a.pth")) == ["model.a", "b"]


def test_integers_are_not_taken_for_weights(tmp_path):
    with pytest.raises(ValueError, match="a.pth: a is of torch.int8, not torch.float32; check"):
        check_state({"a": WEIGHT.to(torch.int8)}, {"a": WEIGHT}, tmp_path / "a.pth")


def test_a_file_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # a hole, which takes no room
    with pytest.raises(ValueError, match="a.safetensors: 1024.0 GiB, larger than 16 GiB"):
        read_state(file)
