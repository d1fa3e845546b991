"""The command line: what it runs, what it answers to wrong input, and with which exit code."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from vlpfast import cli, recipes

SMALL = (
    (
        "--model.vision.dim=16 --model.vision.depth=1 --model.vision.heads=2 --model.text.dim=16 "
        "--model.text.depth=1 --model.text.heads=2 --embed-dim=8 --vocab-size=260 --max-tokens=32 "
        "--batch-size=4 --log-every-n-steps=1 --save-every=2 --report-to=none --device=cpu "
        "--precision=fp32 --loader=torch --workers=1 --prefetch=1 --warmup=1"
    )
    .replace("--vocab-size", "--data.vocab-size")
    .split()
)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("data") / "scenes"
    args = ["--num-samples=24", "--val-samples=12", "--heldout-samples=0"]
    assert cli.main(["data", "make", "scenes", str(out), *args]) == 0
    return str(out)


@pytest.fixture
def train(scenes, tmp_path):
    """Calls `vlpfast train clip_tiny` on a very small model."""

    def run(*flags: str, recipe: str = "clip_tiny", data: str = f"{scenes}/train") -> int:
        logs = f"--logs={tmp_path / 'logs'}"
        return cli.main(["train", recipe, "--data", data, *SMALL, logs, "--name=run", *flags])

    run.folder = tmp_path / "logs" / "run"
    return run


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr that an error is."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("vlpfast: error: ")
    return lines[0].removeprefix("vlpfast: error: ")


def test_train_resume_eval(train, scenes, capsys):
    assert train("--steps=4") == 0
    assert "done: 4 steps, 16 samples" in capsys.readouterr().out
    config = json.loads((train.folder / "config.json").read_text())
    assert config["model"]["vision"]["dim"] == 16
    assert config["data"]["path"] == f"{scenes}/train"
    assert train("--steps=4") == 1
    assert "--resume latest" in error_of(capsys)
    assert train("--steps=6", "--resume", "latest") == 0
    out = capsys.readouterr().out
    assert "at step 4" in out
    assert "changed train.steps: 4 -> 6" in out
    assert "done: 6 steps" in out
    args = ["eval", str(train.folder), "--data", f"{scenes}/val", "--device=cpu"]
    assert cli.main([*args, "--task=retrieval", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["num_images"] == 12
    assert result["metrics"]
    assert cli.main([*args, "--task=retrieval"]) == 0
    assert "chance" in capsys.readouterr().out


def test_epochs_in_place_of_steps(train, capsys):
    assert train("--epochs=0.5") == 0
    assert "done: 3 steps" in capsys.readouterr().out


def test_one_data_set(train, capsys):
    assert train("--steps=1", "--data=elsewhere") == 2
    assert error_of(capsys).startswith("--data is given twice")


def test_resume_with_another_model(train, capsys):
    assert train("--steps=2") == 0
    capsys.readouterr()
    assert train("--steps=3", "--model.text.depth=2", "--resume=latest") == 1
    assert "changed: model.text.depth: 1 -> 2" in error_of(capsys)


def test_stopped_run_ends_as_the_whole_one(train, tmp_path):
    """The real step, loader and masking: teacher, queue, negatives and masks resume to the bit."""
    folders = {}
    for name in ("whole", "stopped"):
        folders[name] = tmp_path / "logs" / name
        flags = ["--steps=5", f"--name={name}", "--fusion.dim=16", "--fusion.heads=2"]
        flags = [f.replace("--fusion", "--model.fusion") for f in flags]
        flags += ["--model.fusion.depth=1", "--queue-size=8", "--image-size=32"]
        if name == "stopped":
            assert train(*flags, "--time-limit-minutes=1e-9", recipe="albef_tiny") == 0
            flags.append("--resume=latest")
        assert train(*flags, recipe="albef_tiny") == 0
    states = [
        torch.load(folder / "checkpoints" / "step_5.pt", weights_only=True)["state_dict"]
        for folder in folders.values()
    ]
    assert states[0].keys() == states[1].keys()
    assert any(name.startswith("teacher.") for name in states[0])
    for name, wanted in states[0].items():
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(states[1][name], wanted, rtol=0, atol=0, msg=name)
        else:
            assert states[1][name] == wanted, name


@pytest.mark.slow
def test_killed_command_ends_as_the_whole_one(scenes, tmp_path):
    """SIGKILL at random moments, from the start of the process on, with the default loader."""
    small = [flag for flag in SMALL if not flag.startswith("--loader")]
    command = [sys.executable, "-m", "vlpfast", "train", "albef_tiny", f"--data={scenes}/train"]
    command += [*small, "--steps=40", "--save-every=3", "--threads=1", f"--logs={tmp_path}"]
    command += ["--model.fusion.dim=16", "--model.fusion.heads=2", "--model.fusion.depth=1"]
    command += ["--queue-size=8", "--model.text.dropout=0.1", "--ema-decay=0.9"]
    subprocess.run([*command, "--name=whole"], check=True)
    delays, killed = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen([*command, "--name=killed", "--resume=latest"])
        log = tmp_path / "killed" / "out.log"
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and (not log.exists() or log.stat().st_size == size):
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.6))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed
    subprocess.run([*command, "--name=killed", "--resume=latest"], check=True)
    whole, ours = (
        torch.load(tmp_path / name / "checkpoints" / "step_40.pt", weights_only=True)
        for name in ("whole", "killed")
    )
    for part in ("state_dict", "state_dict_ema"):
        for name, wanted in whole[part].items():
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(ours[part][name], wanted, rtol=0, atol=0, msg=name)


def test_pack_and_check(scenes, tmp_path, capsys):
    rows = [{"image": "a.png", "caption": "a red square"}, {"image": "b.png", "caption": "text"}]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"this is no image")
    table, shards = str(tmp_path / "table.jsonl"), str(tmp_path / "shards")
    assert cli.main(["data", "check", table]) == 0
    out = capsys.readouterr().out
    assert "num_samples: 1\n" in out
    assert "num_corrupt: 1\n" in out
    assert "b.png" in out
    assert cli.main(["data", "pack", table, shards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 1
    assert cli.main(["data", "check", shards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_corrupt"] == 0
    assert cli.main(["data", "check", f"{tmp_path}/nothing"]) == 1
    assert "nothing" in error_of(capsys)


def test_interrupted_run_says_how_to_go_on(train, monkeypatch, capsys):
    from vlpfast.objectives import PretrainStep

    finish = PretrainStep.finish_step

    def interrupt(self) -> None:
        finish(self)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()

    monkeypatch.setattr(PretrainStep, "finish_step", interrupt)
    assert train("--steps=50") == 1
    out = capsys.readouterr().out
    assert "interrupted after step 2, saved" in out
    assert out.rstrip().endswith("--steps=50 --resume latest")
    assert (train.folder / "checkpoints" / "step_2.pt").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("train albef_tny", "unknown recipe 'albef_tny'; did you mean 'albef_tiny'?"),
        ("train albef_tiny --optm.lr 3", "unknown field 'optm.lr'; did you mean 'optim.lr'?"),
        ("train albef_tiny --batchsize 3", "did you mean 'train.batch_size'?"),
        ("train albef_tiny --zzzz 3", "unknown field 'zzzz'; --help lists all fields"),
        ("train albef_tiny --heads 3", "several fields are named 'heads': model.vision.heads"),
        ("train albef_tiny --data x --steps many", "--train.steps: invalid literal for int()"),
        ("train albef_tiny --data x --precision fp8", "invalid choice 'fp8'"),
        ("train albef_tiny --data x --lr=-1", "optim.lr must be > 0, got -1.0"),
        ("train albef_tiny --data x --preset clip", "choose another recipe: albef_base"),
        ("train albef_tiny --resume", "--resume needs 'latest' or the path"),
        ("train albef_tiny", "needs data: vlpfast train albef_tiny --data PATH"),
        ("data mkae scenes x", "unknown data action 'mkae'; did you mean 'make'?"),
        ("data make scenes out", "--num-samples"),
        ("data make squares out --num-samples 3", "'squares'"),
        ("eval logs/run --data x --task retreival", "'retreival'"),
        ("profile albef_tiny", "needs data: vlpfast profile albef_tiny --data PATH"),
        ("profile albef_tiny --data x --depth 0", "--depth 0: depth must be >= 1, got 0"),
        ("profile albef_tiny --data x --out", "--out needs a value"),
        ("env more", "Unrecognized options: more"),
    ],
)
def test_wrong_usage(line, message, capsys):
    assert cli.main(line.split()) == 2
    assert message in error_of(capsys)


def test_missing_data_is_a_run_error(train, capsys):
    assert train("--steps=2", data="nowhere") == 1
    assert "nowhere" in error_of(capsys)


def test_parts_that_do_not_fit(train, capsys):
    assert train("--steps=2", "--max-tokens=80") == 1
    assert "data.max_tokens must be <= model.text.context_length 64, got 80" in error_of(capsys)


def test_divergence_names_the_loss(train, capsys):
    assert train("--steps=30", "--lr=1e30", "--grad-clip-norm=0") == 1
    assert "loss 'itc' is nan at step" in capsys.readouterr().err


def test_traceback_on_request(train, monkeypatch):
    monkeypatch.setenv("VLPFAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nowhere"):
        train("--steps=2", data="nowhere")


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train --help",
        "train albef_tiny --help",
        "eval --help",
        "data --help",
        "data make --help",
        "data pack --help",
        "data regions --help",
        "data check --help",
        "data score --help",
        "data capfilt --help",
        "profile --help",
        "profile albef_tiny --help",
        "env --help",
    ],
)
def test_help_has_an_example(line, capsys):
    try:
        code = cli.main(line.split())
    except SystemExit as done:
        code = done.code
    assert code == 0
    out = capsys.readouterr().out
    assert out.count("vlpfast ") >= 2
    assert "xample:" in out


def test_profile(scenes, tmp_path, capsys):
    flags = ["--warmup-steps=0", "--timed-steps=1", "--recorded-steps=1", "--depth=1"]
    args = ["profile", "clip_tiny", "--data", f"{scenes}/train", *SMALL, *flags]
    assert cli.main([*args, f"--out={tmp_path / 'out'}"]) == 0
    assert "samples/s" in capsys.readouterr().out
    assert (tmp_path / "out" / "trace.json.gz").is_file()


def test_data_make_siblings(tmp_path, capsys):
    args = ["data", "make", "scenes", str(tmp_path), "--num-samples=4", "--val-samples=2"]
    assert cli.main([*args, "--heldout-samples=0", "--siblings=1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {split: info["siblings"] for split, info in made.items()} == {"train": 1.0, "val": 0.0}
    assert cli.main([*args, "--siblings=2"]) == 1
    assert "siblings: expected a share in [0, 1], got 2.0" in error_of(capsys)


def test_train_help_names_the_recipes(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipes.names())
    assert "Input:" in out
    assert "Output:" in out


def test_no_command_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert "usage: vlpfast" in capsys.readouterr().out


def test_flags_of_a_bool_and_of_a_tuple(train):
    flags = ("--mlm-whole-word", "--optim.no-decay", "scale", "pos")
    assert train("--steps=1", *flags) == 0
    config = json.loads((train.folder / "config.json").read_text())
    assert config["objectives"]["mlm_whole_word"] is True
    assert config["optim"]["no_decay"] == ["scale", "pos"]


def test_env(capsys):
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["python"].startswith("3.")


def test_help_imports_no_torch():
    code = (
        "import sys, vlpfast.cli; vlpfast.cli.main(['--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert done.returncode == 0


def test_a_reader_that_left_is_not_an_error_message():
    command = [sys.executable, "-m", "vlpfast", "train"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
