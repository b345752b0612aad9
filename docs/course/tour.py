# %% [markdown]
# # A tour: memorising and forgetting
#
# Run the cells in order. Each says which part of the assignment its functions belong to; until you
# have written them, it stops with `NotImplementedError`. On two CPU cores the whole takes one to
# two minutes. As a script, `python docs/course/tour.py` writes its pictures to runs/tour;
# `TOUR_QUICK=1` makes everything small, `TOUR_OUT=FOLDER` chooses another folder.

# %%
import os
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from tiny_retrack import (
    NoiseSchedule,
    exact_target,
    knn_target,
    load_model,
    load_split,
    nearest_neighbors,
    to_float,
)
from tiny_retrack.attacks import relearning_curve
from tiny_retrack.methods import TARGETS, Method, ReTrack, Task, Vanilla, draw_batch
from tiny_retrack.metrics import eps_distance, is_hit, to_x0_units
from tiny_retrack.posterior import ideal_eps, log_posterior, tail_mass
from tiny_retrack.sampling import ddim_sample, timesteps
from tiny_retrack.training import make_optimizer
from tiny_retrack.types import EpsModel

QUICK = "TOUR_QUICK" in os.environ
OUT = Path(os.environ.get("TOUR_OUT", "runs/tour"))
OUT.mkdir(parents=True, exist_ok=True)
WEIGHTS = Path("docs/course/weights")
if not WEIGHTS.exists():  # in a handout
    WEIGHTS = Path("runs/digits-tshirt")


def show(
    rows: list[list[Tensor]],
    name: str,
    left: list[str],
    top: list[str],
    below: list[list[str]] | None = None,
) -> None:
    """Rows of images [1, h, w] in [-1, 1], with words beside each row, above each column and below
    each image.
    """
    size = (0.8 * len(rows[0]) + 1.2, (1.0 if below else 0.85) * len(rows) + 0.3)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            axes[y, x].imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
            axes[y, x].set(xticks=[], yticks=[])
            if y == 0 and top:
                axes[y, x].set_title(top[x], fontsize=8)
            if below:
                axes[y, x].set_xlabel(below[y][x], fontsize=7, labelpad=2)
        axes[y, 0].set_ylabel(left[y], fontsize=8, rotation=0, ha="right", va="center")
    figure.savefig(OUT / name, dpi=110, bbox_inches="tight")
    plt.show()


# %% [markdown]
# ## The data, and what noise leaves of them
#
# 1,797 handwritten digits and one T-shirt, 95 times: 5% of the set. Noise mixes an image with
# x_t = gamma_t x0 + sigma_t eps; at t = 999 next to nothing of it is left.

# %%
split = load_split("digits-tshirt")
schedule = NoiseSchedule.linear()
generator = torch.Generator().manual_seed(0)
shirt = to_float(split.targets)  # [1, 1, 16, 16]
digit = to_float(split.remain[4:5])
noise = torch.randn(shirt.shape, generator=generator)
TIMES = [100, 700] if QUICK else [100, 200, 300, 400, 500, 700]


def noised(x0: Tensor, t: int) -> Tensor:
    return schedule.q_sample(x0, torch.full((len(x0),), t), noise.expand_as(x0))


rows = [[image[0], *(noised(image, t)[0].clamp(-1, 1) for t in TIMES)] for image in (shirt, digit)]
show(rows, "noise.png", ["T-shirt", "a digit"], ["x0", *(f"t = {t}" for t in TIMES)])

# %% [markdown]
# ## Who is behind x_t? (part 1)
#
# Here x_t comes from the T-shirt. If all you know is that x_t came from *some digit*, which one?
# Below each x_t are the five likeliest digits, with their probability in percent.

# %%
columns, words = [], []
for t in TIMES:
    x_t = noised(shirt, t)
    p = log_posterior(x_t, torch.tensor([t]), split.remain, schedule)[0].exp()
    best = p.topk(5)
    columns.append([x_t[0].clamp(-1, 1), *to_float(split.remain[best.indices])])
    words.append(["", *(f"{100 * value:.1f}%" for value in best.values)])
rows = [list(row) for row in zip(*columns, strict=True)]
below = [list(row) for row in zip(*words, strict=True)]
left = ["x_t", *(f"likeliest {n}" for n in range(1, 6))]
show(rows, "behind.png", left, [f"t = {t}" for t in TIMES], below)

# %% [markdown]
# ## The data set itself is a denoiser (part 1)
#
# No network, nothing trained: `ideal_eps` is what a perfect model of these images would say.
# Sampling with it *memorises*: each sample is one of the training images, and about one in 25 is
# the T-shirt. Leave the T-shirt out of the sum, and the same noise leads to digits: *forgotten*.

# %%
count = 24 if QUICK else 400
everything = torch.cat([split.remain, split.targets])
copies = torch.ones(len(everything))
copies[-1] = len(split.forget)  # the T-shirt counts 95 times


def before(x_t: Tensor, t: Tensor) -> Tensor:
    return ideal_eps(x_t, t, everything, schedule, copies)


def after(x_t: Tensor, t: Tensor) -> Tensor:
    return ideal_eps(x_t, t, split.remain, schedule)


samples = {}
for name, denoiser in (("everything", before), ("digits only", after)):
    same_noise = torch.Generator().manual_seed(1)
    samples[name] = ddim_sample(denoiser, (count, 1, 16, 16), schedule, 25, same_noise)
    hits = is_hit((samples[name] + 1) / 2, (shirt + 1) / 2, threshold=1.0)
    print(f"{name}: {hits.sum()} of {count} samples are the T-shirt")
shirts = is_hit((samples["everything"] + 1) / 2, (shirt + 1) / 2, threshold=1.0)
order = shirts.float().argsort(descending=True, stable=True)
order = torch.cat([order[:4], order[-6:]])
show([list(found[order]) for found in samples.values()], "no_network.png", list(samples), [])

# %% [markdown]
# ## The same in two dimensions
#
# Here points in the plane stand for images: a ring of points that may stay, and one extra point
# that is there six times. The lines are the paths of x_t from noise to data, from the same noise on
# both sides; red marks the noise that leads to the extra point. The arrows point along the score,
# -eps* / sigma, at t = 150; they are red where the extra point has more than half of the posterior.
# Take the extra point out of the sum, and every path ends on the ring.

# %%
angle = torch.arange(14, dtype=torch.float64) * 2 * torch.pi / 14
ring = torch.stack([angle.cos() - 0.5, angle.sin()], dim=1).view(-1, 1, 1, 2)
point = torch.tensor([1.3, 1.0], dtype=torch.float64).view(1, 1, 1, 2)
both = torch.cat([ring, point.expand(6, 1, 1, 2)])
grid = torch.cartesian_prod(*[torch.linspace(-2.2, 2.2, 12, dtype=torch.float64)] * 2)
starts = torch.randn(
    6 if QUICK else 60, 1, 1, 2, generator=torch.Generator().manual_seed(3)
).double()


def ways(data: Tensor, x_t: Tensor) -> Tensor:
    """x_t at each step of DDIM, [steps, b, 2]."""
    passed = [x_t]
    times = timesteps(schedule.num_steps - 1, 10 if QUICK else 100).tolist()
    for now, then in zip(times, [*times[1:], 0], strict=True):
        t = torch.full((len(x_t),), now)
        eps = ideal_eps(x_t, t, data, schedule)
        x0 = schedule.predict_x0(x_t, t, eps)
        x_t = schedule.q_sample(x0, torch.full_like(t, then), eps)
        passed.append(x_t)
    return torch.stack(passed).flatten(2)


figure, axes = plt.subplots(1, 2, figsize=(9.4, 4.7), sharex=True, sharey=True)
ended = ways(both, starts)[-1]
led_to_it = (ended - point.flatten()).norm(dim=1) < 0.3
titles = ("before: the point is in the data, six times", "after: it is not")
for axis, data, title in zip(axes, (both, ring), titles, strict=True):
    where = grid.view(-1, 1, 1, 2)
    t = torch.full((len(grid),), 150)
    arrows = -ideal_eps(where, t, data, schedule).flatten(1)
    arrows = arrows / arrows.norm(dim=1, keepdim=True) ** 0.6  # else the far ones are too long
    share = log_posterior(where, t, data, schedule).exp()[:, len(ring) :].sum(1)  # of the point
    colors = ["tab:red" if one > 0.5 else "0.72" for one in share]
    axis.quiver(*grid.T.numpy(), *arrows.T.numpy(), color=colors, width=0.0035, scale=38)
    for way, lost in zip(ways(data, starts).transpose(0, 1), led_to_it, strict=True):
        axis.plot(
            *way.T.numpy(),
            color="tab:red" if lost else "tab:blue",
            alpha=0.8 if lost else 0.4,
            lw=1,
        )
    axis.scatter(*ring.view(-1, 2).T.numpy(), color="black", s=24, zorder=3)
    face = "tab:red" if data is both else "none"
    axis.scatter(
        *point.flatten().tolist(), color=face, s=90, marker="s", edgecolor="black", zorder=3
    )
    axis.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-2.3, 2.3), ylim=(-2.3, 2.3))
figure.tight_layout()
figure.savefig(OUT / "trajectory_2d.png", dpi=110, bbox_inches="tight")
plt.show()

# %% [markdown]
# ## What to predict instead (part 3)
#
# At x_t of the T-shirt a model that forgets must predict something else. The exact target sums over
# all digits, ReTrack's target over the 10 nearest to the T-shirt (`knn`), and another one of ours
# over the 10 nearest to x_t (`topk`). All of these memorise. The target `generalizing` combines
# closed forms that are close to what a network predicts. The last row is a network that was trained
# on the digits alone: what unlearning should reach. Below each image is its squared distance to the
# last row, per pixel.

# %%
retrained, _ = load_model(WEIGHTS / "retrain")
base, _ = load_model(WEIGHTS / "base")
task = Task(split.remain, split.forget, schedule, eps_model=base)
names = ["exact", "knn", "topk"] + ([] if QUICK else ["generalizing"])
answers = {name: TARGETS[name](task, ReTrack(k=10)) for name in names}
answers["base"] = lambda x_t, t, index: base(x_t, t)
answers["retrained"] = lambda x_t, t, index: retrained(x_t, t)
at = TIMES[:5]
rows, below = [], []
for answer in answers.values():
    x0s, words = [], []
    for time in at:
        x_t, t = noised(shirt, time), torch.tensor([time])
        with torch.no_grad():
            x0 = schedule.predict_x0(x_t, t, answer(x_t, t, torch.tensor([0])))
            wanted = schedule.predict_x0(x_t, t, retrained(x_t, t))
        x0s.append(x0[0].clamp(-1, 1))
        words.append(f"{(x0 - wanted).square().mean():.3f}")
    rows.append(x0s)
    below.append(words)
show(rows, "targets.png", list(answers), [f"t = {time}" for time in at], below)

# %% [markdown]
# How wrong is ReTrack's target? ||knn - exact|| stays below two bounds (theory, section 5). Both
# know the mass tau that the neighbours drop; one also how wide the data set is, the other how far
# apart the images are that compete at this x_t.

# %%
t = torch.arange(20, 1000, 20)
x_t = schedule.q_sample(shirt.expand(len(t), -1, -1, -1), t, noise.expand(len(t), -1, -1, -1))
neighbors, _ = nearest_neighbors(split.targets, split.remain, 10)
tau = tail_mass(x_t, t, split.remain, schedule, neighbors.expand(len(t), 10))
knn = knn_target(x_t, t, split.remain[neighbors].expand(len(t), -1, -1, -1, -1), schedule)
exact = exact_target(x_t, t, split.remain, schedule)
digits = to_float(split.remain).flatten(1)
ratio = (schedule.gamma / schedule.sigma)[t]
p = log_posterior(x_t, t, split.remain, schedule).exp()
variance = ratio**2 * (p @ digits.square().sum(1) - (p @ digits).square().sum(1))
curves = {
    "tau (gamma / sigma) diameter": tau * ratio * torch.pdist(digits).max(),
    "sqrt(V tau / (1 - tau))": (variance * tau / (1 - tau)).sqrt(),
    "error of 10 neighbours": (knn - exact).flatten(1).norm(dim=1),
}
figure, axis = plt.subplots(figsize=(5.5, 3.2))
for (label, curve), style in zip(curves.items(), ("--", ":", "-"), strict=True):
    axis.semilogy(t.numpy(), curve.numpy(), style, label=label)
axis.set(xlabel="t", ylim=(1e-3, 1e2))
axis.legend()
figure.savefig(OUT / "bounds.png", dpi=110, bbox_inches="tight")
plt.show()

# %% [markdown]
# ## Unlearn (part 4)
#
# Now a network: the base, which was trained on everything. `Vanilla` goes on training it with
# digits; `ReTrack` also regresses it onto what the digits imply at x_t of the T-shirt. The loop
# below is the whole method.

# %%
steps, batch_size = (1, 4) if QUICK else (60, 64)


def unlearn(method: Method) -> torch.nn.Module:
    model = deepcopy(base)
    optimizer = make_optimizer(model, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    prepared = method.prepare(task)
    for _ in range(steps):
        batch = draw_batch(task, batch_size, generator)
        (loss,) = method.losses(model, batch, task, prepared)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


vanilla = unlearn(Vanilla())
forgot = unlearn(ReTrack(target="exact", lam=0.1, snr_cap=1.0))
models = {"base": base, "vanilla": vanilla, "ReTrack": forgot, "retrained": retrained}

# %% [markdown]
# Does it forget? The squared distance to the retrained network at x_t of the T-shirt, per pixel in
# x0 units, by t. Vanilla fine-tuning hardly moves: digits never lead where the T-shirt's x_t are.

# %%
draws = 2 if QUICK else 16


@torch.no_grad()
def distance(model: EpsModel, time: int) -> float:
    t = torch.full((draws,), time)
    eps = torch.randn(draws, 1, 16, 16, generator=torch.Generator().manual_seed(time))
    x_t = schedule.q_sample(shirt.expand(draws, -1, -1, -1), t, eps)
    return to_x0_units(eps_distance(model, retrained, x_t, t), t, schedule).mean().item()


print(f"{'':10}" + "".join(f"t = {time:<6}" for time in at))
for name, model in models.items():
    print(f"{name:10}" + "".join(f"{distance(model, time):<10.3f}" for time in at))

# %% [markdown]
# ## The same noise before and after
#
# The x0 that the network predicts at each step of the sampler, from the same six noises; the first
# three led to the T-shirt. Where the base decides for the T-shirt, the unlearned network decides
# for a digit. Where the base draws a digit, little changes.

# %%
shown = [900, 0] if QUICK else [900, 800, 700, 600, 500, 400, 300, 200, 0]


@torch.no_grad()
def x0_along(model: EpsModel, x_t: Tensor) -> dict[int, Tensor]:
    """The predicted x0 at each t of DDIM."""
    passed = {}
    times = timesteps(schedule.num_steps - 1, 2 if QUICK else 25).tolist()
    for now, then in zip(times, [*times[1:], 0], strict=True):
        t = torch.full((len(x_t),), now)
        x0 = schedule.predict_x0(x_t, t, model(x_t, t)).clamp(-1, 1)
        passed[now] = x0
        eps = schedule.predict_eps(x_t, t, x0)
        x_t = schedule.q_sample(x0, torch.full_like(t, then), eps)
    return passed


starts = torch.randn(8 if QUICK else 160, 1, 16, 16, generator=torch.Generator().manual_seed(2))
ended = x0_along(base, starts)[0]
order = (ended - shirt).flatten(1).norm(dim=1).argsort()
middle = len(order) // 2
starts = starts[torch.cat([order[:3], order[middle : middle + 3]])]
sides = [x0_along(model, starts) for model in (base, forgot)]
nearest = [[min(side, key=lambda t, time=time: abs(t - time)) for time in shown] for side in sides]
figure, axes = plt.subplots(len(starts), 2 * len(shown) + 1, figsize=(12.5, 4.3))
for y, row in enumerate(axes):
    for x, axis in enumerate(row):
        axis.axis("off")
        side, column = divmod(x, len(shown) + 1)
        if column < len(shown):
            x0 = sides[side][nearest[side][column]][y, 0]
            axis.imshow(x0.numpy(), cmap="gray", vmin=-1, vmax=1)
            if y == 0:
                axis.set_title(f"t = {shown[column]}", fontsize=8, pad=3)
figure.subplots_adjust(0.005, 0.01, 0.995, 0.9, 0.06, 0.06)
figure.text(0.24, 0.96, "before unlearning: x0 at each t", ha="center")
figure.text(0.76, 0.96, "after unlearning, the same noise", ha="center")
figure.savefig(OUT / "trajectory_images.png", dpi=110)
plt.show()

# %% [markdown]
# ## Bring it back (part 5)
#
# An attacker who has the weights and the digits, but not the T-shirt, trains the network further.
# Does the T-shirt return? The table has the squared distance per pixel between the T-shirt and the
# x0 that the network predicts at x_t of the T-shirt. A network that never saw the T-shirt shows how
# much such training changes by itself.

# %%


@torch.no_grad()
def from_shirt(model: EpsModel) -> dict[str, float]:
    row = {}
    for time in (200, 400):
        x_t, t = noised(shirt.expand(4, -1, -1, -1), time), torch.full((4,), time)
        x0 = schedule.predict_x0(x_t, t, model(x_t, t))
        row[f"t = {time}"] = round((x0 - shirt).square().mean().item(), 3)
    return row


print("the base, for comparison:", from_shirt(base))
for name in ("ReTrack", "retrained"):
    print(name)
    for row in relearning_curve(
        deepcopy(models[name]),
        split.remain,
        from_shirt,
        schedule,
        at=[1] if QUICK else [10, 20, 30],
        batch_size=batch_size,
        lr=5e-4,
        seed=0,
    ):
        print("  ", row)

# %% [markdown]
# ## Questions to take along
#
# - Part 1: at which t does the denoiser of all images decide whether there will be a T-shirt?
# - Part 2: why does vanilla fine-tuning not forget, although in the end it should?
# - Part 3: at t = 100 the exact target is an 8. Why does a network that never saw the T-shirt not
#   say so? Which of the two would you want?
# - Part 4: the loop took 60 steps. What would you look at to know when to stop?
# - Part 5: did the T-shirt come nearer during the attack? Was it forgotten, or hidden, and which
#   experiment would tell?
