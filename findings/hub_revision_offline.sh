#!/usr/bin/env bash
# Without a network `load_dataset(..., revision=A)` gives the data of revision B, if B was loaded last.
#
# One expects: a pinned revision is that revision or an error, with a network and without: so `HF_HUB_OFFLINE=1` on the
# nodes of a cluster, or a hub that is down for a minute, changes nothing about what is trained on.
# What happens: datasets 5.2.0, where both are in the cache, gives the one whose folder was written last, whatever is asked for;
# its warning says "Using the latest cached version", and nothing of a revision. A revision that does not exist is given, too.
# Why: load.py, dataset_module_factory: whatever fails on the way to the hub ends in
# `CachedDatasetModuleFactory(path, cache_dir=cache_dir)`, which is not told the revision; cache.py, _find_hash_in_cache sorts the
# folders by their time. The folder's name is the commit, so that it could look.
# Who is hurt: a run that is resumed on nodes without a network, after somebody has loaded another revision into the shared
# cache: other data, in another order, under the same run file.
# Instead: `huggingface_hub.snapshot_download(repo_type="dataset", revision=A)`, which keeps to it offline, and its files.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install -q --disable-pip-version-check datasets==5.2.0 huggingface_hub==2.4.0
cat > hub.py <<'PY'
"""Two revisions of a dataset, as the hub's API gives them, on a port of this machine."""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"v1": "1" * 40, "v2": "2" * 40}
FILES = {"1" * 40: b'{"text": "of v1"}\n', "2" * 40: b'{"text": "of v2"}\n'}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def do_POST(self):  # paths-info
        length = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(length).decode()
        commit = self.commit(self.path.split("/paths-info/")[1])
        self.send(json.dumps([self.entry(commit)] if "train.jsonl" in asked else []).encode(), commit)

    def commit(self, text):
        name = text.split("/")[0].split("?")[0]
        return COMMITS.get(name, name if name in FILES else COMMITS["v1"] if name == "main" else None)

    def entry(self, commit):
        return {"type": "file", "path": "train.jsonl", "size": len(FILES[commit]), "oid": hashlib.sha1(FILES[commit]).hexdigest()}

    def answer(self, body):
        path = self.path
        for part in ("/resolve/", "/tree/", "/revision/"):
            if part in path:
                commit = self.commit(path.split(part)[1])
                if commit is None:
                    return self.send(b"{}", None, 404, {"X-Error-Code": "RevisionNotFound"}, body)
                if part == "/resolve/":
                    if not path.endswith("/train.jsonl"):
                        return self.send(b"", commit, 404, {"X-Error-Code": "EntryNotFound"}, body)
                    return self.send(FILES[commit], commit, 200, {"ETag": f'"{hashlib.sha1(FILES[commit]).hexdigest()}"'}, body)
                if part == "/tree/":
                    return self.send(json.dumps([self.entry(commit)]).encode(), commit, 200, {}, body)
                about = {"id": "some/chats", "sha": commit, "siblings": [{"rfilename": "train.jsonl"}], "private": False,
                         "disabled": False, "gated": False, "tags": [], "downloads": 0, "likes": 0}
                return self.send(json.dumps(about).encode(), commit, 200, {}, body)
        self.send(b"{}", None, 404, {"X-Error-Code": "RepoNotFound"}, body)

    def send(self, content, commit, status=200, headers=None, body=True):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **({"X-Repo-Commit": commit} if commit else {}), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
PY
cat > check.py <<'PY'
import sys

import datasets

datasets.disable_progress_bars()
print(datasets.load_dataset("some/chats", revision=sys.argv[1], split="train")[0]["text"])
PY
export HF_HOME="$folder/home" HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1
env/bin/python hub.py > port & hub=$!
trap 'kill $hub 2>/dev/null; rm -rf "$folder"' EXIT
while [ ! -s port ]; do sleep 0.2; done
export HF_ENDPOINT="http://127.0.0.1:$(cat port)"
load() { env/bin/python check.py "$1" 2> errors | tail -1 || { tail -3 errors; echo failed; }; }
echo "with a network:    v1: $(load v1); v2: $(load v2)"
export HF_HUB_OFFLINE=1
found="$(load v1); $(load v2); $(load v9)"
echo "without a network: v1: $(load v1); v2: $(load v2); v9, which does not exist: $(load v9)"
grep -h "cached" errors | head -2
[ "$found" = "of v2; of v2; of v2" ]
echo "as described"
