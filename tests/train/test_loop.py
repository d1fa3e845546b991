"""The loop with a tiny module: guard, accumulation, stopping, and what a run leaves."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlpfast.train import checkpoint
from vlpfast.train.config import OptimConfig
from vlpfast.train.types import NonFiniteError


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.module.parameters()])


def test_run_folder(tiny):
    loaders = []
    result = tiny.trainer(loaders=loaders, ema_decay=0.9, keep_checkpoints=2).fit()
    folder = result.run_dir
    assert (result.step, result.samples_seen, result.stopped) == (10, 40, "done")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_10.pt", "step_9.pt"]
    assert (folder / "latest").read_text().strip() == "checkpoints/step_10.pt"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert rows[-1]["losses"] == pytest.approx(result.losses)
    assert rows[-1]["losses"]["itc"] < rows[0]["losses"]["itc"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [loader.closed for loader in loaders] == [True]
    state = checkpoint.load(result.checkpoint)
    assert state["global_step"] == 10
    assert state["epoch"] == 1
    exported = load_file(folder / "model.safetensors")
    torch.testing.assert_close(
        exported["0.weight"], state["state_dict"]["model.0.weight"], rtol=0, atol=0
    )
    averaged = load_file(folder / "model_ema.safetensors")
    assert averaged.keys() == exported.keys()
    assert not torch.equal(averaged["0.weight"], exported["0.weight"])


def test_tensorboard(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tiny.trainer(report_to="tensorboard", steps=4, save_every=0).fit()
    events = EventAccumulator(str(result.run_dir / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/losses/itc")] == [2, 4]
    assert events.Scalars("train/losses/itc")[-1].value == pytest.approx(result.losses["itc"])
    assert {"train/lr", "train/metrics/logit_scale", "train/data_s", "train/cpu_s"} <= set(
        events.Tags()["scalars"]
    )


def test_log_line(tiny):
    result = tiny.trainer(steps=10).fit()
    lines = (result.run_dir / "out.log").read_text().splitlines()
    (line,) = (line for line in lines if "Step: 10/10" in line)
    assert "Train Epoch: 1 [ 8/32 (25%)]" in line
    for part in (
        "Data (t): ",
        "Batch (t): ",
        "/s/process",
        "LR: ",
        "Logit Scale: 14.3",
        "Itc: ",
        "Mlm: ",
    ):
        assert part in line


@pytest.mark.parametrize("name", ["itc", "mlm"])
def test_guard_names_the_loss_and_leaves_the_weights(tiny, make_step, name):
    trainer = tiny.trainer(step=make_step({3: name}))
    untouched = tiny.trainer(name="other", steps=10, time_limit_minutes=0)
    with pytest.raises(NonFiniteError, match=f"loss '{name}' is nan at step 3"):
        trainer.fit()
    assert trainer.step == 3
    batches = iter(untouched.open_loader(0))
    for _ in range(3):
        untouched.take_step(untouched.module, batches)
    torch.testing.assert_close(weights(trainer), weights(untouched), rtol=0, atol=0)
    assert f"loss '{name}' is nan" in (tiny.folder / "run" / "out.log").read_text()


def test_guard_names_the_parameter_of_a_bad_gradient(tiny, make_step):
    step = make_step()
    step.model[3].weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient of 'model\.3\.weight' is not at step 0"):
        tiny.trainer(step=step).fit()


def test_accumulation_equals_a_large_batch(tiny, make_step):
    """Exact for losses whose count is the same in every micro-batch; here all rows count."""

    class AllRows(type(make_step())):
        def counted(self, y, batch):
            return y.abs().sum(), torch.tensor(len(y))

    # SGD-like comparison of the gradients themselves: Adam would hide a wrong factor.
    gradients = []
    for accum_freq, batch_size in ((1, 12), (3, 4)):
        trainer = tiny.trainer(
            step=AllRows(), accum_freq=accum_freq, batch_size=batch_size, name=str(accum_freq)
        )
        seen = []
        trainer.optimizer.register_step_pre_hook(
            lambda *_, t=trainer, s=seen: s.append([p.grad.clone() for p in t.parameters])
        )
        trainer.take_step(trainer.module, iter(trainer.open_loader(0)))
        gradients.append(seen[0])
    for large, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(accumulated, large)


def test_clipping_bounds_the_gradient(tiny):
    norms = []
    for clip in (0.0, 0.01):
        trainer = tiny.trainer(optim=OptimConfig(lr=0.01, grad_clip_norm=clip), name=str(clip))
        seen = []
        trainer.optimizer.register_step_pre_hook(
            lambda *_, t=trainer, s=seen: s.append(
                nn.utils.get_total_norm([p.grad for p in t.parameters]).item()
            )
        )
        report = trainer.take_step(trainer.module, iter(trainer.open_loader(0)))
        norms.append((report.grad_norm, seen[0]))
    (free, after_free), (bound, after_bound) = norms
    assert free == bound == pytest.approx(after_free)
    assert after_bound == pytest.approx(0.01, rel=1e-3)


def test_learning_rate_is_scaled_by_group(tiny):
    optim = OptimConfig(lr=0.01, warmup=3, lr_multipliers=(("3.", 10.0),))
    trainer = tiny.trainer(optim=optim)
    trainer.take_step(trainer.module, iter(trainer.open_loader(0)))
    rates = {g["lr_scale"]: g["lr"] for g in trainer.optimizer.param_groups}
    assert rates == pytest.approx({1.0: 0.01 / 3, 10.0: 0.1 / 3})


def test_time_limit_stops_with_a_checkpoint_and_resumes(tiny):
    stopped = tiny.trainer(time_limit_minutes=1e-9).fit()
    assert (stopped.stopped, stopped.step) == ("time limit", 1)
    assert checkpoint.latest(stopped.run_dir).name == "step_1.pt"
    resumed = tiny.trainer()
    assert resumed.fit("latest").stopped == "done"
    whole = tiny.trainer(name="whole")
    whole.fit()
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_with_a_checkpoint(tiny, make_step, number):
    class Interrupted(type(make_step())):
        def finish_step(self):
            super().finish_step()
            if self.finished == 4:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = tiny.trainer(step=Interrupted()).fit()
    # The signal comes after the step's stop flags were shared, so one more step is taken.
    assert (result.stopped, result.step) == ("interrupted", 5)
    assert checkpoint.load(result.checkpoint)["global_step"] == 5
    assert signal.getsignal(number) is before


def test_epochs_become_steps(tiny):
    # 32 samples, 4 a step, two micro-batches: 4 steps an epoch.
    assert tiny.trainer(steps=0, epochs=2.5, accum_freq=2).total_steps == 10


def test_bf16_autocast_keeps_fp32_weights(tiny):
    trainer = tiny.trainer(precision="amp_bf16", name="bf16")
    trainer.fit()
    full = tiny.trainer(name="fp32")
    full.fit()
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    difference = (weights(trainer) - weights(full)).abs().max()
    assert 0 < difference < 0.02


def test_corrupt_samples_are_named_whatever_the_end(tiny):
    """Each once, by every process, also when the run dies of something else."""
    loaders: list = []
    trainer = tiny.trainer(steps=6, log_every_n_steps=1, loaders=loaders)

    def fail(*_: object) -> None:
        loaders[0].corrupt["b.jpg"] = "cut"
        if trainer.step == 3:
            raise RuntimeError("the machine is gone")

    trainer.optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        trainer.fit()
    lines = (tiny.folder / "run" / "corrupt" / "0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"sample": "b.jpg", "reason": "cut"}]


def test_a_cooldown_longer_than_the_run(tiny):
    optim = OptimConfig(lr_scheduler="const-cooldown", warmup=4, cooldown=20)
    with pytest.raises(ValueError, match=r"warmup 4 and optim\.cooldown 20 .* 10 steps"):
        tiny.trainer(optim=optim)
