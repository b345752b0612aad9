"""Make a trained model forget. `python unlearn.py` runs ReTrack on runs/digits-tshirt/base/ and
writes beside it.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tiny_retrack import NoiseSchedule, UNet, load_model, save_model
from tiny_retrack.data import Split, read_image, to_float, to_uint8
from tiny_retrack.lab import flags, runs
from tiny_retrack.lab.checkpoint import atomic, fingerprint, write_json
from tiny_retrack.lab.plots import save_rows, table
from tiny_retrack.lab.presets import PRESETS, UnlearnSettings, add_flags, resolve
from tiny_retrack.losses import (
    EpsModel,
    ddpm_loss,
    dimum_loss,
    erasediff_gradient,
    erasediff_losses,
    neggrad_loss,
    parse_rescale,
    retrack_loss,
    siss_gradient,
    siss_losses,
    vdu_loss,
)
from tiny_retrack.metrics import oracle_distance
from tiny_retrack.posterior import exact_target, knn_target, nearest_neighbors, topk_target
from tiny_retrack.sampling import sample_many
from tiny_retrack.training import denoiser, fit, make_optimizer, place, rank, use_bf16
from tiny_retrack.types import InputError, NonFiniteError

LOOK_EVERY = 20  # steps between looks at the losses: each waits for the device
STD_FLOOR = 0.1  # vdu, of the root mean square over all weights: one that hardly moved would else be nailed down


@dataclass(frozen=True)
class Problem:
    """What stays the same from step to step."""

    remain: Tensor  # uint8 [n, c, h, w]
    forget: Tensor  # uint8 [m, c, h, w]
    neighbors: Tensor  # [m, k]: the k remain images nearest to each forget image
    schedule: NoiseSchedule
    settings: UnlearnSettings
    target: str
    alternatives: Tensor  # uint8 [m, c, h, w]: dimum's, one for each forget image
    weights: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] = (
        (),
        (),
        (),
    )  # vdu's `weight_moments`


@dataclass(frozen=True)
class Batch:
    """All that is random in a step, drawn alike for every method. Images in [-1, 1]."""

    x0_remain: Tensor
    x0_forget: Tensor
    forget_index: Tensor  # which forget images these are
    t: Tensor
    t_remain: Tensor  # for methods whose remain batch has times of its own
    noise: Tensor
    noise_remain: Tensor
    uniform: Tensor  # U[0, 1) a pixel
    from_forget: Tensor  # Bool, True with probability siss_lam


def draw_batch(p: Problem, generator: torch.Generator) -> Batch:
    b, device = p.settings.batch_size, p.remain.device
    random = {"generator": generator, "device": device}
    x0_remain = to_float(p.remain[torch.randint(len(p.remain), (b,), **random)])
    forget_index = torch.randint(len(p.forget), (b,), **random)
    return Batch(
        x0_remain,
        to_float(p.forget[forget_index]),
        forget_index,
        t=torch.randint(p.schedule.num_steps, (b,), **random),
        t_remain=torch.randint(p.schedule.num_steps, (b,), **random),
        noise=torch.randn(x0_remain.shape, **random),
        noise_remain=torch.randn(x0_remain.shape, **random),
        uniform=torch.rand(x0_remain.shape, **random),
        from_forget=torch.rand(b, **random) < p.settings.siss_lam,
    )


TARGETS: dict[str, Callable[[Problem, Batch, Tensor], Tensor]] = {
    "knn": lambda p, b, x_t: knn_target(
        x_t, b.t, to_float(p.remain[p.neighbors[b.forget_index]]), p.schedule
    ),
    "topk": lambda p, b, x_t: topk_target(x_t, b.t, p.remain, p.schedule, p.settings.k),
    "exact": lambda p, b, x_t: exact_target(x_t, b.t, p.remain, p.schedule),
}


def vanilla(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    return (ddpm_loss(eps_model, b.x0_remain, b.t_remain, b.noise_remain, p.schedule),)


def neggrad(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    return (neggrad_loss(eps_model, b.x0_forget, b.t, b.noise, p.schedule),)


def erasediff(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    return erasediff_losses(
        eps_model, b.x0_remain, b.x0_forget, b.t, b.noise, b.uniform, p.schedule
    )


def siss(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    lam = p.settings.siss_lam
    return siss_losses(
        eps_model, b.x0_remain, b.x0_forget, b.t, b.noise, b.from_forget, lam, p.schedule
    )


def siss_no_is(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    return (
        ddpm_loss(eps_model, b.x0_remain, b.t, b.noise, p.schedule),
        ddpm_loss(eps_model, b.x0_forget, b.t, b.noise, p.schedule),
    )


def retrack(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    x_forget = p.schedule.q_sample(b.x0_forget, b.t, b.noise)
    x_remain = p.schedule.q_sample(b.x0_remain, b.t_remain, b.noise_remain)
    eps = eps_model(torch.cat([x_forget, x_remain]), torch.cat([b.t, b.t_remain])).chunk(
        2
    )  # faster than two passes
    target = TARGETS[p.target](p, b, x_forget)
    forget = retrack_loss(
        lambda x_t, t: eps[0], b.x0_forget, b.t, b.noise, target, p.schedule, p.settings.snr_cap
    )
    remain = ddpm_loss(lambda x_t, t: eps[1], b.x0_remain, b.t_remain, b.noise_remain, p.schedule)
    return (p.settings.lam * forget + (1 - p.settings.lam) * remain,)


def vdu(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    return (
        vdu_loss(eps_model, b.x0_forget, b.t, b.noise, *p.weights, p.settings.gamma, p.schedule),
    )


def dimum(eps_model: EpsModel, p: Problem, b: Batch) -> tuple[Tensor, ...]:
    alternative = to_float(p.alternatives[b.forget_index])
    forget = dimum_loss(eps_model, b.x0_forget, alternative, b.t, b.noise, p.schedule)
    remain = ddpm_loss(eps_model, b.x0_remain, b.t_remain, b.noise_remain, p.schedule)
    return (p.settings.lam * forget + (1 - p.settings.lam) * remain,)


@dataclass(frozen=True)
class Method:
    """A row of METHODS: the losses of a batch and, if there are two, what makes one gradient of
    theirs.
    """

    losses: Callable[[EpsModel, Problem, Batch], tuple[Tensor, ...]]
    combine: Callable[[Problem], Callable[..., list[Tensor]]] | None = None


def siss_combine(p: Problem) -> Callable[..., list[Tensor]]:
    return lambda g_remain, g_forget: siss_gradient(g_remain, g_forget, p.settings.rescale)


# To add a method: one pure loss in losses.py, one function above, one row here, one row in
# tests/test_methods.py.
METHODS = {
    "vanilla": Method(vanilla),
    "neggrad": Method(neggrad),
    "erasediff": Method(erasediff, lambda p: erasediff_gradient),
    "siss": Method(siss, siss_combine),
    "siss-no-is": Method(siss_no_is, siss_combine),
    "retrack": Method(retrack),
    "vdu": Method(vdu),
    "dimum": Method(dimum),
}


def pick_alternatives(choice: str, split: Split, neighbors: Tensor, seed: int) -> Tensor:
    """uint8 [m, c, h, w]: what dimum learns in place of each forget image; the same for all copies
    of an image.

    Raises:
        InputError: if `choice` is neither "knn" nor "random" nor a readable image.
    """
    if choice == "knn":
        return split.remain[neighbors[:, 0]]
    if choice == "random":
        distinct, which = torch.unique(split.forget, dim=0, return_inverse=True)
        index = torch.randint(
            len(split.remain), (len(distinct),), generator=torch.Generator().manual_seed(seed)
        )
        return split.remain[index.to(which.device)[which]]
    if not Path(choice).is_file():
        raise InputError(f"--alternative {choice}: neither knn nor random, nor an image file")
    _, channels, size, _ = split.forget.shape
    return read_image(Path(choice), size, channels).to(split.forget.device).expand_as(split.forget)


def weight_moments(
    checkpoint: Path, model: UNet
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The model's own weights; their mean and standard deviation over the pretraining checkpoints
    that were kept.

    Raises:
        InputError: if fewer than two were kept.
    """
    folders = sorted(checkpoint.glob("step-*"))
    if len(folders) < 2:
        raise InputError(
            f"vdu: {checkpoint} kept {len(folders)} checkpoints of its training: train with --keep N"
        )
    models = [load_model(folder)[0] for folder in folders]
    strange = [
        folder for folder, kept in zip(folders, models, strict=True) if kept.config != model.config
    ]
    if strange:
        raise InputError(f"vdu: {strange[0]} is not of the same network as {checkpoint}: remove it")
    kept, own = [each.state_dict() for each in models], dict(model.named_parameters())
    stacks = [
        torch.stack([state[name] for state in kept]).to(weight.device)
        for name, weight in own.items()
    ]
    means, stds = [stack.mean(0) for stack in stacks], [stack.std(0) for stack in stacks]
    floor = STD_FLOOR * torch.cat([std.flatten() for std in stds]).square().mean().sqrt()
    if not floor > 0:
        raise InputError(
            f"vdu: the checkpoints that {checkpoint} kept are all the same: train with --keep N"
        )
    return list(own.values()), means, [std.clamp_min(floor) for std in stds]


@torch.no_grad()
def probe(eps_model: EpsModel, p: Problem, seed: int) -> dict[str, float]:
    """The losses on both sets, and how far the model is from what the remaining data say at the
    forgotten images.
    """
    generator = torch.Generator(p.remain.device).manual_seed(seed)
    b = draw_batch(p, generator)
    t = torch.randint(200, 400, b.t.shape, generator=generator, device=b.t.device)
    x_t = p.schedule.q_sample(b.x0_forget, t, b.noise)
    distance = oracle_distance(
        eps_model, lambda x, t: exact_target(x, t, p.remain, p.schedule), x_t, t
    )
    return {
        "loss on remain": ddpm_loss(eps_model, b.x0_remain, b.t, b.noise, p.schedule).item(),
        "loss on forget": ddpm_loss(eps_model, b.x0_forget, b.t, b.noise, p.schedule).item(),
        "to the oracle": distance.mean().item(),
    }


def make_parser() -> flags.Parser:
    parser = flags.make_parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, help="the model that is to forget (default: runs/DATASET/base)"
    )
    parser.add_argument(
        "--method", type=flags.one_of(METHODS), default="retrack", help=", ".join(METHODS)
    )
    parser.add_argument(
        "--target",
        type=flags.one_of(TARGETS),
        default="knn",
        help="retrack: what the forget loss regresses on",
    )
    add_flags(parser, UnlearnSettings)
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument(
        "--save-every",
        type=flags.positive,
        help="also keep the model of every N-th step before the last, in OUT/step-N",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="run folder (default: runs/DATASET/METHOD, for retrack with -TARGET)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is in the run folder"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    device = runs.pick_device(args.device)
    checkpoint = args.checkpoint or Path(
        "runs", args.dataset or flags.DATA_DEFAULTS["dataset"], "base"
    )
    model, schedule = load_model(checkpoint)
    data = flags.data_settings(args, runs.recorded_data(checkpoint))
    split = runs.load_data(data, args.download).to(device)
    if not len(split.forget):
        raise InputError(
            f"nothing to forget: {data['dataset']} has no forget set of its own, give --forget"
        )
    runs.check_model_fits(model.config, schedule.num_steps, split, checkpoint)
    settings = resolve(PRESETS[data["dataset"]].unlearn, args)
    name = args.method + (f"-{args.target}" if args.method == "retrack" else "")
    out = args.out or Path("runs", data["dataset"], name)
    if checkpoint.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"--out {out} is the checkpoint itself, or holds it: choose another folder"
        )
    if settings.k > len(split.remain):
        raise InputError(f"--k {settings.k}: only {len(split.remain)} images remain")
    parse_rescale(settings.rescale)
    runs.check_folder(out, args.overwrite)

    bf16 = use_bf16(args.bf16, device)
    model = place(model, device, bf16)
    neighbors, _ = nearest_neighbors(split.forget, split.remain, settings.k)
    alternatives = pick_alternatives(settings.alternative, split, neighbors, args.seed)
    problem = Problem(
        split.remain, split.forget, neighbors, schedule, settings, args.target, alternatives
    )
    if args.method == "vdu":
        problem = replace(problem, weights=weight_moments(checkpoint, model))
    method = METHODS[args.method]
    shape = tuple(split.remain.shape[1:])

    def grid() -> Tensor:
        return to_uint8(
            sample_many(
                denoiser(model, bf16), 16, shape, schedule, 25, seed=args.seed, device=device
            )
        )

    samples, probes = grid(), probe(denoiser(model, bf16), problem, args.seed)
    progress = fit(
        model,
        lambda eps_model, generator: method.losses(
            eps_model, problem, draw_batch(problem, generator)
        ),
        make_optimizer(model, settings.lr),
        steps=settings.steps,
        lr_at=lambda step: settings.lr,
        seed=args.seed,
        device=device,
        combine=method.combine(problem) if method.combine else None,
        bf16=bf16,
        compiled=args.compile,
        accumulate=settings.accumulate,
    )
    history, snapshots, clock = [], {}, time.perf_counter()
    advice = f"{checkpoint} is untouched; lower --lr or --steps"
    with runs.stop_on_signal() as stop:
        for done in tqdm(progress, name, total=settings.steps, unit="step", disable=rank() > 0):
            history.append(torch.cat([done.losses, done.grad_norm[None]]))
            if args.save_every and done.step % args.save_every == 0 and done.step < settings.steps:
                snapshots[done.step] = {
                    key: value.clone() for key, value in model.state_dict().items()
                }
            if done.step % LOOK_EVERY == 0 or done.step == settings.steps:
                sound = torch.stack(history[-LOOK_EVERY:]).isfinite().all(1).tolist()
                if not all(sound):
                    step = done.step - len(sound) + 1 + sound.index(False)
                    raise NonFiniteError(f"{name} diverged at step {step}: {advice}")
            if stop.signal:
                raise SystemExit(128 + stop.signal)
    seconds = time.perf_counter() - clock
    if rank() > 0:
        return

    samples, probes = [samples, grid()], [probes, probe(denoiser(model, bf16), problem, args.seed)]
    if not all(
        map(math.isfinite, probes[1].values())
    ):  # the losses are those before each step, the last one's too
        raise NonFiniteError(f"{name} diverged at step {settings.steps}: {advice}")
    runs.prepare_folder(out, args.overwrite)
    save_model(out, model, schedule)
    for step, weights in snapshots.items():
        save_model(out / f"step-{step}", model, schedule, state=weights)
    lines = enumerate(torch.stack(history).tolist(), start=1)
    log = [{"step": step, "losses": line[:-1], "grad_norm": line[-1]} for step, line in lines]
    with atomic(out / "log.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in log))
    with atomic(out / "before_after.png") as path:
        save_rows(
            path, {"before": samples[0], name: samples[1]}, "the same noise, before and after"
        )
    run = {
        "method": args.method,
        "target": args.target if args.method == "retrack" else None,
        "seed": args.seed,
    }
    run |= {
        "checkpoint": str(checkpoint),
        "base": fingerprint(checkpoint),
        "data": data,
        "unlearn": asdict(settings),
    }
    run |= {
        "bf16": bf16,
        "seconds": round(seconds, 2),
        "probe": {"before": probes[0], "after": probes[1]},
    }
    write_json(out / "run.json", {**run, **runs.provenance(device)})
    runs.discard_old(out)
    print(table([{"model": checkpoint.name, **probes[0]}, {"model": name, **probes[1]}]))
    print(
        f"{out}: {settings.steps} steps in {seconds:.1f} s; now run: python evaluate.py {checkpoint} {out}"
    )


if __name__ == "__main__":
    runs.run_command(main)
