"""Where does ReTrack's approximation hold? `python -m tiny_retrack.lab.theory` measures it on
digits-tshirt in a minute.

Everything is measured at x_t made from a forgotten image a_u, as a function of t: how much of the
posterior k neighbours of a_u drop, and k neighbours of x_t; how far that moves the target; and how
many samples of the vanilla loss say as much about the answer at x_t as one sample of ReTrack's
loss. docs/theory.md derives the formulas, numbered (1) to (7) there, and shows the results.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tiny_retrack.data import Split, to_float, to_uint8
from tiny_retrack.lab import datasets, flags, runs
from tiny_retrack.lab.checkpoint import atomic, load_model, write_json
from tiny_retrack.lab.plots import save_curves, save_panels, save_rows, table
from tiny_retrack.losses import inner, retrack_loss, squared_error
from tiny_retrack.methods import ReTrack, Task
from tiny_retrack.posterior import (
    MAX_COVARIANCE,
    exact_target,
    gaussian_moments,
    gaussian_target,
    ideal_eps,
    knn_target,
    local_target,
    log_posterior,
    nearest_neighbors,
    tail_mass,
    topk_target,
)
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import denoiser, use_bf16
from tiny_retrack.types import EpsModel, Images, InputError, Loss, Steps

Curves = dict[str, list[float]]  # values over t, by label

PANELS = {  # what is measured: the label of its axis
    "support": "remain images behind x_t, 1 / sum p^2",
    "dropped_mass": "posterior mass dropped",
    "error": "relative error of the target",
    "missed": "share of the way missed",
    "overlap": "share of x_t's k neighbours that are a_u's",
    "samples": "log10 of a number of samples",
}
SHOWN_FROM = 300  # t


# --- What x_t is made of


@dataclass(frozen=True)
class Draws:
    """What x_t is made of: the same images and noise at every t, so that curves over t are smooth.

    Everything that is measured is computed in float64.
    """

    split: Split
    schedule: NoiseSchedule
    x0: Images  # forgotten images, in [-1, 1]
    noise: Images
    x0_remain: Images  # for samples of the vanilla loss, with the same noise
    neighbors: Int[Tensor, "b k"]  # indices of the remain images nearest to x0, nearest first

    def at(self, t: int) -> tuple[Images, Steps]:
        """x_t of the forgotten images, and t for each."""
        steps = torch.full((len(self.x0),), t, device=self.x0.device)
        return self.schedule.q_sample(self.x0, steps, self.noise), steps


def make_draws(split: Split, schedule: NoiseSchedule, draws: int, k: int, seed: int) -> Draws:
    """Draw `draws` x_t of the forget set, and find the k remain images nearest to each image.

    Raises:
        InputError: if the forget set is empty, if k is not in 1..N, or for a data set with prompts.
    """
    if split.prompts is not None:
        raise InputError("data sets with prompts are not supported, take another --dataset")
    if not len(split.forget):
        raise InputError(
            "nothing to forget: the data set has no forget set of its own, give --forget"
        )
    device = split.remain.device
    generator = torch.Generator(device).manual_seed(seed)

    def random_images(images: Tensor) -> Tensor:
        index = torch.randint(len(images), (draws,), generator=generator, device=device)
        return images[index]

    forget = random_images(split.forget)
    remain = random_images(split.remain)
    noise = torch.randn(forget.shape, dtype=torch.float64, generator=generator, device=device)
    neighbors, _ = nearest_neighbors(forget, split.remain, k)
    x0, x0_remain = to_float(forget).double(), to_float(remain).double()
    return Draws(split, schedule, x0, noise, x0_remain, neighbors)


# --- What is measured


def approximation(d: Draws, t: int, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """What the k nearest neighbours of a_u, or of x_t, leave out; means over the draws.

    Returns, for all panels but "samples", values by label:
        support: 1 / sum p^2, the effective number of remain images behind x_t.
        dropped_mass: the tail mass tau of docs/theory.md, section 5.
        error: ||target - eps*|| / ||eps*||, the target's error (6) relative to eps* (2).
        missed: ||target - eps*|| / ||eps - eps*||, with eps the answer that leads to a_u.
        overlap: the share of x_t's k neighbours that are also a_u's.
    """
    x_t, steps = d.at(t)
    remain = d.split.remain
    log_p = log_posterior(x_t, steps, remain, d.schedule)
    exact = exact_target(x_t, steps, remain, d.schedule)
    support = 1 / log_p.exp().square().sum(1)
    found: dict[str, dict[str, float]] = {"support": {"1 / sum p^2": support.mean().item()}}
    found |= {"dropped_mass": {}, "error": {}, "missed": {}, "overlap": {}}

    nearest = {"a_u": d.neighbors, "x_t": log_p.topk(max(ks), dim=1).indices}
    for who, index in nearest.items():
        for k in ks:
            name = f"{k} of {who}"
            kept = index[:, :k]
            dropped = tail_mass(x_t, steps, remain, d.schedule, kept)
            error = _norms(_target_of(kept, d, t) - exact)
            found["dropped_mass"][name] = dropped.mean().item()
            found["error"][name] = (error / _norms(exact)).mean().item()
            found["missed"][name] = (error / _norms(d.noise - exact)).mean().item()
    for k in ks:
        is_kept = torch.zeros_like(log_p).scatter(1, d.neighbors[:, :k], 1)
        found["overlap"][f"k = {k}"] = is_kept.gather(1, nearest["x_t"][:, :k]).mean().item()
    return found


def _target_of(kept: Int[Tensor, "b k"], d: Draws, t: int) -> Images:
    """The target over the kept remain images, one x_t at a time: [b, k, c, h, w] may be large."""
    x_t, steps = d.at(t)
    targets = []
    for x, step, index in zip(x_t.split(1), steps.split(1), kept.split(1), strict=True):
        targets.append(knn_target(x, step, d.split.remain[index], d.schedule))
    return torch.cat(targets)


def _norms(images: Images) -> Float[Tensor, " b"]:
    return images.flatten(1).norm(dim=1)


def log_importance(d: Draws, t: int) -> Float[Tensor, " b"]:
    """log q_u(x_t) / q_r(x_t), which is -log w of (3).

    q_u / q_r says how much more often the forget set gives rise to this x_t than the remain set.
    """
    x_t, steps = d.at(t)
    n = len(d.split.remain)
    log_p = log_posterior(x_t, steps, d.split.everything, d.schedule)
    log_odds = log_p[:, n:].logsumexp(1) - log_p[:, :n].logsumexp(1)
    return log_odds - math.log(len(d.split.forget) / n)


def vanilla_samples(d: Draws, t: int) -> dict[str, float]:
    """log10 of how many samples of the vanilla loss say as much about the answer at x_t as one
    sample of ReTrack's loss (7); means over the draws.

    Returns:
        all: "place" + "answer".
        place: q_u / q_r.
        answer: 1 + V / ||e - eps*||^2, with V the posterior variance of v (5), and e the ideal
            denoiser of everything, which is the model that is to forget.
        factor: what ReTrack's samples would lose if the importance factor w = q_r / q_u of (3) were
            kept: E w^2 / (E w)^2, for a w whose logarithm is Gaussian.
    """
    x_t, steps = d.at(t)
    exact = exact_target(x_t, steps, d.split.remain, d.schedule)
    e = ideal_eps(x_t, steps, d.split.everything, d.schedule)
    place = log_importance(d, t)
    answer = torch.log1p(_posterior_variance(d, t, exact) / squared_error(e, exact))
    logs = {
        "all": place + answer,
        "place": place,
        "answer": answer,
        "factor": place.var(correction=0),
    }
    return {name: value.mean().item() / math.log(10) for name, value in logs.items()}


def _posterior_variance(d: Draws, t: int, exact: Images) -> Float[Tensor, " b"]:
    """V = (gamma / sigma)^2 (sum_n p_n ||a_n||^2 - ||sum_n p_n a_n||^2), see (5)."""
    x_t, steps = d.at(t)
    p = log_posterior(x_t, steps, d.split.remain, d.schedule).exp()  # [b, n]
    squares = torch.cat(
        [to_float(part).double().square().flatten(1).sum(1) for part in d.split.remain.split(4096)]
    )
    mean = d.schedule.predict_x0(x_t, steps, exact)
    variance = (p @ squares - mean.square().flatten(1).sum(1)).clamp_min(0)
    return (d.schedule.gamma[t] / d.schedule.sigma[t]) ** 2 * variance


def relative_variance(s: Float[Tensor, " m"]) -> float | None:
    """Var(s) / E(s)^2: how many samples to average until signal equals noise.

    None if the m samples are too few to tell their mean from 0.
    """
    variance = s.var().item()
    squared_mean = s.mean().item() ** 2 - variance / len(s)  # unbiased
    return variance / squared_mean if squared_mean > variance / len(s) else None


def network_progress(model: nn.Module, d: Draws, t: int, bf16: bool) -> dict[str, Any]:
    """How far the gradient of one sample, in a network's weights, leads towards eps* at x_t.

    s = <g, G> / ||G||^2 (docs/theory.md, section 8), with g the gradient of a sample and G that of
    E_{q_u} ||eps_theta - eps*||^2. G is taken over the first half of the draws; the samples are the
    second half.

    Returns:
        A table's row: t; then E s for the vanilla loss, for ReTrack's with the importance factor
        kept (3), and for ReTrack's (4); then the relative variance of s for each.
    """
    eps_model = denoiser(model, bf16)
    params = list(model.parameters())
    x_t, steps = d.at(t)
    exact = exact_target(x_t, steps, d.split.remain, d.schedule).float()
    x0, x0_remain, noise = d.x0.float(), d.x0_remain.float(), d.noise.float()
    half = len(steps) // 2

    def gradient(rows: slice, x0: Images, target: Images) -> list[Tensor]:
        loss = retrack_loss(eps_model, x0[rows], steps[rows], noise[rows], target[rows], d.schedule)
        return list(torch.autograd.grad(loss, params))

    wanted = gradient(slice(half), x0, exact)

    def progress(x0: Images, target: Images) -> Float[Tensor, " m"]:
        shares: list[Loss] = []
        for i in range(half, len(steps)):
            found = gradient(slice(i, i + 1), x0, target)
            shares.append(inner(found, wanted) / inner(wanted, wanted))
        return torch.stack(shares).double()

    retrack = progress(x0, exact)
    samples = {
        "vanilla": progress(x0_remain, noise),
        "factor kept": retrack / log_importance(d, t)[half:].exp(),
        "retrack": retrack,
    }
    row: dict[str, Any] = {"t": t}
    row |= {f"{name}: E s": s.mean().item() for name, s in samples.items()}
    row |= {f"{name}: samples": relative_variance(s) for name, s in samples.items()}
    return row


def limits(
    series: dict[str, Curves], times: Sequence[int], ks: Sequence[int]
) -> list[dict[str, Any]]:
    """A table's row for each k: the first t at which the approximation no longer holds, or None."""

    def first(curve: list[float], beyond: Callable[[float], bool]) -> int | None:
        return next((t for t, value in zip(times, curve, strict=True) if beyond(value)), None)

    rows = []
    for k in ks:
        overlap = series["overlap"][f"k = {k}"]
        row: dict[str, Any] = {"k": k}
        row["less than half of x_t's neighbours are a_u's"] = first(overlap, lambda v: v < 0.5)
        for who in ("a_u", "x_t"):
            dropped = series["dropped_mass"][f"{k} of {who}"]
            row[f"k of {who} drop over 10%"] = first(dropped, lambda v: v > 0.1)
        rows.append(row)
    return rows


# --- The command


def closed_forms(d: Draws, ks: Sequence[int]) -> dict[str, EpsModel]:
    """The targets for the first draws, by name. Prints a line if images are too large for some."""
    remain, schedule = d.split.remain, d.schedule

    def of_a_u(k: int) -> EpsModel:
        neighbors = remain[d.neighbors[:, :k]]
        return lambda x_t, t: knn_target(x_t, t, neighbors[: len(x_t)], schedule)

    def of_x_t(k: int) -> EpsModel:
        return lambda x_t, t: topk_target(x_t, t, remain, schedule, k)

    targets = {f"{k} of a_u": of_a_u(k) for k in ks}
    targets |= {f"{k} of x_t": of_x_t(k) for k in ks}
    targets["exact"] = lambda x_t, t: exact_target(x_t, t, remain, schedule)
    if remain[0].numel() <= MAX_COVARIANCE:
        moments = gaussian_moments(remain)
        targets["Gaussian"] = lambda x_t, t: gaussian_target(x_t, t, moments, schedule)
    else:
        print(
            f"images of over {MAX_COVARIANCE} numbers: without the targets that need a covariance"
        )
    targets["local, 3 x 3"] = lambda x_t, t: local_target(x_t, t, remain, schedule, 3)
    return targets


def generalizing_target(d: Draws, eps_model: EpsModel, seed: int) -> EpsModel:
    """The target generalizing, as unlearn.py fits it to a base."""
    task = Task(d.split.remain, d.split.forget, d.schedule, eps_model, seed=seed)
    target = ReTrack(target="generalizing").prepare(task)
    return lambda x_t, t: target(x_t, t, torch.zeros_like(t))


def x0_of_answers(d: Draws, answers: Mapping[str, EpsModel], t: int, num: int) -> dict[str, Images]:
    """The x0 that each answer stands for at the first `num` draws, by name."""
    x_t, steps = (value[:num] for value in d.at(t))
    x0 = {}
    for name, eps_model in answers.items():
        with torch.no_grad():
            eps = eps_model(x_t.float(), steps).double()
        x0[name] = d.schedule.predict_x0(x_t, steps, eps)
    return x0


def distances(
    d: Draws, answers: Mapping[str, EpsModel], retrained: Sequence[str], t: int
) -> dict[str, float | None]:
    """t, and by name how far an answer's x0 is from that of the retrained networks: the mean square
    per pixel, in x0 units, over draws and networks. For one of them, over the others; None if there
    are none.
    """
    x0 = x0_of_answers(d, answers, t, len(d.x0))
    mean: dict[str, float | None] = {"t": t}
    for name in answers:
        squared = [(x0[name] - x0[other]).square().mean() for other in retrained if other != name]
        mean[name] = torch.stack(squared).mean().item() if squared else None
    return mean


def strip(path: Path, d: Draws, answers: Mapping[str, EpsModel], times: Sequence[int]) -> None:
    """Draw the x0 that each answer stands for at the first draw, one column per t."""
    rows: dict[str, list[Tensor]] = {"x_t": []}
    for t in times:
        x_t, _ = d.at(t)
        rows["x_t"].append(x_t[:1])
        for name, x0 in x0_of_answers(d, answers, t, 1).items():
            rows.setdefault(name, []).append(x0)
    pictures = {name: to_uint8(torch.cat(images)).cpu() for name, images in rows.items()}
    columns = [f"t = {t}" for t in times]
    save_rows(path, pictures, "the x0 that each answer to x_t stands for", columns)


def line(path: Path, schedule: NoiseSchedule, t: int = 200) -> None:
    """Two images on a line, a_r that remains at -1 and a_u that is to be forgotten at 1: the
    densities of x_t made from each, their ratio w, and what three denoisers say.
    """
    gamma, sigma = schedule.gamma[t].item(), schedule.sigma[t].item()
    x = torch.linspace(-2.5, 2.5, 201, dtype=torch.float64)
    x_t, steps = x.view(-1, 1, 1, 1), torch.full((201,), t)
    density = {}
    for name, a in {"q_r: x_t made from a_r": -1.0, "q_u: x_t made from a_u": 1.0}.items():
        exponent = -((x - gamma * a) ** 2) / (2 * sigma**2)
        density[name] = exponent.exp() / (sigma * math.sqrt(2 * math.pi))
    q_r, q_u = density.values()
    answers = {}
    data_of = {"the base: eps* of both": [-1.0, 1.0], "the target: eps* of a_r alone": [-1.0]}
    for name, images in data_of.items():
        data = torch.tensor(images).view(-1, 1, 1, 1)
        answers[name] = ideal_eps(x_t, steps, data, schedule).flatten()
    panels = {
        "density": density,
        "w = q_r / q_u": {"w, the weight of x_t ~ q_u": q_r / q_u},
        "answer, in eps units": answers,
    }
    curves = {}
    for ylabel, lines in panels.items():
        curves[ylabel] = {label: (x.tolist(), y.tolist()) for label, y in lines.items()}
    xlabel = f"x_t, at t = {t} (a_r = -1, a_u = 1)"
    # The answers are other curves than the densities: other colours.
    looks = dict(zip(answers, [("black", "-"), ("C2", "-")], strict=True))
    looks["w, the weight of x_t ~ q_u"] = ("C4", "-")
    save_panels(path, curves, xlabel, columns=3, log=["w = q_r / q_u"], looks=looks)


def make_parser() -> flags.Parser:
    parser = flags.make_parser(__doc__)
    parser.prog = "python -m tiny_retrack.lab.theory"
    parser.add_argument(
        "--k",
        type=flags.positive,
        nargs="+",
        help="how many neighbours (default: 1 10 100 1000, as far as there are so many images)",
    )
    parser.add_argument(
        "--draws",
        type=flags.positive,
        default=32,
        help="x_t of the forgotten image at each t (default: 32)",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="also measure the gradients of this network, and show its answers",
    )
    parser.add_argument(
        "--retrained",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="also show the answers of these networks, and how far all others are from them",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: runs/DATASET/theory)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def load_retrained(
    folders: Sequence[Path], split: Split, schedule: NoiseSchedule
) -> dict[str, nn.Module]:
    """The networks, by the names that tables and pictures give them.

    Raises:
        InputError: as `runs.load_fitting`; or if a network has another noise schedule.
    """
    models = {}
    for number, folder in enumerate(folders, 1):
        model, its_schedule = runs.load_fitting(folder, split)
        if not its_schedule.is_close(schedule):
            raise InputError(f"--retrained {folder}: its noise schedule is not that of the study")
        models[f"retrained network {number}"] = model
    return models


def measure(d: Draws, times: Sequence[int], ks: Sequence[int]) -> dict[str, Curves]:
    """The curves of each panel."""
    rows = [{**approximation(d, t, ks), "samples": vanilla_samples(d, t)} for t in times]
    series: dict[str, Curves] = {}
    for name in PANELS:
        series[name] = {label: [row[name][label] for row in rows] for label in rows[0][name]}
    return series


def tables(
    series: dict[str, Curves],
    times: Sequence[int],
    schedule: NoiseSchedule,
    first_t: list[dict[str, Any]],
    network: list[dict[str, Any]],
    distance: list[dict[str, Any]],
) -> str:
    """All results as Markdown."""
    noise = [(schedule.sigma[t] / schedule.gamma[t]).item() for t in times]
    text = f"**first t at which**\n\n{table(first_t)}\n"
    for name, curves in series.items():
        columns = {"t": times, "sigma/gamma": noise, **curves}
        rows = []
        for values in zip(*columns.values(), strict=True):
            rows.append(dict(zip(columns, values, strict=True)))
        text += f"\n**{PANELS[name]}**\n\n{table(rows)}\n"
    if network:
        text += f"\n**gradients of the network**\n\n{table(network)}\n"
    if distance:
        text += "\n**mean squared distance to the retrained networks, x0 units**\n\n"
        text += f"{table(distance)}\n"
    return text


def draw_panels(
    out: Path, series: dict[str, Curves], times: Sequence[int], ks: Sequence[int]
) -> None:
    """One figure per panel but "support": a colour per k; a_u's neighbours drawn solid, x_t's
    dashed.
    """
    looks = {"all": ("black", "-"), "place": ("C1", "--")}  # nearly the same where t is low
    for i, k in enumerate(ks):
        looks |= {f"{k} of a_u": (f"C{i}", "-"), f"{k} of x_t": (f"C{i}", "--")}
    for name, curves in series.items():
        if name == "support":
            continue  # a single curve, of which the table says all
        first = 0
        if name == "samples":  # below, they are too many to show what lies above
            first = sum(t < SHOWN_FROM for t in times)
        drawn = {label: (times[first:], values[first:]) for label, values in curves.items()}
        with atomic(out / f"{name}.png") as path:
            save_curves(path, drawn, "t", PANELS[name], looks=looks)


def draw_answers(
    out: Path, d: Draws, answers: Mapping[str, EpsModel], times: Sequence[int]
) -> None:
    """What each answer stands for, and what a sample of each loss says."""
    with atomic(out / "redirected.png") as path:
        strip(path, d, answers, times)
    with atomic(out / "line.png") as path:
        line(path, d.schedule)


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    clock = time.perf_counter()
    device = runs.pick_device(args.device)
    model, schedule, recorded = None, NoiseSchedule.linear(), None
    if args.checkpoint:
        model, schedule = load_model(args.checkpoint)
        recorded = runs.recorded_data(args.checkpoint)
    data, split = datasets.load_data(flags.data_settings(args, recorded), args.download)
    split = split.to(device)
    if model is not None:
        runs.check_model_fits(model.config, schedule.num_steps, split, args.checkpoint)
        if args.draws < 4:
            raise InputError(f"--draws {args.draws}: the gradients of a network need at least 4")
    retrained = load_retrained(args.retrained, split, schedule)
    out = args.out or Path("runs", data["dataset"], "theory")
    runs.check_folder(out, args.overwrite)

    ks = sorted(set(args.k or [k for k in (1, 10, 100, 1000) if k <= len(split.remain)]))
    times = sorted({*range(0, schedule.num_steps, 50), schedule.num_steps - 1})
    hundreds = [t for t in times if t % 100 == 0 and t > 0]
    d = make_draws(split, schedule, args.draws, max(ks), args.seed)
    series = measure(d, times, ks)
    first_t = limits(series, times, ks)
    network = []
    answers = closed_forms(d, ks)
    bf16 = use_bf16(args.bf16, device)
    if model is not None:
        model = model.to(device)
        network = [network_progress(model, d, t, bf16) for t in hundreds]
        eps_model = denoiser(model, bf16)
        if "Gaussian" in answers:  # which is a part of it
            answers["generalizing"] = generalizing_target(d, eps_model, args.seed)
        answers["the network"] = eps_model
    for name, other in retrained.items():
        answers[name] = denoiser(other.to(device), bf16)
    distance = [distances(d, answers, [*retrained], t) for t in times] if retrained else []

    runs.prepare_folder(out, args.overwrite)
    text = tables(series, times, schedule, first_t, network, distance)
    draw_panels(out, series, times, ks)
    draw_answers(out, d, answers, hundreds)
    with atomic(out / "table.md") as path:
        path.write_text(text, encoding="utf-8")
    seconds = round(time.perf_counter() - clock, 1)
    run = {"data": data, "seed": args.seed, "draws": args.draws, "k": ks, "seconds": seconds}
    result = {"t": times, "series": series, "first_t": first_t}
    result |= {"network": network, "distance": distance}
    record = runs.provenance(device, runs.command_line(__file__, argv))
    write_json(out / "theory.json", {**run, **result, **record})
    runs.discard_old(out)
    print(f"{text}\n{out}: theory.json, table.md and figures, in {seconds} s")


if __name__ == "__main__":
    runs.run_command(main)
