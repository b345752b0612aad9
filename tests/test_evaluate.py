"""Evaluation: what is measured of models whose every answer is known."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, Script, assert_refused
from networks import PixelFeatures
from oracle import flat, gamma, sigma, squared_distance
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import evaluate
from tiny_retrack import NoiseSchedule, UNet, load_model, save_model
from tiny_retrack.data import NO_LABEL, ImageSet, Split, to_float
from tiny_retrack.lab import evaluation, features, flags, spec
from tiny_retrack.lab.checkpoint import read_tensors, write_json
from tiny_retrack.lab.evaluation import Evaluator, build_evaluator
from tiny_retrack.lab.hits import HitThreshold, choose_threshold
from tiny_retrack.lab.plots import AttackCurve, AttackPlot, table
from tiny_retrack.lab.presets import EvalSettings
from tiny_retrack.metrics import Classifier, FeatureNetwork, fit_classifier
from tiny_retrack.posterior import ideal_denoiser, ideal_eps
from tiny_retrack.sampling import ddim_sample, ddpm_sample
from tiny_retrack.types import InputError

SCHEDULE = NoiseSchedule.linear()
RANGES = ("0-199", "200-399", "400-999")


class KnownDenoiser(nn.Module):
    """A denoiser whose samples and whose likelihood are known.

    For integer t, as samplers give it, the ideal denoiser of some images: its samples are these
    images. For real t, as the likelihood's ODE gives it, the ideal denoiser of N(0, I).
    """

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        self.data = data

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        if t.is_floating_point():
            return standard_normal_eps(x_t, t)
        return ideal_eps(x_t, t, self.data, SCHEDULE)


def standard_normal_eps(x_t: Tensor, t: Tensor) -> Tensor:
    """sigma(t) x_t of the VP-SDE: its Jacobian is a multiple of 1, so every probe is exact."""
    s = t / 999
    sigma_t = (-torch.expm1(-(0.1 * s + 19.9 * s**2 / 2))).sqrt()
    return sigma_t[:, None, None, None] * x_t


def standard_normal_bits(images: Tensor) -> float:
    """Mean bits per dimension of uint8 images under N(0, I) on [-1, 1]."""
    values = [value for image in flat(to_float(images)) for value in image]
    nats = [0.5 * value * value + 0.5 * math.log(2 * math.pi) for value in values]
    return 7 + math.fsum(nats) / len(nats) / math.log(2)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Over 32 dark images of 2x2 pixels; two with a bright row, repeated, are to be forgotten."""
    generator = torch.Generator().manual_seed(0)
    remain = 40 * torch.randint(0, 3, (32, 1, 2, 2), generator=generator, dtype=torch.uint8)
    forget = torch.tensor([[[[255, 250], [60, 50]]], [[[60, 50], [250, 255]]]], dtype=torch.uint8)
    split = Split(remain, forget.repeat(6, 1, 1, 1), torch.zeros(32, dtype=torch.long))
    return Evaluator(
        split,
        data={"dataset": "folder"},
        network=PixelFeatures(),
        features="pixels",
        settings=EvalSettings(num_samples=60, sampler_steps=100, threshold=0),
        threshold=HitThreshold(0.05, "small"),
        nll_tolerance=1e-4,
        seed=0,
        device=torch.device("cpu"),
        bf16=False,
        attack=evaluation.AttackSettings(at=(1,), samples=4, copies=2, draws=2, t=50),
    )


def remain_only(evaluator: Evaluator) -> Evaluator:
    """The evaluator of a data set in which nothing is to be forgotten."""
    split = replace(evaluator.split, forget=evaluator.split.forget[:0])
    return replace(evaluator, split=split, threshold=choose_threshold(split, own=0))


def knows_everything(evaluator: Evaluator) -> KnownDenoiser:
    """What a model is before it forgets: the ideal denoiser of all images."""
    return KnownDenoiser(evaluator.split.everything)


def knows_remain(evaluator: Evaluator) -> KnownDenoiser:
    """What unlearning should reach."""
    return KnownDenoiser(evaluator.split.remain)


@pytest.fixture
def known_checkpoint(monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator, tmp_path: Path) -> Path:
    """A folder that is loaded as the denoiser of everything."""
    model = knows_everything(evaluator)
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda *_: (model, SCHEDULE))
    monkeypatch.setattr(evaluation, "fingerprint", lambda _: "known")
    return tmp_path


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the pixels of uint8 images, scaled to [-1, 1]; in float64."""
    x, y = (images.flatten(1).double().numpy() / 127.5 - 1 for images in (a, b))
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y) - 2 * roots.sum()


def pixel_inception_score(images: Tensor) -> float:
    """Over the first three pixels as logits."""
    p = []
    for image in flat(to_float(images)):
        weights = [math.exp(value) for value in image[:3]]
        p.append([weight / math.fsum(weights) for weight in weights])
    marginal = [math.fsum(column) / len(p) for column in zip(*p, strict=True)]
    kl = []
    for row in p:
        kl.append(math.fsum(v * math.log(v / m) for v, m in zip(row, marginal, strict=True)))
    return math.exp(math.fsum(kl) / len(kl))


def test_evaluation_measures_each_figure_over_its_own_images(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    """The wiring: hits over all samples, FID and IS over the others, NLL of each set."""
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, evaluator)
    assert metrics == json.loads((known_checkpoint / "metrics.json").read_text())
    split = evaluator.split
    samples = read_tensors(known_checkpoint / "samples.safetensors")[0]["samples"]  # all 60
    known = split.everything.tolist()
    assert all(sample in known for sample in samples.tolist())
    is_forgotten = torch.tensor([sample in split.forget.tolist() for sample in samples.tolist()])
    assert 5 < is_forgotten.sum() < 55
    others = samples[~is_forgotten]
    assert metrics["hit_frequency"] == is_forgotten.double().mean().item()
    assert metrics["fid"] == pytest.approx(frechet_distance(others, split.remain), rel=1e-3)
    assert metrics["inception_score"] == pytest.approx(pixel_inception_score(others), rel=1e-3)
    remain = pytest.approx(standard_normal_bits(split.remain[::2]), rel=1e-3)
    forget = pytest.approx(standard_normal_bits(split.targets), rel=1e-3)
    assert metrics["nll"] == {"remain": remain, "forget": forget}
    # What would be measured over other images is not near: the test can tell.
    assert abs(frechet_distance(samples, split.remain) / metrics["fid"] - 1) > 0.1
    assert abs(frechet_distance(others, split.everything) / metrics["fid"] - 1) > 0.1
    assert abs(standard_normal_bits(split.remain) / standard_normal_bits(split.targets) - 1) > 0.01


def test_evaluation_measures_held_out_images_too(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    """FID of the samples that are no hits, and NLL, to images that are in neither set."""
    generator = torch.Generator().manual_seed(1)
    held_out = torch.randint(60, 160, (20, 1, 2, 2), generator=generator, dtype=torch.uint8)
    evaluator = replace(evaluator, split=replace(evaluator.split, held_out=held_out))
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, evaluator)
    samples = read_tensors(known_checkpoint / "samples.safetensors")[0]["samples"]
    forgotten = evaluator.split.forget.tolist()
    others = torch.stack([sample for sample in samples if sample.tolist() not in forgotten])
    expected = pytest.approx(frechet_distance(others, held_out), rel=1e-3)
    assert metrics["fid_held_out"] == expected
    shown = held_out[torch.arange(16) * 20 // 16]
    expected = pytest.approx(standard_normal_bits(shown), rel=1e-3)
    assert metrics["nll"]["held-out"] == expected
    row = evaluation.metrics_row(metrics)
    assert row["fid held-out"] == metrics["fid_held_out"] != row["fid"]
    assert row["nll held-out"] == metrics["nll"]["held-out"] != row["nll remain"]


def test_evaluation_compares_with_the_remain_sets_denoiser_at_the_forgotten_images(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, evaluator)
    # The model knows the forgotten images: they come back, though only just below t = 250.
    assert metrics["injection"]["100"]["l2"] == pytest.approx(0, abs=1e-3)
    assert metrics["injection"]["100"]["cosine"] == pytest.approx(1, abs=1e-4)
    # At little noise it says the forgotten image, and the oracle a remain image.
    gaps = []
    for target in flat(to_float(evaluator.split.targets)):
        for image in flat(to_float(evaluator.split.remain)):
            gaps.append(squared_distance(target, image) / 4)
    assert min(gaps) <= metrics["oracle_distance"]["0-199"] <= max(gaps)
    assert list(metrics["oracle_distance"]) == list(RANGES)


def test_evaluation_without_a_forget_set_has_no_figures_of_forgetting(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    nothing = remain_only(evaluator)
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, nothing)
    assert metrics["hit_frequency"] is metrics["threshold"] is None
    assert metrics["threshold_about"] == "nothing was to be forgotten"
    assert metrics["nll"]["forget"] is None
    assert metrics["injection"] is metrics["oracle_distance"] is None
    row = evaluation.metrics_row(metrics)
    assert list(row) == ["hit_frequency", "fid", "inception_score", "nll remain", "nll forget"]
    assert table([row]).splitlines()[2].startswith("| -  ")
    assert not (known_checkpoint / "hits.png").exists()


def test_evaluation_without_a_threshold_leaves_nothing_out(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    """FID and IS are over all samples, hits included."""
    none = replace(evaluator, threshold=HitThreshold(None, "it would reach a remain image"))
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, none)
    assert (metrics["hit_frequency"], metrics["threshold"]) == (None, None)
    assert metrics["threshold_about"] == "it would reach a remain image"
    samples = read_tensors(known_checkpoint / "samples.safetensors")[0]["samples"]  # all 60
    expected = frechet_distance(samples, evaluator.split.remain)
    assert metrics["fid"] == pytest.approx(expected, rel=1e-3)
    assert metrics["inception_score"] == pytest.approx(pixel_inception_score(samples), rel=1e-3)
    attack = evaluation.attacked_hit_frequency(
        knows_everything(evaluator), evaluator.split.targets, none, SCHEDULE
    )
    assert attack is None


def test_evaluation_over_a_network_without_classes_has_no_inception_score(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    network = PixelFeatures()
    network.has_classes = False
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, replace(evaluator, network=network))
    assert metrics["inception_score"] is None
    assert metrics["fid"] is not None


def test_evaluation_writes_into_another_folder_if_told(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    model, out = known_checkpoint / "model", known_checkpoint / "out"
    model.mkdir()
    metrics = evaluation.evaluate_checkpoint(model, evaluator, out)
    assert metrics == json.loads((out / "metrics.json").read_text())
    pictures = {"samples.png", "injection.png", "hits.png"}
    assert {path.name for path in out.glob("*.png")} == pictures
    assert [*model.iterdir()] == []


def test_evaluation_samples_by_the_sampler_of_its_settings(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, known_checkpoint: Path
) -> None:
    assert EvalSettings(num_samples=1, sampler_steps=1, threshold=0).sampler == "ddim"
    drawn = {}
    for name in ("ddim", "ddpm"):
        by_name = replace(evaluator, settings=replace(evaluator.settings, sampler=name))
        drawn[name] = evaluation.draw_samples(knows_everything(evaluator), 5, 3, SCHEDULE, by_name)
        sample = {"ddim": ddim_sample, "ddpm": ddpm_sample}[name]
        generator = torch.Generator().manual_seed(3)
        expected = sample(
            knows_everything(evaluator), (5, 1, 2, 2), SCHEDULE, 100, generator, clip=True
        )
        assert_close(drawn[name], expected, rtol=0, atol=0)
        assert evaluation.cache_key(known_checkpoint, by_name)["sampler"] == name
    assert not torch.equal(drawn["ddim"], drawn["ddpm"])


def test_evenly_spaced_images_are_distinct_and_cover_all() -> None:
    images = torch.arange(80, dtype=torch.uint8).view(80, 1, 1, 1)

    def chosen(num_images: int) -> list[int]:
        return evaluation.evenly_spaced(images[:num_images], 16).flatten().tolist()

    assert chosen(80) == [*range(0, 80, 5)]
    assert chosen(17) == [*range(16)]
    assert chosen(3) == [0, 1, 2]


def test_evaluation_looks_at_forgotten_images_from_all_of_them(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32 that differ in the first pixel, the second half is seen as well."""
    forget = torch.zeros(32, 1, 2, 2, dtype=torch.uint8)
    forget[:, 0, 0, 0] = 200 + torch.arange(32)
    many = replace(evaluator, split=replace(evaluator.split, forget=forget))
    seen = evaluation.inject(knows_everything(many), many, SCHEDULE, times=[0])
    assert seen.pictures["forgotten"][:, 0, 0, 0].tolist() == [*range(200, 232, 2)]
    of_nll = []
    monkeypatch.setattr(evaluation, "mean_nll", lambda model, x, *_: of_nll.append(x))
    evaluation.nll_metrics(knows_everything(many), SCHEDULE, many)
    assert of_nll[1][:, 0, 0, 0].tolist() == [*range(200, 232, 2)]


def test_metrics_row_names_every_figure_with_its_range(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    metrics = evaluation.evaluate_checkpoint(known_checkpoint, evaluator)
    ratios = {"forgotten": {"0-19": 2.0}, "remain": {"0-19": 1.5}}
    metrics = {**metrics, "retrain_ratio": ratios, "loss_z": -1.0}
    row = evaluation.metrics_row(metrics)
    assert row == {
        **{name: metrics[name] for name in ("hit_frequency", "fid", "inception_score")},
        "nll remain": metrics["nll"]["remain"],
        "nll forget": metrics["nll"]["forget"],
        **{f"inject t={t}": metrics["injection"][t]["l2"] for t in ("100", "250", "500")},
        **{f"oracle x0-mse t={r}": metrics["oracle_distance"][r] for r in RANGES},
        "ratio t=0-19": 2.0,
        "ratio at remain t=0-19": 1.5,
        "loss z": -1.0,
    }
    assert row.keys() - evaluation.table_row(metrics).keys() == {"ratio at remain t=0-19"}


def test_oracle_is_the_ideal_denoiser_of_the_remain_set(evaluator: Evaluator) -> None:
    oracle = ideal_denoiser(evaluator.split.remain, SCHEDULE)
    distance = evaluation.denoiser_distance(knows_remain(evaluator), oracle, evaluator, SCHEDULE)
    assert distance.x0 == distance.eps == dict.fromkeys(RANGES, 0.0)
    distance = evaluation.denoiser_distance(
        knows_everything(evaluator), oracle, evaluator, SCHEDULE
    )
    assert min(distance.eps[t_range] for t_range in RANGES[:2]) > 0


def test_denoiser_distance_is_in_x0_and_in_eps_units(evaluator: Evaluator) -> None:
    """A model that is 0.5 per pixel off in eps; and one that is 0.5 off in x0."""
    oracle = ideal_denoiser(evaluator.split.remain, SCHEDULE)

    def off_in_eps(x_t: Tensor, t: Tensor) -> Tensor:
        return oracle(x_t, t) + 0.5

    def off_in_x0(x_t: Tensor, t: Tensor) -> Tensor:
        shift = torch.tensor([0.5 * gamma(step) / sigma(step) for step in t.tolist()])
        return (oracle(x_t, t).double() + shift.view(-1, 1, 1, 1)).float()

    expected = pytest.approx(dict.fromkeys(RANGES, 0.25), rel=1e-3)
    assert evaluation.denoiser_distance(off_in_eps, oracle, evaluator, SCHEDULE).eps == expected
    expected = pytest.approx(dict.fromkeys(RANGES, 0.25), rel=5e-3)
    assert evaluation.denoiser_distance(off_in_x0, oracle, evaluator, SCHEDULE).x0 == expected


def test_denoiser_distance_is_taken_within_each_range_of_t(evaluator: Evaluator) -> None:
    """Of a model that is off by t, and so by at least and at most the ends of a range."""

    def off_by_t(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(x_t) + t.view(-1, 1, 1, 1)

    distance = evaluation.denoiser_distance(
        off_by_t, lambda x_t, t: torch.zeros_like(x_t), evaluator, SCHEDULE, draws=500
    )
    for t_range, value in distance.eps.items():
        low, high = map(int, t_range.split("-"))
        mean_square = (high**3 - low**3) / 3 / (high - low)
        assert value == pytest.approx(mean_square, rel=0.15)


def test_injection_lands_where_the_denoiser_leads(evaluator: Evaluator) -> None:
    split = evaluator.split
    known = evaluation.inject(knows_everything(evaluator), evaluator, SCHEDULE)
    assert list(known.similarity) == ["100", "250", "500"]
    assert torch.equal(known.pictures["from t=100"], known.pictures["forgotten"])
    forgotten = evaluation.inject(knows_remain(evaluator), evaluator, SCHEDULE)
    lengths = []
    for i, landed in enumerate(forgotten.pictures["from t=100"]):
        assert landed.tolist() in split.remain.tolist()
        (a,), (b,) = flat(landed[None] / 255), flat(split.targets[i % 2][None] / 255)
        lengths.append(math.sqrt(squared_distance(a, b)))
    assert forgotten.similarity["100"]["l2"] == pytest.approx(math.fsum(lengths) / 16, rel=1e-3)


def test_mean_nll_is_the_mean_over_the_images(evaluator: Evaluator) -> None:
    model = knows_everything(evaluator)
    for images in (evaluator.split.targets, evaluator.split.remain):  # 2, repeated, and 32
        expected = pytest.approx(standard_normal_bits(images), rel=1e-3)
        assert evaluation.mean_nll(model, images, evaluator, SCHEDULE) == expected


class Broken(nn.Module):
    """A model whose output is NaN."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t * math.nan


def test_mean_nll_of_a_broken_model_is_none(evaluator: Evaluator) -> None:
    targets = evaluator.split.targets
    assert evaluation.mean_nll(Broken(), targets, evaluator, SCHEDULE) is None


def test_nan_to_none_reaches_into_dicts_and_lists() -> None:
    value = {"a": math.nan, "b": {"c": math.inf, "d": 1.5}, "e": "nan", "f": [{"g": -math.inf}, 2]}
    expected = {"a": None, "b": {"c": None, "d": 1.5}, "e": "nan", "f": [{"g": None}, 2]}
    assert evaluation.nan_to_none(value) == expected
    assert math.isnan(evaluation.none_to_nan(None))
    assert evaluation.none_to_nan(1.5) == 1.5


# --- Attacks ---


def test_attack_row_has_the_last_figures_and_the_first_step_with_enough_hits() -> None:
    def curve(*hits: float) -> list[dict]:
        points = []
        for step, share in zip((0, 10, 30), hits, strict=True):
            points.append({"step": step, "hit_frequency": share, "inject": 5 - share, "nll": None})
        return points

    curves = {"remain": curve(0.0, 0.0, 0.04), "augmented": curve(0.0, 0.05, 0.2)}
    membership = {"auc": 0.5, "tpr_at_1_percent": 0.0}
    row = evaluation.attack_row({"curves": curves, "membership": membership, "back": 0.05})
    assert row == {
        "remain: hit_frequency": 0.04,
        "remain: inject t=250": 4.96,
        "remain: nll": None,
        "remain: back at step": None,
        "augmented: hit_frequency": 0.2,
        "augmented: inject t=250": 4.8,
        "augmented: nll": None,
        "augmented: back at step": 10,
        "membership auc": 0.5,
        "membership tpr_at_1_percent": 0.0,
    }


def test_attackers_train_on_their_own_images(evaluator: Evaluator) -> None:
    split = evaluator.split
    model = knows_remain(evaluator)
    few = evaluation.pick_look_alikes(evaluator)
    assert len(few) == 2
    assert not any(image in split.forget.tolist() for image in few.tolist())

    def images_of(attacker: str) -> list:
        images = evaluation.auxiliary_images(attacker, model, few, evaluator, SCHEDULE)
        return images.tolist()

    remain = split.remain.tolist()
    assert images_of("remain") == remain
    assert images_of("augmented") == remain + 16 * few.tolist()  # half of it look-alikes
    samples = images_of("samples")
    assert len(samples) == evaluator.settings.num_samples
    assert all(image in remain for image in samples)


def test_attacked_hits_are_nearer_to_the_forgotten_image_than_to_a_look_alike(
    evaluator: Evaluator,
) -> None:
    """All samples are one forgotten image; a look-alike that is the same image takes them away."""
    target = evaluator.split.targets[:1]
    model = KnownDenoiser(target)
    far = torch.zeros_like(target)
    assert evaluation.attacked_hit_frequency(model, far, evaluator, SCHEDULE) == 1
    assert evaluation.attacked_hit_frequency(model, target, evaluator, SCHEDULE) == 0


def test_membership_tells_what_the_model_knows(
    known_checkpoint: Path, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    knows = evaluation.membership(known_checkpoint, evaluator)
    assert knows == {"auc": 1.0, "tpr_at_1_percent": 1.0}
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda *_: (Broken(), SCHEDULE))
    broken = evaluation.membership(known_checkpoint, evaluator)
    assert broken == {"auc": None, "tpr_at_1_percent": None}


def test_look_alikes_of_a_blank_image_are_refused(evaluator: Evaluator) -> None:
    blank = torch.full((1, 1, 2, 2), 200, dtype=torch.uint8)
    blank_only = replace(evaluator, split=replace(evaluator.split, forget=blank))
    with pytest.raises(InputError, match="is blank, it has no look-alikes"):
        evaluation.pick_look_alikes(blank_only)


# --- Results on disk ---


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(folder, UNet(replace(TINY_UNET, sample_size=8)), SCHEDULE)
    return folder


def test_cache_is_used_only_for_the_same_key(
    tiny_checkpoint: Path, tmp_path: Path, evaluator: Evaluator
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    path = folder / "metrics.json"

    def cached(evaluator: Evaluator) -> dict | None:
        key = evaluation.cache_key(folder, evaluator)
        return evaluation.read_cached(path, key, evaluation.metrics_row)

    assert cached(evaluator) is None
    figures = dict.fromkeys(("hit_frequency", "fid", "inception_score"), 0.5)
    result = {**figures, "nll": {}, "injection": None, "oracle_distance": None}
    result |= evaluation.cache_key(folder, evaluator)
    path.write_text(json.dumps(result))
    assert cached(evaluator) == result
    settings = replace(evaluator.settings, num_samples=61)
    by_ddpm = replace(evaluator.settings, sampler="ddpm")
    for changed in (
        replace(evaluator, bf16=True),
        replace(evaluator, seed=1),
        replace(evaluator, nll_tolerance=1e-3),
        replace(evaluator, features="other"),
        replace(evaluator, data={"dataset": "folder", "forget": ["3"]}),
        replace(evaluator, settings=settings),
        replace(evaluator, settings=by_ddpm),
        replace(evaluator, threshold=HitThreshold(0.1, "small")),
    ):
        assert cached(changed) is None
    path.write_text(json.dumps({name: result[name] for name in result if name != "fid"}))
    assert cached(evaluator) is None
    path.write_text(json.dumps(result))
    model, schedule = load_model(folder)
    with torch.no_grad():
        model.conv_in.weight.add_(1)
    save_model(folder, model, schedule)
    assert cached(evaluator) is None


def test_attack_key_holds_what_an_attack_depends_on(
    tiny_checkpoint: Path, evaluator: Evaluator
) -> None:
    key = evaluation.attack_key(tiny_checkpoint, evaluator)
    assert key == json.loads(json.dumps(key))
    assert key.items() >= evaluation.cache_key(tiny_checkpoint, evaluator).items()
    assert (key["at"], key["copies"], key["attackers"][0]) == ([1], 2, "remain")


def attack_of(figures: dict[int, float | None]) -> dict[str, Any]:
    """An attack.json with these NLLs by step, and ten times as much for the other figures."""
    points = []
    for step, value in figures.items():
        tenfold = None if value is None else 10 * value
        points.append({"step": step, "hit_frequency": tenfold, "inject": tenfold, "nll": value})
    return {"curves": {"remain": points}}


def test_attack_curve_is_the_mean_and_the_range_over_models() -> None:
    attacks = [attack_of({0: 8.0, 15: 7.0}), attack_of({0: 9.0, 15: 4.0})]
    curve = evaluation.attack_curve(attacks, "remain", "nll")
    assert curve == AttackCurve([0, 15], mean=[8.5, 5.5], low=[8.0, 4.0], high=[9.0, 7.0])
    unknown = evaluation.attack_curve([attack_of({0: 8.0, 15: None})], "remain", "nll")
    assert math.isnan(unknown.mean[1])


def test_attacks_are_drawn_six_curves_a_plot_with_the_retrained_as_a_band(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[AttackPlot]]] = []

    def save(path: Path, rows: list[tuple[str, list[AttackPlot]]], _: str) -> None:
        drawn.extend(rows)
        path.touch()

    monkeypatch.setattr(evaluation, "save_attacks", save)
    labels = [f"method {i}" for i in range(8)]
    attacks = {label: [attack_of({0: float(i)})] for i, label in enumerate(labels)}
    attacks["retrain"] = [attack_of({0: 3.0}), attack_of({0: 5.0})]
    evaluation.draw_attacks(tmp_path / "attack.png", attacks)
    assert [title for title, _ in drawn] == ["attacked with: remain"] * 2
    (first, second) = [row for _, row in drawn]
    assert [list(plot.curves) for plot in first] == [labels[:6]] * 3
    assert [list(plot.curves) for plot in second] == [labels[6:]] * 3
    hits, inject, nll = first
    assert nll.band == AttackCurve([0], mean=[4.0], low=[3.0], high=[5.0])
    assert hits.band == inject.band == AttackCurve([0], mean=[40.0], low=[30.0], high=[50.0])
    assert nll.curves["method 2"].mean == [2.0]


def test_attack_takes_the_given_steps_rate_and_samples(digits_checkpoint: Path) -> None:
    parser = evaluate.make_parser(None)
    flags = ["--attack", "remain", "--attack-steps", "500", "15", "15"]
    args = parser.parse_args([*flags, "--attack-lr", "1e-4", "--attack-samples", "1000"])
    attack = build(digits_checkpoint, **spec.evaluation_options(args)).attack
    assert attack == evaluation.AttackSettings(at=(15, 500), lr=1e-4, samples=1000)
    args = parser.parse_args(["--attack"])
    default = build(digits_checkpoint, **spec.evaluation_options(args)).attack
    assert default == evaluation.AttackSettings()


# --- The evaluator ---


def build(folder: Path, **options: Any) -> Evaluator:
    """Over the digits; the feature network is not trained."""
    settings = EvalSettings(num_samples=4, sampler_steps=2, threshold=5.7)
    return build_evaluator([folder], flags.DATA_DEFAULTS, settings, **options)


@pytest.fixture
def digits_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    def untrained(*_: object) -> tuple[FeatureNetwork, str]:
        return Classifier(1, 10), "untrained"

    monkeypatch.setattr(evaluation, "own_features", untrained)
    save_model(tmp_path / "model", UNet(TINY_UNET), SCHEDULE)
    return tmp_path / "model"


def test_evaluator_takes_the_given_threshold_or_none(
    digits_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digit that is nearest to the T-shirt is at 6.45."""
    assert build(digits_checkpoint).threshold.value == 5.7
    assert build(digits_checkpoint, threshold=3.5).threshold.value == 3.5
    too_large = build(digits_checkpoint, threshold=6.5)
    assert too_large.threshold.value is None
    evaluation.describe(too_large)
    says = "warning: hits are not counted, and not left out of FID and IS: the nearest remain image"
    assert f"{says} is at 6.45, within the given threshold 6.5" in capsys.readouterr().out


def test_evaluator_refuses_a_folder_that_cannot_be_written_to(
    digits_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "own_features", lambda *_: pytest.fail("reached"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != digits_checkpoint)
    with pytest.raises(InputError, match=r"model may not be written to: .* evaluate a copy"):
        build(digits_checkpoint, outs=[digits_checkpoint])


def test_evaluator_refuses_to_replace_fuller_results(
    digits_checkpoint: Path, evaluator: Evaluator
) -> None:
    """Figures of what was to be forgotten are not replaced by those of an evaluation without it."""
    path = digits_checkpoint / "metrics.json"
    nothing = remain_only(evaluator).split
    for harmless in ({}, {"data": {"forget": []}}, {"data": 3}):
        path.write_text(json.dumps(harmless))
        evaluation._check_results(digits_checkpoint, nothing)
    path.write_text(json.dumps({"data": {"forget": ["cat/1.png", "2.png"]}}))
    evaluation._check_results(digits_checkpoint, evaluator.split)
    with pytest.raises(InputError, match=r"would be lost: give --forget cat/1.png 2.png again, or"):
        evaluation._check_results(digits_checkpoint, nothing)


def test_evaluator_attacks_by_all_means_unless_told(digits_checkpoint: Path) -> None:
    assert build(digits_checkpoint, attackers=[]).attackers == ("remain", "samples", "augmented")
    assert build(digits_checkpoint, attackers=["samples"]).attackers == ("samples",)


def test_evaluator_refuses_wrong_input_before_the_feature_network(
    digits_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(evaluation, "own_features", reached)
    with pytest.raises(InputError, match="--nll-tolerance 2: must be from 1e-12 to 1"):
        build(digits_checkpoint, nll_tolerance=2)
    with pytest.raises(InputError, match="is no checkpoint"):
        build(tmp_path / "none")
    save_model(tmp_path / "small", UNet(replace(TINY_UNET, sample_size=8)), SCHEDULE)
    with pytest.raises(InputError, match="makes 1x8x8 images, the data set has 1x16x16"):
        build(tmp_path / "small")


# --- Feature networks on disk ---


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels that a feature network was trained on, each time; all networks are different."""
    trained = []

    def fit(images_at: Any, labels: Tensor, seed: int, progress: str) -> tuple[Classifier, float]:
        torch.manual_seed(len(trained))
        assert images_at(torch.arange(len(labels))).shape == (len(labels), 1, 8, 8)
        trained.append(labels)
        return Classifier(1, 10, has_classes=len(labels.unique()) > 1).eval(), 0.75

    monkeypatch.setattr(features, "fit_classifier", fit)
    return trained


def image_set(labels: list[int]) -> ImageSet:
    """Black images, of which the last is to be forgotten."""
    n = len(labels)
    pixels = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    return ImageSet(pixels, torch.tensor(labels), forgotten=torch.arange(n) == n - 1)


def test_own_features_are_trained_once_per_data_set(tmp_path: Path, fits: list[Tensor]) -> None:
    cpu = torch.device("cpu")

    def own(digest: str, labels: list[int]) -> tuple[FeatureNetwork, str]:
        return features.own_features(lambda: image_set(labels), digest, 1, tmp_path, cpu)

    first, name = own("a", [0, 1, 2, 3])
    again, same_name = own("a", [0, 1, 2, 3])
    assert name == same_name == "own classifier, held-out accuracy 0.750"
    assert len(fits) == 1
    for (key, weight), other in zip(
        first.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert_close(weight, other, rtol=0, atol=0, msg=key)
    assert first.has_classes
    assert again.has_classes
    for _ in range(2):  # trained, then read
        network, name = own("b", [0, 0, 0])
        assert not network.has_classes
        assert name == "own classifier of quarter turns, held-out accuracy 0.750"
    assert len(fits) == 2


def test_own_features_know_every_labelled_image_whatever_is_forgotten(
    tmp_path: Path, fits: list[Tensor]
) -> None:
    load = partial(image_set, [4, NO_LABEL, 2, 3])
    features.own_features(load, "a", 1, tmp_path, torch.device("cpu"))
    assert fits[0].tolist() == [4, 2, 3]  # the last is to be forgotten


def test_own_features_of_a_damaged_record_are_trained_again(
    tmp_path: Path, fits: list[Tensor]
) -> None:
    for record in ({}, {"accuracy": "high", "has_classes": True}, {"accuracy": 0.5}):
        features.own_features(lambda: image_set([0, 1]), "a", 1, tmp_path, torch.device("cpu"))
        (tmp_path / "classifier.json").write_text(json.dumps({"digest": "a", **record}))
    features.own_features(lambda: image_set([0, 1]), "a", 1, tmp_path, torch.device("cpu"))
    assert len(fits) == 4


def test_own_features_are_not_trained_where_they_cannot_be_kept(
    tmp_path: Path, fits: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="may not be written to: the feature network of FID"):
        features.own_features(lambda: image_set([0]), "a", 1, tmp_path, torch.device("cpu"))
    assert fits == []


def test_inception_features_need_a_file_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"no weights at .*6726825d.pth; fetch them with"):
        features.inception_features("inception", download=False)
    with pytest.raises(InputError, match="no weights at"):
        features.inception_features(str(tmp_path / "none.pth"), download=False)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="is not torch-fidelity's Inception: Error"):
        features.inception_features(str(tmp_path / "other.pth"), download=False)
    torch.save(print, tmp_path / "code.pth")
    with pytest.raises(InputError, match="is not torch-fidelity's Inception: Weights only"):
        features.inception_features(str(tmp_path / "code.pth"), download=False)


def test_inception_features_fetch_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def fetch(url: str, **options: object) -> None:
        asked.append((url.rpartition("/")[2], options))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(InputError, match=r"cannot be fetched \(no network\)"):
        features.inception_features("inception", download=True)
    name = "weights-inception-2015-12-05-6726825d.pth"
    assert asked == [(name, {"check_hash": True, "weights_only": True})]


def test_inception_features_without_torch_fidelity_name_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r'pip install "tiny-retrack\[fid\]"'):
        features.inception_features("inception", download=False)


# --- The script ---


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are evaluated; no work is done."""
    folders = []

    def note(folder: Path, evaluator: Evaluator) -> dict[str, Any]:
        folders.append(folder)
        figures = dict.fromkeys(("hit_frequency", "fid", "inception_score"))
        return {**figures, "nll": {}, "injection": None, "oracle_distance": None}

    monkeypatch.setattr(evaluation, "own_features", lambda *_: (Classifier(1, 10), "untrained"))
    monkeypatch.setattr(evaluation, "evaluate_checkpoint", note)
    return folders


def test_evaluate_alone_takes_the_base_alone(
    base: Path, evaluated: list[Path], script: Script
) -> None:
    shutil.copytree(base, base.parent / "runs/digits-tshirt/base")
    done = script("evaluate", cwd=base.parent)
    assert (done.code, evaluated) == (0, [Path("runs/digits-tshirt/base")]), done.err
    assert "a hit: within 5.70 of a forgotten image (the data set's own;" in done.out


def test_evaluate_without_forget_does_not_replace_fuller_results(
    base: Path, evaluated: list[Path], script: Script
) -> None:
    folder = base.parent / "pictures"
    folder.mkdir()
    for name, level in {"a": 0, "b": 99, "c": 200}.items():
        Image.new("L", (16, 16), level).save(folder / f"{name}.png")
    write_json(base / "run.json", {})
    flags = ["base", "--dataset", "folder", "--data-dir", "pictures"]
    flags += ["--size", "16", "--channels", "1"]
    assert script("evaluate", *flags, cwd=base.parent).code == 0
    write_json(base / "metrics.json", {"data": {"forget": ["b.png"]}})
    refused = script("evaluate", *flags, cwd=base.parent)
    assert_refused(refused, "metrics.json has figures of", "--forget b.png again")
    assert script("evaluate", *flags, "--forget", "b.png", cwd=base.parent).code == 0
    assert len(evaluated) == 2


def test_evaluate_on_several_processes_works_once(
    base: Path, evaluated: list[Path], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them. Rank 0 waits for no one: none of the others is there."""
    outs = []
    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        done = script("evaluate", "base", cwd=base.parent)
        assert done.code == 0, done.err
        outs.append(done.out)
        assert not torch.distributed.is_initialized()
    assert evaluated == [Path("base")]
    assert "| base " in outs[0]
    assert outs[1] == ""


@pytest.mark.parametrize(
    ("name", "flag"),
    [("evaluate", "--sampler-step"), ("train_ddpm", "--step"), ("unlearn", "--step")],
)
def test_flags_are_not_abbreviated(name: str, flag: str, script: Script, tmp_path: Path) -> None:
    assert_refused(script(name, flag, "3", cwd=tmp_path), f"unrecognized arguments: {flag}")


# --- Against retrained networks ---


def recorded_model(folder: Path, seed: int, **record: Any) -> Path:
    """A network of random weights, with a run.json."""
    torch.manual_seed(seed)
    save_model(folder, UNet(TINY_UNET), SCHEDULE)
    write_json(folder / "run.json", {"seed": seed, **record})
    return folder


def test_models_that_may_have_seen_the_held_out_images_are_told(
    tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "fit_classifier", partial(fit_classifier, steps=5))
    data = {"dataset": "digits-tshirt", "hold_out": 0.1}
    held = recorded_model(tmp_path / "held", 1, data=data)
    seen = recorded_model(tmp_path / "seen", 2, data={**data, "hold_out": 0.0})
    flags = ["--num-samples", "70", "--sampler-steps", "2", "--nll-tolerance", "1"]
    done = script("evaluate", seen, held, *flags, cwd=tmp_path)
    assert done.code == 0, done.err
    told = [line for line in done.out.splitlines() if line.startswith("warning: ")]
    assert told == [
        f"warning: {seen} does not record --hold-out 0.1: it may have been trained on the images "
        "that are held out here"
    ]


def test_retrained_networks_are_checked(
    tmp_path: Path, evaluator: Evaluator, capsys: pytest.CaptureFixture[str]
) -> None:
    remain = torch.zeros(3, 1, 16, 16, dtype=torch.uint8)
    split = Split(remain, remain[:1] + 1, torch.zeros(3, dtype=torch.long))
    evaluator = replace(evaluator, split=split)
    folders = [recorded_model(tmp_path / str(seed), seed, remain_only=True) for seed in (1, 2)]
    with pytest.raises(InputError, match="--retrained: give at least two different"):
        spec.check_retrained(folders[:1])
    copy = recorded_model(tmp_path / "copy", 1, remain_only=True)
    with pytest.raises(InputError, match="--retrained: two of the folders hold the same"):
        spec.check_retrained([*folders, copy])
    spec.check_retrained(folders)
    evaluation.build_yardstick(folders, evaluator)
    assert capsys.readouterr().out.endswith("its unit cannot be said; train a third\n")
    base = recorded_model(tmp_path / "base", 3)
    yardstick = evaluation.build_yardstick([*folders, base], evaluator)
    out = capsys.readouterr().out
    assert "base does not say that it was trained with --remain-only" in out
    assert "was trained with another" not in out
    assert "the mean distance of two of 3 retrained networks, has a standard error of" in out
    data = {"dataset": "folder", "forget": ["cat.png"], "hold_out": 0.1}
    other = recorded_model(tmp_path / "other", 4, remain_only=True, data=data)
    evaluation.build_yardstick([*folders, other], replace(evaluator, data={"dataset": "folder"}))
    out = capsys.readouterr().out
    assert "other was trained with another --forget, --hold-out: it may have seen" in out
    evaluation.build_yardstick([*folders, other], replace(evaluator, data=data))
    assert "was trained with another" not in capsys.readouterr().out
    start = {"checkpoint": "1", "initial_seed": 1}
    later = recorded_model(tmp_path / "later", 5, remain_only=True, start=start)
    others = evaluation.build_yardstick([*folders, later], evaluator).retrained
    assert [each.seed for each in others] == [1, 2, 1]
    out = capsys.readouterr().out
    assert "warning: " + str(later) + " was trained with --checkpoint: networks that share" in out
    assert out.count("warning: ") == 1
    metrics = evaluation.with_retrain_ratio({"fid": 1.0}, folders[0], yardstick)
    assert metrics["fid"] == 1.0
    assert metrics["retrain_ratio"]["forgotten"]["100-199"] > 0


def test_evaluated_models_must_have_forgotten_the_same(tmp_path: Path) -> None:
    def model(name: str, **record: Any) -> Path:
        return recorded_model(tmp_path / name, 1, **record)

    data = {"dataset": "folder", "forget": ["cat.png"], "hold_out": 0.0}
    base = model("base", data={**data, "forget": []})
    one = model("one", method="vanilla", data=data)
    same = model("same", method="siss", data=data)
    other = model("other", method="siss", data={**data, "forget": ["dog.png"]})
    assert evaluation.recorded_data([base, one, same]) == data
    says = "one and .*other differ in --forget: evaluate them one by one, or say with --forget"
    with pytest.raises(InputError, match=says):
        evaluation.recorded_data([base, one, same, other])
    assert evaluation.recorded_data([one, other], is_forget_given=True) == {
        **data,
        "forget": ["dog.png"],
    }


def test_cached_metrics_are_without_those_of_retrained_networks(
    known_checkpoint: Path, evaluator: Evaluator
) -> None:
    metrics = evaluation.evaluate_once(known_checkpoint, evaluator)
    more = {**metrics, "retrain_ratio": {"forgotten": {"0-19": 2.0}}, "loss_z": 1.0}
    write_json(known_checkpoint / "metrics.json", more)
    assert evaluation.evaluate_once(known_checkpoint, evaluator) == metrics


def test_an_attacked_model_may_be_called_retrain(
    known_checkpoint: Path, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = {"step": 0, "hit_frequency": 0.5, "inject": 1.0, "nll": 2.0}
    attack = {"membership": {"auc": 0.5}, "curves": {"remain": [point, {**point, "step": 1}]}}
    monkeypatch.setattr(evaluation, "attack_checkpoint", lambda *_: {**attack, "back": 0.05})
    monkeypatch.chdir(known_checkpoint)
    Path("retrain").mkdir()
    assert "| retrain |" in evaluation.attack_all([Path("retrain")], evaluator)
    assert Path("retrain/attack.png").exists()
