"""Runs, folders that go on or are refused, divergence, tables."""

import json
from dataclasses import asdict

import pytest
import torch

from bench.rivals import __main__ as command
from bench.rivals import examples, runner
from bench.rivals.method import Method
from bench.rivals.one_run import outcome
from bench.rivals.plan import Folder, Run, stamp, task_of
from bench.rivals.report import Row, section, table, tables
from bench.rivals.runner import Study, go_on
from bench.rivals.tasks import Task
from bench.rivals.training import Training
from flatprune.errors import InputError

STAMP = {
    "code": "c0de",
    "commit": "abc",
    "settings": {"epochs": 10, "lr": 0.1},
    "versions": {"torch": "2"},
    "cpu": "a CPU",
    "data": {"digits": "d1"},
}
RUN = Run("tiny", "5", "ours", 1.0, 11)


def test_one_run(study, tmp_path):
    data = task_of(RUN).data(tmp_path, RUN.seed, validation=False)
    found, network = outcome(RUN, data)
    again, _ = outcome(RUN, data)
    assert found["status"] == "ended" and network == {}
    assert 0 < found["accuracy"] <= 100 and found["params"] == 64 * 8 + 8 + 8 * 10 + 10 and found["macs"] == 64 * 8 + 80
    assert found["target_cost"] == pytest.approx(0.05 * found["params"])
    for key in ("accuracy", "nll", "ece", "train_accuracy"):
        assert found[key] == again[key]
    assert min(found[key] for key in ("seconds", "latency_1", "latency_128")) > 0
    folder = Folder(tmp_path, STAMP)
    folder.keep(RUN, found)
    assert folder.outcome(RUN) == {**asdict(RUN), **found} and not found.keys() & asdict(RUN).keys()
    tuning = Run("tiny", "5", "ours", 1.0, 11, validation=True)
    held_out = task_of(tuning).data(tmp_path, 11, validation=True)
    assert len(held_out.x_test) == round(0.2 * 1347) and len(held_out.x_train) == len(data.x_train)


def test_a_run_that_diverges_says_so(study, tmp_path):
    run = Run("tiny", "5", "ours", 3.0, 11)
    found, _ = outcome(run, task_of(run).data(tmp_path, 11, validation=False))
    assert found == {"status": "diverged", "reason": "the loss is nan at step 3 of 8"}


class Watched(Method):
    """Notes what each step sees."""

    def __init__(self):
        super().__init__(0.1)
        self.seen = []

    def loss(self, run, x, outputs, loss):
        self.seen.append((run.optimizer.param_groups[0]["lr"], x, outputs.detach(), outputs.dtype))
        return loss


@pytest.mark.parametrize("bf16", [False, True])
def test_a_task_with_a_warm_up_in_bfloat16(tmp_path, bf16):
    task = Task("tiny", "digits", 8, "lenet5", train_size=128, epochs=2, batch_size=32, warmup=0.5, bf16=bf16)
    method = Watched()
    Training(task, task.data(tmp_path, 11, validation=False), method, "params", 1.0, 11).train()
    rates, images, outputs, dtypes = zip(*method.seen)
    plain = [0.1 * method.rate(step / 8) for step in range(8)]
    assert rates == pytest.approx([rate * min(1, (step + 1) / 4) for step, rate in enumerate(plain)])
    assert set(dtypes) == {torch.float32}  # the loss is computed in it
    assert all(torch.equal(z, z.bfloat16().float()) for z in outputs) is bf16
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in images) or not bf16


class Instant:
    """In place of a process: it has ended at once, with a file, or for one seed without."""

    killed = 13

    def __init__(self, run, folder, _):
        self.returncode = 0
        if run.seed == self.killed:
            self.returncode = -9
        elif run.value == 3.0:
            folder.keep(run, {"status": "diverged", "reason": "nan"})
        else:
            folder.keep(run, {"status": "ended", "accuracy": 80.0 + run.seed % 10 + run.value})
        made.append(run)

    def poll(self):
        return self.returncode


made = []


@pytest.fixture
def fake(study, monkeypatch):
    made.clear()
    monkeypatch.setattr(runner, "_start", Instant)
    monkeypatch.setattr(runner, "_POLL", 0.0)
    return {"ours": study["ours"]}


def test_what_has_ended_is_not_run_again(fake, tmp_path):
    folder = Folder(tmp_path, STAMP)
    assert go_on(Study(["tiny"], ["5"], fake, [11, 12], []), folder, tmp_path, minutes=0, jobs=1) == 2
    assert not made
    assert go_on(Study(["tiny"], ["5"], fake, [11], []), folder, tmp_path, None, 1) == 0
    assert go_on(Study(["tiny"], ["5"], fake, [11, 12], []), Folder(tmp_path, STAMP), tmp_path, None, 2) == 0
    assert [run.seed for run in made] == [11, 12]
    assert not list(tmp_path.glob("*.tmp"))


def test_knobs_are_chosen_on_seeds_of_their_own(fake, tmp_path):
    folder = Folder(tmp_path, STAMP)
    assert go_on(Study(["tiny"], ["5"], fake, [11], [101, 102]), folder, tmp_path, None, 1) == 0
    tuned = [(run.value, run.seed) for run in made if run.validation]
    assert tuned == [(value, seed) for value in (1.0, 2.0, 3.0) for seed in (101, 102)]
    assert folder.best_value("tiny", "5", "ours", fake["ours"], [101, 102]) == 2.0  # 3.0 diverges
    assert [(run.value, run.seed) for run in made if not run.validation] == [(1.0, 11), (2.0, 11)]


def test_a_killed_run_is_a_failed_one(fake, tmp_path, capsys):
    folder = Folder(tmp_path, STAMP)
    assert go_on(Study(["tiny"], ["5"], fake, [13], []), folder, tmp_path, None, 1) == 0
    assert folder.outcome(Run("tiny", "5", "ours", 1.0, 13))["status"] == "failed"
    assert "tiny-5-ours-1.0-test-13: failed: ended with exit code -9" in capsys.readouterr().out
    run = Run("tiny", "5", "ours", 1.0, 14)
    with pytest.raises(KeyboardInterrupt):
        runner._close(run, folder, -15)
    assert folder.outcome(run) is None


@pytest.mark.parametrize("key", ["code", "settings", "versions", "data"])
def test_a_folder_of_another_study_is_refused(key, tmp_path):
    Folder(tmp_path, STAMP)
    other = json.loads(json.dumps(STAMP))
    other[key] = "ffff" if key == "code" else dict.fromkeys(other[key], "other")
    with pytest.raises(InputError, match=f"was made with other {key}: .*other|was made with other code"):
        Folder(tmp_path, other)
    Folder(tmp_path, {**STAMP, "commit": "def", "data": {"cifar10.npz": "d2"}})  # another task's images
    assert json.loads((tmp_path / "study.json").read_text())["data"] == {"digits": "d1", "cifar10.npz": "d2"}
    with pytest.raises(InputError, match="no study is in this folder"):
        Folder(tmp_path / "elsewhere", None)


def test_the_stamp_of_this_code(tmp_path):
    (tmp_path / "fashion-mnist.npz").write_bytes(b"images")
    first = stamp(tmp_path, ["fashion"])
    assert first == stamp(tmp_path, ["fashion", "fashion-resnet20"]) and first["settings"]["methods"]["ours"]
    with pytest.raises(InputError, match=r"cifar10\.npz: no such file"):
        stamp(tmp_path, ["cifar"])


def ended(accuracy, **others):
    return {"status": "ended", "accuracy": accuracy, "params": 3600, **others}


def test_the_table():
    ours = Row("ours", "lr 0.1", {11: ended(84.0, nll=0.5), 12: ended(85.0, nll=0.7), 13: ended(86.0, nll=0.6)})
    other = Row("OTO", "lr 0.1", {11: ended(82.0), 12: ended(84.0), 13: {"status": "diverged", "reason": "nan"}})
    absent = Row("absent", "lr 0.1", {11: None, 12: None, 13: None}, "not run: x is not installed")
    shown = table("a task", [ours, other, absent], ours, None)
    rows = [dict(zip(shown.head, row)) for row in shown.rows]
    assert rows[0]["n"] == "3" and rows[0]["test accuracy, %"] == "85.00 ± 1.00" and rows[0]["NLL"] == "0.600 ± 0.100"
    assert rows[1]["n"] == "2; 1 of 3 diverged" and rows[1]["less ours, points"] == "-1.50 ± 0.50"
    assert rows[2]["n"] == "not run: x is not installed" and rows[2]["test accuracy, %"] == ""
    assert rows[0]["less ours, points"] == "" and rows[1]["parameters"] == "3,600 ± 0"


def test_the_page(study, fake, tmp_path):
    folder = Folder(tmp_path / "out", STAMP)
    go_on(Study(["tiny"], ["5"], fake, [11, 12], [101, 102]), folder, tmp_path, None, 1)
    (shown,) = tables(folder, study, ["tiny"], ["5", "2"], [11, 12], [101, 102])
    text = section([shown], folder, "python -m bench.rivals", [11, 12], [101, 102])
    assert "| ours | strength 1.0 |" not in text  # the title of the made-up method is another
    assert "| halver | strength 2.0, tuned | 2 | 83.50 ± 0.71 |" in text
    assert "not run: no-such-package is not installed" in text and "knobs chosen on seeds 101 to 102" in text
    (untuned,) = tables(folder, study, ["tiny"], ["5"], [11, 12], [])
    assert "nothing tuned yet" in section([untuned], folder, "", [11, 12], [101, 102])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rivals -->\nold\n<!-- rivals -->\n")
    assert command.main(["--report", "--out", str(tmp_path / "out"), "--page", str(page), "--seeds", "2"]) == 0
    assert "--seeds 2" in page.read_text() and "old" not in page.read_text()
    assert command.PAGE.read_text().count("<!-- rivals -->") == 2


def test_mistakes_are_one_line(tmp_path, capsys):
    assert command.main(["--methods", "otto", "--data-dir", str(tmp_path)]) == 2
    assert command.main(["--report", "--out", str(tmp_path / "none")]) == 2
    assert command.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "'otto'" in errors[0] and "no study" in errors[1] and "no such file" in errors[2]


def test_rivals_that_are_not_installed_are_named(study, fake, tmp_path, capsys, monkeypatch):
    (tmp_path / "fashion-mnist.npz").write_bytes(b"images")
    words = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "out"), "--tasks", "fashion", "--targets", "5"]
    assert command.main([*words, "--seeds", "1", "--tuning-seeds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "absent: no-such-package is not installed, not run" in shown and shown.endswith("82.00 %\ndone\n")
    monkeypatch.setattr(examples, "is_installed", lambda method: False)
    assert command.main(["--example", "oto"]) == 2
    assert "oto: only-train-once is not installed, not run" in capsys.readouterr().out
