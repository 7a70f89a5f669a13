"""Which bucket a URL names, and the obstore client for it, with the credentials of the environment.

s3, s3a                    S3, and by AWS_ENDPOINT_URL what speaks its protocol, such as MinIO and R2
gs, gcs                    Google Cloud Storage
az, azure, abfs, abfss     Azure: abfs://container@account.dfs.core.windows.net/..., or abfs://container/... and
                           the account from the environment
memory                     this process's memory
"""

from __future__ import annotations

import atexit
import os
import re
import time
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

S3, GCS, AZURE, MEMORY = ("s3", "s3a"), ("gs", "gcs"), ("az", "azure", "abfs", "abfss"), ("memory",)

SCHEMES = (*S3, *GCS, *AZURE, *MEMORY)

_BUCKET = re.compile(r"[A-Za-z0-9._-]*")

_ENDPOINT = re.compile(r"https?://[^/\s@]+(/|$)")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")

_COLLAPSED = re.compile(rf"(?:{'|'.join((*SCHEMES, 'file'))}):/(?!/)", re.IGNORECASE)

_memory: dict[str, ObjectStore] = {}  # by URL: one process has one


def scheme_of(location: str) -> str | None:
    """Return the scheme of a URL, in lower case; None if it is a path."""
    found = _URL.match(location)
    return found[1].lower() if found else None


def refuse_collapsed(location: str) -> None:
    """Raise `ArgumentError` for a URL that went through `pathlib.Path`, which leaves one slash of two."""
    found = _COLLAPSED.match(location)
    if found:
        raise ArgumentError("checkpoint_id", f"{location!r} was a URL before pathlib took a slash from it: pass a str")


def bucket_of(url: str) -> str:
    """Return the part of a URL that names the bucket: what a client is made for.

    Raises:
        ArgumentError: it has what no bucket's name has, such as a user or a port.
    """
    scheme, _, rest = url.partition("://")
    scheme, bucket = scheme.lower(), rest.partition("/")[0]
    container, at, account = bucket.rpartition("@")
    if (at and (scheme not in AZURE or ":" in container)) or not _BUCKET.fullmatch(account):
        raise ArgumentError("checkpoint_id", f"a URL of {scheme}:// has no bucket's name before its path")
    return f"{scheme}://{bucket}"


def check_url(url: str) -> str:
    """Return a URL without slashes at its end.

    Raises:
        ArgumentError: it is none.
    """
    if scheme_of(url) is None:
        raise ArgumentError("url", f"must be a URL such as s3://bucket/prefix, got {url!r}")
    bucket = bucket_of(url)
    return "/".join(filter(None, (bucket, _path(url[len(bucket) :], url))))


def path_below(base: str, checkpoint_id: str) -> str:
    """Return the path below `base` that an id names, which is a URL or such a path.

    Raises:
        ArgumentError: it is elsewhere, or no path that an object can have.
    """
    scheme = scheme_of(checkpoint_id)
    if scheme is None:
        refuse_collapsed(checkpoint_id)
        return _path(checkpoint_id, checkpoint_id)
    bucket_of(checkpoint_id)  # which may have a password in it: refused, and not printed
    given = f"{scheme}{checkpoint_id[len(scheme) :]}"
    if given != base and not given.startswith(f"{base}/"):
        raise ArgumentError("checkpoint_id", f"{checkpoint_id!r} is not in {base}, where this storage is")
    return _path(given[len(base) :], checkpoint_id)


def _path(path: str, given: str) -> str:
    names = [name for name in path.split("/") if name]
    if any(name in (".", "..") for name in names):
        raise ArgumentError("checkpoint_id", f'{given!r} has a "." or ".." in it, which no object\'s name can have')
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ArgumentError("checkpoint_id", f"{given!r} is not UTF-8, as an object's name must be") from None
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        raise ArgumentError("checkpoint_id", f"{given!r} has a control character in it")
    return "/".join(names)


def url_of(store: ObjectStore) -> str:
    """Return the URL of a store of obstore.

    Raises:
        ArgumentError: it has none, or it is no such store.
    """
    obstore = import_obstore("ObjectStorage")
    if not isinstance(store, obstore.store.ObjectStoreMethods):
        raise ArgumentError("store", f"must be a store of obstore, got {store!r}")
    config: dict[str, Any] = getattr(store, "config", {})
    prefix = str(getattr(store, "prefix", None) or "")
    if isinstance(store, obstore.store.S3Store):
        root = f"s3://{config['bucket']}"
    elif isinstance(store, obstore.store.GCSStore):
        root = f"gs://{config['bucket']}"
    elif isinstance(store, obstore.store.AzureStore):
        root = f"az://{config['container_name']}"
    elif isinstance(store, obstore.store.MemoryStore):
        root = "memory://"
    else:
        raise ArgumentError("url", f"is needed for {store!r}: what to call it in ids and messages")
    return "/".join(filter(None, (root, prefix)))


def keeps_buffers(store: ObjectStore) -> bool:
    """Whether a store goes on using the memory that it was given, when the PUT has ended."""
    return bool(isinstance(store, import_obstore("ObjectStorage").store.MemoryStore))


def import_obstore(what: str) -> Any:
    """Return obstore.

    Raises:
        ArgumentError: it is not installed; says how to install it.
    """
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        problem = f"{what} needs obstore: pip install 'aiodcp[object]'"
        raise ArgumentError("checkpoint_id" if "://" in what else "storage", problem) from error
    _let_threads_settle()
    return obstore


@cache
def _let_threads_settle() -> None:
    """Wait a moment when the interpreter ends, so that obstore's threads have let go of Python's objects by then.

    A process that ends just after a request aborts else: 12 of 40 that listed and read two objects with obstore alone,
    none of 40 that waited for 20 ms.
    """
    atexit.register(time.sleep, 0.05)


def make_store(url: str) -> tuple[ObjectStore, str]:
    """Return a client for the bucket of a URL, and that bucket's URL.

    Raises:
        ArgumentError: there is none for this URL; says why.
    """
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in (*SCHEMES, "file"))
        raise ArgumentError("checkpoint_id", f"{url!r} is of no scheme that is known: {known}")
    obstore = import_obstore(f"{scheme}://")
    base = bucket_of(url)
    bucket = base.partition("://")[2]
    if scheme in MEMORY:
        return _memory.setdefault(base, obstore.store.MemoryStore()), base
    if not bucket:
        raise ArgumentError("checkpoint_id", f"{url!r} names no bucket")
    make = partial(_make_s3 if scheme in S3 else _make_gcs if scheme in GCS else _make_azure, bucket)
    try:
        return make(), base
    except obstore.exceptions.BaseError as error:
        said = str(error).split("\n")[0]
        raise ArgumentError("checkpoint_id", f"{url!r}: {said}") from None


def _client_options(*, allow_http: bool) -> ClientConfig:
    # Time-outs are the storage's own, which knows how much it sends.
    options: ClientConfig = {"timeout": "1h", "connect_timeout": "5s"}
    if allow_http:
        options["allow_http"] = True
    return options


_NO_RETRY: RetryConfig = {"max_retries": 0}  # they are made above, and reported


def _make_s3(bucket: str) -> ObjectStore:
    from obstore.store import S3Store

    endpoint = next(filter(None, map(os.environ.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))), "")
    if endpoint and not _ENDPOINT.match(endpoint):
        raise ArgumentError("checkpoint_id", "AWS_ENDPOINT_URL must begin with http:// or https://, and a host")
    options = _client_options(allow_http=endpoint.startswith("http://"))
    config: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if not endpoint.startswith("http://"):
        # TLS guards the bytes on their way, and the CRC32s of items from one end to the other: a SHA256 of every object
        # would cost a core for every 1.5 GB/s. AWS's own clients do not sign payloads over TLS either.
        config["unsigned_payload"] = True
    return S3Store(
        bucket,
        client_options=options,
        retry_config=_NO_RETRY,
        credential_provider=_profile(),
        **config,
    )


def _profile() -> Any:
    """Return what reads credentials from AWS's configuration files, if those are where they are.

    `object_store` knows environment variables, web identities, containers and instances; profiles boto3 knows.
    """
    environment = os.environ
    first = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if any(environment.get(name) for name in (*first, "AWS_CONTAINER_CREDENTIALS_FULL_URI")):
        return None
    file = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    if not environment.get("AWS_PROFILE") and not file.is_file():
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        if not environment.get("AWS_PROFILE"):
            return None
        problem = "AWS_PROFILE is set, and profiles are read by boto3, which is not installed: pip install boto3"
        raise ArgumentError("checkpoint_id", problem) from error
    try:
        return Boto3CredentialProvider()
    except Exception as error:
        raise ArgumentError("checkpoint_id", f"no credentials in AWS's configuration files: {error}") from error


def _make_gcs(bucket: str) -> ObjectStore:
    from obstore.store import GCSStore

    return GCSStore(bucket, client_options=_client_options(allow_http=False), retry_config=_NO_RETRY)


def _make_azure(bucket: str) -> ObjectStore:
    from obstore.store import AzureStore

    container, _, host = bucket.partition("@")
    config: dict[str, Any] = {"account_name": host.split(".")[0]} if host else {}
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT") or ""
    options = _client_options(allow_http=endpoint.startswith("http://"))
    if endpoint:
        config["endpoint"] = endpoint
    return AzureStore(container, client_options=options, retry_config=_NO_RETRY, **config)
