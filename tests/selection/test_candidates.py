"""Names, patterns and lists -> candidates."""

import pytest
import timm

from fofa_deploy.errors import PlanError
from fofa_deploy.models import build_model, find_model
from fofa_deploy.profile import find_profile
from fofa_deploy.select.candidates import CandidatePlan, device_kind, expand, listed_for


def test_a_pattern_is_every_model_of_its_name_at_every_size():
    found = expand([CandidatePlan(model="timm:mobilenetv3_small_*")], [(32, 32), (48, 64)])
    models = [name for name in timm.list_models() if name.startswith("mobilenetv3_small_")]
    assert len(found) == 2 * len(models) > 4
    assert {candidate.student.model for candidate in found} == {f"timm:{name}" for name in models}
    assert "mobilenetv3_small_100-32" in {candidate.name for candidate in found}
    assert "mobilenetv3_small_100-48x64" in {candidate.name for candidate in found}


def test_a_pattern_without_a_match_says_what_to_do():
    with pytest.raises(PlanError, match="no timm model matches 'nosuchnet_\\*'") as caught:
        expand([CandidatePlan(model="timm:nosuchnet_*")], [(32, 32)])
    assert "list_models" in caught.value.action


def test_two_of_one_name_are_refused_and_names_of_their_own_help():
    plain, small = CandidatePlan(model="timm:resnet10t"), CandidatePlan(model="timm:resnet10t", arguments={"base_width": 32})
    with pytest.raises(PlanError, match="two candidates named 'resnet10t-32'"):
        expand([plain, small], [(32, 32)])
    one, other = expand([plain, small.model_copy(update={"name": "narrow"})], [(32, 32)])
    assert (one.name, other.name) == ("resnet10t-32", "narrow-32")
    assert other.student.arguments == {"base_width": 32}


def test_a_function_of_ones_own_is_a_candidate():
    (found,) = expand([CandidatePlan(model="mymodels.nets:tiny")], [(16, 16)])
    assert (found.name, found.student.model) == ("tiny-16", "mymodels.nets:tiny")


@pytest.mark.parametrize(
    ("profile", "kind"),
    [("raspberry-pi-5", "board"), ("x86-onnxruntime", "cpu"), ("cpu-onnxruntime", "cpu"), ("rtx-desktop", "gpu"),
     ("intel-igpu-openvino", "gpu"), ("jetson-orin", "gpu")],
)  # fmt: skip
def test_every_kind_of_device_has_its_list(profile, kind):
    found = find_profile(profile)
    assert device_kind(found) == kind
    listed = expand(listed_for(found), [(224, 224)])
    assert len(listed) >= 10
    for candidate in listed:
        find_model(candidate.student)


def test_a_candidate_is_made_for_the_data_sets_classes_channels_and_its_own_size():
    import torch

    (found,) = expand([CandidatePlan(model="timm:vit_tiny_patch16_224", arguments={"patch_size": 4, "depth": 1})], [(16, 16)])
    model = build_model(found.student, classes=7, channels=1, image_size=found.image_size)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
