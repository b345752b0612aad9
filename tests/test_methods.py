"""Every method: the gradient that it trains with against the plain-Python oracle.

`ORACLES` has a row for each method and `TARGET_ORACLES` one for each target of ReTrack; a method or
a target without a row fails by name.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple
from unittest.mock import patch

import oracle
import pytest
import torch
from test_losses import SCHEDULE, SHAPE, Linear, PlainLinear, draw, gradient_of_quadratic
from torch import Tensor
from torch.testing import assert_close

from tiny_retrack import methods, posterior
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.methods import (
    METHODS,
    SISS,
    TARGETS,
    VDU,
    Batch,
    DiMUM,
    EraseDiff,
    Method,
    NegGrad,
    ReTrack,
    SISSNoIS,
    Task,
    Vanilla,
    draw_batch,
)
from tiny_retrack.posterior import exact_target, gaussian_moments, gaussian_target
from tiny_retrack.types import InputError

BATCH_SIZE = 6
COUNT = len(Linear().params)  # weights of the model

# --- What the methods are given, in torch and in plain Python ---


def random_pixels(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)


KEPT = [draw(COUNT, seed=seed) for seed in (11, 12, 13)]  # the weights of three checkpoints
REMAIN = random_pixels(9, seed=0)
MOMENTS = gaussian_moments(REMAIN)


def mixture_eps(x_t: Tensor, t: Tensor) -> Tensor:
    """A model that is half the identity, 0.3 the Gaussian and 0.2 the exact denoiser."""
    x_t = x_t.double()
    noise = 0.3 * gaussian_target(x_t, t, MOMENTS, SCHEDULE)
    return noise + 0.2 * exact_target(x_t, t, REMAIN, SCHEDULE)


TASK = Task(
    remain=REMAIN,
    forget=random_pixels(2, seed=1),
    schedule=SCHEDULE,
    eps_model=mixture_eps,
    kept_params=[[params] for params in KEPT],
)


def task_of(model: Linear) -> Task:
    return replace(TASK, params=[model.params])


def make_batch() -> Batch:
    """A batch in float64, whose generator is where `draw_batch` left it."""
    batch = draw_batch(TASK, BATCH_SIZE, torch.Generator().manual_seed(1))
    images = ("x0_remain", "x0_forget", "noise", "noise_remain")
    return replace(batch, **{name: getattr(batch, name).double() for name in images})


@dataclass(frozen=True)
class Numbers:
    """The task and the batch as the oracle takes them: an image is a list of floats."""

    remain: list[list[float]]
    forget: list[list[float]]
    x0_remain: list[list[float]]
    x0_forget: list[list[float]]
    forget_index: list[int]
    t: list[int]
    t_remain: list[int]
    noise: list[list[float]]
    noise_remain: list[list[float]]
    generator_state: Tensor  # after the batch was drawn

    def generator(self) -> torch.Generator:
        """For what a method draws besides the batch, from the same state as the method's own."""
        generator = torch.Generator()
        generator.set_state(self.generator_state)
        return generator


def numbers_of(batch: Batch) -> Numbers:
    return Numbers(
        remain=oracle.flat(TASK.remain),
        forget=oracle.flat(TASK.forget),
        x0_remain=oracle.flat(batch.x0_remain),
        x0_forget=oracle.flat(batch.x0_forget),
        forget_index=batch.forget_index.tolist(),
        t=batch.t.tolist(),
        t_remain=batch.t_remain.tolist(),
        noise=oracle.flat(batch.noise),
        noise_remain=oracle.flat(batch.noise_remain),
        generator_state=batch.generator.get_state(),
    )


# --- The oracle of each target ---

# (x_t, t, the forget image, the remain images, the settings) -> eps
TargetOracle = Callable[[list[float], int, list[float], list[list[float]], Any], list[float]]


def generalizing_oracle(
    x_t: list[float], t: int, forget: list[float], remain: list[list[float]], settings: ReTrack
) -> list[float]:
    """What the model itself says, as it is a mixture of closed forms everywhere; towards t = 700,
    and from there on, the Gaussian denoiser.
    """
    gaussian = oracle.gaussian_target(x_t, t, remain)
    exact = oracle.exact_target(x_t, t, remain)
    own = [0.3 * a + 0.2 * b for a, b in zip(gaussian, exact, strict=True)]
    share = min(max((t - 600) / 100, 0), 1)
    return [(1 - share) * a + share * b for a, b in zip(own, gaussian, strict=True)]


# name of the target: its value for one x_t of one forget image. A new target needs one row.
TARGET_ORACLES: dict[str, TargetOracle] = {
    "knn": lambda x_t, t, a, remain, s: oracle.knn_target(x_t, t, a, remain, s.k),
    "topk": lambda x_t, t, a, remain, s: oracle.topk_target(x_t, t, remain, s.k),
    "exact": lambda x_t, t, a, remain, s: oracle.exact_target(x_t, t, remain),
    "gaussian": lambda x_t, t, a, remain, s: oracle.gaussian_target(x_t, t, remain),
    "local": lambda x_t, t, a, remain, s: oracle.local_target(x_t, t, remain, SHAPE, s.patch),
    "generalizing": generalizing_oracle,
}


def target_oracle(name: str) -> TargetOracle:
    if name not in TARGET_ORACLES:
        pytest.fail(
            f"the target {name!r} has no oracle: add a row to TARGET_ORACLES in "
            f"tests/test_methods.py"
        )
    return TARGET_ORACLES[name]


# --- The oracle of each method ---


def remain_loss(model: PlainLinear, n: Numbers) -> float:
    return oracle.ddpm_loss(model, n.x0_remain, n.t_remain, n.noise_remain)


def vanilla_oracle(method: Vanilla, model: PlainLinear, n: Numbers) -> tuple[float]:
    return (remain_loss(model, n),)


def neggrad_oracle(method: NegGrad, model: PlainLinear, n: Numbers) -> tuple[float]:
    return (oracle.neggrad_loss(model, n.x0_forget, n.t, n.noise),)


def erasediff_oracle(method: EraseDiff, model: PlainLinear, n: Numbers) -> tuple[float, float]:
    uniform = oracle.flat(torch.rand(BATCH_SIZE, *SHAPE, generator=n.generator()))
    return oracle.erasediff_losses(model, n.x0_remain, n.x0_forget, n.t, n.noise, uniform)


def siss_oracle(method: SISS, model: PlainLinear, n: Numbers) -> tuple[float, float]:
    coins = torch.rand(BATCH_SIZE, generator=n.generator()).tolist()
    from_forget = [coin < method.siss_lam for coin in coins]
    return oracle.siss_losses(
        model, n.x0_remain, n.x0_forget, n.t, n.noise, from_forget, method.siss_lam
    )


def siss_no_is_oracle(method: SISSNoIS, model: PlainLinear, n: Numbers) -> tuple[float, float]:
    remain = oracle.ddpm_loss(model, n.x0_remain, n.t, n.noise)
    forget = oracle.ddpm_loss(model, n.x0_forget, n.t, n.noise)
    return remain, forget


def retrack_oracle(method: ReTrack, model: PlainLinear, n: Numbers) -> tuple[float]:
    target_of = target_oracle(method.target)
    targets = []
    for a, t, e in zip(n.x0_forget, n.t, n.noise, strict=True):
        x_t = oracle.noised(a, t, e)
        targets.append(target_of(x_t, t, a, n.remain, method))
    forget = oracle.retrack_loss(model, n.x0_forget, n.t, n.noise, targets, method.snr_cap)
    return (method.lam * forget + (1 - method.lam) * remain_loss(model, n),)


def vdu_oracle(method: VDU, model: PlainLinear, n: Numbers) -> tuple[float]:
    mean, std = oracle.weight_moments([params.tolist() for params in KEPT])
    weight = method.prior_weight
    return (oracle.vdu_loss(model, n.x0_forget, n.t, n.noise, model.params, mean, std, weight),)


def dimum_oracle(method: DiMUM, model: PlainLinear, n: Numbers) -> tuple[float]:
    alternatives = []
    for a in n.x0_forget:
        (nearest,) = oracle.nearest_neighbors(a, n.remain, 1)
        alternatives.append(n.remain[nearest])
    forget = oracle.dimum_loss(model, n.x0_forget, alternatives, n.t, n.noise)
    return (method.lam * forget + (1 - method.lam) * remain_loss(model, n),)


def subtract(g_remain: list[float], g_forget: list[float]) -> list[float]:
    return oracle.siss_gradient(g_remain, g_forget, "10%")


class Row(NamedTuple):
    """The oracle of a method.

    Attributes:
        settings: of the method that is compared; other values than the defaults, where it has any.
        losses: the method's losses, as quadratics in the weights of the model.
        combine: one gradient of those of the losses; None where there is only one loss.
    """

    settings: dict[str, Any]
    losses: Callable[[Any, PlainLinear, Numbers], tuple[float, ...]]
    combine: Callable[[list[float], list[float]], list[float]] | None = None


# name of the method: its oracle. A new method needs one row.
ORACLES: dict[str, Row] = {
    "vanilla": Row({}, vanilla_oracle),
    "neggrad": Row({}, neggrad_oracle),
    "erasediff": Row({}, erasediff_oracle, oracle.erasediff_gradient),
    "siss": Row({"siss_lam": 0.55, "rescale": "10%"}, siss_oracle, subtract),
    "siss-no-is": Row({"rescale": "10%"}, siss_no_is_oracle, subtract),
    "retrack": Row({"k": 3, "patch": 1, "lam": 0.3, "snr_cap": 0.7}, retrack_oracle),
    "vdu": Row({"prior_weight": 0.2}, vdu_oracle),
    "dimum": Row({"lam": 0.3, "alternative": "knn"}, dimum_oracle),
}


def oracle_of(name: str) -> Row:
    if name not in ORACLES:
        pytest.fail(
            f"the method {name!r} has no oracle: add a row to ORACLES in tests/test_methods.py"
        )
    return ORACLES[name]


def gradient_by_method(method: methods.Method, model: Linear) -> Tensor:
    task = task_of(model)
    losses = method.losses(model, make_batch(), task, method.prepare(task))
    gradients = []
    for loss in losses:
        gradients.append(torch.autograd.grad(loss, [model.params], retain_graph=True))
    (gradient,) = method.combine(*gradients)
    return gradient


def gradient_by_oracle(row: Row, method: methods.Method, params: list[float]) -> list[float]:
    numbers = numbers_of(make_batch())

    def losses_of(model: PlainLinear) -> tuple[float, ...]:
        return row.losses(method, model, numbers)

    gradients = gradient_of_quadratic(losses_of, params)
    if row.combine is not None:
        return row.combine(*gradients)
    (gradient,) = gradients
    return gradient


def labels() -> list[str]:
    """Every method; retrack with each of its targets."""
    names = [name for name in METHODS if name != "retrack"]
    return names + [f"retrack-{target}" for target in TARGETS]


@pytest.mark.parametrize("label", labels())
def test_method_gradient_equals_the_oracle(label: str) -> None:
    target = label.removeprefix("retrack-")
    name = label if target == label else "retrack"
    row = oracle_of(name)
    settings = {**row.settings, "target": target} if name == "retrack" else row.settings
    method = METHODS[name](**settings)
    model = Linear()
    expected = gradient_by_oracle(row, method, model.params.tolist())
    gradient = gradient_by_method(method, model)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_oracles_are_of_methods_and_targets_that_exist() -> None:
    assert set(ORACLES) <= set(METHODS)
    assert set(TARGET_ORACLES) <= set(TARGETS)


@pytest.mark.parametrize("name", METHODS)
def test_oracle_settings_are_not_the_defaults(name: str) -> None:
    """Where they were the same, a setting that the method does not use would not show."""
    defaults = asdict(METHODS[name]())  # pyright: ignore[reportArgumentType]
    compared = {**defaults, **oracle_of(name).settings}
    for setting, default in defaults.items():
        if isinstance(default, int | float):
            assert compared[setting] != default, (
                f"give {setting} another value in ORACLES[{name!r}]"
            )


@pytest.mark.parametrize("target", TARGETS)
def test_target_equals_the_oracle(target: str) -> None:
    """Each x_t of a batch has its own forget image."""
    target_of = target_oracle(target)
    batch = make_batch()
    n = numbers_of(batch)
    x_t = SCHEDULE.q_sample(batch.x0_forget, batch.t, batch.noise)
    settings = ReTrack(target=target, k=3, patch=1)
    found = TARGETS[target](TASK, settings)(x_t, batch.t, batch.forget_index)
    expected = []
    for x, t, index in zip(oracle.flat(x_t), n.t, n.forget_index, strict=True):
        expected.append(target_of(x, t, n.forget[index], n.remain, settings))
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert set(n.forget_index) == {0, 1}
    assert min(n.t) < posterior.LOCAL_BELOW < max(n.t)
    assert_close(found.flatten(1), wanted, rtol=1e-7, atol=1e-9)


# --- What is drawn ---


def test_batch_is_drawn_from_the_right_sets() -> None:
    batch = draw_batch(TASK, 4000, torch.Generator().manual_seed(0))
    drawn_remain = {tuple(image) for image in oracle.flat(batch.x0_remain)}
    drawn_forget = {tuple(image) for image in oracle.flat(batch.x0_forget)}
    assert drawn_remain == {tuple(image) for image in oracle.flat(TASK.remain)}
    assert drawn_forget == {tuple(image) for image in oracle.flat(TASK.forget)}
    assert oracle.flat(batch.x0_forget) == oracle.flat(TASK.forget[batch.forget_index])


def test_batch_times_are_uniform_and_its_noise_normal() -> None:
    """Within five standard errors of 4,000 draws; both halves have their own."""
    count = 4000
    batch = draw_batch(TASK, count, torch.Generator().manual_seed(0))
    for t in (batch.t, batch.t_remain):
        assert t.min() >= 0
        assert t.max() <= 999
        assert abs(t.double().mean() - 499.5) < 5 * 288.7 / math.sqrt(count)
    for noise in (batch.noise, batch.noise_remain):
        pixels = noise.numel()
        assert abs(noise.double().mean()) < 5 / math.sqrt(pixels)
        assert abs(noise.double().square().mean() - 1) < 5 * math.sqrt(2 / pixels)
    correlation = (batch.noise * batch.noise_remain).double().mean()
    assert abs(correlation) < 5 / math.sqrt(batch.noise.numel())
    assert not torch.equal(batch.t, batch.t_remain)


@pytest.mark.parametrize("name", METHODS)
def test_method_draws_only_from_the_generator_of_the_batch(name: str) -> None:
    method = METHODS[name](**oracle_of(name).settings)
    state = torch.get_rng_state()
    first = gradient_by_method(method, Linear())
    torch.manual_seed(5)
    assert torch.equal(gradient_by_method(method, Linear()), first)
    torch.set_rng_state(state)
    gradient_by_method(method, Linear())
    assert torch.equal(torch.get_rng_state(), state)


# --- What is prepared ---


@pytest.mark.parametrize(
    "method",
    [Vanilla(), NegGrad(), EraseDiff(), SISS(), SISSNoIS(), ReTrack("topk", 3), ReTrack("exact")],
    ids=str,
)
def test_method_without_knn_searches_no_neighbors(method: methods.Method) -> None:
    with patch.object(methods, "nearest_neighbors") as search:
        method.prepare(TASK)
    assert not search.called


@pytest.mark.parametrize("target", ["knn", "topk"])
def test_retrack_refuses_more_neighbors_than_remain_images(target: str) -> None:
    ReTrack(target=target, k=9).prepare(TASK)
    with pytest.raises(InputError, match="k = 10: must be from 1 to the number of images, 9"):
        ReTrack(target=target, k=10).prepare(TASK)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (ReTrack, {"lam": -3.0}, "lam -3.0: must be from 0 to 1"),
        (ReTrack, {"target": "exakt"}, "target exakt: must be one of knn, topk, exact"),
        (ReTrack, {"snr_cap": math.inf}, "snr_cap inf: must be from 0 to 1000000000"),
        (DiMUM, {"replaces": "promt"}, "replaces promt: must be one of image, prompt"),
        (SISS, {"siss_lam": 1.5}, "siss_lam 1.5: must be from 0 to 1"),
    ],
)
def test_methods_refuse_settings_out_of_their_bounds(
    method: type[Method], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        method(**settings)


def test_methods_may_have_plain_fields() -> None:
    @dataclass(frozen=True)
    class Mine(Method):
        weight: float = 2.0

    assert Mine(weight=3.0).weight == 3.0


@pytest.mark.parametrize("method", [SISS, SISSNoIS])
def test_siss_refuses_an_invalid_rescale(method: type[SISS | SISSNoIS]) -> None:
    with pytest.raises(InputError, match="rescale much"):
        method(rescale="much")


def test_vdu_moments_equal_the_oracle_and_have_a_floor() -> None:
    """Two tensors, one of which hardly moves: the floor is that of all weights together."""
    still = [draw(3, seed=20) + 1e-6 * draw(3, seed=21 + i) for i in range(3)]
    kept = [[moving.view(4, 6), rest] for moving, rest in zip(KEPT, still, strict=True)]
    means, stds = VDU().prepare(replace(TASK, kept_params=kept))
    assert [mean.shape for mean in means] == [std.shape for std in stds] == [(4, 6), (3,)]
    flat = [torch.cat([tensor.flatten() for tensor in tensors]).tolist() for tensors in kept]
    mean, std = oracle.weight_moments(flat)
    assert torch.cat([m.flatten() for m in means]).tolist() == pytest.approx(mean, rel=1e-12)
    assert torch.cat([s.flatten() for s in stds]).tolist() == pytest.approx(std, rel=1e-9)
    assert stds[1].unique().numel() == 1  # all at the floor
    assert stds[0].min() > stds[1].max()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], r"checkpoints of the pretraining.*got 0: train with --keep N"),
        ([KEPT[0]], r"checkpoints of the pretraining.*got 1: train with --keep N"),
        ([KEPT[0], KEPT[0]], r"are all the same: train with --keep N"),
    ],
    ids=["none", "one", "the same twice"],
)
def test_vdu_refuses_too_few_checkpoints(kept: list[Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        VDU().prepare(replace(TASK, kept_params=[[params] for params in kept]))


COPIES = replace(TASK, forget=TASK.forget[[0, 1, 0, 0, 1]])


def test_dimum_knn_alternative_is_the_nearest_remain_image() -> None:
    found = DiMUM(alternative="knn").prepare(COPIES)
    remain = oracle.flat(TASK.remain)
    nearest = [oracle.nearest_neighbors(a, remain, 1)[0] for a in oracle.flat(COPIES.forget)]
    assert torch.equal(found, TASK.remain[nearest])


def test_dimum_of_a_prompt_learns_the_alternative_and_the_remain_images() -> None:
    """Under the prompt, which is bound outside; it never sees a forget image."""
    method = DiMUM(lam=0.3, replaces="prompt")
    batch = make_batch()
    x0 = method.prepare(TASK)[batch.forget_index].double() / 127.5 - 1
    alternative = ddpm_loss(Linear(), x0, batch.t, batch.noise, SCHEDULE)
    expected = 0.3 * alternative + 0.7 * only_loss(Vanilla())
    assert_close(only_loss(method), expected, rtol=2e-6, atol=0)  # x0 is not rounded to float32


def test_dimum_random_alternative_is_one_remain_image_for_all_copies_of_an_image() -> None:
    draws = []
    for seed in range(5):
        drawn = DiMUM(alternative="random").prepare(replace(COPIES, seed=seed))
        assert torch.equal(drawn, drawn[[0, 1, 0, 0, 1]])
        assert all(image in oracle.flat(TASK.remain) for image in oracle.flat(drawn))
        draws.append(drawn)
    assert any(not torch.equal(drawn, draws[0]) for drawn in draws)
    again = DiMUM(alternative="random").prepare(replace(COPIES, seed=1))
    assert torch.equal(draws[1], again)


def test_dimum_given_alternative_is_that_of_every_forget_image() -> None:
    picture = random_pixels(1, seed=30)
    method = DiMUM(alternative="other.png")
    found = method.prepare(replace(COPIES, alternative=picture))
    assert torch.equal(found, picture.expand_as(COPIES.forget))
    with pytest.raises(InputError, match=r"other\.png"):
        method.prepare(COPIES)


# --- How methods are related ---


def only_loss(method: methods.Method, task: Task | None = None) -> Tensor:
    model = Linear()
    task = task or task_of(model)
    if not task.params:
        task = replace(task, params=[model.params])
    (loss,) = method.losses(model, make_batch(), task, method.prepare(task))
    return loss


def test_retrack_with_lambda_0_is_vanilla() -> None:
    assert_close(only_loss(ReTrack(k=3, lam=0.0)), only_loss(Vanilla()), rtol=1e-12, atol=0)


def test_vdu_prior_alone_is_a_normal_log_density_and_without_it_is_neggrad() -> None:
    model = Linear()
    task = task_of(model)
    (mean,), (std,) = VDU().prepare(task)
    log_density = torch.distributions.Normal(mean, std).log_prob(model.params)
    constants = std.log() + math.log(math.tau) / 2
    expected = -(log_density + constants).sum()
    assert_close(only_loss(VDU(prior_weight=1.0), task), expected)
    assert_close(only_loss(VDU(prior_weight=0.0), task), only_loss(NegGrad()))


def test_dimum_is_retrack_with_one_neighbor_and_the_loss_of_that_neighbor() -> None:
    batch = make_batch()
    alternative = DiMUM(alternative="knn").prepare(TASK)[batch.forget_index]
    x0 = alternative.double() / 127.5 - 1
    own = ddpm_loss(Linear(), x0, batch.t, batch.noise, SCHEDULE)
    retracked = only_loss(ReTrack(target="knn", k=1, lam=0.3, snr_cap=1e9))
    loss = only_loss(DiMUM(lam=0.3, alternative="knn"))
    assert_close(loss, retracked + 0.3 * own, rtol=2e-6, atol=0)  # x0 is not rounded to float32
