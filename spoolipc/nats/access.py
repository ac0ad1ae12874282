"""Where the servers are, and who we are to them: what a URL says, and what the environment does.

Secrets come from the URL, or from NATS_CREDS, NATS_NKEY, NATS_USER and NATS_PASSWORD, or NATS_TOKEN, the first of these
that is set. They are part of no path, representation or error. Where TLS was asked for, nothing is sent without it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import nats.errors
from nats.aio.client import Client

from ..errors import AccessDenied, UnsupportedOperation

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_WAYS: Final[tuple[Mapping[str, str], ...]] = (
    {"user_credentials": "NATS_CREDS"},
    {"nkeys_seed": "NATS_NKEY"},
    {"user": "NATS_USER", "password": "NATS_PASSWORD"},
    {"token": "NATS_TOKEN"},
)
_FILES: Final = {
    "user_credentials": (b"BEGIN NATS USER JWT", b"BEGIN USER NKEY SEED", b"\nSU"),
    "nkeys_seed": (b"SU",),
}
"""Secrets that are files, and what such a file has in it; one without makes the client look for it for ever."""
_PLAIN: Final = "the server does not offer TLS"
_WANTED: Final = (
    "the servers want to know who this is: put USER:PASSWORD@ or TOKEN@ into the URL, or set NATS_USER and"
    " NATS_PASSWORD, NATS_TOKEN, NATS_CREDS or NATS_NKEY"
)


class Address(NamedTuple):
    """What a URL says. servers: without secrets. name: of the spool. replicas, storage: of a spool that is made."""

    scheme: str
    servers: tuple[str, ...]
    name: str
    replicas: int
    storage: str
    user: str | None
    password: str | None

    @property
    def path(self) -> str:
        """The URL without what is secret in it."""
        asked = f"?replicas={self.replicas}" if self.replicas > 1 else ""
        asked += f"{'&' if asked else '?'}storage={self.storage}" if self.storage != "file" else ""
        return f"{self.scheme}://{','.join(self.servers)}/{self.name}{asked}"

    def __repr__(self) -> str:
        return f"Address({self.path!r})"


def address(url: str) -> Address:
    """The parts of `nats://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/NAME[?replicas=3][&storage=memory]`.

    Raises ValueError, which tells nothing secret, for what is no such URL.
    """
    scheme, _, rest = url.partition("://")
    before, _, after = rest.rpartition("@")
    found = urlsplit(f"{scheme}://{after}", allow_fragments=False)
    name, asked = found.path.removeprefix("/"), parse_qsl(found.query, keep_blank_values=True)
    query = dict(asked)
    is_repeated = len(asked) > len(query)
    replicas, storage = query.pop("replicas", "1"), query.pop("storage", "file")
    servers = tuple(found.netloc.split(","))
    if not all(re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:\d{1,5})?", each) for each in servers):
        raise ValueError(
            f"{scheme}: a URL is {scheme}://HOST:PORT/NAME, not {scheme}://{found.netloc}{found.path}"
        )
    for port in (each.rpartition("]")[2].partition(":")[2] for each in servers):
        if port and not 0 < int(port) < 65536:
            raise ValueError(f"{scheme}://{found.netloc}{found.path}: {port} is no port: 1 to 65535")
    if not _NAME.fullmatch(name):
        what = "1 to 128 letters, digits, '-' and '_'"
        raise ValueError(f"{name!r} is no name of a spool on a server: {what}")
    if query or is_repeated or replicas not in ("1", "3", "5") or storage not in ("file", "memory"):
        what = "known are replicas, of 1, 3 or 5, and storage, of file or memory, each once"
        raise ValueError(f"{scheme}://{found.netloc}{found.path}: after the ? of a URL {what}")
    user, colon, password = before.partition(":")
    given = unquote(user) or None, unquote(password) if colon else None
    return Address(scheme, servers, name, int(replicas), storage, *given)


def options(where: Address) -> dict[str, Any]:
    """How to connect. Raises AccessDenied for what cannot be used, UnsupportedOperation without nkeys."""
    found: dict[str, Any] = dict(_secrets(where)[0])
    for name, marks in _FILES.items():
        if name in found:
            _check(where, _word_of(name), found[name], marks)
            if find_spec("nkeys") is None:
                what = "needs nkeys, which is not installed: pip install nkeys"
                raise UnsupportedOperation(f"{where.path}: {_word_of(name)} {what}")
    if where.scheme == "tls" or any(os.environ.get(each) for each in ("NATS_CA", "NATS_CERT")):
        found["tls"] = _context(where)
    scheme = "tls" if "tls" in found else "nats"
    return found | {"servers": [f"{scheme}://{each}" for each in where.servers]}


def _secrets(where: Address) -> tuple[dict[str, str], str]:
    """What to show to the servers, and where that is from, "" for nothing. Raises AccessDenied for a half of it."""
    if where.password is not None:
        return {"user": where.user or "", "password": where.password}, "the user and password in the URL"
    if where.user is not None:
        return {"token": where.user}, "the token in the URL"
    for way in _WAYS:
        found = {name: os.environ[word] for name, word in way.items() if os.environ.get(word)}
        if len(found) == len(way):
            return found, " and ".join(way.values())
        if found:
            unset = next(word for name, word in way.items() if name not in found)
            raise AccessDenied(
                0, f"{where.path}: {' and '.join(way.values())} belong together; {unset} is not set"
            )
    return {}, ""


def _word_of(name: str) -> str:
    return next(way[name] for way in _WAYS if name in way)


def _check(where: Address, word: str, path: str, marks: tuple[bytes, ...]) -> None:
    """Raise AccessDenied for a file that is not there, or not what it should be."""
    try:
        with open(path, "rb") as file:
            text = file.read(1 << 20)
    except OSError as error:
        raise AccessDenied(0, f"{where.path}: {word} names {path}: {error.strerror}") from None
    if not all(mark in text for mark in marks):
        raise AccessDenied(0, f"{where.path}: {word} names {path}, which has no such thing in it")


def _context(where: Address) -> ssl.SSLContext:
    """How TLS is spoken. Raises AccessDenied for files that cannot be used."""
    said = "NATS_CA"
    try:
        context = ssl.create_default_context(cafile=os.environ.get("NATS_CA") or None)
        if certificate := os.environ.get("NATS_CERT"):
            said = "NATS_CERT or NATS_KEY"
            context.load_cert_chain(certificate, os.environ.get("NATS_KEY") or None, password="")
    except OSError as error:  # those of ssl as well
        why = getattr(error, "reason", None) or error.strerror
        raise AccessDenied(0, f"{where.path}: {said} names no file that can be used: {why}") from None
    return context


def refusal(where: Address, error: BaseException) -> AccessDenied | None:
    """What to raise for an error that stays however often it is tried; None for any other."""
    if isinstance(error, AccessDenied):
        return error
    said, given, what = str(error).lower(), _secrets(where)[1], ""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = f"the server's certificate is not trusted ({error.verify_message})"
        what = f"{why}; NATS_CA names the file of who signed it"
    elif isinstance(error, ssl.SSLError):
        what = f"no TLS with the server ({error.reason}); NATS_CERT and NATS_KEY name a certificate that it asks for"
    elif _PLAIN in str(error):
        what = f"{_PLAIN}, which tls:// or NATS_CA asks for; nothing was sent"
    elif not isinstance(error, (OSError, nats.errors.Error)):
        what = f"{given or 'what is set'} cannot be used ({type(error).__name__})"
    elif "authorization" in said or "authentication" in said:
        what = f"the servers refuse {given}" if given else _WANTED
    return AccessDenied(0, f"{where.path}: {what}") if what else None


class Guarded(Client):
    """A client that sends nothing over a plain connection where TLS was asked for."""

    def _connect_command(self) -> bytes:
        if "tls" in self.options and not self._server_info.get("tls_required"):
            raise nats.errors.Error(_PLAIN)
        return super()._connect_command()
