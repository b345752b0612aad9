"""unlearn.py's dict of methods: each row's gradient against the method's formula (one oracle a
method).
"""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import train_ddpm
import unlearn
from tiny_retrack import NoiseSchedule, UNet, UNetConfig, load_model, save_model
from tiny_retrack.data import Split, to_float
from tiny_retrack.lab.presets import UnlearnSettings
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.posterior import nearest_neighbors
from tiny_retrack.types import InputError
from unlearn import METHODS, TARGETS, Batch, Problem, draw_batch, pick_alternatives, weight_moments

SCHEDULE = NoiseSchedule.linear()
SETTINGS = UnlearnSettings(
    steps=1,
    batch_size=6,
    lr=1e-3,
    k=3,
    lam=0.3,
    siss_lam=0.4,
    rescale="10%",
    gamma=0.2,
    snr_cap=0.7,
)
MEAN, STD = torch.tensor([0.31, -0.45, 0.17]).double(), torch.tensor([0.02, 0.1, 0.05]).double()


class Toy(nn.Module):
    """eps = a x + b x^2 + c t/1000, weights in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.4, 0.2], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.w[0] * x + self.w[1] * x * x + self.w[2] * t[:, None, None, None] / 1000


@pytest.fixture(scope="module")
def problem() -> Problem:
    generator = torch.Generator().manual_seed(0)
    remain = torch.randint(0, 256, (9, 1, 2, 3), generator=generator, dtype=torch.uint8)
    forget = torch.randint(0, 256, (2, 1, 2, 3), generator=generator, dtype=torch.uint8)
    neighbors, _ = nearest_neighbors(forget, remain, SETTINGS.k)
    return Problem(
        remain, forget, neighbors, SCHEDULE, SETTINGS, "knn", alternatives=remain[[4, 7]]
    )


@pytest.fixture(scope="module")
def batch(problem: Problem) -> Batch:
    drawn = draw_batch(problem, torch.Generator().manual_seed(1))
    as_double = {
        name: value.double() for name, value in vars(drawn).items() if value.is_floating_point()
    }
    return replace(drawn, **as_double)


def sample_gradient(x0: Tensor, t: int, noise: Tensor, target: Tensor | None) -> list[float]:
    """d/dw ||eps_w(x_t, t) - target||^2 for one image, pixel by pixel; the target is the noise if
    none is given.
    """
    gamma, sigma = SCHEDULE.gamma[t].item(), SCHEDULE.sigma[t].item()
    w, out = [0.3, -0.4, 0.2], [0.0, 0.0, 0.0]
    target = noise if target is None else target
    for a, e, v in zip(
        x0.flatten().tolist(), noise.flatten().tolist(), target.flatten().tolist(), strict=True
    ):
        x = gamma * a + sigma * e
        residual = w[0] * x + w[1] * x * x + w[2] * t / 1000 - v
        for i, d in enumerate((x, x * x, t / 1000)):
            out[i] += 2 * residual * d
    return out


def mean(vectors: list[list[float]]) -> list[float]:
    return [math.fsum(v[i] for v in vectors) / len(vectors) for i in range(3)]


def ddpm(
    x0: Tensor, t: Tensor, noise: Tensor, target: Tensor | None = None, snr_cap: float = math.inf
) -> list[float]:
    """Gradient of a batch's mean squared error, each weighted by min(1, snr_cap / SNR)."""
    gradients = []
    for i in range(len(x0)):
        snr = float((SCHEDULE.gamma[t[i]] / SCHEDULE.sigma[t[i]]) ** 2)
        gradient = sample_gradient(
            x0[i], int(t[i]), noise[i], None if target is None else target[i]
        )
        gradients.append([min(1.0, snr_cap / snr) * g for g in gradient])
    return mean(gradients)


def mixture_target(x_t: Tensor, t: int, images: Tensor) -> Tensor:
    """sum_n p_n v_n by loops."""
    gamma, sigma = SCHEDULE.gamma[t], SCHEDULE.sigma[t]
    v = [(x_t - gamma * a) / sigma for a in images]
    logits = [-0.5 * float((u * u).sum()) for u in v]
    weights = [math.exp(x - max(logits)) for x in logits]
    return sum(w * u for w, u in zip(weights, v, strict=True)) / math.fsum(weights)


def retrack(p: Problem, b: Batch) -> list[float]:
    pixels = p.remain.double() / 127.5 - 1
    forget = p.forget.double() / 127.5 - 1
    targets = []
    for i in range(len(b.t)):
        t = int(b.t[i])
        x_t = SCHEDULE.gamma[t] * b.x0_forget[i] + SCHEDULE.sigma[t] * b.noise[i]
        around = forget[b.forget_index[i]] if p.target == "knn" else x_t / SCHEDULE.gamma[t]
        k = len(pixels) if p.target == "exact" else p.settings.k
        order = sorted(range(len(pixels)), key=lambda n: float((pixels[n] - around).square().sum()))
        targets.append(mixture_target(x_t, t, pixels[order[:k]]))
    forget_part = ddpm(b.x0_forget, b.t, b.noise, torch.stack(targets), p.settings.snr_cap)
    remain_part = ddpm(b.x0_remain, b.t_remain, b.noise_remain)
    return [0.3 * f + 0.7 * r for f, r in zip(forget_part, remain_part, strict=True)]


def erasediff(p: Problem, b: Batch) -> list[float]:
    r, f = ddpm(b.x0_remain, b.t, b.noise), ddpm(b.x0_forget, b.t, b.noise, b.uniform)
    scale = max(
        1e-3 - math.fsum(x * y for x, y in zip(r, f, strict=True)) / math.fsum(y * y for y in f), 0
    )
    return [x + scale * y for x, y in zip(r, f, strict=True)]


def subtract(r: list[float], u: list[float]) -> list[float]:
    """g_r - s g_u with ||s g_u|| = 10% of ||g_r||."""
    scale = 0.1 * math.hypot(*r) / math.hypot(*u)
    return [x - scale * y for x, y in zip(r, u, strict=True)]


def siss(p: Problem, b: Batch) -> list[float]:
    parts: tuple[list, list] = ([], [])
    for i in range(len(b.t)):
        t = int(b.t[i])
        gamma, sigma = SCHEDULE.gamma[t], SCHEDULE.sigma[t]
        start = b.x0_forget[i] if b.from_forget[i] else b.x0_remain[i]
        m = gamma * start + sigma * b.noise[i]
        eps = [(m - gamma * a) / sigma for a in (b.x0_remain[i], b.x0_forget[i])]
        density = [
            math.exp(-0.5 * float((e * e).sum() - min((e * e).sum() for e in eps))) for e in eps
        ]
        mixture = 0.6 * density[0] + 0.4 * density[1]
        for part, e, q in zip(parts, eps, density, strict=True):
            part.append([q / mixture * g for g in sample_gradient(start, t, b.noise[i], e)])
    return subtract(mean(parts[0]), mean(parts[1]))


def vdu(p: Problem, b: Batch) -> list[float]:
    ascent, w = ddpm(b.x0_forget, b.t, b.noise), [0.3, -0.4, 0.2]
    return [-0.8 * ascent[i] + 0.2 * (w[i] - float(MEAN[i])) / float(STD[i]) ** 2 for i in range(3)]


def dimum(p: Problem, b: Batch) -> list[float]:
    """lam (x_t of the forget image onto its alternative, and the alternative itself) + (1 - lam)
    vanilla.
    """
    alternative = (p.alternatives.double() / 127.5 - 1)[b.forget_index]
    targets = []
    for i in range(len(b.t)):
        gamma, sigma = SCHEDULE.gamma[b.t[i]], SCHEDULE.sigma[b.t[i]]
        targets.append(
            (gamma * b.x0_forget[i] + sigma * b.noise[i] - gamma * alternative[i]) / sigma
        )
    redirected = ddpm(b.x0_forget, b.t, b.noise, torch.stack(targets))
    learned = ddpm(alternative, b.t, b.noise)
    kept = ddpm(b.x0_remain, b.t_remain, b.noise_remain)
    return [0.3 * (f + a) + 0.7 * r for f, a, r in zip(redirected, learned, kept, strict=True)]


ORACLES = {
    "vanilla": lambda p, b: ddpm(b.x0_remain, b.t_remain, b.noise_remain),
    "neggrad": lambda p, b: [-g for g in ddpm(b.x0_forget, b.t, b.noise)],
    "erasediff": erasediff,
    "siss": siss,
    "siss-no-is": lambda p, b: subtract(
        ddpm(b.x0_remain, b.t, b.noise), ddpm(b.x0_forget, b.t, b.noise)
    ),
    "retrack": retrack,
    "vdu": vdu,
    "dimum": dimum,
}


def test_every_method_has_an_oracle() -> None:
    assert set(ORACLES) == set(METHODS)


@pytest.mark.parametrize(
    ("name", "target"), [(m, "knn") for m in METHODS] + [("retrack", t) for t in TARGETS]
)
def test_gradient_is_the_formulas(name: str, target: str, problem: Problem, batch: Batch) -> None:
    model = Toy()
    problem = replace(problem, target=target, weights=([model.w], [MEAN], [STD]))
    losses = METHODS[name].losses(model, problem, batch)
    grads = [list(torch.autograd.grad(loss, [model.w], retain_graph=True)) for loss in losses]
    combine = METHODS[name].combine
    (got,) = combine(problem)(*grads) if combine else grads[0]
    expected = torch.tensor(ORACLES[name](problem, batch), dtype=torch.float64)
    assert_close(got, expected, rtol=2e-6, atol=1e-9)  # to_float rounds pixels to float32


def test_a_batch_is_drawn_from_the_right_sets(problem: Problem) -> None:
    b = draw_batch(
        replace(problem, settings=replace(SETTINGS, batch_size=4000)),
        torch.Generator().manual_seed(0),
    )
    for images, source in ((b.x0_remain, problem.remain), (b.x0_forget, problem.forget)):
        assert_close(images.unique(dim=0), (source.float() / 127.5 - 1).unique(dim=0))
    assert_close(b.x0_forget, (problem.forget / 127.5 - 1)[b.forget_index])
    for t in (
        b.t,
        b.t_remain,
    ):  # uniform over 0..999: the bounds are 5 standard errors of 4,000 draws
        assert (t.min() >= 0, t.max() <= 999) == (True, True)
        assert abs(t.double().mean() - 499.5) < 5 * 288.7 / 4000**0.5
    assert abs(b.from_forget.double().mean() - 0.4) < 5 * (0.24 / 4000) ** 0.5
    assert not torch.equal(b.t, b.t_remain)


def test_vdu_without_ascent_is_the_pretrainings_gaussian_and_without_it_is_neggrad(
    problem: Problem, batch: Batch
) -> None:
    model = Toy()
    problem = replace(problem, weights=([model.w], [MEAN], [STD]))
    (prior,) = METHODS["vdu"].losses(
        model, replace(problem, settings=replace(SETTINGS, gamma=1.0)), batch
    )
    expected = (
        -torch.distributions.Normal(MEAN, STD).log_prob(model.w)
        - STD.log()
        - math.log(math.tau) / 2
    )
    assert_close(prior, expected.sum())
    (ascent,) = METHODS["vdu"].losses(
        model, replace(problem, settings=replace(SETTINGS, gamma=0.0)), batch
    )
    assert_close(ascent, METHODS["neggrad"].losses(model, problem, batch)[0])


def test_dimum_with_one_neighbour_is_retrack_with_k_1_and_the_alternatives_own_loss(
    problem: Problem, batch: Batch
) -> None:
    nearest = replace(problem, alternatives=problem.remain[problem.neighbors[:, 0]])
    (loss,) = METHODS["dimum"].losses(Toy(), nearest, batch)
    published = replace(
        problem, neighbors=problem.neighbors[:, :1], settings=replace(SETTINGS, snr_cap=10_000.0)
    )
    (retracked,) = METHODS["retrack"].losses(Toy(), published, batch)
    own = ddpm_loss(
        Toy(),
        to_float(nearest.alternatives)[batch.forget_index].double(),
        batch.t,
        batch.noise,
        SCHEDULE,
    )
    assert_close(loss, retracked + SETTINGS.lam * own, rtol=2e-6, atol=0)


def test_an_alternative_is_given_once_for_all_copies_of_an_image(
    problem: Problem, tmp_path: Path
) -> None:
    copies = problem.forget[[0, 1, 0, 0, 1]]
    split = Split(problem.remain, copies, torch.zeros(len(problem.remain)))
    nearest, _ = nearest_neighbors(copies, problem.remain, 2)
    found = pick_alternatives("knn", split, nearest, seed=0)
    distance = [[(f.double() - r.double()).square().sum() for r in problem.remain] for f in copies]
    assert torch.equal(found, torch.stack([problem.remain[d.index(min(d))] for d in distance]))
    draws = [pick_alternatives("random", split, nearest, seed) for seed in range(5)]
    for drawn in draws:
        assert torch.equal(drawn, drawn[[0, 1, 0, 0, 1]])
        assert all((image == problem.remain).flatten(1).all(1).any() for image in drawn)
    assert any(not torch.equal(drawn, draws[0]) for drawn in draws)
    assert torch.equal(draws[1], pick_alternatives("random", split, nearest, seed=1))

    shape = (1, 3, 3)  # pictures are square
    square = Split(torch.zeros(4, *shape).byte(), torch.zeros(2, *shape).byte(), torch.zeros(4))
    picture = torch.arange(9, dtype=torch.uint8).reshape(3, 3) * 20
    Image.fromarray(picture.numpy()).save(tmp_path / "other.png")
    found = pick_alternatives(str(tmp_path / "other.png"), square, nearest, seed=0)
    assert torch.equal(found, picture.expand(2, *shape))
    with pytest.raises(InputError, match="nor an image file"):
        pick_alternatives("nearest", square, nearest, seed=0)


def test_weight_moments_are_those_of_the_kept_checkpoints(tmp_path: Path) -> None:
    config = UNetConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    models = [UNet(config) for _ in range(4)]
    with torch.no_grad():
        for model in models:
            model.conv_in.bias.fill_(0.25)  # one that does not move
    for step, model in enumerate(models[:1]):
        save_model(tmp_path / f"step-{step}", model, SCHEDULE)
    with pytest.raises(InputError, match=r"kept 1 checkpoints .* --keep"):
        weight_moments(tmp_path, models[3])
    save_model(tmp_path / "step-1", models[0], SCHEDULE)
    with pytest.raises(InputError, match="are all the same"):
        weight_moments(tmp_path, models[3])
    save_model(tmp_path / "step-1", UNet(replace(config, block_out_channels=(16,))), SCHEDULE)
    with pytest.raises(InputError, match=r"step-1 is not of the same network"):
        weight_moments(tmp_path, models[3])
    for step, model in enumerate(models[:3]):
        save_model(tmp_path / f"step-{step}", model, SCHEDULE)
    own, means, stds = weight_moments(tmp_path, models[3])
    names = [name for name, _ in models[3].named_parameters()]
    mean, deviation = {}, {}
    for name in names:
        a, b, c = (model.get_parameter(name).detach().double() for model in models[:3])
        mean[name] = (a + b + c) / 3
        deviation[name] = (
            ((a - mean[name]) ** 2 + (b - mean[name]) ** 2 + (c - mean[name]) ** 2) / 2
        ).sqrt()
    every = [value for name in names for value in deviation[name].flatten().tolist()]
    floor = 0.1 * math.sqrt(math.fsum(value * value for value in every) / len(every))
    for i, name in enumerate(names):
        assert own[i] is models[3].get_parameter(name)
        assert_close(means[i].double(), mean[name], rtol=1e-5, atol=1e-7)
        expected = torch.tensor([max(value, floor) for value in deviation[name].flatten().tolist()])
        assert_close(stds[i].flatten(), expected, rtol=1e-4, atol=0)
    assert_close(
        stds[names.index("conv_in.bias")], torch.full((8,), floor)
    )  # the one that did not move


TINY = [
    "--steps",
    "6",
    "--batch-size",
    "2",
    "--warmup",
    "2",
    "--save-every",
    "2",
    "--keep",
    "2",
    "--bf16",
    "off",
]


def test_kept_checkpoints_are_the_last_ones_and_a_resumed_run_keeps_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args, **options):
        for done in fit(*args, **options):
            if done.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield done

    fit = train_ddpm.fit
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    train_ddpm.main([*TINY, "--out", str(whole)])
    with monkeypatch.context() as patch:
        patch.setattr(train_ddpm, "fit", interrupted)
        with pytest.raises(SystemExit):
            train_ddpm.main([*TINY, "--out", str(halved)])
    with pytest.raises(InputError, match=r"keep = \[2, 2\]"):
        train_ddpm.main([*TINY, "--out", str(halved), "--resume", "--save-every", "1"])
    train_ddpm.main([*TINY, "--out", str(halved), "--resume"])
    for out in (whole, halved):
        assert sorted(path.name for path in out.glob("step-*")) == ["step-4", "step-6"]
    for name in ("step-4", "step-6", "."):
        a, b = load_model(whole / name)[0].state_dict(), load_model(halved / name)[0].state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)
    last, own = load_model(whole / "step-6")[0].state_dict(), load_model(whole)[0].state_dict()
    assert all(torch.equal(last[key], own[key]) for key in own)

    flags = ["--checkpoint", str(whole), "--method", "vdu", "--steps", "1", "--batch-size", "2"]
    unlearn.main([*flags, "--out", str(tmp_path / "vdu")])
    assert (tmp_path / "vdu/run.json").exists()
    with pytest.raises(
        InputError, match="--keep 4: 6 steps have 3 checkpoints, lower --save-every"
    ):
        train_ddpm.main([*TINY, "--keep", "4", "--out", str(tmp_path / "x")])
