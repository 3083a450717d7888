"""Folders of the Hugging Face Hub: what its own library reads in them, and what it sends to an address of ours."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.config import Config, to_yaml
from pipeline.errors import UserError
from pipeline.evaluation import TARGET
from pipeline.export.__main__ import convert
from pipeline.export.generator_file import fingerprint, load_generator, read_generator, save_export, warm_start
from pipeline.export.hub import push
from pipeline.export.images import render_range
from pipeline.models.networks import Critic
from pipeline.storage.run_folder import RunFolder
from tests.export.generators import random_generator, saved_run
from tests.jobs import ROOT, changed, environment

DATA = "ab" * 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of WGANs on MNIST with scores of its generator and, newer, of another one."""
    generator, folder = random_generator(), RunFolder(tmp_path / "secret place/digits")
    saved_run(folder, generator, DATA, 20)
    config = changed(Config(), run={"name": "digits", "root": str(tmp_path / "secret place")}, training={"seed": 3})
    folder.config.write_text(to_yaml(config))
    folder.environment.write_text(json.dumps({"dataset": "mnist", "dataset_fingerprint": DATA, "hostname": "secret"}))
    folder.evaluation.mkdir()
    for step, own, fid in [(20, fingerprint(generator), 12.5), (30, "cd" * 32, 3.0)]:
        features = {"mnist": {"fid": fid, "fid_floor": 1.04, "is_mean": 9.1, "kid_mean": None, "precision": 0.5}}
        facts = {"step": step, "weights": "ema", "images_fingerprint": own, "num_images": 10_000, "reference": "train"}
        folder.scores(step).write_text(json.dumps({**facts, "features": features}))
    return folder.path


def test_a_folder_has_what_the_hub_expects_and_loads_back(run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    out = tmp_path / "hub"
    assert convert(run, out, licence="mit") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "samples.png", "scores.json")
    ]
    loaded, original = load_generator(out), load_generator(run)
    assert fingerprint(loaded) == fingerprint(original)
    assert torch.equal(render_range(loaded, 3, 0, 8), render_range(original, 3, 0, 8))
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "gan-pipeline")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert {"wgan", "gan"} <= set(card.data.tags)
    results = [(item.dataset_name, item.metric_type, item.metric_value) for item in card.data.eval_results]
    assert results == [("mnist", "fid", 12.5), ("mnist", "is", 9.1), ("mnist", "precision", 0.5)], "of this generator"
    assert "| mnist | 12.5 | 1.04 | 9.10 | — |" in card.text
    assert "Yann LeCun" in card.text
    config = json.loads((out / "config.json").read_text())
    assert config["generator"] == original.spec()
    assert config["training"]["critic_optimizer"]["rho"] == 0.9
    assert config["provenance"] | {"step": 20, "dataset": DATA, "run": "digits"} == config["provenance"]
    assert json.loads((out / "scores.json").read_text())["features"]["mnist"]["fid"] == 12.5
    with Image.open(out / "samples.png") as picture:
        assert picture.size == (4 * 30 * 2 + 4, 4 * 30 * 2 + 4)
    assert not [path for path in out.iterdir() if b"secret" in path.read_bytes()], "no path, no machine"


def test_what_a_source_does_not_tell_is_left_out(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    path = tmp_path / "generator.safetensors"
    save_export(random_generator(3, (3, 32, 24)), path, {"run": "alone", "step": 5})
    assert convert(path, tmp_path / "hub", data_licence="CC0") == 0
    card = ModelCard.load(tmp_path / "hub/README.md")
    assert (card.data.license, card.data.eval_results) == (None, None)
    assert "Not scored." in card.text
    assert "Licence of the data: CC0." in card.text
    assert "3 classes" in card.text
    assert not (tmp_path / "hub/scores.json").exists()


def test_what_cannot_be_written_or_sent_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for out, name, message in [
        (tmp_path / "there", None, "there: exists already, name another folder"),
        (tmp_path / "a.onnx", "me/digits", r"a\.onnx is a file: --push"),
        (tmp_path / "hub", "me/digits/of mine", "--push is 'me/digits/of mine'"),
    ]:
        with pytest.raises(UserError, match=message):
            convert(run, out, push=name)
    assert not (tmp_path / "hub").exists()
    assert "Hugging Face" in TARGET


class Hub(BaseHTTPRequestHandler):
    """The Hub as far as a commit of small files takes it."""

    received: dict[str, bytes]
    served: dict[str, bytes]
    asked: list[str]
    refuses: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        status, answer = 200, dict[str, Any]()
        if self.refuses:
            status, answer = 401, {"error": "Invalid username or password."}
        elif self.path == "/api/repos/create":
            assert json.loads(body)["name"] == "digits"
            answer = {"url": f"{host}/me/digits"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/me/digits/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif self.path == "/api/models/me/digits/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = b64decode(line["value"]["content"])
            answer = {"commitOid": "1" * 40, "commitUrl": f"{host}/me/digits/commit/{'1' * 40}"}
        else:
            status = 404
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        content = self.served.get(self.path)
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "RevisionNotFound" if "/digits/" in self.path else "RepoNotFound")
            self.end_headers()
            return
        headers = {
            "Content-Length": len(content),
            "ETag": f'"{sha256(content).hexdigest()}"',
            "X-Repo-Commit": "1" * 40,
        }
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"received": {}, "served": {}, "asked": [], "refuses": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_push_sends_every_file_and_a_refusal_is_one_line(
    hub: tuple[str, type[Hub]], run: Path, tmp_path: Path
) -> None:
    address, handler = hub

    def run_push(out: Path) -> subprocess.CompletedProcess[str]:
        return run_program("export", run, out, "--push", "me/digits")

    def run_program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        there = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_none",
            "HF_HUB_DISABLE_XET": "1",
        }
        return subprocess.run(command, cwd=ROOT, env=environment() | there, capture_output=True, text=True, timeout=120)

    sent = run_push(tmp_path / "sent")
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout.splitlines() == [str(tmp_path / "sent"), f"{address}/me/digits"]
    assert handler.received == {path.name: path.read_bytes() for path in (tmp_path / "sent").iterdir()}
    handler.served = {f"/me/digits/resolve/main/{name}": content for name, content in handler.received.items()}
    drawn = run_program("generate", "-g", "hf://me/digits", "--out", tmp_path / "digits.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "digits.png").exists()
    handler.refuses = True
    refused = run_push(tmp_path / "kept")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert refused.stderr.startswith("error: --push me/digits: ")
    assert f"`hf upload me/digits {tmp_path / 'kept'}`" in refused.stderr
    assert (tmp_path / "kept/README.md").exists()


def test_a_server_that_is_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi("http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr("pipeline.export.hub.HfApi", lambda: api)
    with pytest.raises(UserError, match=f"--push me/digits: .*; {tmp_path} is written: after `hf auth login`"):
        push(tmp_path, "me/digits")


def test_a_generator_on_the_hub_is_read_wherever_a_path_is_given(
    hub: tuple[str, type[Hub]], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    address, handler = hub
    handler.served = {f"/me/digits/resolve/{name}/model.safetensors": export.read_bytes() for name in ("main", "v1")}
    fetch = partial(hf_hub_download, endpoint=address, cache_dir=tmp_path / "cache", token=False)
    monkeypatch.setattr("pipeline.export.hub.hf_hub_download", fetch)
    for name in ("hf://me/digits", Path("hf://me/digits"), "hf://me/digits@v1"):
        assert fingerprint(load_generator(name)) == fingerprint(load_generator(export))
    generator, average = load_generator(export), load_generator(export)
    torch.nn.init.zeros_(generator.get_parameter("dense.weight"))
    critic = Critic(generator.config, (1, 28, 28))
    message = warm_start("hf://me/digits", generator, average, critic)
    assert message == "begins with the weights of hf://me/digits: generator, ema"
    assert fingerprint(generator) == fingerprint(load_generator(export))
    assert convert(Path("hf://me/digits"), tmp_path / "copy.safetensors") == 0
    assert read_generator(tmp_path / "copy.safetensors", "ema")[1] == {"run": "test", "step": 3, "source": "digits"}
    for name, reason in (("me/letters", "404 "), ("me/digits@v2", "404 "), ("me/digits/more", "Repo id must")):
        bare = name.partition("@")[0]
        with pytest.raises(UserError, match=f"hf://{bare}: {reason}.*; it takes a repository with model.safetensors"):
            load_generator(f"hf://{name}")
    assert {path.rpartition("/")[2] for path in handler.asked} == {"model.safetensors"}, "nothing that is unpickled"


def test_the_best_generator_of_a_run_goes_to_the_hub(
    hub: tuple[str, type[Hub]], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    address, handler = hub
    api = HfApi(address, token="hf_none")
    monkeypatch.setattr("pipeline.export.hub.HfApi", lambda: api)
    monkeypatch.chdir(tmp_path)
    best = RunFolder(run).best_export
    save_export(load_generator(run), best, {"run": "digits", "step": 20, "dataset": DATA})
    assert convert(best, Path("hf://me/digits")) == 0
    assert handler.received == {path.name: path.read_bytes() for path in (tmp_path / "digits").iterdir()}
    assert json.loads(handler.received["scores.json"])["features"]["mnist"]["fid"] == 12.5
