"""A hub on this machine, with as much of the Hugging Face hub's protocol as downloads need."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from tests.support.http_files import FileServer, Request

__all__ = ["COMMIT", "FakeHub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub(FileServer):
    """Serves OWNER/REPOSITORY/FILE of its folder as repositories with one commit, "main".

    Attributes:
        gated: repositories that want a token.
        wrong_hashes: files, by name, whose SHA-256 it does not tell right.
    """

    gated: set[str] = field(default_factory=set)
    wrong_hashes: set[str] = field(default_factory=set)

    def answer(self, request: Request) -> None:
        path = unquote(request.path.split("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            if self._opens(request, match[1], match[2]):
                request.reply(200, json.dumps(self._listing(match[1])).encode(), {"Content-Type": "application/json"})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._opens(request, match[1], match[2]):
                self._send(request, self.folder / match[1] / match[3])
        else:
            request.reply(404)

    def _opens(self, request: Request, repository: str, revision: str) -> bool:
        if not (self.folder / repository).is_dir():
            request.reply(401, headers={"X-Error-Code": "RepoNotFound"})
        elif revision not in {"main", COMMIT}:
            request.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif repository in self.gated and not request.headers.get("Authorization"):
            request.reply(403, headers={"X-Error-Code": "GatedRepo"})
        else:
            return True
        return False

    def _listing(self, repository: str) -> dict[str, object]:
        root = self.folder / repository
        files = [file for file in sorted(root.rglob("*")) if file.is_file()]
        return {
            "id": repository,
            "sha": COMMIT,
            "siblings": [
                {
                    "rfilename": str(file.relative_to(root)),
                    "size": file.stat().st_size,
                    "blobId": "0" * 40,
                    "lfs": {"sha256": self._hash(file), "size": file.stat().st_size, "pointerSize": 134},
                }
                for file in files
            ],
        }

    def _send(self, request: Request, file: Path) -> None:
        if not file.is_file():
            request.reply(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        tags = {"X-Repo-Commit": COMMIT, "ETag": f'"{self._hash(file)}"', "X-Linked-Size": str(file.stat().st_size)}
        request.send_file(file, tags)

    def _hash(self, file: Path) -> str:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return digest[::-1] if file.name in self.wrong_hashes else digest
