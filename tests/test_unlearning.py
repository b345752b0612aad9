"""Unlearning as a whole: a model that learned an image forgets it; and what a run reads from disk.

The model is a small multilayer perceptron on 8x8 digits, so that training and unlearning take
seconds.
"""

import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import oracle
import pytest
import torch
from conftest import TINY_UNET
from PIL import Image
from torch import Tensor, nn

import train_ddpm
import unlearn
from tiny_retrack import UNet, load_model, save_model
from tiny_retrack.data import load_split, random_batch, to_float
from tiny_retrack.lab import pretraining, unlearning
from tiny_retrack.lab.presets import UnlearnSettings, configure
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.methods import Method, ReTrack, Task, Vanilla, draw_batch
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import cosine_with_warmup, fit, make_optimizer
from tiny_retrack.types import EpsModel, InputError, Loss

SCHEDULE = NoiseSchedule.linear()
CPU = torch.device("cpu")

# --- A run of seconds that unlearns ---

SIZE = 8
FREQUENCIES = (0.5, 1, 2, 4)  # of the features of t
TRAIN_STEPS = 1000
UNLEARN_STEPS = 150


class Perceptron(nn.Module):
    """eps = sigma_t x_t + gamma_t net(x_t, t): at net = 0 the denoiser of N(0, I) data."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        pixels = SIZE * SIZE
        self.net = nn.Sequential(
            nn.Linear(pixels + 2 * len(FREQUENCIES), width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, pixels),
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angles = [math.pi * frequency * t / SCHEDULE.num_steps for frequency in FREQUENCIES]
        features = [angle.sin() for angle in angles] + [angle.cos() for angle in angles]
        net_input = torch.cat([x_t.flatten(1), torch.stack(features, dim=1)], dim=1)
        gamma, sigma = SCHEDULE.scales(t, x_t)
        return sigma * x_t + gamma * self.net(net_input).view_as(x_t)


def digits_tshirt_task() -> Task:
    """200 digits and 10 copies of the T-shirt, at 8x8."""
    split = load_split("digits-tshirt")

    def halved(images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float(), 2).round().to(torch.uint8)

    return Task(halved(split.remain[:200]), halved(split.forget[:10]), SCHEDULE)


@dataclass(frozen=True)
class Probe:
    """What unlearning should change, and what it should not.

    Attributes:
        distance: mean squared distance per pixel, in eps units, to the remain set's ideal denoiser
            at x_t of the forgotten image, t in 200..399.
        remain_loss: the DDPM loss on the remain set.
    """

    distance: float
    remain_loss: float


@torch.no_grad()
def probe(model: nn.Module, task: Task) -> Probe:
    generator = torch.Generator().manual_seed(1)
    t = torch.randint(200, 400, (32,), generator=generator)
    noise = torch.randn(32, 1, SIZE, SIZE, generator=generator)
    x_t = SCHEDULE.q_sample(to_float(task.forget[:1]).expand_as(noise), t, noise)
    remain = oracle.flat(task.remain)
    distances = []
    rows = zip(oracle.flat(x_t), t.tolist(), oracle.flat(model(x_t, t)), strict=True)
    for x, step, eps in rows:
        ideal = oracle.ideal_eps(x, step, remain)
        distances.append(oracle.squared_distance(eps, ideal) / len(x))
    x0, t, noise = random_batch(task.remain, 2048, SCHEDULE.num_steps, generator)
    remain_loss = ddpm_loss(model, x0, t, noise, SCHEDULE).item()
    return Probe(oracle.average(distances), remain_loss)


@pytest.fixture(scope="module")
def trained() -> tuple[Perceptron, Task]:
    """A model that was trained on the remain and the forget set."""
    task = digits_tshirt_task()
    images = torch.cat([task.remain, task.forget])
    torch.manual_seed(0)
    model = Perceptron()

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss]:
        x0, t, noise = random_batch(images, 64, SCHEDULE.num_steps, generator)
        return (ddpm_loss(eps_model, x0, t, noise, SCHEDULE),)

    lr = 3e-3
    steps = fit(
        model,
        losses,
        make_optimizer(model, lr),
        steps=TRAIN_STEPS,
        lr_at=cosine_with_warmup(lr, 20, TRAIN_STEPS),
        seed=0,
        device=CPU,
    )
    for _ in steps:
        pass
    return model, task


def unlearned(trained: tuple[Perceptron, Task], method: Method) -> Perceptron:
    """A copy of the trained model, after UNLEARN_STEPS steps of the method."""
    base, task = trained
    model = Perceptron()
    model.load_state_dict(base.state_dict())
    prepared = method.prepare(task)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss, ...]:
        return method.losses(eps_model, draw_batch(task, 64, generator), task, prepared)

    lr = 2e-4
    steps = fit(
        model,
        losses,
        make_optimizer(model, lr),
        steps=UNLEARN_STEPS,
        lr_at=lambda step: lr,
        seed=0,
        device=CPU,
        combine=method.combine,
    )
    for _ in steps:
        pass
    return model


@pytest.mark.parametrize("target", ["knn", "topk", "exact"])
def test_retrack_halves_the_distance_to_the_oracle_and_keeps_the_remain_loss(
    target: str, trained: tuple[Perceptron, Task]
) -> None:
    base, task = trained
    before = probe(base, task)
    method = ReTrack(target=target, k=10, lam=0.3, snr_cap=1.0)
    after = probe(unlearned(trained, method), task)
    assert after.distance < before.distance / 2
    assert after.remain_loss < 1.05 * before.remain_loss


def test_vanilla_fine_tuning_leaves_most_of_the_distance_to_the_oracle(
    trained: tuple[Perceptron, Task],
) -> None:
    """The control: as many steps without a forget loss do not unlearn."""
    base, task = trained
    before = probe(base, task)
    after = probe(unlearned(trained, Vanilla()), task)
    assert after.distance > 0.75 * before.distance


# --- What a run reads from disk ---


def plan_of(checkpoint: Path, out: Path, method: str, **given: object) -> unlearning.UnlearnPlan:
    settings, configured = configure("digits-tshirt", method, given)
    data = {"dataset": "digits-tshirt"}
    return unlearning.UnlearnPlan(checkpoint, out, data, method, configured, settings)


def tiny_unet(seed: int) -> UNet:
    torch.manual_seed(seed)
    return UNet(TINY_UNET)


def test_kept_params_are_those_of_the_kept_checkpoints(tmp_path: Path) -> None:
    kept = {f"step-{step}": tiny_unet(step) for step in (2, 4, 6)}
    for name, model in kept.items():
        save_model(tmp_path / name, model, SCHEDULE)
    found = unlearning.kept_params(tmp_path, tiny_unet(0))
    assert len(found) == 3
    for params, model in zip(found, kept.values(), strict=True):
        for param, expected in zip(params, model.parameters(), strict=True):
            assert torch.equal(param, expected)


def test_kept_params_refuse_another_network(tmp_path: Path) -> None:
    save_model(tmp_path / "step-1", tiny_unet(0), SCHEDULE)
    other = UNet(replace(TINY_UNET, block_out_channels=(8, 8)))
    save_model(tmp_path / "step-2", other, SCHEDULE)
    with pytest.raises(InputError, match="step-2 is not of the same network"):
        unlearning.kept_params(tmp_path, tiny_unet(0))


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "got 0: train with --keep N"),
        ([1], "got 1: train with --keep N"),
        ([1, 1], "are all the same: train with --keep N"),
    ],
    ids=["none", "one", "the same twice"],
)
def test_vdu_run_refuses_too_few_kept_checkpoints(
    seeds: list[int], message: str, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(base, tiny_unet(0), SCHEDULE)
    for step, seed in enumerate(seeds):
        save_model(base / f"step-{step}", tiny_unet(seed), SCHEDULE)
    plan = plan_of(base, tmp_path / "out", "vdu", steps=1, batch_size=2)
    with pytest.raises(InputError, match=message):
        unlearning.unlearn(plan, load_split("digits-tshirt"))
    assert not (tmp_path / "out").exists()


def test_dimum_run_takes_its_alternative_from_an_image_file(tmp_path: Path) -> None:
    picture = torch.arange(256, dtype=torch.uint8).view(16, 16)
    Image.fromarray(picture.numpy()).save(tmp_path / "other.png")
    split = load_split("digits-tshirt")
    plan = plan_of(tmp_path, tmp_path / "out", "dimum", alternative=str(tmp_path / "other.png"))
    model = tiny_unet(0)
    task = unlearning.make_task(plan, split, model, model, SCHEDULE)
    prepared = plan.method.prepare(task)
    assert torch.equal(prepared, picture.expand_as(split.forget))
    missing = plan_of(tmp_path, tmp_path / "out", "dimum", alternative="nearest")
    with pytest.raises(InputError, match="--alternative nearest: neither knn nor random"):
        unlearning.make_task(missing, split, model, model, SCHEDULE)


# --- What pretraining keeps for VDU ---

TINY_RUN = ["--steps", "6", "--batch-size", "2", "--warmup", "2", "--save-every", "2"]
TINY_RUN += ["--keep", "2", "--bf16", "off"]


@pytest.fixture
def pretrained(tmp_path: Path, tiny_unets: None) -> Path:
    out = tmp_path / "whole"
    train_ddpm.main([*TINY_RUN, "--out", str(out)])
    return out


def weights_of(folder: Path) -> dict[str, Tensor]:
    model, _ = load_model(folder)
    return model.state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    theirs, ours = weights_of(a), weights_of(b)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_pretraining_keeps_the_last_checkpoints_for_vdu(pretrained: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in pretrained.glob("step-*")) == ["step-4", "step-6"]
    assert_same_weights(pretrained / "step-6", pretrained)
    out = tmp_path / "vdu"
    flags = ["--checkpoint", str(pretrained), "--method", "vdu", "--steps", "1"]
    unlearn.main([*flags, "--batch-size", "2", "--out", str(out)])
    assert (out / "run.json").exists()


def test_pretraining_keeps_the_same_checkpoints_when_it_was_resumed(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_fit(*args, **options):
        for done in fit(*args, **options):
            if done.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield done

    resumed = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "fit", interrupted_fit)
        with pytest.raises(SystemExit):
            train_ddpm.main([*TINY_RUN, "--out", str(resumed)])
    with pytest.raises(InputError, match=r"keep = \[2, 2\]"):
        train_ddpm.main([*TINY_RUN, "--out", str(resumed), "--resume", "--save-every", "1"])
    train_ddpm.main([*TINY_RUN, "--out", str(resumed), "--resume"])
    assert sorted(path.name for path in resumed.glob("step-*")) == ["step-4", "step-6"]
    for name in ("step-4", "step-6", "."):
        assert_same_weights(pretrained / name, resumed / name)


def test_pretraining_refuses_to_keep_more_checkpoints_than_it_saves(tmp_path: Path) -> None:
    says = "--keep 4: 6 steps have 3 checkpoints, lower --save-every"
    with pytest.raises(InputError, match=says):
        train_ddpm.main([*TINY_RUN, "--keep", "4", "--out", str(tmp_path / "x")])


def test_learning_rate_is_constant_or_a_cosine_after_a_warm_up() -> None:
    settings = UnlearnSettings(steps=20, batch_size=1, lr=2.0)
    constant = unlearning.learning_rate(settings)
    assert [constant(step) for step in (0, 10, 19)] == [2.0, 2.0, 2.0]
    cosine = unlearning.learning_rate(replace(settings, decay="cosine"))
    assert [cosine(step) for step in (0, 1, 2, 11, 20)] == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0])
