"""Secrets that this process knows, and their removal from every text that leaves it.

A secret is known once `remember` has seen it: the key of a teacher, what a config hides in a URL, under a telling name
or in the form of a well-known service's keys, and the values of environment variables whose names say so (`HF_TOKEN`,
`OPENAI_API_KEY`). Errors, summaries, stored reasons, config dumps and the console pass through `redact`, so an endpoint
that echoes a key does not publish it. Configs pass through `redacted`, which also hides by field: a short password is
too short to search for, but its field is known.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
SHORTEST, SHORTEST_IN_ENVIRONMENT = 6, 8
"""Shorter values are not treated as secrets: they may be ordinary words or numbers."""
BEGINNING = 10
"""This many first characters of a long secret are also hidden, since services may echo a truncated key."""
_NAME = re.compile(
    r"(?:^|[_\-. ])(?:(?:api|access)?[_-]?key|(?:api|access)[_-]?keys|token|(?:access|auth|api|bearer)[_-]?tokens"
    r"|secrets?|credentials?|cookie|bearer|pass(?:word|wd|phrase)?|auth(?:orization)?|(?<=[_\-. ])(?:pwd|pat))$",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PART_OF_TEXT = re.compile(r"^(?:bos|eos|pad|unk|sep|cls|mask|stop)[_-]?token$", re.I)
_KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|pk|rk|gsk|nvapi|tgp|r8|fw|xai|pplx|glpat|xox[abp])[-_]"
    r"(?:(?:proj|ant|api\d\d|or|v1|live|test|svcacct)[-_]){0,3}"
    r"(?=[A-Za-z]{0,99}\d)(?=\d{0,99}[A-Za-z])[A-Za-z0-9]{16,}[A-Za-z0-9_-]*"
    r"|hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{30,}|AIza[A-Za-z0-9_-]{30,}|AKIA[A-Z0-9]{12,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*)"
)
"""The form of well-known services' keys: a long mix of letters and digits, unlike names."""
_URL = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s'\"<>]+")
_LOGIN = re.compile(r"://[^\s/:@]{0,200}:[^\s/@]{1,200}@")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")

_known: set[str] = set()
_forms: tuple[str, ...] = ()


def remember(secrets: Iterable[str]) -> None:
    """Redact these from now on, in every form in which a service may echo them."""
    global _forms
    fresh = {secret.strip() for secret in secrets} - _known
    fresh = {secret for secret in fresh if len(secret) >= SHORTEST}
    if fresh:
        _known.update(fresh)
        forms = {form for secret in _known for form in _echoes(secret) if len(form) >= SHORTEST}
        _forms = tuple(sorted(forms, key=len, reverse=True))  # a longer form may hold a shorter one


def remember_environment() -> None:
    """Remember the values of environment variables whose names say that they are secret."""
    remember(
        value for name, value in os.environ.items() if is_secret_name(name) and len(value) >= SHORTEST_IN_ENVIRONMENT
    )


def remember_config(tree: Any) -> None:
    """Remember the secrets of a config before it is validated: in URLs and under secret-like names."""
    remember(_in_tree(tree, ""))


def has_secret(tree: Any) -> bool:
    """Whether nested dicts and lists hold a secret in a URL or under a telling name."""
    return any(_in_tree(tree, ""))


def redact(text: str) -> str:
    """`text` with every known secret, the beginning of one, and any URL's user and password replaced by `***`."""
    if "://" in text:
        text = _LOGIN.sub(f"://{HIDDEN}@", text)
    for form in _forms:
        if form in text:
            text = text.replace(form, HIDDEN)
        if len(form) >= 2 * BEGINNING:
            text = _without_beginnings(text, form)
    return text


def redacted(tree: Any, name: str = "") -> Any:
    """A copy of nested dicts and lists without known secrets, and without what stands where secrets do: under a telling
    name, and as a URL's password.

    Args:
        name: of the field that holds `tree`.
    """
    if isinstance(tree, str):
        if tree and is_secret_name(name):
            return HIDDEN
        return redact(_URL.sub(lambda found: _bare(found.group()), tree))
    if isinstance(tree, Mapping):
        return {redacted(key): redacted(value, str(key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted(value, name) for value in tree]
    return tree


def is_secret_name(name: str) -> bool:
    """Whether a field or variable of this name holds a secret."""
    return bool(_NAME.search(_CAMEL.sub("_", name))) and not _PART_OF_TEXT.match(name)


def is_variable(name: str) -> bool:
    """Whether a field contains the name of an environment variable; else it may contain the key itself."""
    return name in os.environ or bool(_VARIABLE.fullmatch(name))


def url_secrets(url: str) -> list[str]:
    """The secrets in a URL: its password, a user name without one, and query values under secret-like names."""
    try:
        parts = urlsplit(url)
        user, password = parts.username, parts.password
    except ValueError:  # not a URL: the code that uses it reports the error
        return []
    found = [password] if password else [user] if user else []
    found += [value for name, value in parse_qsl(parts.query) if is_secret_name(name)]
    if user and password:
        found.append(base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode())
    return [form for secret in found for form in {secret, unquote(secret)}]


def _bare(url: str) -> str:
    """A URL without its user, its password and its query values under telling names."""
    head, mark, rest = url.partition("://")
    place, slash, query = rest.partition("?")
    host, tail = (place.partition("/")[0], "".join(place.partition("/")[1:]))
    if "@" in host:
        host = f"{HIDDEN}@{host.rpartition('@')[2]}"
    parts = [part.partition("=") for part in query.split("&")]
    query = "&".join(f"{name}={HIDDEN}" if is_secret_name(name) else name + is_ + value for name, is_, value in parts)
    return f"{head}{mark}{host}{tail}{slash}{query}"


def _without_beginnings(text: str, secret: str) -> str:
    """`text` with `***` for truncated forms of `secret`."""
    start = text.find(secret[:BEGINNING])
    while start >= 0:
        same = BEGINNING
        while same < len(secret) and text[start + same : start + same + 1] == secret[same]:
            same += 1
        text = text[:start] + HIDDEN + text[start + same :]
        start = text.find(secret[:BEGINNING], start + len(HIDDEN))
    return text


def _in_tree(node: Any, name: str) -> Iterable[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _in_tree(value, str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _in_tree(value, name)
    elif isinstance(node, str):
        for url in _URL.findall(node):
            yield from url_secrets(url)
        yield from _KEY.findall(node)
        if is_secret_name(name) or (name == "api_key_env" and not is_variable(node)):
            yield node
            yield node.rpartition(" ")[2]  # the key behind "Bearer"


def _echoes(secret: str) -> Iterable[str]:
    yield secret
    yield quote(secret, safe="")
    yield quote_plus(secret)
    yield json.dumps(secret)[1:-1]
    yield repr(secret)[1:-1]
    yield base64.b64encode(secret.encode(errors="surrogatepass")).decode()
