"""One unlearning run on disk, as `unlearn.py` plans it: its inputs, the loop, before and after."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from tiny_retrack.data import NO_LABEL, Split, to_float, to_uint8
from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import (
    atomic,
    fingerprint,
    hash_file,
    load_model,
    save_model,
    write_json,
)
from tiny_retrack.lab.hits import choose_threshold
from tiny_retrack.lab.plots import save_rows
from tiny_retrack.lab.presets import PRESETS, UnlearnSettings
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.methods import VDU, DiMUM, Method, ReTrack, Task, draw_batch
from tiny_retrack.metrics import eps_distance, is_hit, to_x0_units
from tiny_retrack.pictures import read_image
from tiny_retrack.posterior import ideal_denoiser
from tiny_retrack.prompts import at_prompt
from tiny_retrack.sampling import SAMPLERS, inject_and_denoise, sample_many
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import cosine_with_warmup, denoiser, fit, make_optimizer, place, rank
from tiny_retrack.types import EpsModel, InputError, Loss, NonFiniteError
from tiny_retrack.unet import UNet

CPU = torch.device("cpu")
PICTURES = 16  # in a row of before_after.png
INJECTED_AT = 250  # t of the forgotten images in before_after.png, as in the papers
MOVED = 0.1  # of the distance to the oracle: less than this is not unlearning
LOOK_EVERY = 20  # steps between looks at the losses: each look waits for the device
PROBE_TIMES = (200, 400)  # t of the distance that is shown before and after
OWN_SAMPLES = 512  # that a model with prompts draws under the prompt that it is to unlearn
FEWEST_SAMPLES = 16  # of these that are hits, and that are none
DISTANCE = f"oracle x0-mse t={PROBE_TIMES[0]}-{PROBE_TIMES[1] - 1}"  # as evaluate.py calls it


@dataclass(frozen=True)
class UnlearnPlan:
    """All that an unlearning run is.

    Attributes:
        checkpoint: the model that is to forget; it is not touched.
        out: the run folder.
        data: of `datasets.load_data`; recorded in run.json.
        method_name, method: the key in METHODS, and the method with its settings.
        bf16: autocast to bfloat16.
        compiled: torch.compile the UNet.
        save_every: also keep the model of every such step before the last, in OUT/step-*.
        overwrite: replace what is in `out`.
        command: of `runs.command_line`.
    """

    checkpoint: Path
    out: Path
    data: dict[str, Any]
    method_name: str
    method: Method
    settings: UnlearnSettings
    seed: int = 0
    device: torch.device = CPU
    bf16: bool = False
    compiled: bool = False
    save_every: int | None = None
    overwrite: bool = False
    command: str | None = None

    @property
    def label(self) -> str:
        """The method's name; for retrack with its target."""
        return run_label(self.method_name, self.method)


@dataclass(frozen=True)
class Unlearned:
    """What came of a run.

    Attributes:
        before, after: the figures of `probe`.
        seconds: of the steps alone.
        own_samples: of a model with prompts: the prompt, and how many of its own samples were the
            forget and the remain set.
    """

    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    own_samples: dict[str, int] | None = None

    @property
    def warning(self) -> str | None:
        """What to tell if the model did not move towards the oracle by a tenth of the way."""
        before, after = self.before[DISTANCE], self.after[DISTANCE]
        if after <= (1 - MOVED) * before:
            return None
        moved = "moved away from" if after > before else "hardly moved towards"
        change = f"{before:.4g} before, {after:.4g} after ({after / before - 1:+.1%})"
        return (
            f"warning: the model {moved} the oracle, the ideal denoiser of the remain set: "
            f"distance {change}; take more --steps, a higher --lr, or another --method"
        )


def run_label(method_name: str, method: Method) -> str:
    """How folders and tables call a run: the method's name, for retrack with its target."""
    return f"{method_name}-{method.target}" if isinstance(method, ReTrack) else method_name


def unlearn(plan: UnlearnPlan, split: Split) -> Unlearned | None:
    """Make the checkpoint's model forget `split.forget`; leave the result and its record in
    `plan.out`.

    Of a model with prompts, the one of `split.forget` is unlearned: the forget and the remain set
    are the model's own samples under it (`own_samples`), as in ReTrack's Stable Diffusion.

    Returns None for the processes of a torchrun that do not write. A signal (SIGINT, SIGTERM) exits
    with 128 + its number, and nothing is written.

    Raises:
        InputError: if the checkpoint, the data and the settings do not fit together.
        NonFiniteError: if the model diverges; nothing is written.
    """
    model, schedule = _load(plan, split)
    # As the files are now: they may change before this run is written.
    origin = {
        "base": fingerprint(plan.checkpoint),
        "base_seed": runs.initial_seed(plan.checkpoint),
        "alternative": digest_alternative(plan.method),
    }
    split = split.to(plan.device)
    eps_model = denoiser(model, plan.bf16)
    prompt = forgotten_prompt(split)
    own = None
    if prompt is not None:
        eps_model = at_prompt(eps_model, prompt)
        split = own_samples(plan, split, eps_model, schedule)
        own = {"prompt": prompt, "forget": len(split.forget), "remain": len(split.remain)}
    task = make_task(plan, split, model, eps_model, schedule)
    prepared = plan.method.prepare(task)

    index = torch.arange(PICTURES, device=plan.device) * len(split.forget) // PICTURES
    forgotten = split.forget[index]  # evenly spaced; fewer than 16 are repeated
    drawn_before = _draw(plan, eps_model, task, forgotten)
    before = probe(eps_model, task, plan.settings.batch_size, plan.seed)
    clock = time.perf_counter()
    log, snapshots = _optimise(plan, model, task, prepared, prompt)
    seconds = time.perf_counter() - clock
    if rank() > 0:
        return None

    drawn_after = _draw(plan, eps_model, task, forgotten)
    after = probe(eps_model, task, plan.settings.batch_size, plan.seed)
    if not all(math.isfinite(value) for value in after.values()):
        # The losses of a step are those before it: of the last one, only the probe tells.
        raise _diverged(plan, plan.settings.steps)
    result = Unlearned(before, after, seconds, own)
    pictures = _before_after(forgotten, drawn_before, drawn_after, plan.label)
    _write(plan, origin, model, schedule, result, log, snapshots, pictures)
    return result


def _load(plan: UnlearnPlan, split: Split) -> tuple[UNet, NoiseSchedule]:
    """The model on its device, once everything that can be checked beforehand is found good."""
    if not len(split.forget):
        name = plan.data["dataset"]
        raise InputError(f"nothing to forget: {name} has no forget set of its own, give --forget")
    method = plan.method
    if isinstance(method, DiMUM) and method.replaces == "prompt" and split.prompts is None:
        raise InputError("--replaces prompt: the data set has no prompts, take --replaces image")
    model, schedule = runs.load_fitting(plan.checkpoint, split)
    runs.check_apart(plan.checkpoint, plan.out)
    runs.check_folder(plan.out, plan.overwrite)
    if model.config.sample_size is None:  # any size: from now on the data set's
        model.config = replace(model.config, sample_size=split.remain.shape[-1])
    return place(model, plan.device, plan.bf16), schedule


def forgotten_prompt(split: Split) -> int | None:
    """The prompt of the images to be forgotten; None for a data set without prompts.

    Raises:
        InputError: if they have several.
    """
    if split.prompts is None:
        return None
    prompts = split.prompts[len(split.remain) :].unique().tolist()
    if len(prompts) > 1:
        told = ", ".join(map(str, prompts))
        raise InputError(f"--forget: the images have the prompts {told}: forget those of one")
    return prompts[0]


def own_samples(
    plan: UnlearnPlan, split: Split, eps_model: EpsModel, schedule: NoiseSchedule
) -> Split:
    """OWN_SAMPLES samples of the model: hits are to be forgotten, all others remain.

    Prints how many there are of each.

    Raises:
        InputError: if there are fewer than FEWEST_SAMPLES of either.
    """
    settings = PRESETS[plan.data["preset"]].evaluate
    threshold = choose_threshold(split, settings.threshold)
    if threshold.value is None:
        raise InputError(f"hits cannot be told from other samples: {threshold.about}")
    samples = sample_many(
        eps_model,
        OWN_SAMPLES,
        tuple(split.remain.shape[1:]),
        schedule,
        settings.sampler_steps,
        seed=plan.seed + 1,  # with the default seeds, not the samples that evaluate.py looks at
        device=plan.device,
        sampler=SAMPLERS[settings.sampler],
        progress="own samples" if rank() == 0 else "",
    )
    hits = is_hit((samples + 1) / 2, split.targets.cpu() / 255, threshold.value)
    forget, remain = to_uint8(samples[hits]), to_uint8(samples[~hits])
    told = f"{len(forget)} of {OWN_SAMPLES} samples under the prompt are hits"
    if min(len(forget), len(remain)) < FEWEST_SAMPLES:
        raise InputError(
            f"{plan.checkpoint}: {told}; at least {FEWEST_SAMPLES} hits and {FEWEST_SAMPLES} other "
            "samples are needed"
        )
    if rank() == 0:
        print(f"{told}, to be forgotten; the others remain")
    return Split(remain, forget, torch.full((len(remain),), NO_LABEL)).to(plan.device)


def make_task(
    plan: UnlearnPlan, split: Split, model: UNet, eps_model: EpsModel, schedule: NoiseSchedule
) -> Task:
    """What the method is given, and what it needs from the disk.

    Raises:
        InputError: if that is missing or does not fit.
    """
    task = Task(split.remain, split.forget, schedule, eps_model, seed=plan.seed)
    method = plan.method
    if isinstance(method, VDU):
        kept = kept_params(plan.checkpoint, model)
        task = replace(task, params=list(model.parameters()), kept_params=kept)
    if isinstance(method, DiMUM):
        task = replace(task, alternative=read_alternative(method, split))
    return task


def read_alternative(method: DiMUM, split: Split) -> UInt8[Tensor, "1 c h w"] | None:
    """The image file that takes the forgotten images' place; None where it is not a file.

    Raises:
        InputError: if there is no such image.
    """
    if method.alternative in ("knn", "random"):
        return None
    path = Path(method.alternative)
    if not path.is_file():
        raise InputError(f"--alternative {path}: neither knn nor random, nor an image file")
    channels, size = split.forget.shape[1:3]
    return read_image(path, size, channels)[None].to(split.forget.device)


def digest_alternative(method: Method) -> str | None:
    """Of the file that `read_alternative` reads: it may change under the same name."""
    if not isinstance(method, DiMUM) or method.alternative in ("knn", "random"):
        return None
    return hash_file(Path(method.alternative)).hex()[:16]


def kept_params(checkpoint: Path, model: UNet) -> list[list[Tensor]]:
    """The weights of each checkpoint that the model's training kept (`train_ddpm.py --keep`).

    Raises:
        InputError: if one is of another network.
    """
    kept = []
    for folder in sorted(checkpoint.glob("step-*")):
        other, _ = load_model(folder)
        if other.config != model.config:
            raise InputError(f"vdu: {folder} is not of the same network as {checkpoint}: remove it")
        params = zip(other.parameters(), model.parameters(), strict=True)
        kept.append([theirs.detach().to(ours.device) for theirs, ours in params])
    return kept


@torch.no_grad()
def probe(eps_model: EpsModel, task: Task, batch_size: int, seed: int) -> dict[str, float]:
    """The DDPM loss on both sets, and the distance to the oracle at x_t of the forget images.

    The oracle is the remain set's ideal denoiser; the distance is the squared one per pixel, in x0
    units, with images in [-1, 1].
    """
    generator = torch.Generator(task.remain.device).manual_seed(seed)
    batch = draw_batch(task, batch_size, generator)
    low, high = PROBE_TIMES
    t = torch.randint(low, high, batch.t.shape, generator=generator, device=batch.t.device)

    oracle = ideal_denoiser(task.remain, task.schedule)
    x_t = task.schedule.q_sample(batch.x0_forget, t, batch.noise)
    distance = to_x0_units(eps_distance(eps_model, oracle, x_t, t), t, task.schedule)
    remain = ddpm_loss(eps_model, batch.x0_remain, batch.t, batch.noise, task.schedule)
    forget = ddpm_loss(eps_model, batch.x0_forget, batch.t, batch.noise, task.schedule)
    return {
        "loss on remain": remain.item(),
        "loss on forget": forget.item(),
        DISTANCE: distance.mean().item(),
    }


@torch.no_grad()
def _draw(
    plan: UnlearnPlan, eps_model: EpsModel, task: Task, forgotten: Tensor
) -> dict[str, Tensor]:
    """The model's rows of before_after.png, uint8: samples, and the forgotten images, noised and
    denoised. The noise depends on the seed alone.
    """
    shape = tuple(task.remain.shape[1:])
    samples = sample_many(
        eps_model, PICTURES, shape, task.schedule, 25, seed=plan.seed, device=plan.device
    )
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    noise = torch.randn((PICTURES, *shape), generator=generator, device=plan.device)
    x0 = to_float(forgotten)
    denoised = inject_and_denoise(eps_model, x0, INJECTED_AT, noise, task.schedule, 10)
    return {"samples": to_uint8(samples), f"from t={INJECTED_AT}": to_uint8(denoised).cpu()}


def _before_after(
    forgotten: Tensor, before: dict[str, Tensor], after: dict[str, Tensor], label: str
) -> dict[str, Tensor]:
    """The rows of before_after.png by label: the forgotten images, then what each model makes."""
    rows = {"forgotten": forgotten.cpu()}
    for name in before:
        rows[f"{name}, before"] = before[name]
        rows[f"{name}, {label}"] = after[name]
    return rows


def _optimise(
    plan: UnlearnPlan, model: UNet, task: Task, prepared: Any, prompt: int | None
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Tensor]]]:
    """Run the steps. Returns the lines of the log, and by step the weights that are to be kept."""
    settings = plan.settings

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss, ...]:
        if prompt is not None:
            eps_model = at_prompt(eps_model, prompt)
        batch = draw_batch(task, settings.batch_size, generator)
        return plan.method.losses(eps_model, batch, task, prepared)

    progress = fit(
        model,
        losses,
        make_optimizer(model, settings.lr),
        steps=settings.steps,
        lr_at=learning_rate(settings),
        seed=plan.seed,
        device=plan.device,
        combine=plan.method.combine,
        bf16=plan.bf16,
        compiled=plan.compiled,
        accumulate=settings.accumulate,
    )
    history: list[Tensor] = []  # by step: the losses, then the gradient's norm
    snapshots: dict[int, dict[str, Tensor]] = {}
    bar = tqdm(progress, plan.label, total=settings.steps, unit="step", disable=rank() > 0)
    with runs.stop_on_signal() as stop:
        for done in bar:
            history.append(torch.cat([done.losses, done.grad_norm[None]]))
            is_last = done.step == settings.steps
            if plan.save_every and done.step % plan.save_every == 0 and not is_last:
                weights = model.state_dict().items()
                snapshots[done.step] = {name: value.clone() for name, value in weights}
            if is_last or done.step % LOOK_EVERY == 0:
                _check_finite(plan, history, done.step)
                bar.set_postfix(loss=f"{history[-1][0].item():.2f}", refresh=False)
            if stop.signal:
                raise SystemExit(128 + stop.signal)
    rows = torch.stack(history).tolist()
    log = [
        {"step": step, "losses": row[:-1], "grad_norm": row[-1]}
        for step, row in enumerate(rows, start=1)
    ]
    return log, snapshots


def learning_rate(settings: UnlearnSettings) -> Callable[[int], float]:
    """The learning rate by step, from 0: constant, as in the papers, or with `decay`."""
    if settings.decay == "cosine":
        return cosine_with_warmup(settings.lr, settings.steps // 10, settings.steps)
    return lambda step: settings.lr


def _check_finite(plan: UnlearnPlan, history: list[Tensor], step: int) -> None:
    """Raise if one of the last LOOK_EVERY steps, of which `step` is the last, was not finite."""
    recent = torch.stack(history[-LOOK_EVERY:])
    is_finite = recent.isfinite().all(1).tolist()
    if not all(is_finite):
        first = step - len(recent) + 1 + is_finite.index(False)
        raise _diverged(plan, first)


def _diverged(plan: UnlearnPlan, step: int) -> NonFiniteError:
    return NonFiniteError(
        f"{plan.label} diverged at step {step}: {plan.checkpoint} is untouched; "
        f"lower --lr or --steps"
    )


def _write(
    plan: UnlearnPlan,
    origin: dict[str, Any],
    model: UNet,
    schedule: NoiseSchedule,
    result: Unlearned,
    log: list[dict[str, Any]],
    snapshots: dict[int, dict[str, Tensor]],
    pictures: dict[str, Tensor],
) -> None:
    """The run folder, with run.json last: it says that all the rest is there."""
    out = plan.out
    runs.prepare_folder(out, plan.overwrite)
    save_model(out, model, schedule)
    for step, weights in snapshots.items():
        save_model(out / f"step-{step}", model, schedule, state=weights)
    with atomic(out / "log.jsonl") as path:
        lines = [json.dumps(record) + "\n" for record in log]
        path.write_text("".join(lines), encoding="utf-8")
    with atomic(out / "before_after.png") as path:
        title = f"the same noise, before and after; the forgotten images, from t={INJECTED_AT}"
        save_rows(path, pictures, title)
    method = asdict(plan.method)  # pyright: ignore[reportArgumentType]
    about = {
        "method": plan.method_name,
        "target": method.get("target"),
        "seed": plan.seed,
        "checkpoint": str(plan.checkpoint),
        **origin,
        "data": plan.data,
        "unlearn": {**asdict(plan.settings), **method},
        "bf16": plan.bf16,
        "seconds": round(result.seconds, 2),
        "metrics": {"before": result.before, "after": result.after},
    }
    if result.own_samples is not None:
        about["own_samples"] = result.own_samples
    write_json(out / "run.json", {**about, **runs.provenance(plan.device, plan.command)})
    runs.discard_old(out)
