"""`HubServer` with uploads: repositories are created, large files go by Git LFS, and a commit is all or nothing.

`faults` may also name "create", "preupload", "batch", "put" and "commit", with status codes to answer.
`commits` lists what each commit did: {"summary", "files", "deleted"}.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

from tests.weights.hub_server import LARGE, Answers, HubServer


class PushServer(HubServer):
    def __init__(self, folder: Path, token: str = "hf_test"):
        super().__init__(folder, token)
        self.created, self.commits, self.objects, self.sent = {}, [], {}, []
        self.server.RequestHandlerClass = type("Handler", (Uploads,), {"server_hub": self})

    def files(self, repo: str) -> list[str]:
        return [name for name in super().files(repo) if name != ".repo"]


class Uploads(Answers):
    server_hub: PushServer

    def json(self, value: dict, status: int = 200):
        self.send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def allowed(self, repo, revision):  # an empty repository is one too
        return (self.server_hub.folder / repo / ".repo").is_file() or super().allowed(repo, revision)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.fault("put"):
            return
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server_hub.objects[oid] = content
        self.send(b"", {})

    def do_POST(self):
        hub, path = self.server_hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.log.append(("POST", path, None))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            if self.fault("create"):
                return
            there, hub.created[name] = (hub.folder / name).is_dir(), about
            (hub.folder / name).mkdir(parents=True, exist_ok=True)
            (hub.folder / name / ".repo").touch()
            self.json({"url": f"{hub.url}/{name}"} | ({"error": "exists"} if there else {}), 409 if there else 200)
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path) and not self.fault("preupload"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(LARGE) else "regular"} for n in names]
            self.json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch") and not self.fault("batch"):
            actions = {"upload": {"href": hub.url + "/lfs/{oid}"}, "verify": {"href": hub.url + "/verify"}}
            filled = lambda one: json.loads(json.dumps(actions).replace("{oid}", one["oid"]))  # noqa: E731
            self.json({"objects": [one | {"actions": filled(one)} for one in json.loads(body)["objects"]]})
        elif path == "/verify":
            about = json.loads(body)
            self.json({}, 200 if len(hub.objects[about["oid"]]) == about["size"] else 422)
        elif (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)) and not self.fault("commit"):
            self.commit(hub.folder / match[1], [json.loads(line) for line in body.splitlines()])
            self.json({"commitUrl": f"{hub.url}/{match[1]}/commit/1", "commitOid": hub.commit(match[1])})

    def fault(self, step: str) -> bool:
        faults = self.server_hub.faults.get(step, [])
        if faults:
            self.json({"error": "something broke"}, faults.pop(0))
            return True
        return False

    def commit(self, folder: Path, lines: list[dict]):
        done = {"summary": lines[0]["value"]["summary"], "files": [], "deleted": []}
        for line in lines[1:]:
            about = line["value"]
            path = folder / about["path"]
            if line["key"] == "deletedFile":
                path.unlink()
                done["deleted"].append(about["path"])
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            lfs = line["key"] == "lfsFile"
            path.write_bytes(self.server_hub.objects[about["oid"]] if lfs else base64.b64decode(about["content"]))
            done["files"].append(about["path"])
        self.server_hub.commits.append(done)
