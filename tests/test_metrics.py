"""Metrics against closed forms and plain loops."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import PixelFeatures
from oracle import flat, gamma, norm, sigma, squared_distance
from torch import Tensor, nn
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule
from tiny_retrack.lab.plots import cell, smooth, table
from tiny_retrack.metrics import (
    Inception,
    eps_distance,
    fid,
    fit_classifier,
    hit_frequency,
    inception_score,
    injection_similarity,
    is_hit,
    nearest_reference,
    quarter_turns,
    to_x0_units,
)
from tiny_retrack.types import InputError, NonFiniteError


class ManyFeatures(PixelFeatures):
    """As many features as Inception has."""

    num_features = 2048

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).repeat(1, 512)


def random_images(num: int, seed: int = 0) -> Tensor:
    """Around [-1, 1], and beyond it."""
    return torch.randn(num, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("samples", "target"),
    [
        (torch.zeros(0, 1, 2, 2), torch.zeros(1, 1, 2, 2)),
        (torch.zeros(3, 1, 2, 3), torch.zeros(1, 3, 2)),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)),
        (torch.zeros(3, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.uint8)),
    ],
    ids=["no samples", "other shape", "uint8", "a uint8 target"],
)
@pytest.mark.usefixtures("unchecked")
def test_hit_frequency_refuses_what_gives_no_share(samples: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match="samples"):
        hit_frequency(samples, target, 1.0)


def test_hit_frequency_refuses_a_target_in_another_range() -> None:
    with pytest.raises(ValueError, match=r"target must have pixels in \[0, 1\]"):
        hit_frequency(torch.zeros(3, 1, 2, 2), torch.full((1, 1, 2, 2), -1.0), 1.0)


def test_hit_frequency_refuses_samples_that_are_not_finite() -> None:
    samples = torch.zeros(3, 1, 2, 2)
    samples[1, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        hit_frequency(samples, torch.zeros(1, 1, 2, 2), 1.0)


def test_nearest_reference_has_the_least_norm() -> None:
    images, references = random_images(5), random_images(3, seed=1)
    distances, indices = [], []
    for image in flat(images):
        lengths = [math.sqrt(squared_distance(image, other)) for other in flat(references)]
        distances.append(min(lengths))
        indices.append(lengths.index(min(lengths)))
    expected = (torch.tensor(distances), torch.tensor(indices))
    assert_close(nearest_reference(images, references), expected)
    assert len(set(indices)) > 1


@given(st.integers(0, 2**31), st.floats(0.05, 2.0), st.integers(1, 3))
def test_hit_frequency_counts_clipped_samples(seed: int, threshold: float, num: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.rand(12, 1, 2, 3, generator=generator) * 1.4 - 0.2
    targets = torch.rand(num, 1, 2, 3, generator=generator)
    count = 0
    for sample in flat(samples):
        clipped = [min(max(value, 0), 1) for value in sample]
        squares = [squared_distance(clipped, target) for target in flat(targets)]
        count += math.sqrt(min(squares)) < threshold
    assert hit_frequency(samples, targets, threshold) == count / 12
    assert hit_frequency(samples.double(), targets, threshold) == count / 12


def test_is_hit_excludes_the_threshold_itself() -> None:
    target = torch.zeros(1, 2, 2)
    norms = (0.0, 0.98, 1.0, 2.0)
    samples = torch.stack([torch.full((1, 2, 2), length / 2) for length in norms])
    assert is_hit(samples, target, 1.0).tolist() == [True, True, False, False]


def test_injection_similarity_is_the_norm_and_the_cosine_of_clipped_images() -> None:
    x0 = random_images(3).clamp(-1, 1)
    denoised = random_images(3, seed=1) * 2
    lengths, cosines = [], []
    for a, b in zip(flat(x0), flat(denoised), strict=True):
        b = [min(max(value, -1), 1) for value in b]
        lengths.append(math.sqrt(squared_distance(a, b)) / 2)
        cosines.append(math.fsum(u * v for u, v in zip(a, b, strict=True)) / norm(a) / norm(b))
    got = injection_similarity(x0, denoised, PixelFeatures())
    assert_close(got, (torch.tensor(lengths), torch.tensor(cosines)))


def test_fid_is_the_closed_form_between_gaussians() -> None:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), from the samples' own moments in float64."""
    a = random_images(400)
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0]).view(1, 1, 2, 2)
    b = random_images(300, seed=1) * scale + 0.3
    x, y = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real)
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = gap + np.trace(cov_x + cov_y) - 2 * roots.sum()
    assert fid(a.split(90), b.split(70), PixelFeatures()) == pytest.approx(expected, rel=1e-4)
    assert fid(a.split(90), a.split(70), PixelFeatures()) == pytest.approx(0, abs=1e-4)


def test_fid_of_too_few_images_is_none_and_the_advice_helps() -> None:
    images = random_images(10)
    few, network = images[:3].split(2), PixelFeatures()
    says = "3 samples and 10 images cannot span 4 features: take at least 4 samples"
    with pytest.warns(UserWarning, match=says):
        assert fid(few, images.split(5), network) is None
    with pytest.warns(UserWarning, match="0 samples and 10 images"):
        assert fid(images[:0].split(2), images.split(5), network) is None
    with pytest.warns(UserWarning, match="3 images cannot span 4 features: the data set is too sm"):
        assert fid(few, few, network) is None
    with pytest.warns(UserWarning, match="take the data set's own features, of which there are 64"):
        assert fid(images.split(5), images.split(5), ManyFeatures()) is None


def test_inception_score_is_the_exponential_of_the_mean_kl() -> None:
    x = random_images(30) * 3
    p = []
    for image in flat(x):
        weights = [math.exp(value) for value in image[:3]]
        p.append([weight / math.fsum(weights) for weight in weights])
    marginal = [math.fsum(column) / len(p) for column in zip(*p, strict=True)]
    kl = []
    for row in p:
        kl.append(math.fsum(v * math.log(v / m) for v, m in zip(row, marginal, strict=True)))
    expected = math.exp(math.fsum(kl) / len(kl))
    assert inception_score(x, PixelFeatures(), batch_size=7) == pytest.approx(expected, rel=1e-5)


def test_inception_score_of_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        inception_score(torch.zeros(0, 1, 2, 2), PixelFeatures())


def test_inception_score_is_from_one_to_the_number_of_classes() -> None:
    same = torch.ones(8, 1, 2, 2)
    assert inception_score(same, PixelFeatures()) == pytest.approx(1)
    certain = torch.eye(3)[torch.arange(9) % 3] * 100
    certain = nn.functional.pad(certain, (0, 1)).view(9, 1, 2, 2)
    assert inception_score(certain, PixelFeatures()) == pytest.approx(3)


def test_eps_distance_is_the_mean_square_over_pixels() -> None:
    x_t, t = random_images(3), torch.tensor([0, 500, 999])

    def double(x: Tensor, t: Tensor) -> Tensor:
        return 2 * x

    def shifted(x: Tensor, t: Tensor) -> Tensor:
        return x + t[:, None, None, None] / 1000

    expected = []
    for image, step in zip(flat(x_t), t.tolist(), strict=True):
        squares = [(2 * value - value - step / 1000) ** 2 for value in image]
        expected.append(math.fsum(squares) / 4)
    assert_close(eps_distance(double, shifted, x_t, t), torch.tensor(expected))


def test_to_x0_units_is_the_mean_square_of_the_predicted_images() -> None:
    t = torch.tensor([0, 300, 999])
    schedule = NoiseSchedule.linear()
    x_t = random_images(3).double()
    eps = random_images(3, seed=1).double()
    other = random_images(3, seed=2).double()
    expected = []
    for x, a, b, step in zip(flat(x_t), flat(eps), flat(other), t.tolist(), strict=True):
        x0 = [(v - sigma(step) * e) / gamma(step) for v, e in zip(x, a, strict=True)]
        x0_other = [(v - sigma(step) * e) / gamma(step) for v, e in zip(x, b, strict=True)]
        expected.append(squared_distance(x0, x0_other) / 4)
    distance = eps_distance(lambda x, t: eps, lambda x, t: other, x_t, t)
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert_close(to_x0_units(distance, t, schedule), wanted, rtol=1e-9, atol=0)


def test_quarter_turns_of_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="only square ones"):
        quarter_turns(torch.zeros(4, 1, 2, 3))


def test_quarter_turns_turn_each_quarter_further() -> None:
    corner = torch.zeros(6, 1, 2, 2)
    corner[:, 0, 0, 0] = 1  # top left; turned by 90 degrees it is bottom left
    turned, classes = quarter_turns(corner)
    at = [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert classes.tolist() == [0, 0, 1, 1, 2, 2]
    for image, turns in zip(turned, classes.tolist(), strict=True):
        row, column = at[turns]
        assert image.sum() == image[0, row, column] == 1


@pytest.mark.parametrize("labelled", [True, False])
def test_fit_classifier_learns_and_repeats_bitwise(labelled: bool) -> None:
    """Bright left or right halves; without labels, which way a bright left half was turned."""
    n = 200
    labels = torch.arange(n) % 2 if labelled else torch.zeros(n, dtype=torch.long)
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    images[labels == 0, :, :, :4] += 1
    images[labels == 1, :, :, 4:] += 1
    state = torch.get_rng_state()
    (first, accuracy), (second, _) = (
        fit_classifier(lambda index: images[index], labels, seed=0, steps=60, batch_size=32)
        for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    again = second.state_dict()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again[name]), name
    assert accuracy > 0.95
    assert first.has_classes is labelled
    assert first(images[:5]).shape == (5, 64)
    assert first.logits(images[:5]).shape == (5, 2 if labelled else 4)


@pytest.mark.parametrize(("num_labels", "steps"), [(100, 400), (2000, 1350)])
def test_fit_classifier_sees_a_large_set_three_times(num_labels: int, steps: int) -> None:
    """Nine tenths of the images are trained on, in batches of 4."""
    batches = []

    def images_at(index: Tensor) -> Tensor:
        batches.append(len(index))
        return torch.zeros(len(index), 1, 4, 4)

    fit_classifier(images_at, torch.arange(num_labels) % 2, seed=0, batch_size=4)
    assert batches.count(4) == steps


def random_inception_weights() -> dict[str, Tensor]:
    """A state dict of torch-fidelity's network, untrained."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Untrained(extractor.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    weights = Untrained("untrained", ["2048"], nothing).state_dict()
    for weight in weights.values():
        if weight.ndim == 4:
            nn.init.kaiming_normal_(weight)  # else features would vanish
    return weights


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, Tensor]:
    return random_inception_weights()


def test_inception_is_torchmetrics_own(inception_weights: dict[str, Tensor], tmp_path) -> None:
    """Features as its FID accumulates them, logits as its Inception Score, from the same file.

    Its FID and Inception Score take uint8 images of three channels.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    torch.save(inception_weights, tmp_path / "weights.pth")
    generator = torch.Generator().manual_seed(0)
    grey = torch.randint(0, 255, (2, 1, 16, 16), generator=generator, dtype=torch.uint8)
    x = (grey.float() + 0.4) / 127.5 - 1  # 0.4 of a grey level above, and rounded away
    rgb = grey.repeat(1, 3, 1, 1)
    theirs = FrechetInceptionDistance(
        feature=2048, feature_extractor_weights_path=str(tmp_path / "weights.pth")
    )
    theirs.update(rgb, real=False)
    network = Inception(inception_weights)
    features = network(x)
    assert features.shape == (2, 2048)
    assert features.mean() > 0.01
    assert_close(features.double().sum(0), theirs.fake_features_sum)
    assert_close(features.double().T @ features.double(), theirs.fake_features_cov_sum)
    unbiased = NoTrainInceptionV3("theirs", ["logits_unbiased"], str(tmp_path / "weights.pth"))
    assert_close(network.logits(x), unbiased(rgb))
    assert network.logits(x).shape == (2, 1008)


def test_inception_refuses_other_weights(inception_weights: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        Inception({"weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        Inception({**inception_weights, "fc.bias": torch.zeros(1000)})


def test_inception_without_torch_fidelity_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r'pip install "tiny-retrack\[fid\]"'):
        Inception({})


def test_table_aligns_cells_and_shows_none_as_a_dash() -> None:
    assert cell(None) == "-"
    assert cell(0.123456) == "0.1235"
    rows = [{"a": 1, "bb": 2.0}, {"a": None, "bb": "x"}]
    assert table(rows) == "| a | bb |\n| - | -- |\n| 1 | 2  |\n| - | x  |"
    assert table([]) == ""


def test_smooth_is_the_mean_of_the_points_around() -> None:
    """By their x, not by their number; at the ends, of those on one side."""
    at = [10, 20, 30, 100]
    assert smooth(at, [1, 2, 6, 8], width=20) == pytest.approx([1.5, 3, 4, 8])
    assert smooth(at, [1, 2, 6, 8], width=19) == pytest.approx([1, 2, 6, 8])
    assert smooth([], [], width=2) == []
