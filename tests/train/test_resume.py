"""A run that is killed anywhere and resumed ends as the run that was not, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import torch

from vlpfast.train import checkpoint
from vlpfast.train.config import OptimConfig

STEPS = 12


def final_state(folder) -> dict:
    return checkpoint.load(checkpoint.path_of(folder, STEPS))


def assert_same_state(actual: dict, expected: dict) -> None:
    for part in ("state_dict", "state_dict_ema"):
        assert actual[part].keys() == expected[part].keys()
        for name, tensor in expected[part].items():
            torch.testing.assert_close(actual[part][name], tensor, rtol=0, atol=0, msg=name)
    moments, expected_moments = (s["optimizer"]["moments"] for s in (actual, expected))
    for key, state in expected_moments.items():
        for name, tensor in state.items():
            torch.testing.assert_close(moments[key][name], tensor, rtol=0, atol=0)
    assert actual["samples_seen"] == expected["samples_seen"]


def trainer(tiny, name: str, **train):
    return tiny.trainer(name=name, steps=STEPS, accum_freq=2, ema_decay=0.9, **train)


def fork(run: Callable[[], object]) -> int:
    """The id of a process that does `run` and exits with 0, or with 1 after an error."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of runs this small; test_loop looks at the picture."""
    monkeypatch.setattr("vlpfast.train.loop.plot_losses", lambda *_: None)


@pytest.fixture
def whole(tiny) -> dict:
    trainer(tiny, "whole").fit()
    return final_state(tiny.folder / "whole")


def test_killed_at_random_moments(tiny, whole):
    """The moments cover the start, steps, and the writing of checkpoints."""

    def run():
        slow = trainer(tiny, "killed", save_every=2)
        # 24 forwards take longer than the longest delay, so the first two runs at least are killed.
        slow.module.register_forward_pre_hook(lambda *_: time.sleep(0.01))
        slow.fit("latest")

    delays, killed = random.Random(0), 0
    for _ in range(20):
        pid = fork(run)
        time.sleep(delays.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
    assert killed >= 2
    trainer(tiny, "killed").fit("latest")
    assert_same_state(final_state(tiny.folder / "killed"), whole)


@pytest.mark.parametrize("where", ["in torch.save", "before rename", "after rename", "at pointer"])
def test_killed_while_writing_a_checkpoint(tiny, whole, where):
    def run():
        calls = {"replace": 0}
        rename, save = os.replace, torch.save

        def replace(source, target):
            is_second = str(target).endswith("step_6.pt")
            if where == "before rename" and is_second:
                die()
            if where == "at pointer" and calls["replace"] and str(target).endswith("latest"):
                die()
            rename(source, target)
            if is_second:
                calls["replace"] += 1
                if where == "after rename":
                    die()

        def half_save(state, path):
            save(state, path)
            if where == "in torch.save" and state["global_step"] == 6:
                os.truncate(path, path.stat().st_size // 2)
                die()

        os.replace, torch.save = replace, half_save
        trainer(tiny, "killed").fit()

    assert os.WIFSIGNALED(os.waitpid(fork(run), 0)[1])
    folder = tiny.folder / "killed"
    newest = checkpoint.latest(folder)
    assert newest.name in ("step_3.pt", "step_6.pt")
    checkpoint.load(newest)
    resumed = trainer(tiny, "killed")
    resumed.fit("latest")
    assert not list(folder.rglob("*.partial"))
    assert_same_state(final_state(folder), whole)


def test_resume_reads_no_global_generator(tiny, whole):
    trainer(tiny, "stopped", time_limit_minutes=1e-9).fit()
    torch.manual_seed(12345)
    trainer(tiny, "stopped").fit("latest")
    assert_same_state(final_state(tiny.folder / "stopped"), whole)


def test_another_split_of_the_global_batch_resumes(tiny):
    """Same samples a step in other micro-batches: allowed, and nearly the same numbers."""
    first = tiny.trainer(batch_size=4, accum_freq=2, time_limit_minutes=1e-9)
    first.fit()
    second = tiny.trainer(batch_size=8, accum_freq=1)
    assert second.fit("latest").samples_seen == 80


def test_metrics_have_no_step_twice(tiny):
    tiny.trainer(steps=10, save_every=3, log_every_n_steps=1, time_limit_minutes=0).fit()
    rewound = tiny.trainer(steps=10, save_every=0, log_every_n_steps=1)
    path = tiny.folder / "run" / "checkpoints" / "step_9.pt"
    (tiny.folder / "run" / "metrics.jsonl").open("a").write('{"step": 11, "cut o')
    rewound.fit(str(path))
    lines = (tiny.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == [f'{{"step": {i}' for i in range(1, 11)]


def test_finished_run_resumes_to_nothing(tiny):
    tiny.trainer().fit()
    loaders = []
    result = tiny.trainer(loaders=loaders).fit("latest")
    assert (result.stopped, result.step, loaders) == ("done", 10, [])


def test_new_run_leaves_a_used_folder_alone(tiny):
    tiny.trainer().fit()
    with pytest.raises(ValueError, match=r"holds step_10\.pt already; .*--resume latest"):
        tiny.trainer().fit()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "seed is 5, was 0"),
        ({"batch_size": 8}, "global batch is 8, was 4"),
        ({"identity": {"data": "other"}}, "data is 'other', was 'd'"),
    ],
    ids=["seed", "batch", "data"],
)
def test_another_stream_is_refused(tiny, change, message):
    tiny.trainer(time_limit_minutes=1e-9).fit()
    before = (tiny.folder / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match=message):
        tiny.trainer(**change).fit("latest")
    assert (tiny.folder / "run" / "config.json").read_text() == before


def test_missing_and_broken_checkpoints_say_so(tiny):
    with pytest.raises(FileNotFoundError, match="no checkpoint at nowhere"):
        tiny.trainer().fit("nowhere")
    broken = tiny.folder / "broken.pt"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        tiny.trainer().fit(str(broken))


def test_averaged_weights_asked_for_late_are_refused(tiny):
    tiny.trainer(time_limit_minutes=1e-9, optim=OptimConfig(lr=0.01)).fit()
    with pytest.raises(ValueError, match="no averaged weights"):
        tiny.trainer(ema_decay=0.5).fit("latest")
