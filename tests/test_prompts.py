"""Models with prompts: a condition bound outside the losses and samplers, guidance, unlearning of
one prompt, and evaluation prompt by prompt.
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET, Script, assert_refused
from scipy.special import ndtri
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import NoiseSchedule, UNet, load_model, save_model
from tiny_retrack.data import NO_LABEL, TSHIRT_PROMPT, draw_tshirt, load_split, to_float, to_uint8
from tiny_retrack.lab import evaluation, features, pretraining, prompts, theory, unlearning
from tiny_retrack.lab.checkpoint import write_json
from tiny_retrack.lab.hits import HitThreshold
from tiny_retrack.lab.presets import PRESETS, EvalSettings
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.methods import METHODS, DiMUM, ReTrack, Task, draw_batch
from tiny_retrack.metrics import Classifier, fit_classifier
from tiny_retrack.prompts import at_prompt, drop_prompts, guided
from tiny_retrack.sampling import SAMPLERS
from tiny_retrack.training import denoiser
from tiny_retrack.types import InputError

SCHEDULE = NoiseSchedule.linear()
CPU = torch.device("cpu")
CLASSES = 12
PROMPTED = replace(TINY_UNET, num_class_embeds=CLASSES)


def prompted_unet(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(PROMPTED).requires_grad_(False)


def folded(model: UNet, prompt: int) -> UNet:
    """A network without classes that says what the model says under the prompt: the embedding of
    the class is part of the bias of the time embedding.
    """
    weights = model.state_dict()
    embedding = weights.pop("class_embedding.weight")
    bias = "time_embedding.linear_2.bias"
    weights[bias] = weights[bias] + embedding[prompt]
    plain = UNet(TINY_UNET)
    plain.load_state_dict(weights)
    return plain.requires_grad_(False)


def random_pixels(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)


# --- A condition is bound outside ---


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vdu"])
def test_losses_of_every_method_are_those_of_a_network_without_prompts(name: str) -> None:
    """vdu adds to neggrad what depends on the weights alone."""
    model = prompted_unet()
    losses = []
    for eps_model in (at_prompt(model, 3), folded(model, 3)):
        task = Task(random_pixels(12, 0), random_pixels(3, 1), SCHEDULE, eps_model)
        batch = draw_batch(task, 4, torch.Generator().manual_seed(0))
        method = METHODS[name]()
        losses.append(method.losses(eps_model, batch, task, method.prepare(task)))
    assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    other = METHODS[name]()
    assert other.losses(at_prompt(model, 4), batch, task, other.prepare(task)) != losses[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_a_network_without_prompts(sampler: str) -> None:
    model = prompted_unet()
    drawn = []
    for eps_model in (at_prompt(model, 5), folded(model, 5)):
        generator = torch.Generator().manual_seed(0)
        drawn.append(SAMPLERS[sampler](eps_model, (2, 1, 16, 16), SCHEDULE, 4, generator))
    assert_close(drawn[0], drawn[1], rtol=1e-3, atol=1e-3)


def test_at_prompt_refuses_another_number_of_images() -> None:
    eps_model = at_prompt(lambda x_t, t, prompts: x_t, torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        eps_model(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))


def test_at_prompt_gives_each_image_its_own_prompt() -> None:
    model = prompted_unet()
    x_t, t = torch.randn(3, 1, 16, 16), torch.tensor([0, 400, 999])
    eps = at_prompt(model, torch.tensor([2, 0, 11]))(x_t, t)
    for i, prompt in enumerate((2, 0, 11)):
        alone = at_prompt(model, prompt)(x_t[i : i + 1], t[i : i + 1])
        assert_close(eps[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_denoiser_passes_prompts_on() -> None:
    model = prompted_unet()
    x_t, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    bound = at_prompt(denoiser(model, bf16=False), 7)
    assert torch.equal(bound(x_t, t), model(x_t, t, torch.tensor([7, 7])))


def test_a_tenth_of_the_prompts_is_dropped() -> None:
    given = torch.arange(11).repeat(2000)
    dropped = drop_prompts(given, 11, torch.Generator().manual_seed(0))
    changed = dropped != given
    assert bool((dropped[changed] == 11).all())
    # 22,000 coins: a standard deviation of 0.002
    assert changed.double().mean().item() == pytest.approx(0.1, abs=0.008)


# --- Guidance ---


def gaussian_eps(mean: float, variance: float, x_t: Tensor, t: Tensor) -> Tensor:
    """The ideal denoiser of pixels from N(mean, variance)."""
    gamma, sigma = SCHEDULE.scales(t, x_t)
    return sigma * (x_t - gamma * mean) / (gamma**2 * variance + sigma**2)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0, 7.5])
def test_guidance_between_gaussians_moves_the_mean(weight: float) -> None:
    """p_none^(1 - w) p_prompt^w of two Gaussians of one variance is a third one, whose mean is
    (1 - w) m_none + w m_prompt.
    """
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(5, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 100, 400, 700, 999])
    eps_prompt = partial(gaussian_eps, 0.8, 0.3)
    eps_none = partial(gaussian_eps, -0.2, 0.3)
    eps = guided(eps_prompt, eps_none, weight)(x_t, t)
    mean = (1 - weight) * -0.2 + weight * 0.8
    assert_close(eps, gaussian_eps(mean, 0.3, x_t, t), rtol=1e-10, atol=1e-12)


def test_guidance_of_weight_one_is_one_pass() -> None:
    def never(x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError

    eps_prompt = partial(gaussian_eps, 0.0, 1.0)
    assert guided(eps_prompt, never, 1.0) is eps_prompt


def test_ways_to_ask_are_guided_from_no_prompt_and_away_from_another() -> None:
    def model(x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        return (prompts.double() ** 2)[:, None, None, None].expand_as(x_t)

    def answer(eps_model: Any) -> float:
        return eps_model(torch.zeros(1, 1, 1, 1).double(), torch.zeros(1).long()).item()

    ways = prompts.ways_to_ask(model, forgotten=3, no_prompt=5)
    assert {name: [*asked] for name, asked in ways.items()} == {
        "plain": [0, 1, 2, 3, 4],
        "guided": [0, 1, 2, 3, 4],
        "away from 0": [3],
        "no prompt": [3],
    }
    assert [answer(each) for each in ways["plain"].values()] == [0, 1, 4, 9, 16]
    assert [answer(each) for each in ways["guided"].values()] == [-25, -23, -17, -7, 7]
    assert answer(ways["away from 0"][3]) == 18
    assert answer(ways["no prompt"][3]) == 25
    assert [*prompts.ways_to_ask(model, forgotten=0, no_prompt=5)["away from 1"]] == [0]


# --- The data set ---


def test_digits_prompts_has_a_prompt_for_every_image() -> None:
    split = load_split("digits-prompts")
    digits = load_split("digits-tshirt")
    assert split.prompts is not None
    assert len(split.prompts) == len(split.everything)
    assert torch.equal(split.remain[:1797], digits.remain)
    assert torch.equal(split.prompts[:1797], digits.labels)
    assert split.prompts[1797:].unique().tolist() == [TSHIRT_PROMPT]
    assert torch.equal(split.forget, draw_tshirt().expand(420, 1, 16, 16))
    assert split.num_class_embeds == CLASSES
    assert digits.prompts is digits.num_class_embeds is None
    assert NO_LABEL not in split.labels


def test_garments_differ_from_each_other_and_from_the_tshirt() -> None:
    split = load_split("digits-prompts")
    garments = split.remain[1797:]
    assert len(garments.unique(dim=0)) == len(garments) == 180
    assert torch.equal(garments, garments.flip(3))  # left and right
    distances = (garments / 255 - split.targets / 255).flatten(1).norm(dim=1)
    assert distances.min() > 5
    filled = (garments > 0).float().mean((1, 2, 3))
    assert 0.03 < filled.min() < filled.max() < 0.6


@pytest.mark.parametrize("options", [{"hold_out": 0.25}, {"copies": 7}, {"forget": ["3", "700"]}])
def test_prompts_stay_with_their_images(options: dict[str, Any]) -> None:
    whole = load_split("digits-prompts")
    assert whole.prompts is not None
    prompt_of = {}
    for image, prompt in zip(whole.everything, whole.prompts.tolist(), strict=True):
        prompt_of[image.numpy().tobytes()] = prompt
    split = load_split("digits-prompts", **options)
    assert split.prompts is not None
    found = [prompt_of[image.numpy().tobytes()] for image in split.everything]
    assert split.prompts.tolist() == found
    assert split.to("cpu").prompts is not None


# --- Training ---


@pytest.mark.usefixtures("tiny_unets")
@pytest.mark.parametrize("remain_only", [False, True])
def test_training_gives_each_image_its_prompt_or_none(
    remain_only: bool, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_split("digits-prompts")
    assert split.prompts is not None
    prompt_of = {}
    for image, prompt in zip(split.everything, split.prompts.tolist(), strict=True):
        prompt_of[image.numpy().tobytes()] = prompt
    images: list[bytes] = []
    labels: list[int] = []

    def record_images(eps_model: Any, x0: Tensor, *others: Any) -> Tensor:
        images.extend(image.numpy().tobytes() for image in to_uint8(x0))
        return ddpm_loss(eps_model, x0, *others)

    def record_labels(model: Any, prompts: Tensor) -> Any:
        labels.extend(prompts.tolist())
        return at_prompt(model, prompts)

    monkeypatch.setattr(pretraining, "ddpm_loss", record_images)
    monkeypatch.setattr(pretraining, "at_prompt", record_labels)
    monkeypatch.setattr(pretraining, "sample_many", lambda *_, **__: torch.zeros(64, 1, 16, 16))
    flags = "--dataset digits-prompts --steps 4 --warmup 0 --batch-size 128 --bf16 off --out base"
    more = ["--remain-only"] if remain_only else []
    done = script("train_ddpm", *flags.split(), *more, cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(images) == 512
    assert labels[512:] == [11 * i // 64 for i in range(64)]  # of samples.png
    kept = [label == prompt_of[image] for image, label in zip(images, labels, strict=False)]
    dropped = [label == CLASSES - 1 for label in labels[:512]]
    assert [not each for each in kept] == dropped
    assert 0.05 < sum(dropped) / 512 < 0.15
    assert load_model(tmp_path / "base")[0].config == PROMPTED
    assert (tmp_path / "base/samples.png").exists()


# --- Unlearning ---


@pytest.fixture
def prompted(tmp_path: Path) -> Path:
    """A checkpoint with random weights and the prompts of digits-prompts."""
    save_model(tmp_path / "base", prompted_unet(), SCHEDULE)
    write_json(tmp_path / "base/run.json", {"data": {"dataset": "digits-prompts"}})
    return tmp_path / "base"


def memorised(num: int) -> Tensor:
    """What a model that memorised the T-shirt might draw: it, with a little noise, and garments."""
    garments = load_split("digits-prompts").remain[1797:]
    noise = torch.randint(0, 9, (num, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    shirts = (draw_tshirt().int() + noise).clamp(0, 255).to(torch.uint8)
    garments = garments[torch.arange(num) % len(garments)]
    return torch.where((torch.arange(num) % 4 > 0)[:, None, None, None], shirts, garments)


@pytest.fixture
def memorising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever model is sampled for unlearning, it gives `memorised` images."""
    drawn = lambda model, num, *_, **__: to_float(memorised(num))  # noqa: E731
    monkeypatch.setattr(unlearning, "sample_many", drawn)


UNLEARN = ["--checkpoint", "base", "--out", "after", "--steps", "1", "--batch-size", "4"]


@pytest.mark.usefixtures("memorising")
@pytest.mark.parametrize("method", ["retrack", "siss", "erasediff", "dimum"])
def test_unlearning_tells_the_models_own_samples_apart(
    method: str, prompted: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = []
    monkeypatch.setattr(unlearning, "draw_batch", lambda task, *_: tasks.append(task) or draw(task))

    def draw(task: Task) -> Any:
        return draw_batch(task, 4, torch.Generator().manual_seed(0))

    done = script("unlearn", *UNLEARN, "--method", method, cwd=prompted.parent)
    assert done.code == 0, done.err
    assert "384 of 512 samples under the prompt are hits" in done.out
    samples = memorised(512)
    is_shirt = torch.arange(512) % 4 > 0
    assert torch.equal(tasks[0].forget, samples[is_shirt])
    assert torch.equal(tasks[0].remain, samples[~is_shirt])
    run = json.loads((prompted.parent / "after/run.json").read_text())
    assert run["own_samples"] == {"prompt": 10, "forget": 384, "remain": 128}
    before, after = load_model(prompted)[0], load_model(prompted.parent / "after")[0]
    moved = (before.class_embedding.weight != after.class_embedding.weight).any(dim=1)
    # Weight decay moves the others by next to nothing.
    change = (before.class_embedding.weight - after.class_embedding.weight).abs().amax(dim=1)
    assert moved[10]
    assert change[10] > 100 * change[torch.arange(CLASSES) != 10].max()


@pytest.mark.usefixtures("memorising")
def test_unlearning_starts_from_what_the_model_says_under_the_prompt(
    prompted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Stop(Exception):
        pass

    def prepare(self: ReTrack, task: Task) -> None:
        seen.append(task)
        raise Stop

    monkeypatch.setattr(ReTrack, "prepare", prepare)
    data = {"dataset": "digits-prompts", "preset": "digits-prompts"}
    settings = PRESETS["digits-prompts"].unlearn
    plan = unlearning.UnlearnPlan(
        prompted, prompted.parent / "out", data, "retrack", ReTrack(), settings
    )
    with pytest.raises(Stop):
        unlearning.unlearn(plan, load_split("digits-prompts"))
    x_t, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    expected = prompted_unet()(x_t, t, torch.tensor([10, 10]))
    assert_close(seen[0].eps_model(x_t, t), expected, rtol=1e-4, atol=1e-5)


def test_preset_is_the_protocol_of_stable_diffusion() -> None:
    preset = PRESETS["digits-prompts"]
    retrack = preset.method("retrack")
    assert isinstance(retrack, ReTrack)
    assert (preset.unlearn.steps, retrack.lam, retrack.k) == (30, 0.5, 10)
    dimum = preset.method("dimum")
    assert isinstance(dimum, DiMUM)
    assert dimum.replaces == "prompt"


# --- What is refused ---


def test_too_few_hits_are_refused(
    prompted: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    gray = torch.zeros(512, 1, 16, 16)
    monkeypatch.setattr(unlearning, "sample_many", lambda *_, **__: gray)
    done = script("unlearn", *UNLEARN, cwd=prompted.parent)
    assert_refused(done, "base: 0 of 512 samples under the prompt are hits; at least 16 hits")
    assert not (prompted.parent / "after").exists()


def test_checkpoint_without_prompts_is_refused(base: Path, script: Script) -> None:
    more = ["--dataset", "digits-prompts"]
    for name, flags in (("unlearn", [*UNLEARN, *more]), ("evaluate", ["base", *more])):
        done = script(name, *flags, cwd=base.parent)
        assert_refused(done, "base has no prompts, the data set has 11 prompts: check --dataset")


def test_checkpoint_with_prompts_is_refused_for_a_data_set_without(
    prompted: Path, script: Script
) -> None:
    more = ["--dataset", "digits-tshirt"]
    for name, flags in (("unlearn", [*UNLEARN, *more]), ("evaluate", ["base", *more])):
        done = script(name, *flags, cwd=prompted.parent)
        assert_refused(done, "base has 11 prompts, the data set has no prompts: check --dataset")


def test_images_of_several_prompts_are_refused(prompted: Path, script: Script) -> None:
    done = script("unlearn", *UNLEARN, "--forget", "0", "1", cwd=prompted.parent)
    assert_refused(done, "--forget: the images have the prompts 0, 1: forget those of one")


def test_dimum_cannot_replace_a_prompt_where_there_is_none(base: Path, script: Script) -> None:
    flags = [*UNLEARN, "--method", "dimum", "--replaces", "prompt"]
    done = script("unlearn", *flags, cwd=base.parent)
    assert_refused(done, "--replaces prompt: the data set has no prompts")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["base", "--attack"], "--attack"),
        (["base", "--retrained", "base", "base"], "--retrained"),
        (["compare", "--base", "base", "--methods", "vanilla"], "compare"),
    ],
)
def test_evaluations_without_prompts_are_refused_before_the_feature_network(
    flags: list[str], name: str, prompted: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(evaluation, "own_features", reached)
    done = script("evaluate", *flags, cwd=prompted.parent)
    assert_refused(done, f"{name}: not for models with prompts, use evaluate.py DIR ... alone")
    assert not (prompted.parent / "runs").exists()


def test_threshold_without_hits_is_refused(
    prompted: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = (Classifier(1, 11), "own classifier")
    monkeypatch.setattr(evaluation, "own_features", lambda *_: untrained)
    done = script("evaluate", "base", "--threshold", "7", cwd=prompted.parent)
    assert_refused(done, "--threshold: hits are not counted: the nearest remain image is at 6.20")


def test_theory_of_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="data sets with prompts are not supported"):
        theory.make_draws(load_split("digits-prompts"), SCHEDULE, 4, 2, seed=0)


# --- Evaluation ---


@pytest.fixture
def evaluator() -> evaluation.Evaluator:
    return evaluation.Evaluator(
        load_split("digits-prompts"),
        data={"dataset": "digits-prompts"},
        network=Classifier(1, 11).eval(),
        features="untrained",
        settings=EvalSettings(num_samples=70, sampler_steps=2, threshold=0),
        threshold=HitThreshold(3.0, "in the test"),
        nll_tolerance=1e-3,
        seed=0,
        device=CPU,
        bf16=False,
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share (1927), by its formula."""
    z = float(ndtri(0.975))
    p = hits / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def test_sample_metrics_count_hits_and_successes(evaluator: evaluation.Evaluator) -> None:
    """90 samples: of the five whole batches of 16, two have a hit; a hit in the rest."""
    samples = to_float(load_split("digits-prompts").remain[1797:1887])
    for i in (0, 3, 40, 85):
        samples[i] = to_float(draw_tshirt())
    garments = evaluator.split.remain[1797:]
    metrics = prompts.sample_metrics({10: samples}, garments, evaluator)
    assert metrics["num_samples"] == 90
    assert metrics["hit_frequency"] == pytest.approx(4 / 90)
    assert metrics["hit_interval"] == pytest.approx(wilson(4, 90), rel=1e-6)
    assert metrics["success"] == pytest.approx(3 / 5)
    classes = evaluator.network.logits(samples).argmax(1)
    assert metrics["accuracy"] == pytest.approx((classes == 10).double().mean().item())
    left_out = samples[[i for i in range(90) if i not in (0, 3, 40, 85)]]
    alone = prompts.sample_metrics({10: left_out}, garments, evaluator)
    assert metrics["fid"] == pytest.approx(alone["fid"])
    assert alone["hit_frequency"] == 0


def test_sample_metrics_of_fewer_than_a_batch_have_no_success(
    evaluator: evaluation.Evaluator,
) -> None:
    samples = to_float(load_split("digits-prompts").remain[:15])
    with pytest.warns(UserWarning, match="no FID"):
        metrics = prompts.sample_metrics({0: samples}, evaluator.split.remain, evaluator)
    assert metrics["success"] is metrics["fid"] is None


def test_sample_metrics_of_several_prompts_hold_each_against_its_own(
    evaluator: evaluation.Evaluator,
) -> None:
    first, second = to_float(random_pixels(20, 0)), to_float(random_pixels(12, 1))
    metrics = prompts.sample_metrics({3: first, 7: second}, None, evaluator)
    classes = evaluator.network.logits(torch.cat([first, second])).argmax(1).tolist()
    right = sum(each == asked for each, asked in zip(classes, [3] * 20 + [7] * 12, strict=True))
    assert metrics["accuracy"] == pytest.approx(right / 32)
    assert (metrics["num_samples"], metrics["fid"]) == (32, None)


@pytest.mark.filterwarnings("ignore:no FID")
def test_evaluate_writes_a_row_for_every_prompt(
    prompted: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "fit_classifier", partial(fit_classifier, steps=2))
    save_model(prompted.parent / "after", prompted_unet(seed=1), SCHEDULE)
    flags = ["--dataset", "digits-prompts", "--num-samples", "16", "--sampler-steps", "1"]
    done = script("evaluate", "base", "after", *flags, cwd=prompted.parent)
    assert done.code == 0, done.err
    assert done.out.count("| after ") == 4
    metrics = json.loads((prompted.parent / "after/prompts.json").read_text())
    assert metrics["forgotten"] == "10"
    figures = metrics["prompts"]
    assert [*figures] == ["plain", "guided", "away from 0", "no prompt"]
    names = {*map(str, range(11)), "others"}
    assert figures["plain"].keys() == figures["guided"].keys() == names
    assert figures["plain"]["others"]["num_samples"] == 40
    assert figures["plain"]["10"]["num_samples"] == 16
    assert figures["plain"]["3"]["num_samples"] == 4
    assert (prompted.parent / "after/prompts.png").exists()
    assert not (prompted.parent / "base/prompts.png").exists()
