"""Certificates, users and keys, made for the tests, and the lines of a server's configuration that go with them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import nkeys

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def certificate(place: Path, name: str, by: str = "") -> Path:
    """A certificate for this machine, signed by another one, or of an authority; the key beside it."""
    command = ["openssl", "req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={name}"]
    command += ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
    if by:
        command += ["-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-addext", f"basicConstraints=critical,CA:{'FALSE' if by else 'TRUE'}"]
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    return place / f"{name}.pem"


def tls(place: Path, more: str = "") -> str:
    """The configuration of a server that has a certificate of `ca.pem`."""
    certificate(place, "ca")
    certificate(place, "server", "ca")
    return f'tls {{ cert_file: "{place}/server.pem", key_file: "{place}/server.key", {more} }}'


def seed(kind: int) -> bytes:
    """A new private key."""
    made: bytes = nkeys.encode_seed(os.urandom(32), kind)
    return made


def public(secret: bytes) -> str:
    key: str = nkeys.from_seed(bytearray(secret)).public_key.decode()
    return key


def nkey(place: Path, name: str = "user") -> tuple[Path, str]:
    """A file with a seed, and the public key that goes with it."""
    secret = seed(nkeys.PREFIX_BYTE_USER)
    (file := place / f"{name}.nk").write_bytes(secret)
    return file, public(secret)


def token(claims: dict[str, Any], by: bytes) -> str:
    """A JSON web token as NATS signs it."""

    def coded(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    claims = claims | {"iat": 1_700_000_000, "iss": public(by)}
    claims["jti"] = (
        base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
    )
    body = ".".join(
        coded(json.dumps(each).encode()) for each in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)
    )
    return f"{body}.{coded(nkeys.from_seed(bytearray(by)).sign(body.encode()))}"


class Operator:
    """An operator with one account; `config` is that of a server which knows both."""

    def __init__(self) -> None:
        operator, self._account = seed(nkeys.PREFIX_BYTE_OPERATOR), seed(nkeys.PREFIX_BYTE_ACCOUNT)
        system = seed(nkeys.PREFIX_BYTE_ACCOUNT)
        own = {"sub": public(operator), "name": "o", "nats": {"type": "operator", "version": 2}}
        names = (
            "subs data payload imports exports conn leaf mem_storage disk_storage streams consumer".split()
        )
        limits: dict[str, Any] = dict.fromkeys(names, -1) | {"wildcards": True}
        self.config = (
            f"operator: {token(own, operator)}\nresolver: MEMORY\nsystem_account: {public(system)}\n"
        )
        known = []
        for each, stores in ((self._account, -1), (system, 0)):
            rights = limits | dict.fromkeys(names[-4:], stores)
            claims: dict[str, Any] = {"sub": public(each), "name": f"account {stores}"}
            claims["nats"] = {"limits": rights, "type": "account", "version": 2}
            known.append(f"{public(each)}: {token(claims, operator)}")
        self.config += f"resolver_preload: {{ {', '.join(known)} }}"

    def credentials(self, file: Path) -> Path:
        """A file for a new user."""
        user = seed(nkeys.PREFIX_BYTE_USER)
        told: dict[str, Any] = {"sub": public(user), "name": "u"}
        told["nats"] = {"subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2}
        parts = (("NATS USER JWT", token(told, self._account)), ("USER NKEY SEED", user.decode()))
        file.write_text(
            "".join(f"-----BEGIN {name}-----\n{text}\n------END {name}------\n\n" for name, text in parts)
        )
        return file
