from __future__ import annotations

import numpy as np
import pytest
import torch
from study_factory import random_backbone
from torch import nn

from lbp_ray.nets.folding import carry_norms, computed_once, fold


def trained_backbone():
    """Random weights with running statistics that are not the identity."""
    network = random_backbone()
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.1 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
            layer.weight.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    return network


@pytest.fixture(scope="module")
def backbone():
    return trained_backbone()


def test_folding_changes_no_feature_but_in_the_last_digits(backbone):
    image_B1HW = torch.randn(2, 1, 64, 48)
    with torch.inference_mode():
        features, folded = backbone(image_B1HW.expand(-1, 3, -1, -1)), fold(backbone)(image_B1HW)
    assert ((features - folded).abs().max() / features.abs().max()) < 1e-5


def test_folding_is_exact_in_real_numbers(backbone):
    network = backbone.double()
    image_B1HW = torch.randn(2, 1, 64, 48, dtype=torch.float64)
    with torch.inference_mode():
        features, folded = network(image_B1HW.expand(-1, 3, -1, -1)), fold(network)(image_B1HW)
    assert ((features - folded).abs().max() / features.abs().max()) < 1e-13
    backbone.float()


def test_nothing_is_left_to_normalise_and_the_original_stays(backbone):
    before = [type(module) for module in backbone.modules()]
    folded = fold(backbone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert [type(module) for module in backbone.modules()] == before
    assert backbone.conv1.in_channels == 3


def test_a_network_in_train_mode_is_refused(backbone):
    backbone.layer1[0].bn1.train()
    with pytest.raises(ValueError, match="eval mode"):
        fold(backbone)
    backbone.eval()


def gradients(network, images, owner, *, size=None):
    owner.requires_grad_(True).zero_grad()
    with computed_once(network):
        for part in images.split(size or len(images)):
            network(part).square().sum().backward()
    return [parameter.grad.clone() for parameter in owner.parameters()]


def furthest(first, second):
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [None, 2])
def test_carried_norms_give_the_same_gradients_in_real_numbers(size):
    network = trained_backbone().double()
    images = torch.randn(3, 3, 64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    usual = gradients(network, images, network)
    carried = gradients(carry_norms(network), images, network, size=size)
    assert furthest(usual, carried) < 1e-9


def test_carrying_network_has_the_weights_of_the_other_whatever_becomes_of_them(backbone):
    carrying, images = carry_norms(backbone), torch.randn(2, 3, 64, 48)
    other = {name: value + 1 if "running_var" in name else value for name, value in backbone.state_dict().items()}
    backbone.load_state_dict(other)
    with torch.no_grad():
        usual, carried = backbone(images), carrying(images)
    assert furthest([usual], [carried]) < 1e-5
    assert {id(tensor) for tensor in carrying.parameters()} == {id(tensor) for tensor in backbone.parameters()}


def test_weights_are_computed_once_for_all_passes_and_let_go_after_an_error(backbone):
    carrying = carry_norms(backbone)
    first = carrying.layer1[0].conv1
    with pytest.raises(RuntimeError, match="stop"), computed_once(carrying):  # noqa: PT012
        held = first.held
        carrying(torch.randn(1, 3, 64, 48))
        assert first.held is held
        raise RuntimeError("stop")
    assert first.held is None


def test_no_weight_stays_held_where_one_could_not_be_computed(backbone, monkeypatch):
    carrying = carry_norms(backbone)
    first, second = carrying.layer1[0].conv1, carrying.layer1[0].conv2
    monkeypatch.setattr(second, "fused", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), computed_once(carrying):
        pytest.fail("unreachable")
    assert first.held is None


def test_carried_norms_round_no_worse_than_usual_ones(backbone):
    images = torch.randn(4, 3, 100, 50, generator=torch.Generator().manual_seed(1))
    exact_network = trained_backbone().double()
    exact = gradients(exact_network, images.double(), exact_network)

    def error(network):
        found = gradients(network, images, backbone)
        return np.median([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])

    usual = trained_backbone()
    backbone.load_state_dict(usual.state_dict())
    assert error(carry_norms(backbone)) < 1.5 * error(backbone)
