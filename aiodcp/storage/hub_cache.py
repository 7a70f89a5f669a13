"""`hf://organisation/model@revision`: what Hugging Face's hub client has downloaded. No torch here."""

from __future__ import annotations

from ..errors import ArgumentError

SCHEME = "hf"

PREFIX = f"{SCHEME}://"


def cached_snapshot(url: str) -> str:
    """Return the directory in the hub's cache that a URL means; nothing is downloaded.

    Raises:
        ArgumentError: it is none, is not in the cache, or the hub's client is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        problem = f"{url} needs Hugging Face's hub client: pip install huggingface_hub"
        raise ArgumentError("checkpoint_id", problem) from error
    repository, _, revision = url[len(PREFIX) :].strip("/").partition("@")
    try:
        found: str = snapshot_download(repository, revision=revision or None, local_files_only=True)
    except LocalEntryNotFoundError as error:
        at = f" --revision {revision}" if revision else ""
        problem = f"{url} is not in the hub's cache: download it first, with `hf download {repository}{at}`"
        raise ArgumentError("checkpoint_id", problem) from error
    except (HFValidationError, HfHubHTTPError, ValueError) as error:
        raise ArgumentError("checkpoint_id", f"{url} names no repository of the hub: {error}") from error
    return found
