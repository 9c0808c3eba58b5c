"""Names, patterns and lists -> candidates."""

import pytest
import timm

from fofa_deploy.config import ModelPlan, RunPlan, load_plan
from fofa_deploy.errors import ModelError, PlanError
from fofa_deploy.models import build_model, find_model
from fofa_deploy.pipeline import opened
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.select.candidates import CandidatePlan, device_kind, expand, listed_for


def test_a_pattern_is_every_model_of_its_name_at_every_size():
    found = expand([CandidatePlan(model="timm:mobilenetv3_small_*")], (32, 32), [(32, 32), (48, 64)])
    models = [name for name in timm.list_models() if name.startswith("mobilenetv3_small_")]
    assert len(found) == 2 * len(models) > 4
    assert {candidate.student.model for candidate in found} == {f"timm:{name}" for name in models}
    assert "mobilenetv3_small_100-32" in {candidate.name for candidate in found}
    assert "mobilenetv3_small_100-48x64" in {candidate.name for candidate in found}
    assert {candidate.student.image_size for candidate in found} == {None, (48, 64)}, "the data set's own size needs no word"
    assert {candidate.image_size for candidate in found} == {(32, 32), (48, 64)}


def test_a_line_that_names_its_size_is_a_candidate_at_that_size_alone():
    lines = [CandidatePlan(model="timm:resnet10t", image_size=24), CandidatePlan(model="timm:resnet14t")]
    assert [one.name for one in expand(lines, (32, 32), [(16, 16), (32, 32)])] == ["resnet10t-24", "resnet14t-16", "resnet14t-32"]


def test_a_pattern_without_a_match_says_what_to_do():
    with pytest.raises(PlanError, match="no timm model matches 'nosuchnet_\\*'") as caught:
        expand([CandidatePlan(model="timm:nosuchnet_*")], (32, 32))
    assert "list_models" in caught.value.action


def test_two_of_one_name_are_refused_and_names_of_their_own_help():
    plain, small = CandidatePlan(model="timm:resnet10t"), CandidatePlan(model="timm:resnet10t", arguments={"base_width": 32})
    with pytest.raises(PlanError, match="two candidates named 'resnet10t-32'"):
        expand([plain, small], (32, 32))
    one, other = expand([plain, small.model_copy(update={"name": "narrow"})], (32, 32))
    assert (one.name, other.name) == ("resnet10t-32", "narrow-32")
    assert other.student.arguments == {"base_width": 32}


def test_a_function_of_ones_own_is_a_candidate():
    (found,) = expand([CandidatePlan(model="mymodels.nets:tiny")], (16, 16))
    assert (found.name, found.student.model) == ("tiny-16", "mymodels.nets:tiny")


@pytest.mark.parametrize(
    ("profile", "kind"),
    [("raspberry-pi-5", "board"), ("x86-onnxruntime", "cpu"), ("cpu-onnxruntime", "cpu"), ("rtx-desktop", "gpu"),
     ("intel-igpu-openvino", "gpu"), ("jetson-orin", "gpu")],
)  # fmt: skip
def test_every_kind_of_device_has_its_list(profile, kind):
    found = find_profile(profile)
    assert device_kind(found) == kind
    listed = expand(listed_for(found), (224, 224))
    assert len(listed) >= 10
    for candidate in listed:
        find_model(candidate.student)


def test_a_candidate_is_made_for_the_data_sets_classes_channels_and_its_own_size():
    import torch

    (found,) = expand([CandidatePlan(model="timm:vit_tiny_patch16_224", arguments={"patch_size": 4, "depth": 1})], (16, 16))
    model = build_model(found.student, classes=7, channels=1, image_size=found.image_size)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 7)


def test_a_line_with_widths_and_depths_is_a_candidate_for_each_and_none_twice():
    listed = CandidatePlan(model="timm:vit_tiny_patch16_224", widths=(0.5, 0.51, 1.0), depths=(0.5, 1.0))
    found = {one.name: one.student.arguments for one in expand([listed], (32, 32))}
    assert found == {
        "vit_tiny_patch16_224-w0.5-d0.5-32": {"embed_dim": 96, "depth": 6},
        "vit_tiny_patch16_224-w0.5-32": {"embed_dim": 96},
        "vit_tiny_patch16_224-d0.5-32": {"depth": 6},
        "vit_tiny_patch16_224-32": {},
    }
    (narrow,) = expand([CandidatePlan(model="timm:resnet18", name="net", widths=(0.25,))], (32, 32))
    assert (narrow.name, narrow.student.arguments) == ("net-w0.25-32", {"channels": [16, 32, 64, 128]})


def test_a_pattern_takes_its_widths_along():
    found = expand([CandidatePlan(model="timm:resnet1[0-4]t", widths=(0.5, 1.0))], (32, 32))
    assert [one.name for one in found] == ["resnet10t-w0.5-32", "resnet10t-32", "resnet14t-w0.5-32", "resnet14t-32"]


def test_what_cannot_be_scaled_is_refused_by_name():
    with pytest.raises(ModelError, match="timm:vgg11 cannot be scaled in width"):
        expand([CandidatePlan(model="timm:vgg11", widths=(0.5,))], (32, 32))


def test_widths_are_read_from_a_plan_and_plans_without_them_are_what_they_were():
    found = load_plan("demo", ["student={model='auto'}", "select.candidates=[{model='timm:resnet18',widths=[0.5,1],depths=[1]}]"])
    assert found.select.candidates[0].widths == (0.5, 1.0)
    assert RunPlan.model_validate_json(found.model_dump_json()) == found
    assert set(CandidatePlan(model="timm:resnet18").model_dump()) == {*ModelPlan(model="x").model_dump(), "name"}
    with pytest.raises(PlanError, match="widths"):
        load_plan("demo", ["student={model='auto'}", "select.candidates=[{model='timm:resnet18',widths=[0]}]"])


@pytest.mark.parametrize(("line", "words"), [("timm:resnt18", "did you mean"), ("timm:no_such_*", "no timm model matches")])
def test_a_candidate_that_is_none_is_told_before_anything_is_made(tmp_path, line, words):
    plan = load_plan("demo", ["student={model='auto'}", f"select.candidates=[{{model='{line}'}}]"])
    with pytest.raises((PlanError, ModelError)) as caught, opened(plan, tmp_path / "run", Quiet()):
        pass
    assert words in f"{caught.value.message} {caught.value.action}"
    assert not (tmp_path / "run" / "data").exists()


def test_a_candidates_own_name_is_one_of_a_folder():
    with pytest.raises(PlanError, match="name"):
        load_plan("demo", ["student={model='auto'}", "select.candidates=[{model='timm:resnet18',name='slim resnet'}]"])
    (private,) = expand((CandidatePlan(model="mine:_net"),), (16, 16))
    assert private.name == "_net-16"
