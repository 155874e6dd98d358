"""The hub that models and data sets are loaded from by their id, and what is known of it without loading."""

import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
OFFLINE = "HF_HUB_OFFLINE"
SECONDS = 5.0  # for the hub to answer


def check_id(option: str, name: str, kind: str) -> None:
    """ValueError for an id that the hub, which does not answer, has never been asked for before.

    The hub's own packages retry for a minute before they say so. Where an earlier run has loaded it, they are
    told not to ask.

    Args:
        option: that gave the name.
        name: of the hub.
        kind: `model` or `dataset`.
    """
    if os.environ.get(OFFLINE, "").upper() not in ("1", "ON", "YES", "TRUE"):
        why = _unreachable()
        if why is None:
            return
        os.environ[OFFLINE] = "1"
    else:
        why = f"{OFFLINE} is set"
    if not any(place.is_dir() for place in _places(name, kind)):
        raise ValueError(
            f"{option}: expected something that is here, got {name!r}: there is no such file or folder, and "
            f"as a hub id it has not been loaded before and the hub cannot be reached ({why})"
        )


def _unreachable() -> str | None:
    """Why the hub does not answer; None if it does."""
    found: list[str | None] = [f"no answer in {SECONDS:.0f} s"]

    def ask() -> None:
        request = urllib.request.Request(_endpoint(), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except (OSError, ValueError) as error:
            found[0] = str(getattr(error, "reason", error))
            return
        found[0] = None

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    asking.start()
    asking.join(SECONDS)
    return found[0]


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _places(name: str, kind: str) -> list[Path]:
    """Where the hub's packages keep what they have loaded."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"
    home = Path(os.environ.get("HF_HOME", home)).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    found = [hub / f"{kind}s--{name.replace('/', '--')}"]
    if kind == "dataset":
        prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
        found.append(prepared / name.replace("/", "___"))
    return found
