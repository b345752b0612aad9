"""The methods: what each can be set to, what it prepares once, and its loss on a batch.

A method is a frozen dataclass, and its fields are its flags on the command line. To add one: a
dataclass here with its row in METHODS, its loss in losses.py, and a row of oracles in
tests/test_methods.py. To add a target for ReTrack: a function and its row in TARGETS, and a row
of oracles. CONTRIBUTING.md shows both, line by line.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from tiny_retrack.data import draw_boxes, to_float
from tiny_retrack.losses import (
    ddpm_loss,
    dimum_loss,
    erasediff_gradient,
    erasediff_losses,
    neggrad_loss,
    parse_rescale,
    regression_loss,
    siss_gradient,
    siss_losses,
    squared_error,
    vdu_loss,
)
from tiny_retrack.posterior import (
    ONLY_GAUSSIAN,
    ClosedForms,
    check_k,
    check_patch,
    combined_target,
    exact_target,
    fit_forms,
    gaussian_moments,
    gaussian_target,
    knn_target,
    local_target,
    nearest_neighbors,
    topk_target,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.types import EpsModel, Images, InputError, Loss, Pixels, Steps

Gradient = Sequence[Tensor]  # one tensor per parameter
Weights = Sequence[Tensor]  # likewise

# --- Settings -------------------------------------------------------------------------------------


def setting(
    about: str,
    default: Any = MISSING,
    *,
    low: float | int = 1,
    high: float | int = 10**9,
    choices: Collection[str] = (),
) -> Any:
    """A dataclass field that is also a flag: its help, the bounds of a number, a word's choices."""
    metadata = {"about": about, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


def check_setting(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise an InputError for a value out of the bounds of a `setting`, or none of its choices."""
    choices = metadata["choices"]
    if choices and value not in choices:
        raise InputError(f"{name} {value:.80}: must be one of {', '.join(choices)}")
    low, high = metadata["low"], metadata["high"]
    if isinstance(value, int | float) and not low <= value <= high:
        raise InputError(f"{name} {value}: must be from {low} to {high}")


# --- What a method is given -----------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What stays the same from step to step.

    Attributes:
        remain: what the model may keep.
        forget: what it must forget.
        schedule: of the model.
        eps_model: the model as it is before the first step (generalizing).
        params: the model's own weights (vdu).
        kept_params: its weights at several moments of its pretraining, in the same order (vdu).
        alternative: one image to take the forgotten ones' place (dimum).
        seed: of the draws made in `prepare` (dimum's random alternatives, generalizing's boxes).
    """

    remain: UInt8[Tensor, "n c h w"]
    forget: UInt8[Tensor, "m c h w"]
    schedule: NoiseSchedule
    eps_model: EpsModel | None = None
    params: Weights = ()
    kept_params: Sequence[Weights] = ()
    alternative: UInt8[Tensor, "1 c h w"] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """What is drawn in a step: b remain and b forget images, each with a time and noise.

    With the same seed, all methods get the same batches. Methods with one t and one noise per pair
    of images use `t` and `noise` for both.
    """

    x0_remain: Images
    x0_forget: Images
    forget_index: Int[Tensor, " b"]  # which forget images these are
    t: Steps
    t_remain: Steps
    noise: Images
    noise_remain: Images
    generator: torch.Generator  # for draws that only one method needs


def draw_batch(task: Task, batch_size: int, generator: torch.Generator) -> Batch:
    """Images and times are drawn uniformly, with replacement; noise from N(0, I)."""
    random: dict[str, Any] = {"generator": generator, "device": task.remain.device}
    num_steps = task.schedule.num_steps
    remain_index = torch.randint(len(task.remain), (batch_size,), **random)
    forget_index = torch.randint(len(task.forget), (batch_size,), **random)
    x0_remain = to_float(task.remain[remain_index])
    x0_forget = to_float(task.forget[forget_index])
    return Batch(
        x0_remain,
        x0_forget,
        forget_index,
        t=torch.randint(num_steps, (batch_size,), **random),
        t_remain=torch.randint(num_steps, (batch_size,), **random),
        noise=torch.randn(x0_remain.shape, **random),
        noise_remain=torch.randn(x0_remain.shape, **random),
        generator=generator,
    )


class Method:
    """Base class of all methods. A subclass must define `losses`; the others are optional.

    Raises:
        InputError: for a setting out of its bounds, or none of its choices.
    """

    def __post_init__(self) -> None:
        for f in fields(self):  # pyright: ignore[reportArgumentType]
            if f.metadata:  # else it was declared without `setting`
                check_setting(f.name, getattr(self, f.name), f.metadata)

    def prepare(self, task: Task) -> Any:
        """Compute what `losses` needs at every step; called once, before the first.

        Raises:
            InputError: if the settings do not fit the task.
        """
        return None

    def losses(
        self, eps_model: EpsModel, batch: Batch, task: Task, prepared: Any
    ) -> tuple[Loss, ...]:
        """One loss, or a pair (on remain, on forget).

        Draws that only this method needs come from `batch.generator`.
        """
        raise NotImplementedError

    def combine(self, *gradients: Gradient) -> Gradient:
        """Combine the gradients of `losses` into one; a single gradient is returned unchanged."""
        (gradient,) = gradients
        return gradient


# --- ReTrack --------------------------------------------------------------------------------------

# (x_t, t, index) -> the eps to regress onto, where x_t was made from task.forget[index].
Target = Callable[[Images, Steps, Int[Tensor, " b"]], Images]


def knn(task: Task, settings: "ReTrack") -> Target:
    """Over the k remain images nearest to the forget image: the paper's approximation."""
    neighbors, _ = nearest_neighbors(task.forget, task.remain, settings.k)  # [m, k]

    def target(x_t: Images, t: Steps, forget_index: Int[Tensor, " b"]) -> Images:
        return knn_target(x_t, t, task.remain[neighbors[forget_index]], task.schedule)

    return target


def topk(task: Task, settings: "ReTrack") -> Target:
    """Over the k remain images nearest to x_t / gamma_t: they change along the trajectory."""
    check_k(settings.k, len(task.remain))

    def target(x_t: Images, t: Steps, forget_index: Int[Tensor, " b"]) -> Images:
        return topk_target(x_t, t, task.remain, task.schedule, settings.k)

    return target


def exact(task: Task, settings: "ReTrack") -> Target:
    """Over the whole remain set: what knn and topk approximate."""

    def target(x_t: Images, t: Steps, forget_index: Int[Tensor, " b"]) -> Images:
        return exact_target(x_t, t, task.remain, task.schedule)

    return target


def gaussian(task: Task, settings: "ReTrack") -> Target:
    """The ideal denoiser of a Gaussian with the remain set's mean and covariance."""
    moments = gaussian_moments(task.remain)

    def target(x_t: Images, t: Steps, forget_index: Int[Tensor, " b"]) -> Images:
        return gaussian_target(x_t, t, moments, task.schedule)

    return target


def local(task: Task, settings: "ReTrack") -> Target:
    """Pixel by pixel, over the remain set, weighted by likeness in a window around the pixel."""

    def target(x_t: Images, t: Steps, forget_index: Int[Tensor, " b"]) -> Images:
        return local_target(x_t, t, task.remain, task.schedule, settings.patch)

    return target


FIT_TIMES = (0, 10, 25, 50, 75, 100, 150, 200, 250, 300, 400, 500, 600)
GAUSSIAN_FROM = 700  # from this t on, only the Gaussian: all closed forms are nearly equal
FIT_IMAGES = 64
LOCAL_IMAGES = 2048  # remain images that the local form sees at most, drawn at random


def generalizing(task: Task, settings: "ReTrack") -> Target:
    """An estimate of what the model would predict, had it never seen the forget images.

    Far from its data, a network is nearly a mixture of closed-form denoisers of the remain set. The
    weights are fitted before unlearning, on drawn images that the model has never seen.
    """
    if task.eps_model is None:
        raise InputError("the target generalizing is fitted to the model: give Task(eps_model=...)")
    last = FIT_TIMES[-1]
    if task.schedule.num_steps <= last:
        raise InputError(f"the target generalizing needs a schedule of more than {last} steps")
    generator = torch.Generator(task.remain.device).manual_seed(task.seed)
    subset = task.remain
    if len(subset) > LOCAL_IMAGES:
        chosen = torch.randperm(len(subset), generator=generator, device=subset.device)
        subset = subset[chosen[:LOCAL_IMAGES]]
    moments = gaussian_moments(task.remain)
    forms = ClosedForms(task.remain, subset, moments, task.schedule, settings.patch)
    boxes = to_float(draw_boxes(FIT_IMAGES, task.remain, task.forget, generator))
    fitted = fit_forms(task.eps_model, forms, boxes, FIT_TIMES, generator)
    times = (*FIT_TIMES, GAUSSIAN_FROM)
    weights = torch.cat([fitted, fitted.new_tensor([ONLY_GAUSSIAN])])

    def target(x_t: Images, t: Steps, forget_index: Int[Tensor, " b"]) -> Images:
        return combined_target(x_t, t, forms, times, weights)

    return target


TARGETS: dict[str, Callable[[Task, "ReTrack"], Target]] = {
    "knn": knn,
    "topk": topk,
    "exact": exact,
    "gaussian": gaussian,
    "local": local,
    "generalizing": generalizing,
}


@dataclass(frozen=True)
class ReTrack(Method):
    """Regress onto the remain set's optimal denoiser at x_t of the forget images (2509.13007).

    The loss is lambda L_forget + (1 - lambda) L_remain. L_forget is `retrack_loss`, equal in
    gradient to the paper's `retrack_weighted_loss`; L_remain is `ddpm_loss` at its own times and
    noise.
    """

    target: str = setting("what the forget loss regresses onto", "knn", choices=TARGETS)
    k: int = setting("number of neighbours in the target (knn, topk)", 10)
    patch: int = setting("side of the window, odd (local, generalizing)", 3)
    lam: float = setting("lambda, the weight of the forget loss", 0.005, low=0, high=1)
    snr_cap: float = setting(
        "scale the forget loss by min(1, SNR_CAP / SNR_t), which bounds the weight of low noise; "
        "10000, the largest SNR of the usual schedule, changes nothing",
        10_000.0,
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patch(self.patch)

    def prepare(self, task: Task) -> Target:
        return TARGETS[self.target](task, self)

    def losses(
        self, eps_model: EpsModel, batch: Batch, task: Task, prepared: Target
    ) -> tuple[Loss]:
        x_forget = task.schedule.q_sample(batch.x0_forget, batch.t, batch.noise)
        x_remain = task.schedule.q_sample(batch.x0_remain, batch.t_remain, batch.noise_remain)
        # Predict. One forward pass over both halves is faster than two.
        x_t = torch.cat([x_forget, x_remain])
        eps_forget, eps_remain = eps_model(x_t, torch.cat([batch.t, batch.t_remain])).chunk(2)
        # Compare with the target, and weigh.
        target = prepared(x_forget, batch.t, batch.forget_index)
        forget = regression_loss(eps_forget, target, batch.t, task.schedule, self.snr_cap)
        remain = squared_error(eps_remain, batch.noise_remain).mean()
        # Mix.
        loss = self.lam * forget + (1 - self.lam) * remain
        return (loss,)


# --- The methods that ReTrack is compared with ----------------------------------------------------


def remain_loss(eps_model: EpsModel, batch: Batch, task: Task) -> Loss:
    """The DDPM loss on the batch's remain images, at their own times and noise."""
    return ddpm_loss(eps_model, batch.x0_remain, batch.t_remain, batch.noise_remain, task.schedule)


@dataclass(frozen=True)
class Vanilla(Method):
    """The DDPM loss on the remain set: fine-tuning, the baseline."""

    def losses(self, eps_model: EpsModel, batch: Batch, task: Task, prepared: None) -> tuple[Loss]:
        return (remain_loss(eps_model, batch, task),)


@dataclass(frozen=True)
class NegGrad(Method):
    """Minus the DDPM loss on the forget set; it diverges if it is not stopped."""

    def losses(self, eps_model: EpsModel, batch: Batch, task: Task, prepared: None) -> tuple[Loss]:
        return (neggrad_loss(eps_model, batch.x0_forget, batch.t, batch.noise, task.schedule),)


@dataclass(frozen=True)
class EraseDiff(Method):
    """Regress forget images onto uniform noise; the combined step lowers L_f (2401.05779)."""

    def losses(
        self, eps_model: EpsModel, batch: Batch, task: Task, prepared: None
    ) -> tuple[Loss, Loss]:
        device = batch.noise.device
        uniform = torch.rand(batch.noise.shape, generator=batch.generator, device=device)
        return erasediff_losses(
            eps_model,
            batch.x0_remain,
            batch.x0_forget,
            batch.t,
            batch.noise,
            uniform,
            task.schedule,
        )

    def combine(self, *gradients: Gradient) -> Gradient:
        g_remain, g_forget = gradients
        return erasediff_gradient(g_remain, g_forget)


_RESCALE = "norm of the subtracted gradient, absolute (5) or as a share of the kept one's (10%)"


@dataclass(frozen=True)
class SISSNoIS(Method):
    """SISS without importance sampling: two DDPM losses; g_r - s g_u (2503.01034)."""

    rescale: str = setting(_RESCALE, "5")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_rescale(self.rescale)

    def losses(
        self, eps_model: EpsModel, batch: Batch, task: Task, prepared: None
    ) -> tuple[Loss, Loss]:
        remain = ddpm_loss(eps_model, batch.x0_remain, batch.t, batch.noise, task.schedule)
        forget = ddpm_loss(eps_model, batch.x0_forget, batch.t, batch.noise, task.schedule)
        return remain, forget

    def combine(self, *gradients: Gradient) -> Gradient:
        g_remain, g_forget = gradients
        return siss_gradient(g_remain, g_forget, self.rescale)


@dataclass(frozen=True)
class SISS(SISSNoIS):
    """One importance-weighted pass for a remain and a forget image, and the same subtraction
    (2503.01034).
    """

    siss_lam: float = setting("lambda, the forget images' share of the mixture", 0.5, low=0, high=1)

    def losses(
        self, eps_model: EpsModel, batch: Batch, task: Task, prepared: None
    ) -> tuple[Loss, Loss]:
        coin = torch.rand(len(batch.t), generator=batch.generator, device=batch.t.device)
        return siss_losses(
            eps_model,
            batch.x0_remain,
            batch.x0_forget,
            batch.t,
            batch.noise,
            coin < self.siss_lam,
            self.siss_lam,
            task.schedule,
        )


# A weight that hardly moved during pretraining has almost no standard deviation, and the prior
# would freeze it. So each standard deviation is raised to at least this share of their root mean
# square. The paper has no such floor.
STD_FLOOR = 0.1


@dataclass(frozen=True)
class VDU(Method):
    """Minus the DDPM loss on the forget set; weights stay near their pretraining (2510.04058)."""

    prior_weight: float = setting(
        "weight of the prior from pretraining (the paper's gamma)", 5e-3, low=0, high=1
    )

    def prepare(self, task: Task) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and standard deviation of each weight over the checkpoints that were kept."""
        if len(task.kept_params) < 2:
            raise InputError(
                f"vdu needs 2 checkpoints of the pretraining or more, got "
                f"{len(task.kept_params)}: train with --keep N"
            )
        stacks = [torch.stack([*each]) for each in zip(*task.kept_params, strict=True)]
        means = [stack.mean(0) for stack in stacks]
        stds = [stack.std(0) for stack in stacks]
        root_mean_square = torch.cat([std.flatten() for std in stds]).square().mean().sqrt()
        if not root_mean_square > 0:
            raise InputError("vdu: the kept checkpoints are all the same: train with --keep N")
        floor = STD_FLOOR * root_mean_square
        return means, [std.clamp_min(floor) for std in stds]

    def losses(
        self,
        eps_model: EpsModel,
        batch: Batch,
        task: Task,
        prepared: tuple[list[Tensor], list[Tensor]],
    ) -> tuple[Loss]:
        prior_mean, prior_std = prepared
        loss = vdu_loss(
            eps_model,
            batch.x0_forget,
            batch.t,
            batch.noise,
            task.params,
            prior_mean,
            prior_std,
            self.prior_weight,
            task.schedule,
        )
        return (loss,)


@dataclass(frozen=True)
class DiMUM(Method):
    """An alternative image is learned in place of the forget image (arXiv 2512.03564).

    The paper's models are conditional: the alternative takes the place of what they say under the
    prompt. Without prompts, it takes that of the forget image, wherever x_t is made from it.
    """

    lam: float = setting("lambda, the weight of the forget loss", 0.005, low=0, high=1)
    alternative: str = setting(
        "what takes the forget image's place: knn, random or an image file", "knn"
    )
    replaces: str = setting(
        "what the alternative replaces; prompt as in the paper, for models with prompts",
        "image",
        choices=("image", "prompt"),
    )

    def prepare(self, task: Task) -> Pixels:
        """The alternative of each forget image, [m, c, h, w]; the same for all its copies."""
        if self.alternative == "knn":
            nearest, _ = nearest_neighbors(task.forget, task.remain, 1)
            return task.remain[nearest[:, 0]]
        if self.alternative == "random":
            distinct, which = torch.unique(task.forget, dim=0, return_inverse=True)
            generator = torch.Generator().manual_seed(task.seed)
            index = torch.randint(len(task.remain), (len(distinct),), generator=generator)
            return task.remain[index.to(which.device)[which]]
        if task.alternative is None:
            raise InputError(f"alternative {self.alternative}: neither knn nor random nor an image")
        return task.alternative.expand_as(task.forget)

    def losses(
        self, eps_model: EpsModel, batch: Batch, task: Task, prepared: Pixels
    ) -> tuple[Loss]:
        alternative = to_float(prepared[batch.forget_index])
        if self.replaces == "prompt":
            forget = ddpm_loss(eps_model, alternative, batch.t, batch.noise, task.schedule)
        else:
            forget = dimum_loss(
                eps_model, batch.x0_forget, alternative, batch.t, batch.noise, task.schedule
            )
        remain = remain_loss(eps_model, batch, task)
        return (self.lam * forget + (1 - self.lam) * remain,)


METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "neggrad": NegGrad,
    "erasediff": EraseDiff,
    "siss": SISS,
    "siss-no-is": SISSNoIS,
    "retrack": ReTrack,
    "vdu": VDU,
    "dimum": DiMUM,
}
