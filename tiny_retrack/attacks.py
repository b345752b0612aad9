"""Attacks on an unlearned model: can the forgotten image be brought back, and does the model's loss
still show that it was trained on it?
"""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from tiny_retrack.data import random_batch
from tiny_retrack.losses import ddpm_loss, squared_error
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import denoiser, fit, make_optimizer
from tiny_retrack.types import EpsModel, Loss, NonFiniteError, Pixels

# What an attacker trains on: the remain set; samples of the unlearned model; or the remain set and
# look-alikes of the forgotten images.
ATTACKERS = ("remain", "samples", "augmented")


def relearning_curve(
    model: nn.Module,
    auxiliary: Pixels,
    measure: Callable[[EpsModel], dict[str, Any]],
    schedule: NoiseSchedule,
    *,
    at: Collection[int],
    batch_size: int,
    lr: float,
    seed: int,
    bf16: bool = False,
    progress: str = "",
) -> list[dict[str, Any]]:
    """Fine-tune `model` on `auxiliary` by the DDPM loss (DiMRA, arXiv 2512.03564).

    The attacker has the weights and some images: the remain set, samples of the model itself, or
    (stronger than DiMRA) also `augmented` copies of the forgotten image. An image that comes back
    was hidden, not forgotten. Compare the curve with that of a model that never saw the image.

    Args:
        model: on the device of `auxiliary`; changed in place.
        auxiliary: what the attacker trains on.
        measure: called with the attacked denoiser before the attack and after the steps `at`.
        at: optimiser steps, from 1, at least one; the attack ends with the last one.
        progress: the label of a progress bar; none if empty.

    Returns:
        One row per measurement: "step" (0 first), and the figures of `measure`. An attack that
        diverges goes on: `measure` sees what became of the model.
    """
    eps_model = denoiser(model, bf16)

    def attack(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss]:
        x0, t, noise = random_batch(auxiliary, batch_size, schedule.num_steps, generator)
        loss = ddpm_loss(eps_model, x0, t, noise, schedule)
        return (loss,)

    steps = fit(
        model,
        attack,
        make_optimizer(model, lr),
        steps=max(at),
        lr_at=lambda step: lr,
        seed=seed,
        device=auxiliary.device,
        bf16=bf16,
    )
    rows = [{"step": 0, **measure(eps_model)}]
    for done in tqdm(steps, progress, max(at), unit="step", disable=not progress, leave=False):
        if done.step in at:
            rows.append({"step": done.step, **measure(eps_model)})
    return rows


def augmented(
    images: UInt8[Tensor, "m c h w"], shift: int, gains: Sequence[float] = (1.0,)
) -> Pixels:
    """Look-alikes: every shift by up to `shift` pixels, mirrored or not, times each of the gains.

    Pixels shifted in from outside repeat the edge. A look-alike that equals one of the images is
    left out.

    Returns:
        uint8 [n, c, h, w] in a fixed order, n <= m * 2 * (2 * shift + 1)^2 * len(gains).
    """
    _, _, h, w = images.shape
    offsets = range(2 * shift + 1)
    copies = []
    for source, gain in itertools.product((images, images.flip(3)), gains):
        scaled = (source * gain).round().clamp(0, 255)  # float
        padded = F.pad(scaled, [shift] * 4, mode="replicate")
        for y, x in itertools.product(offsets, offsets):
            copies.append(padded[:, :, y : y + h, x : x + w])
    stacked = torch.cat(copies).to(torch.uint8)
    for image in images:
        differs = (stacked != image).flatten(1).any(1)
        stacked = stacked[differs]
    return stacked


def mean_losses(
    eps_model: EpsModel,
    x0: Float[Tensor, "b c h w"],
    t: Int[Tensor, " d"],
    noise: Float[Tensor, "d c h w"],
    schedule: NoiseSchedule,
) -> Float[Tensor, " b"]:
    """The DDPM loss of each image, averaged over the same d pairs of t and noise; float64."""
    total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    for time, unit_noise in zip(t, noise, strict=True):
        times = time.expand(len(x0))
        noises = unit_noise.expand_as(x0)
        x_t = schedule.q_sample(x0, times, noises)
        total += squared_error(eps_model(x_t, times), noises)
    return total / len(t)


@torch.no_grad()
def membership_inference(
    eps_model: EpsModel,
    members: Float[Tensor, "m c h w"],
    non_members: Float[Tensor, "n c h w"],
    t: Int[Tensor, " d"],
    noise: Float[Tensor, "d c h w"],
    schedule: NoiseSchedule,
    batch_size: int = 250,
) -> tuple[float, float]:
    """How well a low loss tells members from non-members (arXiv 2301.09956). Images in [-1, 1].

    An image's score is minus its mean loss over d pairs of t and noise, the same for all images.
    More pairs make each score less noisy; they do not add members.

    A data set with one forgotten image and no held-out images has only look-alikes of that image
    (`augmented`) as non-members. With one member the AUC is its rank: the share of look-alikes
    with a higher loss. Look-alikes differ in kind from the image: some are plainer, and have a
    lower loss under any model. Chance is therefore not 0.5, but the AUC of a model that saw neither
    them nor the image.

    Returns:
        The area under the ROC curve, and the true-positive rate at 1% false positives (at 0 false
        positives if there are fewer than 100 non-members).

    Raises:
        ValueError: if there are no members or no non-members.
        NonFiniteError: if a loss is not finite.
    """
    if not len(members) or not len(non_members):
        raise ValueError(f"{len(members)} members and {len(non_members)} others: give some of both")
    from sklearn.metrics import roc_auc_score, roc_curve  # takes a second to import

    losses = []
    for x0 in torch.cat([members, non_members]).split(batch_size):
        losses.append(mean_losses(eps_model, x0, t, noise, schedule).cpu())
    loss = torch.cat(losses)
    if not bool(loss.isfinite().all()):
        raise NonFiniteError("a loss is not finite: membership cannot be inferred")
    score = -loss.numpy()
    is_member = np.arange(len(members) + len(non_members)) < len(members)
    fpr, tpr, _ = roc_curve(is_member, score, drop_intermediate=False)
    return float(roc_auc_score(is_member, score)), float(tpr[fpr <= 0.01].max())
