"""Is it forgotten, is the rest intact: metrics over samples and models. Takes tensors and
callables, nothing else.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import inception_v3

EpsModel = Callable[[Tensor, Tensor], Tensor]
Images = Float[Tensor, "n c h w"]


def nearest_distance(a: Images, b: Float[Tensor, "m c h w"]) -> Float[Tensor, " n"]:
    """For each image of `a`, the L2 norm to its nearest in `b`, in the images' own pixel units."""
    return torch.cdist(
        a.flatten(1), b.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).amin(1)


def is_hit(samples: Images, target: Float[Tensor, "*m c h w"], threshold: float) -> Tensor:
    """Bool "n": whether ||sample - target||_2 < threshold for any target (SISS, arXiv 2503.01034).
    Pixels in [0, 1].
    """
    return nearest_distance(samples, target.reshape(-1, *samples.shape[1:])) < threshold


def hit_frequency(samples: Images, target: Float[Tensor, "*m c h w"], threshold: float) -> float:
    """Share of samples, in [0, 1], that are hits. Samples are clipped to [0, 1], where the pixels
    live.
    """
    return is_hit(samples.clamp(0, 1), target, threshold).float().mean().item()


class Classifier(nn.Module):
    """A small convolutional classifier over images in [-1, 1], whose last hidden layer gives the
    features of FID.

    The network is trained by `fit_classifier`, once for a data set.
    """

    num_features = 64

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(
                nn.Conv2d(channels, 32, 3, padding=1),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(
                nn.Conv2d(64, 128, 3, padding=1),
                nn.BatchNorm2d(128),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
            ),
            *(nn.Linear(512, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Images) -> Float[Tensor, "n f"]:
        """Features."""
        return self.body(x)

    def logits(self, x: Images) -> Float[Tensor, "n k"]:
        return self.head(self.body(x))


class Inception(nn.Module):
    """torchvision's Inception v3 over images in [-1, 1]: features, and logits of ImageNet's 1,000
    classes.

    `weights` is the state dict of `Inception_V3_Weights.IMAGENET1K_V1`, which wants 299x299 images
    in [-1, 1].
    """

    num_features = 2048

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.body = inception_v3(weights=None, init_weights=False, transform_input=False)
        self.body.load_state_dict(weights)
        self.body.AuxLogits = None  # only for its training
        self.head = self.body.fc
        self.body.register_module("fc", nn.Identity())

    def forward(self, x: Images) -> Float[Tensor, "n f"]:
        """Features. Grey images are repeated to three channels."""
        x = F.interpolate(x, size=(299, 299), mode="bilinear", antialias=True)
        return self.body(x.expand(-1, 3, -1, -1))

    def logits(self, x: Images) -> Float[Tensor, "n k"]:
        return self.head(self(x))


def fit_classifier(
    images_at: Callable[[Int[Tensor, " b"]], Images],
    labels: Int[Tensor, " n"],
    *,
    seed: int,
    steps: int = 400,
    batch_size: int = 128,
) -> tuple[Classifier, float]:
    """Train the feature network; returns it in eval mode, with its accuracy in [0, 1] on a tenth
    that is held out.

    `images_at(index)` gives the images in [-1, 1] that belong to `labels[index]`. With fewer than
    two classes the
    network learns which way each image was turned (RotNet, arXiv 1803.07728), which needs no
    labels.
    """
    turn = len(labels.unique()) < 2

    def batch(index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(labels.device)
        if not turn:
            return images_at(index), labels[index]
        quarters = images_at(index).chunk(4)
        turned = [quarter.rot90(turns, (2, 3)) for turns, quarter in enumerate(quarters)]
        classes = [
            labels.new_full((len(quarter),), turns) for turns, quarter in enumerate(quarters)
        ]
        return torch.cat(turned), torch.cat(classes)

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held_out, kept = (
        order[: max(1, len(order) // 10)],
        order[len(order) // 10 :],
    )  # of a few, one is in both
    channels, num_classes = (
        images_at(held_out[:1].to(labels.device)).shape[1],
        4 if turn else int(labels.max()) + 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(channels, num_classes).to(labels.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        x, y = batch(kept[torch.randint(len(kept), (batch_size,), generator=generator)])
        optimizer.zero_grad()
        F.cross_entropy(model.logits(x), y).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        correct = [model.logits(x).argmax(1) == y for x, y in map(batch, held_out.split(500))]
    return model, torch.cat(correct).float().mean().item()


@torch.no_grad()
def inception_score(samples: Images, network: nn.Module, batch_size: int = 500) -> float:
    """exp E KL(p(y|x) || p(y)) over the classes of `network.logits` (arXiv 1606.03498), over all
    samples at once.
    """
    device = next(network.parameters()).device
    log_p = torch.cat(
        [F.log_softmax(network.logits(x.to(device)).double(), 1) for x in samples.split(batch_size)]
    )  # pyright: ignore[reportCallIssue]
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp().item()


@torch.no_grad()
def fid(samples: Iterable[Images], reference: Iterable[Images], network: nn.Module) -> float | None:
    """Frechet distance between the features of samples and reference (arXiv 1706.08500), both given
    in batches.

    `network` maps images in [-1, 1] to `network.num_features` features; figures from two networks
    must never be
    compared. None, with a warning, for fewer images than features: their covariance is then
    singular.
    """
    device = next(network.parameters()).device
    metric = FrechetInceptionDistance(feature=network).to(device)
    counts = {True: 0, False: 0}
    for batches, real in ((samples, False), (reference, True)):
        for batch in batches:
            metric.update(batch.to(device), real=real)
            counts[real] += len(batch)
    if min(counts.values()) < int(network.num_features):  # pyright: ignore[reportArgumentType]
        few = (
            "take more samples"
            if counts[False] < counts[True]
            else "take the data set's own features"
        )
        warnings.warn(
            f"no FID: {counts[False]} samples and {counts[True]} images cannot span {network.num_features} features: "
            f"{few}",
            stacklevel=2,
        )
        return None
    return metric.compute().item()


@torch.no_grad()
def injection_similarity(
    x0: Images, denoised: Images, network: nn.Module
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """How near `denoised`, made from a noised x0, came back to it: L2 on [0, 1] pixels, and cosine
    of the features.

    After SISS (arXiv 2503.01034), with the features of `network` in place of SSCD's. Images in [-1,
    1].
    """
    distance = (denoised.clamp(-1, 1) - x0).flatten(1).norm(dim=1) / 2
    return distance, F.cosine_similarity(network(denoised.clamp(-1, 1)), network(x0))


@torch.no_grad()
def oracle_distance(
    eps_model: EpsModel, oracle: EpsModel, x_t: Images, t: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """||eps_model - oracle||^2 a pixel, at each given x_t and t: how far unlearning is from its
    goal.

    The oracle is another denoiser: the ideal one of the remaining data, or a model that was
    retrained on them.
    Multiply by sigma_t^2 / gamma_t^2 for the same distance in x0 units, where low t does not dwarf
    the rest.
    """
    return (eps_model(x_t, t) - oracle(x_t, t)).square().flatten(1).mean(1)
