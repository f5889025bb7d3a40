"""Pushes to a hub that this file serves itself: what is refused before any work, and what a push sends."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import ModelCard, constants

import sparsekern
from sparsekern.cli import main
from sparsekern.runtime.hub import check_push, push
from tests import tiny

REPO = "ann/pruned"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that a push talks to. It notes each request in `server.seen` and each file in `server.files`."""

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.seen.append(self.path)
        if self.headers["Authorization"] != "Bearer good":
            self.answer({"error": "Invalid username or password."}, 401)
        elif not self.path.endswith("/whoami-v2"):
            self.answer({"error": "Repository not found"}, 404)
        else:
            role = {"auth": {"accessToken": {"role": self.server.role}}}
            self.answer({"name": "ann", "type": "user", "orgs": [{"name": "team"}], **role})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(self.path)
        if self.path.endswith(self.server.refused):
            self.answer({"error": "You have no space left."}, 403)
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.answer({"commitUrl": f"https://huggingface.co/{REPO}/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({"url": f"https://huggingface.co/{REPO}", "name": REPO, "warnings": [], "errors": []})

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.files, server.role, server.refused = [], {}, "write", "nothing"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.fixture
def pruned():
    model = tiny.llama()
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    return model


def test_a_push_sends_the_files_of_the_model_in_one_commit(hub, pruned, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("not for others")
    sparsekern.save(tiny.llama(), tmp_path / "model")
    (tmp_path / "model" / "diary.txt").write_text("not for others")
    sparsekern.save(pruned, tmp_path / "model", "packed", overwrite=True, push_to_hub=REPO)
    folder = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir() if path.name != "diary.txt"}
    assert hub.files == folder and "model.safetensors" in folder
    assert [path for path in hub.seen if "/commit/" in path] == [f"/api/models/{REPO}/commit/main"]


@pytest.mark.parametrize(
    ("repo", "kind", "message"),
    [
        (3, TypeError, "push_to_hub: expected the name of a repository, got int"),
        ("pruned", ValueError, "push_to_hub: expected user/name, got 'pruned'"),
        ("a b/c", ValueError, "push_to_hub: expected user/name, got 'a b/c'"),
        ("bob/pruned", ValueError, "push_to_hub: expected a repository of ann or team, whose token this is, got 'bob/pruned'"),
    ],
)
def test_names_that_are_refused(hub, tmp_path, repo, kind, message):
    with pytest.raises(kind, match=message):
        sparsekern.save(tiny.llama(), tmp_path / "model", push_to_hub=repo)
    assert not (tmp_path / "model").exists()


def test_without_a_token_nothing_is_done(hub, no_token, tmp_path, capsys):
    with pytest.raises(ValueError, match="push_to_hub: expected a token for the hub, got none; `hf auth login` keeps one"):
        sparsekern.save(tiny.llama(), tmp_path / "model", push_to_hub=REPO)
    assert main(["prune", "no-such-model", "--out", str(tmp_path / "model"), "--push-to-hub", REPO]) == 2
    assert "error: --push-to-hub: expected a token for the hub" in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and hub.seen == []


def test_tokens_that_are_refused(hub, monkeypatch):
    check_push("team/pruned")
    hub.role = "read"
    with pytest.raises(ValueError, match="push_to_hub: expected a token that may write, got one that only reads"):
        check_push(REPO)
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(ValueError, match="push_to_hub: expected a token that the hub accepts; it says: Invalid user token"):
        check_push(REPO)


def test_without_a_network_nothing_is_done(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="push_to_hub: the hub at http://127.0.0.1:1 cannot be reached: "):
        check_push(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="push_to_hub: expected a connection to the hub, but HF_HUB_OFFLINE is set"):
        check_push(REPO)


@pytest.mark.parametrize("refused", ["/repos/create", "/preupload/main", "/commit/main"])
def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(hub, tmp_path, refused):
    hub.refused = refused
    path = tmp_path / "model"
    with pytest.raises(OSError) as failed:
        sparsekern.save(tiny.llama(), path, push_to_hub=REPO)
    assert f"push_to_hub: the model is complete in {str(path)!r}, but could not be pushed to {REPO}: " in str(failed.value)
    assert str(failed.value).endswith(f"; push it later: hf upload {REPO} {path}") and "no space left" in str(failed.value)
    sparsekern.load(path)
    assert hub.files == {}
    hub.refused = "nothing"
    assert push(path, REPO) == f"https://huggingface.co/{REPO}/commit/1" and "model.safetensors" in hub.files


def test_the_command_pushes_reports_and_card(hub, tmp_path, capsys):
    model, text, out = tiny.save_folder(tmp_path / "tiny"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny.TEXT)
    options = ["--method", "magnitude", "--evaluate", "--text", str(text), "--windows", "1", "--push-to-hub", REPO]
    assert main(["prune", str(model), "--out", str(out), *options]) == 0
    assert f"pushed: https://huggingface.co/{REPO}/commit/1" in capsys.readouterr().out
    assert {"report.json", "report.html", "README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    card = ModelCard(hub.files["README.md"].decode()).data
    assert card.tags == ["sparsekern", "pruned", "sparse", "2:4"] and card.base_model is None
    (found,) = card.eval_results
    measured = json.loads(hub.files["report.json"])["results"]["measured"]
    assert (found.metric_type, found.metric_value) == ("perplexity", measured["perplexity, pruned"])
    assert found.dataset_name == measured["evaluated on"]
