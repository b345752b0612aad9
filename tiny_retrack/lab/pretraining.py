"""One training run on disk: train, look, save, resume. `train_ddpm.py` parses its plan."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tiny_retrack.data import Split, random_draws, to_float, to_uint8
from tiny_retrack.lab import runs
from tiny_retrack.lab.checkpoint import (
    atomic,
    fingerprint,
    load_model,
    load_state,
    save_model,
    save_state,
    write_json,
)
from tiny_retrack.lab.plots import save_curves, save_grid, smooth
from tiny_retrack.lab.presets import TrainSettings
from tiny_retrack.lab.unet_config import check_unet_config
from tiny_retrack.losses import ddpm_loss
from tiny_retrack.prompts import at_prompt, drop_prompts
from tiny_retrack.sampling import sample_many
from tiny_retrack.schedule import NoiseSchedule
from tiny_retrack.training import (
    EMA,
    Progress,
    cosine_with_warmup,
    denoiser,
    fit,
    largest,
    load_training_state,
    make_optimizer,
    num_processes,
    place,
    rank,
    training_state,
)
from tiny_retrack.types import EpsModel, InputError, Loss, NonFiniteError
from tiny_retrack.unet import UNet, UNetConfig

CPU = torch.device("cpu")
Record = dict[str, Any]  # a line of log.jsonl
_RECORD_FIELDS = ("step", "loss", "images_per_s")  # what a line must have to be one


@dataclass(frozen=True)
class PretrainPlan:
    """All that a training is, checked before any work starts.

    Attributes:
        out: the run folder.
        data: of `datasets.load_data`; recorded in run.json.
        unet: the network; that of `checkpoint`, where there is one.
        checkpoint: start from this model, in place of random weights.
        remain_only: leave the forget set out, for the retrained model.
        bf16: autocast to bfloat16.
        compiled: torch.compile the UNet.
        save_every, log_every: steps between checkpoints, and between lines of log.jsonl.
        keep: also keep the last `keep` of the checkpoints, in OUT/step-*.
        overwrite: replace what is in `out`; resume: go on from its last checkpoint.
        command: of `runs.command_line`.
        start: what run.json says of `checkpoint`.

    Raises:
        InputError: if there are fewer checkpoints to keep than asked for; or if `checkpoint` may
            have seen images that the model must not see.
    """

    out: Path
    data: dict[str, Any]
    settings: TrainSettings
    unet: UNetConfig
    checkpoint: Path | None = None
    remain_only: bool = False
    seed: int = 0
    device: torch.device = CPU
    bf16: bool = False
    compiled: bool = False
    save_every: int = 1000
    keep: int | None = None
    log_every: int = 20
    overwrite: bool = False
    resume: bool = False
    command: str | None = None
    start: dict[str, Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        saves = self.settings.steps // self.save_every
        if (self.keep or 0) > saves:
            raise InputError(
                f"--keep {self.keep}: {self.settings.steps} steps have {saves} checkpoints, "
                f"lower --save-every"
            )
        if self.checkpoint is not None:
            runs.check_apart(self.checkpoint, self.out)
            self._check_unseen(self.checkpoint)
            object.__setattr__(self, "start", describe_start(self.checkpoint))

    def _check_unseen(self, checkpoint: Path) -> None:
        """What this model must not see, its start must not have seen: images that are held out, and
        with `remain_only` the forget set. Only a run of this project on the same images says so.
        """
        hold_out = self.data.get("hold_out")
        if not (self.remain_only or hold_out):
            return
        run = runs.read_run(checkpoint)
        recorded = runs.recorded_data(checkpoint) or {}
        names = ("dataset", "forget", "hold_out", "digest")
        is_same = all(name in recorded and recorded[name] == self.data[name] for name in names)
        if not is_same or (self.remain_only and not run.get("remain_only")):
            flags = []
            if self.remain_only:
                flags.append("--remain-only")
            if hold_out:
                flags.append("--hold-out")
            told = " ".join(flags)
            raise InputError(
                f"{told}: {checkpoint} may have seen these images; start from one that was trained "
                f"on the same images with {told}, or without --checkpoint"
            )

    def recorded(self) -> dict[str, Any]:
        """What run.json says of the plan, and what a resumed run must have in common."""
        return {
            "data": self.data,
            "train": asdict(self.settings),
            "seed": self.seed,
            "widths": [*self.unet.block_out_channels],
            "start": self.start,
            "remain_only": self.remain_only,
            "bf16": self.bf16,
            "keep": [self.keep, self.save_every] if self.keep else None,
            "processes": num_processes(),
        }

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of this step stays beside the last one."""
        number = step // self.save_every
        first_kept = self.settings.steps // self.save_every - (self.keep or 0) + 1
        return step % self.save_every == 0 and number >= first_kept


def describe_start(checkpoint: Path) -> dict[str, Any]:
    """The model that a training starts from, as it is now: it may change before the first save."""
    return {
        "checkpoint": str(checkpoint),
        "weights": fingerprint(checkpoint),
        "initial_seed": runs.initial_seed(checkpoint),
    }


class Training:
    """The model of a plan with its optimiser, its EMA and its log, in memory and on disk."""

    def __init__(self, plan: PretrainPlan) -> None:
        torch.manual_seed(plan.seed)
        self.plan = plan
        if plan.checkpoint is None:
            model, self.schedule = UNet(plan.unet), NoiseSchedule.linear()
        else:
            model, self.schedule = load_model(plan.checkpoint)
            model.config = plan.unet  # with the size of the images, which the checkpoint's may lack
        self.model = place(model, plan.device, plan.bf16)
        self.optimizer = make_optimizer(self.model, plan.settings.lr)
        self.ema = EMA(self.model)
        self.history: list[Record] = []
        self.saved_step = 0
        self.extended: list[Any] = []  # the shorter trainings that this one went on from

    def resume(self) -> None:
        """Go on where the last checkpoint in the run folder was written."""
        out = self.plan.out
        tensors, meta = load_state(out)
        self.saved_step, was = runs.check_resumed(out, meta, self.plan.recorded())
        load_training_state(tensors, self.model, self.optimizer, self.ema)
        self.extended = meta.get("extended", [])
        if was["steps"] != self.plan.settings.steps:
            shorter = {"step": self.saved_step, "steps": was["steps"], "warmup": was.get("warmup")}
            self.extended = [*self.extended, shorter]
        self.history = read_log(out / "log.jsonl", self.saved_step)
        if rank() == 0:
            with atomic(out / "log.jsonl") as path:
                lines = [json.dumps(record) + "\n" for record in self.history]
                path.write_text("".join(lines), encoding="utf-8")

    def log(self, done: Progress, losses: list[torch.Tensor], seconds: float) -> Record:
        """Add a line to log.jsonl: the mean loss since the line before, and the speed.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite.
        """
        settings = self.plan.settings
        loss = torch.stack(losses).mean().item()
        grad_norm = done.grad_norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            good = "nothing was saved yet"
            if self.saved_step:
                good = f"{self.plan.out} holds step {self.saved_step}"
            raise NonFiniteError(f"the loss is not finite by step {done.step}; {good}; lower --lr")
        images = len(losses) * settings.batch_size * settings.accumulate * num_processes()
        record = {
            "step": done.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": done.lr,
            "images_per_s": round(images / seconds, 1),
        }
        self.history.append(record)
        if rank() == 0:
            with (self.plan.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        return record

    def save(self, step: int) -> None:
        """Write the EMA's weights as the model, and all that a resumed run needs."""
        self.saved_step = step
        if rank() > 0:
            return
        plan = self.plan
        if plan.is_kept(step):
            folder = plan.out / f"step-{step}"
            save_model(folder, self.model, self.schedule, state=self.ema.shadow)
        save_model(plan.out, self.model, self.schedule, state=self.ema.shadow)
        state = training_state(self.model, self.optimizer, self.ema)
        meta = {"step": step, "run": plan.recorded(), "extended": self.extended}
        save_state(plan.out, state, meta)
        about = {**plan.recorded(), "step": step, "extended": self.extended}
        about["metrics"] = {"loss": self.history[-1]["loss"] if self.history else None}
        about |= runs.provenance(plan.device, plan.command)
        write_json(plan.out / "run.json", about)
        runs.discard_old(plan.out)

    def draw(self) -> None:
        """Write samples of the EMA's weights, of all prompts in turn, and the loss curve."""
        plan = self.plan
        self.model.load_state_dict(self.ema.shadow)
        self.model.eval()
        size = plan.unet.sample_size or 32
        eps_model = denoiser(self.model, plan.bf16)
        if plan.unet.num_class_embeds is not None:
            prompts = torch.arange(64, device=plan.device) * (plan.unet.num_class_embeds - 1) // 64
            eps_model = at_prompt(eps_model, prompts)
        samples = sample_many(
            eps_model,
            64,
            (plan.unet.in_channels, size, size),
            self.schedule,
            25,
            seed=plan.seed,
            device=plan.device,
            progress="samples",
        )
        with atomic(plan.out / "samples.png") as path:
            save_grid(path, to_uint8(samples), columns=8, scale=max(1, 64 // size))
        steps = [record["step"] for record in self.history]
        losses = [record["loss"] for record in self.history]
        mean = smooth(steps, losses, plan.settings.steps / 10)
        curves = {"loss": (steps, losses), "running mean": (steps, mean)}
        with atomic(plan.out / "loss.png") as path:
            save_curves(path, curves, "step", "squared error per image", log=True)


def pretrain(plan: PretrainPlan, split: Split) -> list[Record]:
    """Train from scratch, or on, and leave a checkpoint, a log and pictures in `plan.out`.

    Returns the lines of the log. A signal (SIGINT, SIGTERM) saves and exits with 128 + its number.

    Raises:
        InputError: if the folder may not be used, or holds another run's state.
        NonFiniteError: if the training diverges; the last checkpoint is intact.
    """
    runs.check_folder(plan.out, plan.overwrite, plan.resume)
    images = split.remain if plan.remain_only else split.everything
    images = images.to(plan.device)
    prompts = None if split.prompts is None else split.prompts.to(plan.device)
    classes = plan.unet.num_class_embeds
    training = Training(plan)
    if plan.resume:
        training.resume()
    elif rank() == 0:
        runs.prepare_folder(plan.out, plan.overwrite)

    def losses(eps_model: EpsModel, generator: torch.Generator) -> tuple[Loss]:
        schedule = training.schedule
        batch_size = plan.settings.batch_size
        index, t, noise = random_draws(images, batch_size, schedule.num_steps, generator)
        if prompts is not None and classes is not None:
            # The prompts are of the remain images, then of the forget images.
            eps_model = at_prompt(eps_model, drop_prompts(prompts[index], classes - 1, generator))
        return (ddpm_loss(eps_model, to_float(images[index]), t, noise, schedule),)

    progress = fit(
        training.model,
        losses,
        training.optimizer,
        start=training.saved_step,
        steps=plan.settings.steps,
        lr_at=cosine_with_warmup(plan.settings.lr, plan.settings.warmup, plan.settings.steps),
        seed=plan.seed,
        device=plan.device,
        ema=training.ema,
        bf16=plan.bf16,
        compiled=plan.compiled,
        accumulate=plan.settings.accumulate,
    )
    _follow(training, progress)
    if rank() == 0:
        training.draw()
    return training.history


def _follow(training: Training, progress: Iterator[Progress]) -> None:
    """Run the steps: show them, log and save when it is time, and leave on a signal."""
    plan = training.plan
    steps = plan.settings.steps
    bar = tqdm(
        progress,
        "training",
        total=steps,
        initial=training.saved_step,
        unit="step",
        disable=rank() > 0,
    )
    recent: list[torch.Tensor] = []
    clock = time.perf_counter()
    with runs.stop_on_signal() as stop:
        for done in bar:
            recent.append(done.losses)
            is_log = done.step % plan.log_every == 0
            # Processes that train together must stop at the same step: they ask when they log.
            may_stop = is_log or num_processes() == 1
            signal = largest(stop.signal, plan.device) if may_stop else 0
            is_save = bool(signal) or done.step == steps or done.step % plan.save_every == 0
            if is_save or is_log:
                record = training.log(done, recent, time.perf_counter() - clock)
                bar.set_postfix(loss=f"{record['loss']:.2f}", refresh=False)
                recent = []
                clock = time.perf_counter()
            if is_save:
                training.save(done.step)
            if signal:
                sys.exit(128 + signal)


def unet_for(
    split: Split,
    preset: UNetConfig,
    widths: Sequence[int] | None,
    checkpoint: Path | None = None,
) -> UNetConfig:
    """The network to train on the images of the data set: that of the checkpoint or, without one,
    the preset's with the widths that were given.

    Raises:
        InputError: if the checkpoint's network does not fit the images, or has widths given beside
            it; if there is not one width per level, or if the network cannot have these.
    """
    channels, size = split.remain.shape[1:3]
    if checkpoint is not None:
        if widths:
            raise InputError("--widths: the network is that of --checkpoint, leave one out")
        model, _ = runs.load_fitting(checkpoint, split)
        return replace(model.config, sample_size=size)
    levels = len(preset.block_out_channels)
    widths = tuple(widths or preset.block_out_channels)
    if len(widths) != levels:
        raise InputError(f"--widths: the UNet has {levels} levels, got {len(widths)} numbers")
    unet = replace(
        preset,
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        num_class_embeds=split.num_class_embeds,
    )
    groups = preset.norm_num_groups
    if any(width % groups for width in widths):
        told = " ".join(map(str, widths))
        raise InputError(f"--widths {told}: must be multiples of {groups}, the groups of the norms")
    check_unet_config(unet)
    return unet


def read_log(path: Path, last_step: int) -> list[Record]:
    """The records up to `last_step`; reading stops at the first line that is not a record.

    A killed run may have logged steps after its last checkpoint, and cut its last line short.
    Without the file there are none.
    """
    if not path.exists():
        return []
    history = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if not all(isinstance(record[name], int | float) for name in _RECORD_FIELDS):
                break
        except (ValueError, TypeError, KeyError):
            break
        history.append(record)
    return [record for record in history if record["step"] <= last_step]
