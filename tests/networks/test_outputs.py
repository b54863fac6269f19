"""What a network's channels mean, against brute force and torch's distributions; and what a second stage sees."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from label_specs import BRATS, OVERLAPPING
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from autoseg.core.labels import LabelSpec
from autoseg.networks.build import ARCHITECTURES, build_network
from autoseg.networks.outputs import Outputs
from autoseg.planning.plan import NetworkPlan

CLASSES = LabelSpec(names=("a", "b", "c"), values=(1, 2, 3))
KINDS = {"classes": CLASSES, "nested": BRATS, "overlapping": OVERLAPPING}
every_kind = pytest.mark.parametrize("labels", KINDS.values(), ids=KINDS)
with_regions = pytest.mark.parametrize("labels", [BRATS, OVERLAPPING], ids=["nested", "overlapping"])


def random_logits(n: int, *shape: int) -> Tensor:
    return 3 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def class_by_hand(labels: LabelSpec, is_of: tuple[bool, ...]) -> int:
    """The class with exactly these regions, or else what the last of them is written as."""
    values = (0, *labels.values)
    wanted = {region.name for region, inside in zip(labels.regions, is_of, strict=True) if inside}
    for index, value in enumerate(values):
        if {region.name for region in labels.regions if value in region.values} == wanted:
            return index
    last = [region for region in labels.regions if region.name in wanted][-1]
    return values.index(last.written)


@with_regions
@pytest.mark.parametrize("dim", [0, 1])
def test_every_combination_of_regions_is_decided_as_by_hand(labels: LabelSpec, dim: int) -> None:
    outputs = Outputs.of(labels)
    patterns = list(itertools.product((False, True), repeat=outputs.n))
    signs = torch.tensor(patterns).T.float() * 2 - 1
    logits = signs * (0.1 + random_logits(outputs.n, len(patterns)).abs())
    expected = [class_by_hand(labels, pattern) for pattern in patterns]
    found = outputs.decide(logits if dim == 0 else logits.T, dim=dim)
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    assert outputs.decide_rows(logits.T.contiguous()).tolist() == expected


def test_classes_are_decided_by_the_largest_logit_and_ties_by_the_lowest() -> None:
    outputs = Outputs.of(CLASSES)
    logits = random_logits(4, 5, 6)
    assert outputs.decide(logits).equal(logits.argmax(dim=0))
    assert outputs.decide_rows(logits.flatten(1).T).tolist() == logits.flatten(1).argmax(dim=0).tolist()
    assert outputs.decide(torch.ones(4, 2)).tolist() == [0, 0]
    assert outputs.decide_rows(torch.ones(2, 4)).tolist() == [0, 0]


@every_kind
def test_probabilities_are_decided_as_their_logits(labels: LabelSpec) -> None:
    outputs = Outputs.of(labels)
    logits = random_logits(outputs.n, 8, 9)
    probability = outputs.probabilities(logits)
    assert outputs.decide_probabilities(probability).equal(outputs.decide(logits))
    swapped = logits.movedim(0, 1)
    assert outputs.decide(swapped, dim=1).equal(outputs.decide(logits))
    torch.testing.assert_close(outputs.probabilities(swapped, dim=1), probability.movedim(0, 1))


def test_probabilities_are_a_softmax_or_sigmoids() -> None:
    logits = random_logits(3, 50)
    torch.testing.assert_close(Outputs(3).probabilities(logits).sum(dim=0), torch.ones(50))
    torch.testing.assert_close(Outputs.of(BRATS).probabilities(logits), 1 / (1 + (-logits).exp()))


@every_kind
def test_members_lead_back_to_their_class(labels: LabelSpec) -> None:
    outputs = Outputs.of(labels)
    classes = torch.arange(labels.n_classes).reshape(2, 2)
    members = outputs.members(classes)
    assert members.shape == (outputs.n, 2, 2)
    assert members.dtype == torch.bool
    assert outputs.decide(members.float() * 2 - 1).equal(classes)


@every_kind
def test_empty_logits_are_background_for_sure(labels: LabelSpec) -> None:
    outputs = Outputs.of(labels)
    empty = torch.tensor(outputs.empty_logits)
    assert empty.shape == (outputs.n,)
    assert int(outputs.decide(empty)) == 0
    assert float(outputs.entropy(outputs.probabilities(empty)[:, None])) == pytest.approx(0, abs=1e-6)
    assert float(outputs.log_confidence(empty[:, None])) == pytest.approx(0, abs=1e-6)


def test_likelihood_and_confidence_of_classes_are_those_of_a_categorical_distribution() -> None:
    outputs = Outputs.of(CLASSES)
    logits = random_logits(4, 40)
    classes = torch.arange(40) % 4
    known = Categorical(logits=logits.T)
    torch.testing.assert_close(outputs.log_likelihood(logits, classes), known.log_prob(classes))
    torch.testing.assert_close(outputs.log_confidence(logits), known.probs.amax(dim=1).log())
    torch.testing.assert_close(outputs.entropy(outputs.probabilities(logits)), known.entropy() / np.log(4))


@with_regions
def test_likelihood_and_confidence_of_regions_are_those_of_independent_bernoullis(labels: LabelSpec) -> None:
    outputs = Outputs.of(labels)
    logits = random_logits(outputs.n, 40)
    classes = torch.arange(40) % labels.n_classes
    known = Bernoulli(logits=logits)
    members = torch.tensor(labels.memberships())[:, classes].float()
    torch.testing.assert_close(outputs.log_likelihood(logits, classes), known.log_prob(members).sum(dim=0))
    patterns = [torch.tensor(bits) for bits in itertools.product((0.0, 1.0), repeat=outputs.n)]
    of_patterns = torch.stack([known.log_prob(bits[:, None].expand_as(logits)).sum(dim=0) for bits in patterns])
    torch.testing.assert_close(of_patterns.exp().sum(dim=0), torch.ones(40))
    torch.testing.assert_close(outputs.log_confidence(logits), of_patterns.amax(dim=0))
    torch.testing.assert_close(outputs.entropy(known.probs), known.entropy().mean(dim=0) / np.log(2))


@every_kind
def test_the_likelihood_of_what_is_decided_is_the_confidence(labels: LabelSpec) -> None:
    """For regions, where they form a class."""
    outputs = Outputs.of(labels)
    logits = random_logits(outputs.n, 300)
    decided = outputs.decide(logits)
    if outputs.has_regions:
        is_class = (outputs.members(decided) == (logits > 0)).all(dim=0)
        assert is_class.any()
        logits, decided = logits[:, is_class], decided[is_class]
    torch.testing.assert_close(outputs.log_likelihood(logits, decided), outputs.log_confidence(logits))


@every_kind
def test_entropy_is_1_for_no_idea_and_0_for_certainty(labels: LabelSpec) -> None:
    outputs = Outputs.of(labels)
    entropy = outputs.entropy(outputs.probabilities(random_logits(outputs.n, 500)))
    assert float(entropy.min()) > 0
    assert float(entropy.max()) <= 1 + 1e-6
    assert float(outputs.entropy(outputs.probabilities(torch.zeros(outputs.n, 1)))) == pytest.approx(1)
    certain = outputs.members(torch.arange(labels.n_classes)).float()
    assert outputs.entropy(certain).tolist() == [0] * labels.n_classes


def test_the_class_to_ignore_is_the_one_after_all_others() -> None:
    assert Outputs.of(CLASSES).ignore is None
    assert Outputs.of(replace(CLASSES, ignore=9)).ignore == 4
    assert Outputs.of(replace(BRATS, ignore=9)).ignore == 4
    assert Outputs.of(replace(BRATS, ignore=9)).n == 3
    assert Outputs(5).ignore is None


@every_kind
def test_without_what_was_not_looked_for_the_rest_is_as_likely_as_before(labels: LabelSpec) -> None:
    """What a network says of an unknown structure counts as background; of regions the others stay as they are."""
    outputs = Outputs.of(labels)
    logits = random_logits(outputs.n, 60)
    before = logits.clone()
    known = [True, *[False] * (outputs.n - 2), True]
    probability = outputs.probabilities(outputs.without_unknown(logits, known))
    expected = outputs.probabilities(logits)
    if not outputs.has_regions:
        expected[0] = expected[:-1].sum(dim=0)
    expected[1:-1] = 0
    torch.testing.assert_close(probability, expected)
    swapped = outputs.without_unknown(logits.T.reshape(60, outputs.n, 1), known, dim=1)
    torch.testing.assert_close(outputs.probabilities(swapped, dim=1)[..., 0].T, expected)
    torch.testing.assert_close(outputs.without_unknown(logits, [True] * outputs.n), logits)
    assert logits.equal(before)


# -- the second stage of a cascade -------------------------------------------------------------------------------------

PLAN_2D = NetworkPlan(
    architecture="unet",
    features=(3, 7),
    strides=((1, 1), (2, 2)),
    kernel_sizes=((3, 3), (3, 3)),
    encoder_blocks=(1, 1),
    decoder_blocks=(1,),
)
PLAN_3D = replace(PLAN_2D, strides=((1, 1, 1), (1, 2, 2)), kernel_sizes=((1, 3, 3), (3, 3, 3)))
N_CHANNELS, N_PREVIOUS = 2, 3
every_network = pytest.mark.parametrize(
    ("plan", "architecture"), list(itertools.product((PLAN_2D, PLAN_3D), ARCHITECTURES))
)


def make_input(plan: NetworkPlan) -> tuple[Tensor, Tensor]:
    """An image, and classes that the first stage has found."""
    generator = torch.Generator().manual_seed(0)
    size = (4, 6, 8)[-len(plan.strides[0]) :]
    images = torch.randn(2, N_CHANNELS, *size, generator=generator)
    return images, torch.randint(0, N_PREVIOUS + 1, (2, *size), generator=generator)


@every_network
def test_a_second_stage_sees_a_mask_for_each_class(plan: NetworkPlan, architecture: str) -> None:
    plan = replace(plan, architecture=architecture)
    torch.manual_seed(0)
    second = build_network(plan, n_channels=N_CHANNELS, n_outputs=4, n_previous=N_PREVIOUS).eval()
    plain = build_network(plan, n_channels=N_CHANNELS + N_PREVIOUS, n_outputs=4).eval()
    plain.load_state_dict(second.state_dict())
    images, found = make_input(plan)
    masks = torch.stack([found == index for index in range(1, N_PREVIOUS + 1)], dim=1).float()
    both = torch.cat([images, found.unsqueeze(1).float()], dim=1)
    with torch.no_grad():
        expected = plain(torch.cat([images, masks], dim=1))
        torch.testing.assert_close(second(both), expected)
        changed = second(torch.cat([images, torch.zeros_like(both[:, :1])], dim=1))
    assert not torch.allclose(changed, expected, atol=1e-3)


@every_network
def test_the_gradient_reaches_the_weights_of_every_mask(plan: NetworkPlan, architecture: str) -> None:
    torch.manual_seed(0)
    network = build_network(
        replace(plan, architecture=architecture), n_channels=N_CHANNELS, n_outputs=4, n_previous=N_PREVIOUS
    )
    images, found = make_input(plan)
    network.train()
    outputs = network(torch.cat([images, found.unsqueeze(1).float()], dim=1))
    full = outputs if isinstance(outputs, Tensor) else outputs[0]
    full.square().mean().backward()
    (first,) = [known for known in network.parameters() if known.ndim > 2 and known.shape[1] == N_CHANNELS + N_PREVIOUS]
    assert first.grad is not None
    assert (first.grad.abs().flatten(2).amax(dim=(0, 2)) > 0).all()


@every_network
def test_a_second_stage_has_the_same_weights_but_for_its_first_convolution(
    plan: NetworkPlan, architecture: str
) -> None:
    plan = replace(plan, architecture=architecture)
    alone = build_network(plan, n_channels=N_CHANNELS, n_outputs=4).state_dict()
    second = build_network(plan, n_channels=N_CHANNELS, n_outputs=4, n_previous=N_PREVIOUS).state_dict()
    assert list(alone) == list(second)
    differing = [name for name in alone if alone[name].shape != second[name].shape]
    assert len(differing) == 1
    assert second[differing[0]].shape[1] == alone[differing[0]].shape[1] + N_PREVIOUS
