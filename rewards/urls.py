"""What clients of servers share: reading a URL, the key that goes with it."""

import ipaddress
import os
import warnings
from urllib.parse import urlsplit


def checked_url(url: str, default_path: str = "") -> str:
    """`url` without a slash at its end, and with `default_path` if it has no path.

    Raises:
        ValueError: no http or https URL with a host.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"url: got {url!r}, expected 'http://host:port', without query or password")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or default_path}"


def is_loopback(host: str) -> bool:
    """Whether a host name, address or URL is this machine's own; a name other than localhost never counts."""
    host = (urlsplit(host).hostname or "") if "://" in host else host
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def warn_of_open_token(url: str, sent: bool) -> None:
    """Say that a token goes to another machine in the clear, over http, if it does."""
    if sent and url.startswith("http://") and not is_loopback(url):
        warnings.warn(f"url: {url} is plain http to another machine: the token goes there in the clear", stacklevel=3)


def bearer(key_variable: str | None) -> dict[str, str]:
    """The header with the key that this environment variable holds; none without a variable.

    Raises:
        ValueError: the variable is not set.
    """
    if key_variable is None:
        return {}
    if not os.environ.get(key_variable):
        raise ValueError(f"key_variable: got {key_variable!r}, which is not set in the environment, or empty")
    return {"authorization": f"Bearer {os.environ[key_variable]}"}
