"""The training loop: forward, guard, update, log, save. `run.py` builds what it needs.

All randomness is a function of (seed, step) or of a sample's place in the stream, so a run that is
stopped anywhere and resumed ends in the same weights, to the bit (fp32, same number of processes).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vlpfast.config import differences
from vlpfast.data.batch import Batch
from vlpfast.ops.seed import fold_seed
from vlpfast.train import checkpoint
from vlpfast.train.config import OptimConfig, TrainConfig
from vlpfast.train.distributed import World
from vlpfast.train.ema import Ema
from vlpfast.train.log import RunLog, Window, log_line
from vlpfast.train.optim import (
    create_optimizer,
    load_moments,
    moments_by_name,
    param_groups,
    set_learning_rate,
)
from vlpfast.train.plots import plot_losses
from vlpfast.train.schedule import learning_rate
from vlpfast.train.types import (
    Loader,
    NonFiniteError,
    Run,
    StepOutput,
    StepReport,
    TrainResult,
    on_signals,
)


class Trainer:
    """Takes a step module through its training.

    Args:
        step: called as `step(batch, seed=, step=)`, returns a `StepOutput`; has `.model`,
            `.weights` {name: weight} and `.finish_step()` (see `objectives.PretrainStep`).
        open_loader: gives the stream from a micro-batch number on.
        optim: optimizer and schedule.
        config: lengths and periods.
        run: names and identity.
        world: the processes.
        prepare: what is done to a batch on the device before the step (masking).
    """

    def __init__(
        self,
        step: nn.Module,
        open_loader: Callable[[int], Loader],
        optim: OptimConfig,
        config: TrainConfig,
        run: Run,
        world: World,
        prepare: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self.module = step.to(world.device).train()
        self.ema = Ema(step.model, config.ema_decay) if config.ema_decay else None
        self.open_loader, self.prepare = open_loader, prepare
        self.optim, self.config, self.run, self.world = optim, config, run, world
        self.total_steps = config.total_steps(run.num_samples, world.size)
        if (
            optim.lr_scheduler == "const-cooldown"
            and optim.warmup + optim.cooldown > self.total_steps
        ):
            raise ValueError(
                f"optim.warmup {optim.warmup} and optim.cooldown {optim.cooldown} are more than "
                f"the run's {self.total_steps} steps"
            )
        self.global_batch = world.size * config.batch_size * config.accum_freq
        self.optimizer = create_optimizer(param_groups(step.model, optim), optim, world.device)
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.step = 0
        self._wanted_stop = self._stopped = ""
        self._saved: Path | None = None
        self._num_named = 0

    @property
    def samples_seen(self) -> int:
        """Samples of all processes until now."""
        return self.step * self.global_batch

    @property
    def identity(self) -> dict[str, str | int]:
        """What makes two runs see the same samples in the same order."""
        return {"seed": self.config.seed, "global batch": self.global_batch, **self.run.identity}

    def fit(self, resume: str | None = None) -> TrainResult:
        """Trains to the end, to the time limit or to a signal.

        Args:
            resume: a checkpoint's path, or "latest": the newest of this run, if it has one.
        """
        folder = self.run.folder
        notes = self._start(resume)
        log = RunLog(
            folder,
            active=self.world.is_main,
            start_step=self.step,
            total_steps=self.total_steps,
            report_to=self.config.report_to,
        )
        try:
            log.info(self._summary())
            for note in notes:
                log.info(note)
            with on_signals(lambda: self._want_stop("interrupted")):
                losses = self._loop(log)
            path = self._save(log)
            if self.step >= self.total_steps:
                self._stopped = "done"
                self._export(log)
            self.world.barrier("the last checkpoint to be written")
        except NonFiniteError as error:
            log.info(f"error: {error}")
            raise
        finally:
            log.close()
        return TrainResult(folder, self.step, self.samples_seen, losses, self._stopped, path)

    def state_dict(self) -> dict[str, object]:
        """All that a checkpoint holds."""
        run = self.run
        state = {
            "format_version": checkpoint.FORMAT_VERSION,
            "name": run.name,
            "epoch": self.samples_seen // run.num_samples,
            "global_step": self.step,
            "samples_seen": self.samples_seen,
            "state_dict": self.module.state_dict(),
            "optimizer": moments_by_name(self.optimizer, self.module.model),
            "config": dict(run.config),
            "identity": self.identity,
            "loader_state": {"micro_batch": self.step * self.config.accum_freq},
            "rng": {"torch": torch.get_rng_state()},
        }
        if self.world.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state(self.world.device)
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continues from what `state_dict` gave."""
        self.module.load_state_dict(state["state_dict"])
        load_moments(self.optimizer, self.module.model, state["optimizer"])
        if self.ema is not None:
            if "state_dict_ema" not in state:
                raise ValueError(
                    "train.ema_decay is set, but the checkpoint has no averaged weights"
                )
            self.ema.load_state_dict(state["state_dict_ema"])
        torch.set_rng_state(state["rng"]["torch"])
        if "cuda" in state["rng"] and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.world.device)
        self.step = state["global_step"]

    def _start(self, resume: str | None) -> list[str]:
        """Restores what there is to restore, writes the run folder; returns what to say of it."""
        folder = self.run.folder
        notes, path = list(self.run.notes), checkpoint.find(folder, resume)
        if path is not None:
            state = checkpoint.load(path)
            checkpoint.check_same(path, state, self.identity)
            changes = differences(state["config"], self.run.config)
            try:
                self.load_state_dict(state)
            except (RuntimeError, ValueError) as error:
                parts = [c for c in changes if c.startswith(("model.", "objectives.", "train."))]
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"cannot resume from {path}: {reason} since then changed: "
                    f"{', '.join(parts) or 'nothing of the model'}"
                ) from error
            self._saved = path
            notes = [f"resumed from {path} at step {self.step}", *(f"changed {c}" for c in changes)]
        alike = {**self.identity, "steps": self.total_steps, "samples": self.run.num_samples}
        self.world.check_alike({**alike, "step to go on from": self.step})
        self.world.barrier("all processes to read the checkpoint")
        if self.world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(folder)
            text = json.dumps(self.run.config, indent=2) + "\n"
            files = {"config.json": lambda p: p.write_text(text), **self.run.files}
            for name, write in files.items():
                checkpoint.write_atomic(folder / name, write)
        return notes

    def _summary(self) -> str:
        trained = sum(p.numel() for p in self.parameters)
        return (
            f"{self.run.name}: {trained / 1e6:.2f} M trained parameters, "
            f"{self.run.num_samples} samples, {self.total_steps} steps of {self.global_batch}, "
            f"{self.config.precision} on {self.world.size} x {self.world.device.type}"
        )

    def _loop(self, log: RunLog) -> dict[str, float]:
        """Steps until the end or a stop; returns the mean losses of the last logged window."""
        if self.step >= self.total_steps:
            return {}
        module = self.world.wrap(self.module)
        limit_s = 60 * self.config.time_limit_minutes or math.inf
        window, means, began = Window(), {}, time.monotonic()
        with contextlib.ExitStack() as ending:
            loader = self.open_loader(self.step * self.config.accum_freq)
            ending.enter_context(contextlib.closing(loader))
            ending.callback(self._name_corrupt, loader)
            batches = iter(loader)
            while self.step < self.total_steps and not self._stopped:
                started, cpu = time.monotonic(), time.process_time()
                if started - began > limit_s:
                    self._want_stop("time limit")
                report = self.take_step(module, batches)
                step_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
                window.add(report.data_s, step_s, cpu_s, report.losses)
                log.advance()
                ending = self.step == self.total_steps or self._stopped
                if self.step % self.config.log_every_n_steps == 0 or ending:
                    means = self._log(log, window, report)
                    self._name_corrupt(loader)
                    window = Window()
                if self.config.save_every and self.step % self.config.save_every == 0:
                    self._save(log)
            if loader.corrupt:
                names = ", ".join(f"{n} ({r})" for n, r in list(loader.corrupt.items())[:5])
                log.info(
                    f"skipped {len(loader.corrupt)} corrupt samples here: {names}; all: corrupt/"
                )
        return means

    def _name_corrupt(self, loader: Loader) -> None:
        """Adds samples skipped since the last call to corrupt/RANK.jsonl, each with its reason."""
        new = list(itertools.islice(loader.corrupt.items(), self._num_named, None))
        if not new:
            return
        self._num_named += len(new)
        path = self.run.folder / "corrupt" / f"{self.world.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(json.dumps({"sample": n, "reason": r}) + "\n" for n, r in new)

    def take_step(self, module: nn.Module, batches: Iterator[Batch]) -> StepReport:
        """One optimizer step over `accum_freq` micro-batches, with one read from the device."""
        lr = learning_rate(self.step, self.total_steps, self.optim)
        set_learning_rate(self.optimizer, lr)
        accum = self.config.accum_freq
        data_s, tables = 0.0, []
        for i in range(accum):
            started = time.monotonic()
            batch = self.prepare(next(batches).to(self.world.device, non_blocking=True))
            data_s += time.monotonic() - started
            no_sync = self.world.size > 1 and i < accum - 1
            with module.no_sync() if no_sync else contextlib.nullcontext():
                output = self._forward(module, batch, self.step * accum + i)
                total, table = self._total(output.losses)
                (total / accum).backward()
            tables.append(table)
        report = self._read(output, torch.stack(tables), lr, data_s)
        self._guard(report)
        if self.optim.grad_clip_norm:
            nn.utils.clip_grads_with_norm_(
                self.parameters, self.optim.grad_clip_norm, torch.tensor(report.grad_norm)
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.finish_step()
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        return report

    def _forward(self, module: nn.Module, batch: Batch, micro_batch: int) -> StepOutput:
        seed = fold_seed(self.config.seed, micro_batch, self.world.rank)
        bf16 = self.config.precision == "amp_bf16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16):
            return module(batch, seed=seed, step=self.step)

    def _total(self, losses: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and a table (2, L + 1) of what all processes share.

        total = sum over losses of weight * sum * W / (count over all processes), so that the mean
        of the processes' gradients is the gradient of one process on all rows. Table columns:
        (sum, count) of each loss, then how many processes (ran out of time, were interrupted).
        """
        device = self.world.device
        sums = torch.stack([s.float() for s, _ in losses.values()])
        counts = torch.stack(
            [torch.as_tensor(c, device=device).float() for _, c in losses.values()]
        )
        stop = [self._wanted_stop == "time limit", self._wanted_stop == "interrupted"]
        stop = torch.tensor(stop, device=device, dtype=torch.float32)[:, None]
        table = self.world.sum_(torch.cat([torch.stack([sums.detach(), counts]), stop], dim=1))
        weights = torch.tensor([self.module.weights[name] for name in losses], device=device)
        total = (weights * sums * self.world.size / table[1, :-1].clamp(min=1)).sum()
        return total, table

    def _read(self, output: StepOutput, tables: Tensor, lr: float, data_s: float) -> StepReport:
        """Brings losses, gradient norm, metrics and stop flags to the host in one copy."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        means = (tables[:, 0, :-1] / tables[:, 1, :-1].clamp(min=1)).mean(0)
        metrics = [m.detach().float().reshape(1) for m in output.metrics.values()]
        values = torch.cat([tables[-1, :, -1], norm.reshape(1), means, *metrics]).tolist()
        time_is_up, interrupted, norm, *values = values
        self._stopped = "interrupted" if interrupted else "time limit" if time_is_up else ""
        num_losses = len(output.losses)
        return StepReport(
            losses=dict(zip(output.losses, values[:num_losses], strict=True)),
            metrics=dict(zip(output.metrics, values[num_losses:], strict=True)),
            grad_norm=norm,
            lr=lr,
            data_s=data_s,
        )

    def _guard(self, report: StepReport) -> None:
        """Raises before the update if a loss or the gradient is not finite."""
        odd = [f"loss {n!r} is {v}" for n, v in report.losses.items() if not math.isfinite(v)]
        if not odd and not math.isfinite(report.grad_norm):
            bad = (n for n, p in self.module.named_parameters() if _not_finite(p.grad))
            odd = [f"all losses are finite, but the gradient of {next(bad, 'the norm')!r} is not"]
        if odd:
            raise NonFiniteError(
                f"{', '.join(odd)} at step {self.step} (learning rate {report.lr:.3g}); "
                "no weight was updated. Try a lower optim.lr, optim.grad_clip_norm, "
                "or train.precision fp32"
            )

    def _log(self, log: RunLog, window: Window, report: StepReport) -> dict[str, float]:
        means = window.means()
        row = {
            "step": self.step,
            "epoch": self.samples_seen // self.run.num_samples,
            "samples_seen": self.samples_seen,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "data_s": window.data_s / window.steps,
            "step_s": window.step_s / window.steps,
            "cpu_s": window.cpu_s / window.steps,
            "samples_per_s": self.global_batch * window.steps / window.step_s,
            "losses": means,
            "metrics": report.metrics,
        }
        log.row(row)
        log.info(
            log_line(
                row,
                last=report.losses,
                num_samples=self.run.num_samples,
                total_steps=self.total_steps,
                world=self.world.size,
                device=self.world.device.type,
            )
        )
        return means

    def _save(self, log: RunLog) -> Path:
        """Writes the checkpoint of this step and the loss curves, unless they stand."""
        path = checkpoint.path_of(self.run.folder, self.step)
        if not self.world.is_main or self._saved == path:
            return path
        started = time.monotonic()
        self._saved = checkpoint.save(
            self.run.folder, self.state_dict(), keep=self.config.keep_checkpoints
        )
        plot_losses(self.run.folder / "metrics.jsonl", self.run.folder / "loss.png", self.run.name)
        size = path.stat().st_size / 2**20
        log.info(f"saved {path} ({size:.1f} MiB, {time.monotonic() - started:.2f} s)")
        return path

    def _export(self, log: RunLog) -> None:
        """Writes the model's weights, and the averaged ones, as safetensors."""
        if not self.world.is_main:
            return
        states = {"model": self.module.model.state_dict()}
        if self.ema is not None:
            states["model_ema"] = self.ema.averaged_state_dict(self.module.model)
        for name, state in states.items():
            path = self.run.folder / f"{name}.safetensors"
            checkpoint.export_safetensors(path, state, {"format": "pt", "step": str(self.step)})
            log.info(f"exported {path}")

    def _want_stop(self, reason: str) -> None:
        self._wanted_stop = self._wanted_stop or reason


def _not_finite(grad: Tensor | None) -> bool:
    return grad is not None and not bool(grad.isfinite().all())
