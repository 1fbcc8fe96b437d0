"""Upload of an export: the hub's real client, and a stand-in for the hub, as tests are offline."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from export_models import build, files_below
from factories import write_encoder
from packaging.version import Version

from mlembed.cli import export as export_command
from mlembed.publishing import export as exporting

cards_at_the_endpoint = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.2"),
    reason="huggingface-hub before 2.2 validates cards at huggingface.co, not at HF_ENDPOINT",
)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload uses: repositories, and files in one commit.

    requests: path, authorization and body of each.
    """

    requests: list[tuple[str, str | None, bytes]] = []

    def do_GET(self) -> None:  # noqa: N802
        self.do_POST()

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.requests.append((self.path, self.headers.get("authorization"), body))
        status, answer = 200, {}
        if self.path == "/api/repos/create":
            status = 409 if b"taken" in body else 200
            answer = {"url": f"http://{self.headers['host']}/me/small", "name": "me/small"}
        elif self.path == "/api/validate-yaml" and b"license: mine" in body:
            status, answer = 400, {"errors": [{"message": '"license" must be one of ...'}]}
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, **how} for path in paths]}
        elif "/commit/" in self.path:
            address = f"http://{self.headers['host']}/me/small/commit/1"
            answer = {"commitUrl": address, "commitOid": "1"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    Hub.requests.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_of_a_test", "HF_HUB_OFFLINE": "0"}
    server.shutdown()


@pytest.fixture
def model_directory(tmp_path) -> Path:
    return write_encoder(build(), tmp_path / "model")


def command(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlembed", "export", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
    )


@cards_at_the_endpoint
def test_push(model_directory, hub, tmp_path):
    out = tmp_path / "small"
    arguments = ("--dim", "5", "--push-to-hub", "me/small", "--private")
    done = command(model_directory, out, *arguments, **hub)
    assert done.returncode == 0, done.stderr
    assert "pushed to http" in done.stdout and "me/small" in done.stdout
    requests = {path.split("?")[0]: (token, body) for path, token, body in Hub.requests}
    token, body = requests["/api/repos/create"]
    assert token == "Bearer hf_of_a_test"
    created = json.loads(body)
    assert created["name"] == "small" and created["organization"] == "me"
    assert created.get("visibility") == "private" or created.get("private") is True
    _, body = requests["/api/models/me/small/commit/main"]
    lines = [json.loads(line) for line in body.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    sent = {file["path"]: base64.b64decode(file["content"]) for file in files}
    assert sent == {name: data for name, data in files_below(out).items() if data is not None}
    snippets = (out / "README.md").read_text().split("## How")[0]
    assert 'SentenceTransformer("me/small")' in snippets and '"small"' not in snippets


@cards_at_the_endpoint
def test_card_that_the_hub_rejects(model_directory, hub, tmp_path):
    out = tmp_path / "small"
    arguments = ("--push-to-hub", "me/small", "--license", "mine")
    done = command(model_directory, out, *arguments, **hub)
    assert done.returncode == 1 and '"license\\" must be one of' in done.stderr
    assert done.stderr.count("\n") == 1 and (out / "modules.json").is_file()
    assert not any("create" in path for path, _, _ in Hub.requests)  # no empty repository is left


@pytest.mark.parametrize("name", ["small", "me/../small"])
def test_invalid_repository_name(name, tmp_path):
    with pytest.raises(ValueError, match="small"):  # before anything is read
        export_command.main(str(tmp_path / "none"), tmp_path / "out", push_to_hub=name)


@cards_at_the_endpoint
def test_failed_push_keeps_the_directory(model_directory, hub, tmp_path):
    # This process is offline, so the client fails by itself.
    exporting.export(build(), tmp_path / "out", 5, 1, 3)
    before = files_below(tmp_path / "out")
    with pytest.raises(ValueError, match="small was not uploaded: .*offline.* `hf upload me/small"):
        exporting.push(tmp_path / "out", "me/small", private=False)
    assert files_below(tmp_path / "out") == before
    done = command(model_directory, tmp_path / "small", "--push-to-hub", "me/taken", **hub)
    assert done.returncode == 1 and "vectors within" in done.stdout
    assert done.stderr.startswith("error: push-to-hub: me/taken") and "409" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "small" / "modules.json").is_file()
    assert not any("commit" in path for path, _, _ in Hub.requests)
