"""Tells uv where the user's pip looks for packages, for uv does not read pip's settings.

Standard library only: used by tools/install.py before anything is installed.
"""

import ast
import subprocess
from collections.abc import Iterator

# pip's setting -> uv's option. All are lists of words separated by white space.
_OPTIONS = {
    "find-links": "--find-links",
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "trusted-host": "--allow-insecure-host",
}
_PRECEDENCE = ("global", "install", ":env:")


def uv_options(python: str) -> list[str]:
    """The options that make uv look where the pip of `python` looks."""
    settings = _pip_settings(python)
    options = [
        word
        for name, option in _OPTIONS.items()
        for value in settings.get(name, "").split()
        for word in (option, value)
    ]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    if "extra-index-url" in settings:
        # As pip does: the best version of all indexes, not the first index that has the name.
        options += ["--index-strategy", "unsafe-best-match"]
    return options


def uv_environment(python: str) -> dict[str, str]:
    """The environment variables that give uv pip's certificates and time-out, where set."""
    settings = _pip_settings(python)
    names = {"cert": "SSL_CERT_FILE", "timeout": "UV_HTTP_TIMEOUT", "proxy": "ALL_PROXY"}
    named = {names[key]: value for key, value in settings.items() if key in names}
    if "default-timeout" in settings:
        named.setdefault("UV_HTTP_TIMEOUT", settings["default-timeout"])
    return named


def _pip_settings(python: str) -> dict[str, str]:
    """What `pip config list` shows, the stronger source winning (environment, install, global)."""
    listed = subprocess.run(
        [python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = dict(_parsed(listed.stdout))
    settings: dict[str, str] = {}
    for section in _PRECEDENCE:
        settings |= {name: value for (where, name), value in found.items() if where == section}
    return settings


def _parsed(listing: str) -> Iterator[tuple[tuple[str, str], str]]:
    for line in listing.splitlines():
        key, equals, quoted = line.partition("=")
        section, _, name = key.rpartition(".")
        if equals and section in _PRECEDENCE:
            yield (section, name), str(ast.literal_eval(quoted))
