"""Paths that only mean something on the machine that made a file."""

from __future__ import annotations

import re

_PATH = re.compile(
    r"(?<![\w.~<*}-])/(?:home|Users|root|tmp|work|opt|usr|private|var|mnt|data)/[\w.-]+|\b[A-Z]:\\+[\w.-]+"
)


def machine_paths(text: str) -> list[str]:
    """Absolute paths below a folder of users, systems or temporary files.

    >>> machine_paths("model: /home/ada/base")
    ['/home/ada']
    >>> machine_paths("runs/home/ada, https://example.org/data/x")
    []
    """
    return _PATH.findall(text)
