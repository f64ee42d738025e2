"""Secrets in the addresses of cameras and servers: found by where they stand and what they are called, and hidden."""

from __future__ import annotations

import re

__all__ = ["is_secret_name", "redacted_text"]

_NAME = (
    r"[\w.-]*(?:token|secret|passw|pwd|signature|credential|apikey|auth)[\w.-]*"
    r"|(?:[\w.-]*[-_.])?(?:key|pass|pw|sig|sas|jwt|session)"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_SECRET_ITEM = re.compile(rf"(?<![\w.-])({_NAME})=[^&;\s\"']*", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*):[^\s/]*@")


def is_secret_name(name: str) -> bool:
    """Whether an item of a query of this name holds a secret.

    >>> [name for name in ("token", "X-Amz-Signature", "api_key", "channel", "keyframes") if is_secret_name(name)]
    ['token', 'X-Amz-Signature', 'api_key']
    """
    return _SECRET_NAME.fullmatch(name) is not None


def redacted_text(text: str) -> str:
    """Any text, with each `user:password@` of an address in it hidden, and each `token=value`.

    >>> redacted_text("GET http://ann:pw@h/x?id=4&token=abc: refused")
    'GET http://ann:***@h/x?id=4&token=*** refused'
    """
    return _SECRET_ITEM.sub(r"\1=***", _CREDENTIALS.sub(r"\1:***@", text))
