"""Models and checkpoints: strict, finite, and never run for what they contain."""

import pickle
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fofa_deploy import models
from fofa_deploy.config import ModelPlan
from fofa_deploy.errors import ModelError
from fofa_deploy.models import (
    build_model,
    find_model,
    load_weights,
    parameter_count,
    read_weights,
    refuse_random_head,
    save_weights,
)
from fofa_deploy.store import digest


class Net(nn.Module):
    """Also what 'package.module:function' names."""

    def __init__(self, num_classes: int = 3, in_chans: int = 1, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Conv2d(in_chans, width, 3)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def made(model: str, **options) -> nn.Module:
    return build_model(ModelPlan(model=model, **options), classes=3, channels=1, image_size=(16, 16))


def state(**changes) -> dict[str, torch.Tensor]:
    """Net's weights; ``None`` takes a tensor out."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in {**Net().state_dict(), **changes}.items() if value is not None}


def refusal(path, net=None) -> str:
    with pytest.raises(ModelError) as caught:
        load_weights(net or Net(), path)
    assert str(path) in caught.value.message
    return caught.value.message


class Payload:
    """Runs on a plain unpickling."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


# --- checkpoints


def test_a_network_that_nothing_trains_gets_no_random_classifier():
    """timm keeps the other weights, and says nothing."""
    ready = ModelPlan(model="timm:resnet18", pretrained=True)
    refuse_random_head(ready, 1000)
    with pytest.raises(ModelError, match="know 1000 classes, and the data have 10") as caught:
        refuse_random_head(ready, 10)
    assert "[distill]" in caught.value.action
    refuse_random_head(ready.model_copy(update={"checkpoint": Path("own.safetensors")}), 10)
    refuse_random_head(ModelPlan(model="test_models:Net"), 10)


def test_weights_survive_the_round_trip(tmp_path):
    source, target = Net(), Net()
    save_weights(source, tmp_path / "w.safetensors")
    load_weights(target, tmp_path / "w.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head__bias": None}, "1 missing (head.bias)"),
        ({"tail": torch.zeros(1)}, "1 unknown (tail)"),
        ({"head__weight": torch.zeros(10, 4)}, "1 of another shape (head.weight: 10 x 4 in the file, 3 x 4 in the model)"),
        ({"head__bias": None, "tail": torch.zeros(1)}, "1 missing (head.bias), 1 unknown (tail)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path, changes, words):
    save_file(state(**changes), tmp_path / "w.safetensors")
    assert words in refusal(tmp_path / "w.safetensors")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_that_are_not_finite_are_refused(tmp_path, poison, suffix):
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state(head__bias=torch.tensor([0.0, poison, 0.0])), path)
    assert "NaN or infinity in head.bias" in refusal(path)


def test_a_refused_checkpoint_changes_no_weight(tmp_path):
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    save_file(state(head__bias=None), tmp_path / "w.safetensors")
    refusal(tmp_path / "w.safetensors", net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("inside", [(), ("state_dict",), ("model_state_dict",), ("model",), ("net",), ("model", "state_dict")])
@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.", "model.", "model._orig_mod.", "module._orig_mod.module."])
def test_a_pt_file_of_tensors_is_loaded_as_trainers_save_it(tmp_path, inside, wrap):
    wanted = state(head__bias=torch.full((3,), 0.25))
    saved = {f"{wrap}{key}": value for key, value in wanted.items()}
    for container in reversed(inside):
        saved = {container: saved, "epoch": 3}
    torch.save(saved, tmp_path / "w.pt")
    net = Net()
    load_weights(net, tmp_path / "w.pt")
    assert torch.equal(net.head.bias, wanted["head.bias"])
    assert torch.equal(net.body.weight, wanted["body.weight"])


@pytest.mark.parametrize("own", ["model", "module", "_orig_mod"])
@pytest.mark.parametrize("wrap", ["", "module.", "model.", "_orig_mod."])
def test_a_name_of_the_networks_own_is_kept(tmp_path, own, wrap):
    whole = nn.Sequential(OrderedDict({own: Net()}))
    torch.save({f"{wrap}{key}": torch.full_like(value, 0.5) for key, value in whole.state_dict().items()}, tmp_path / "w.pt")
    load_weights(whole, tmp_path / "w.pt")
    assert all((value == 0.5).all() for value in whole.state_dict().values())


def test_a_part_that_was_compiled_is_known(tmp_path):
    compiled = {key.replace("body.", "body._orig_mod."): torch.full_like(value, 0.5) for key, value in state().items()}
    torch.save(compiled, tmp_path / "w.pt")
    net = Net()
    load_weights(net, tmp_path / "w.pt")
    assert (net.body.weight == 0.5).all()


def test_a_checkpoint_that_contains_itself_is_refused(tmp_path):
    whole: dict[str, object] = {}
    whole["model"] = whole
    torch.save(whole, tmp_path / "w.pt")
    assert "not a dictionary of tensors" in refusal(tmp_path / "w.pt")


def test_what_lies_beside_the_network_is_named(tmp_path):
    torch.save({**{f"model.{key}": value for key, value in state().items()}, "criterion.weight": torch.ones(1)}, tmp_path / "w.pt")
    assert "5 unknown (criterion.weight" in refusal(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_why_a_checkpoint_cannot_be_read_is_said_in_our_words(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"state_dict": state(), "args": Namespace(lr=1)}, path)
    assert refusal(path).endswith("it holds argparse.Namespace, and to load that would run code")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "the pointer that Git LFS keeps" in refusal(path)
    torch.jit.script(Net()).save(str(path))
    assert refusal(path).endswith("it is a TorchScript archive, which is code")
    path.write_bytes(b"some text, which is longer than a word")
    assert refusal(path).endswith("it is no whole file of torch.save")
    path.write_bytes(b"")
    assert refusal(path).endswith("is empty")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "safetensors"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(tmp_path, save, suffix):
    path = tmp_path / f"w.{suffix}"
    save({"head.bias": Payload(tmp_path / "it-ran")}, path)
    assert "cannot be read as plain tensors" in refusal(path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"epoch": 3}, {0: torch.zeros(1)}, torch.zeros(3), "text"])
def test_a_pt_file_of_something_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "w.pt")
    assert "not a dictionary of tensors" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, suffix, keep):
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(state(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert ("cannot be read as plain tensors" if keep else "is empty") in refusal(path)


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "gone.pt")
    assert "does not exist" in refusal(tmp_path)


def test_a_file_with_more_tensors_than_any_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MOST_TENSORS", 50)
    save_file({str(number): torch.zeros(0) for number in range(51)}, tmp_path / "w.safetensors")
    assert "holds 51 tensors" in refusal(tmp_path / "w.safetensors")


# --- names


def test_a_timm_model_fits_the_plan():
    net = made("timm:vit_tiny_patch16_224", arguments={"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2})
    assert net(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


def test_a_module_and_function_name_a_model(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from test_models import Net\ndef wide(**options):\n    return Net(width=9, **options)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = made("my_models:wide")
    assert net(torch.zeros(2, 1, 16, 16)).shape == (2, 3)
    assert parameter_count(net) == 9 * 9 + 9 + 9 * 3 + 3


def test_a_checkpoint_is_part_of_the_plan(tmp_path):
    save_file(state(), tmp_path / "w.safetensors")
    net = made("test_models:Net", checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(net.head.bias, read_weights(tmp_path / "w.safetensors")["head.bias"])
    with pytest.raises(ModelError, match="does not fit"):
        made("test_models:Net", arguments={"width": 5}, checkpoint=tmp_path / "w.safetensors")


def test_an_unknown_timm_name_suggests_near_ones():
    with pytest.raises(ModelError, match="timm has no model 'resent18'") as caught:
        made("timm:resent18")
    assert "resnet18" in caught.value.action


@pytest.mark.parametrize("name", ["no_such_package:f", "test_models:Nett", "test_models", "", ":", "test_models:pytest.skip"])
def test_a_name_that_does_not_resolve_is_refused(name):
    with pytest.raises(ModelError, match="does not resolve"):
        made(name)


def test_what_is_not_callable_is_no_model():
    with pytest.raises(ModelError, match="is not callable"):
        made("sys:path")


@pytest.mark.parametrize("arguments", [{"no_such": 1}, {"width": -1}])
def test_arguments_that_a_model_does_not_take_are_refused(arguments):
    with pytest.raises(ModelError, match="test_models:Net cannot be made"):
        made("test_models:Net", arguments=arguments)


# --- what defines a model


def test_a_users_package_counts_with_all_of_its_files(tmp_path, monkeypatch):
    package = tmp_path / "some_nets"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import net\n")
    (package / "inner.py").write_text("from .parts import width\n\ndef net(num_classes, in_chans):\n    ...\n")
    (package / "parts.py").write_text("width = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    plan = ModelPlan(model="some_nets:net")
    found = models.code_identity(plan)
    assert found == [package / "__init__.py", package / "inner.py", package / "parts.py"]
    before = digest(found)
    (package / "parts.py").write_text("width = 2\n")
    assert digest(models.code_identity(plan)) != before


def test_a_single_module_counts_alone():
    assert models.code_identity(ModelPlan(model=f"{__name__}:Net")) == [Path(__file__)]


@pytest.mark.parametrize("content", [b".", b"\x80\x02.", b"\x80\x02]a."])
def test_a_damaged_pickle_is_refused_whatever_it_raises(tmp_path, content):
    (tmp_path / "w.pt").write_bytes(content)
    assert "cannot be read as plain tensors" in refusal(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
)
def test_tensors_of_another_kind_are_refused(tmp_path, value):
    torch.save(state(head__bias=value), tmp_path / "w.pt")
    assert "head.bias as" in refusal(tmp_path / "w.pt")


def test_weights_in_fewer_bits_are_weights(tmp_path):
    wanted = {key: value.to(torch.float8_e4m3fn) if key == "head.bias" else value for key, value in state().items()}
    save_file(wanted, tmp_path / "w.safetensors")
    net = Net()
    load_weights(net, tmp_path / "w.safetensors")
    assert torch.equal(net.head.bias, wanted["head.bias"].float())


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({**state(), "module.head.bias": torch.zeros(3)}, tmp_path / "w.pt")
    assert "unknown (module.head.bias)" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("text", ["raise SystemExit(0)", "1 +", "undefined"])
def test_a_users_module_that_does_not_import_is_told(tmp_path, monkeypatch, text):
    (tmp_path / "a_broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"does not resolve: (SystemExit|SyntaxError|NameError)"):
        find_model(ModelPlan(model="a_broken_module:net"))


class Odd(Net):
    """Classifies as it likes."""

    def __init__(self, num_classes: int, in_chans: int, passes: str) -> None:
        super().__init__({"fewer": num_classes - 1, "more": num_classes + 2}.get(passes, num_classes), in_chans)
        self.passes = passes

    def forward(self, images):
        logits = super().forward(images)
        return {"tuple": (logits, logits), "map": logits[..., None]}.get(self.passes, logits)


@pytest.mark.parametrize(("passes", "found"), [("fewer", "(2, 2)"), ("more", "(2, 5)"), ("tuple", "a tuple"), ("map", "(2, 3, 1)")])
def test_a_network_with_other_logits_than_classes_is_refused(passes, found):
    with pytest.raises(ModelError) as caught:
        made(f"{__name__}:Odd", arguments={"passes": passes})
    assert caught.value.message == f"{__name__}:Odd makes {found} of 2 images, and there are 3 classes"
    assert made(f"{__name__}:Odd", arguments={"passes": "as many"})


def talkative(num_classes: int, in_chans: int) -> Net:
    print("building")
    return Net(num_classes, in_chans)


def test_what_a_constructor_prints_does_not_reach_standard_output(capsys):
    made(f"{__name__}:talkative")
    assert capsys.readouterr() == ("", "building\n")
