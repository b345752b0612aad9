"""Can the forgotten image be brought back, and does the model still show that it was trained on it?"""

import itertools
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn

from tiny_retrack.data import random_batch
from tiny_retrack.losses import EpsModel, ddpm_loss, squared_error
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import denoiser, fit, make_optimizer


def relearning_curve(
    model: nn.Module,
    auxiliary: UInt8[Tensor, "n c h w"],
    measure: Callable[[EpsModel], dict[str, float]],
    schedule: NoiseSchedule,
    *,
    at: Collection[int],
    batch_size: int,
    lr: float,
    seed: int,
    bf16: bool = False,
) -> list[dict[str, float]]:
    """DiMRA (arXiv 2512.03564): fine-tune `model`, in place, on `auxiliary` by the plain loss of
    its pretraining.

    The attacker has the weights and some images: what remains, samples of the model itself, or
    (stronger than DiMRA)
    also `augmented` copies of the forgotten image. What comes back shows what was hidden and not
    forgotten: hold the
    curve against that of a model that never saw the image, which relearns nothing but only learns.

    Args:
        model: on the device of `auxiliary`; attacked in place.
        measure: what is to be known of the attacked model; called with it before the attack and
        after the steps `at`.
        at: from 1 up; the attack ends with the last one.

    Returns:
        One row a measurement: "step" (0 first), and what `measure` found.
    """
    eps_model = denoiser(model, bf16)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Tensor]:
        x0, t, noise = random_batch(auxiliary, batch_size, schedule.num_steps, generator)
        return (ddpm_loss(eps_model, x0, t, noise, schedule),)

    progress = fit(
        model,
        losses,
        make_optimizer(model, lr),
        steps=max(at),
        lr_at=lambda step: lr,
        seed=seed,
        device=auxiliary.device,
        bf16=bf16,
    )
    rows = [{"step": 0, **measure(eps_model)}]
    for done in progress:
        if done.step in at:
            rows.append({"step": done.step, **measure(eps_model)})
    return rows


def augmented(
    images: UInt8[Tensor, "m c h w"], shift: int, gains: Sequence[float] = (1.0,)
) -> UInt8[Tensor, "n c h w"]:
    """Look-alikes of the images: all shifts by up to `shift` pixels, mirrored or not, times each of
    the `gains`.

    Edges are repeated where a shift leaves a gap. None equals one of the images: n < m (2 (2 shift
    + 1)^2
    len(gains)), in a fixed order.
    """
    _, _, h, w = images.shape
    offsets = range(2 * shift + 1)
    copies = []
    for turned, gain in itertools.product((images, images.flip(3)), gains):
        bright = (turned * gain).round().clamp(0, 255)  # float
        padded = F.pad(bright, [shift] * 4, mode="replicate")
        copies += [
            padded[:, :, y : y + h, x : x + w] for y, x in itertools.product(offsets, offsets)
        ]
    stacked = torch.cat(copies).to(torch.uint8)
    return stacked[torch.stack([(stacked != image).flatten(1).any(1) for image in images]).all(0)]


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
    """(AUC, true-positive rate at 1% false positives) of telling members by their low loss (arXiv
    2301.09956).

    Every image is noised with the same d pairs of t and noise, and its score is minus its mean loss
    over them: the
    draws' own difficulty is then the same for all and cancels. The unit is the image: a second draw
    of an image makes
    its score sharper, it is no second member. Below 100 non-members, 1% means none at all.

    A data set with one forgotten image and no held-out images has no never-seen ones but
    look-alikes (`augmented`) of
    that image. With one member the AUC is its rank: the share of look-alikes whose loss is higher.
    It says whether this
    very image stands out from its like. But look-alikes are not drawn as the image was, some are
    plainer and so have
    lower losses with any model: chance is not 0.5 but the figure of a model that never saw any of
    them.
    """
    scores = []
    for x0 in torch.cat([members, non_members]).split(batch_size):
        loss = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for step, eps in zip(t, noise, strict=True):
            steps, eps = step.expand(len(x0)), eps.expand_as(x0)
            loss += squared_error(eps_model(schedule.q_sample(x0, steps, eps), steps), eps)
        scores.append(-loss.cpu() / len(t))
    truth, score = (
        np.arange(len(members) + len(non_members)) < len(members),
        torch.cat(scores).numpy(),
    )
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    return float(roc_auc_score(truth, score)), float(tpr[fpr <= 0.01].max())
