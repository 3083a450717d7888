"""The functions of `pipeline` as a user of Python meets them: README's own lines, and a notebook on a real kernel."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

import pipeline
from pipeline import Config, configure, evaluate, load_generator, prepare_npz, read_run, train
from pipeline.config import OptimizerConfig, flatten, to_yaml
from pipeline.data import Dataset
from pipeline.distributed.stopping import STOP_SIGNALS
from pipeline.errors import UserError
from pipeline.evaluation import Scores
from pipeline.reporting.read import Curve, Evaluation, Run
from tests.jobs import ROOT, changed, restoring_process, tiny_config

README = (ROOT / "README.md").read_text()
LINES = README.split("## Python and notebooks")[1].split("```python\n")[1].split("```")[0]
NOTEBOOK = ROOT / "launch/quickstart.ipynb"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def small(folder: Path, dataset: Path, **training: Any) -> Config:
    config = tiny_config(data={"dataset": str(dataset)}, run={"root": str(folder), "name": "small"})
    return changed(config, training={"steps": 4, "batch_size": 8, "n_critic": 1, **training})


def tiny_lines(folder: Path, dataset: Path) -> str:
    """README's lines with a file of settings that takes seconds in the place of theirs."""
    file = folder / "tiny.yaml"
    settings = {"every": 2, "num_images": 100, "batch_size": 100}
    file.write_text(to_yaml(changed(small(folder, dataset), evaluation=settings, run={"sample_every": 2})))
    lines = LINES.replace("configs/quickstart.yaml", str(file))
    assert str(file) in lines
    return lines


@pytest.mark.slow
def test_the_readmes_lines(scored_digits: Dataset, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    exec(tiny_lines(tmp_path, scored_digits.folder), seen)
    run = seen["run"]
    assert isinstance(run, Run)
    assert (run.name, run.step, run.status) == ("first", 4, "finished, 4 steps")
    assert run.logged("critic_loss").steps == [1, 2, 3, 4]
    assert [step for step, _ in run.grids] == [2, 4]
    assert run.scored("mnist", "fid").steps == [2, 4]
    assert seen["images"].shape == (16, 1, 28, 28)
    assert seen["images"].dtype == torch.uint8
    # Checkpoints are every 1,000 steps: the last one alone is there to be scored again, and has the same score.
    assert run.latest is not None
    assert seen["fids"] == [pytest.approx(run.latest.score("mnist", "fid"), rel=1e-9)]


def process_as_it_is() -> dict[str, Any]:
    """What a call could leave behind."""
    numbers = torch.full((2_000_000,), 1e-40) * 1.0  # by all threads of OpenMP
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "handlers": [signal.getsignal(number) for number in STOP_SIGNALS],
        "wakeup": _wakeup(),
        "cores": os.sched_getaffinity(0),
        "threads": torch.get_num_threads(),
        "numbers taken for 0": int((numbers.view(torch.int32) == 0).sum()),
        "dtype": torch.get_default_dtype(),
        "flags": (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, matmul.allow_tf32),
        "accelerate": [dict(state._shared_state) for state in (PartialState, AcceleratorState)],
        # But for what torch sets at the first import of its compiler.
        "environment": {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"},
        "folder": Path.cwd(),
        "gradients": torch.is_grad_enabled(),
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
    }


def _wakeup() -> int:
    number = signal.set_wakeup_fd(-1)
    return signal.set_wakeup_fd(number) * 0 + number


@pytest.mark.parametrize("flush", [False, True])
def test_a_call_leaves_the_process_as_it_was(
    flush: bool, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, tiny_dataset)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with restoring_process():
        signal.signal(signal.SIGUSR1, lambda *_: None)
        Accelerator(cpu=True, mixed_precision="bf16")  # the user's own
        os.sched_setaffinity(0, sorted(cores)[:1])
        torch.set_num_threads(2)
        torch.set_flush_denormal(flush)
        before = process_as_it_is()
        # Another precision in the same process: accelerate remembers the first.
        exact = train(changed(config, run={"name": "exact"}, runtime={"precision": "float64"}))
        assert process_as_it_is() == before
        run = train(config)
        assert process_as_it_is() == before
        with pytest.raises(UserError, match=r"runtime\.accumulation is 3"):
            train(changed(config, run={"name": "none"}, runtime={"accumulation": 3}))
        with pytest.raises(UserError, match="mnist"):
            evaluate(config.folder)
        assert process_as_it_is() == before
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)
    assert exact.log[0]["critic_loss"] == pytest.approx(run.log[0]["critic_loss"], rel=1e-3)
    assert exact.log[0]["critic_loss"] != run.log[0]["critic_loss"]


def test_a_thread_of_its_own_trains_too(tiny_dataset: Path, tmp_path: Path) -> None:
    before, runs = process_as_it_is(), list[Run]()
    thread = threading.Thread(target=lambda: runs.append(train(small(tmp_path, tiny_dataset))))
    thread.start()
    thread.join()
    assert runs[0].step == 4
    assert process_as_it_is() == before


def test_settings_by_their_keys(tmp_path: Path) -> None:
    assert configure() == Config()
    keys = {"training.steps": 7, "training.clip_value": None, "run.trackers": ["wandb"], "training.objective": "lsgan"}
    config = configure(ROOT / "configs/wgan_gp.yaml", keys)
    assert (config.training.steps, config.training.clip_value, config.run.trackers) == (7, None, ["wandb"])
    assert (config.training.objective, config.training.gradient_penalty) == ("lsgan", 10)
    for key, value, message in [
        ("training.steps", 0, "training.steps is 0: it must be at least 1"),
        ("training.steps", "many", "^training.steps is many: it must be a whole number$"),
        ("training.pace", 1, "training.pace"),
    ]:
        with pytest.raises(UserError, match=message):
            configure(None, {key: value})
    with pytest.raises(UserError, match=r"nothing\.yaml: no such file"):
        configure(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match=r"^{'run.name': 'x'} is no file: give its path or name first, as in"):
        train({"run.name": "x"})  # type: ignore[arg-type]
    assert configure("quickstart", {"data.dataset": tmp_path}).data.dataset == str(tmp_path)
    with pytest.raises(UserError, match=r"^trainig.steps is no setting: did you mean training.steps\?$"):
        train("quickstart", {"trainig.steps": 5})
    with pytest.raises(UserError, match=r"^training.steps is .*object.*: it must be a whole number"):
        configure("quickstart", {"training.steps": object()})
    with pytest.raises(UserError, match=r"^settings {'training.steps': 5} go with a configuration's name or path"):
        train(Config(), {"training.steps": 5})
    with pytest.raises(UserError, match=r"^training is {'steps': 5}: give a TrainingConfig"):
        Config(training={"steps": 5})  # type: ignore[arg-type]


def test_a_file_trains_with_settings_and_paths_are_texts(tiny_dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(to_yaml(small(tmp_path, tiny_dataset)))
    run = train(str(file), {"training.steps": 3, "run.name": "three"})
    assert (run.name, run.step) == ("three", 3)
    assert read_run(str(run.folder.path)) == run
    assert repr(run) == f"<Run {run.folder.path}: finished, 3 steps>"
    assert not load_generator(str(run.folder.path)).training
    again = prepare_npz(str(tmp_path), "again", {"train": str(tiny_dataset.parent / "tiny.npz")})
    assert again.folder == tmp_path / "again"


def test_every_name_is_there_and_stays() -> None:
    """Importing a program as a module takes the place of nothing."""
    assert set(pipeline.__all__) <= set(dir(pipeline))
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__
    code = (
        "import pipeline, pipeline.train, pipeline.evaluate; print(pipeline.train.__name__, pipeline.evaluate.__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["train", "evaluate"]
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        pipeline.trian  # noqa: B018


def test_no_public_name_takes_or_returns_any() -> None:
    """A type checker sees what users pass and get: neither functions nor the fields of what they return are Any, but
    for the settings of a network of one's own, which are what its writer says."""
    config = Config()
    classes = [Run, Evaluation, Curve, Config, *(type(section) for section in vars(config).values()), OptimizerConfig]
    public = [getattr(pipeline, name) for name in pipeline.__all__]
    public += [vars(kind)[name] for kind in classes for name in vars(kind) if not name.startswith("_")]
    annotations = [annotation for kind in (*classes, Scores) for annotation in kind.__annotations__.items()]
    for member in public:
        function = member.fget if isinstance(member, property) else member
        if inspect.isfunction(function):
            annotations += [(f"{function.__qualname__} {key}", kind) for key, kind in function.__annotations__.items()]
    assert len(annotations) > 150
    unknown = [f"{name}: {kind}" for name, kind in annotations if re.search(r"\bAny\b", str(kind))]
    assert unknown == ["options: dict[str, Any]"]


INTERRUPTED = """
import os, signal, threading, time
from pathlib import Path
from pipeline import configure, train

def interrupt(times, path, lines=3):
    def watch():
        while not path.exists() or path.read_text().count(chr(10)) < lines:
            time.sleep(0.01)
        time.sleep(0.2)  # so that, most likely, the step is none of the log's
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
    threading.Thread(target=watch).start()

def endless(name, log_every=1):
    settings = {"run.name": name, "run.log_every": log_every}
    return configure("FILE", settings | {"training.steps": 10**6, "evaluation.every": None})

handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
"""
STOPPED = """
interrupt(1, Path("ROOT/once/metrics.jsonl"), lines=1)
train(endless("once", log_every=50))
"""
READ = """
from pipeline import read_run
stopped = read_run("ROOT/once")
print("logged", stopped.log[-1]["step"], "is at", stopped.step)
"""
TWICE = """
from pipeline.training.trainer import Saver
interrupt(2, Path("ROOT/twice/metrics.jsonl"))
Saver.save_now = lambda self: time.sleep(30)  # a disk that takes its time
try:
    train(endless("twice"))
except KeyboardInterrupt:
    print("interrupted at once")
"""
AFTERWARDS = """
assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    time.sleep(30)
except KeyboardInterrupt:
    print("the kernel's own interrupt")
"""


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    text = "".join(line for cell in cells for line in cell["source"])
    keys = set(re.findall(r'["`]((?:run|training|network|evaluation)\.[\w.]+)["`]', text)) - {"run.log", "run.grids"}
    assert len(keys) > 10
    assert keys <= set(flatten(Config()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook(mnist_dataset: Dataset, scored_digits: Dataset, tmp_path: Path) -> None:
    """On a real kernel: the notebook as it is, whose bar is a widget; then an interrupt that saves, a second that stops
    at once, and the kernel goes on after either."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("pandas")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (tmp_path / "data").symlink_to(mnist_dataset.folder.parent)
    tiny_lines(tmp_path, scored_digits.folder)
    texts = [INTERRUPTED, STOPPED, READ, TWICE, AFTERWARDS]
    names = {"FILE": str(tmp_path / "tiny.yaml"), "ROOT": str(tmp_path)}
    for name, value in names.items():
        texts = [text.replace(f'"{name}', f'"{value}') for text in texts]
    cells = [nbformat.v4.new_code_cell(text) for text in texts]
    cells[1].metadata["tags"] = ["raises-exception"]
    shipped, notebook.cells = notebook.cells, notebook.cells + cells
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    kinds = {kind for cell in shipped for output in cell.get("outputs", []) for kind in output.get("data", {})}
    assert {"application/vnd.jupyter.widget-view+json", "text/html", "image/png"} <= kinds
    fids = read_run(tmp_path / "runs/notebook").scored("mnist", "fid")
    assert fids.steps == [250, 500]
    assert fids.values[1] < fids.values[0] < 400  # noise has 1,960
    assert (tmp_path / "runs/notebook/wgan_mnist.h5").is_file()
    outputs = [json.dumps(cell.outputs) for cell in cells]
    [error] = [output for output in cells[1].outputs if output.output_type == "error"]
    message = r"Preempted: stopped after step (\d+), which is saved: the same command goes on from there"
    assert (said := re.fullmatch(message, "\n".join(error.traceback)))
    assert f"is at {said[1]}" in outputs[2]
    assert "interrupted at once" in outputs[3]
    assert "the kernel's own interrupt" in outputs[4]
