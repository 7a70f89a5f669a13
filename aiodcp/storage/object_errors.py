"""From what a store refuses to an `OSError` with the store's own words, and never with a credential.

`object_store`, which obstore wraps, puts all it knows into one text: the request, the status, the server's answer, and
its own structures behind "Debug source:". A signature that does not match is answered with the access key in it, and
an Azure URL may carry a token: only the code and the message of an answer, and URLs without a query, are passed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import UnsupportedOperation

_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z][A-Za-z ]*[A-Za-z]))?")

_CODE = re.compile(r"<Code>([^<]{1,200})</Code>")

_MESSAGE = re.compile(r"<Message>([^<]{1,1000})")

_JSON_MESSAGE = re.compile(r'"message": *"([^"]{1,1000})"')  # GCS

_QUERY = re.compile(r"\?[^\s,)]*")

_USER = re.compile(r"://[^/\s@]+@")

_SECRET = re.compile(
    r"(?i)(AKIA|ASIA)[A-Z0-9]{12,}|\b(sig|signature|x-amz-[a-z-]*|AWSAccessKeyId|AccountKey|SharedAccessSignature"
    r"|authorization|bearer)\b[=: ]\s*\S+"
)

_BEFORE_DEBUG = re.compile(r"\n+Debug source:.*", re.DOTALL)

_REQUEST = re.compile(r"Generic \w+ error: |Error performing (?:list request: )?|[A-Z]+ \S+ in \S+ - ")

_ENDPOINT = re.compile(r"performing \w+ (https?://[^/\s?]+)")

_METADATA_SERVICE = re.compile(r"/latest/(api/token|meta-data/)|/computeMetadata/|/metadata/identity/")

_AGAIN_STATUS = {408, 425, 429, 500, 502, 503, 504}

_AGAIN_CODES = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ServerBusy"}

_LOST = ("error sending request", "error decoding response body", "error reading a body", "connection")


@contextmanager
def object_errors(verb: str, url: str) -> Iterator[None]:
    """Make an `OSError` of what a store raises within the block, that names the request.

    Args:
        verb: of the request, such as "PUT".
        url: of the bucket and key.

    Raises:
        FileNotFoundError: there is no such object, though the bucket is there.
        FileExistsError: there is one, and it was to be made.
        PermissionError: the store does not allow it.
        ConnectionError, TimeoutError: the same request may well succeed a little later.
        UnsupportedOperation: the object, or the store, has no such range.
        OSError: all else.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError, ValueError) as error:
        raise _translated(verb, url, error) from None  # its text may hold credentials


def _translated(verb: str, url: str, error: Exception) -> OSError:
    from obstore.exceptions import (
        AlreadyExistsError,
        InvalidPathError,
        NotSupportedError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    text = str(error)
    code = found[1] if (found := _CODE.search(text)) else ""
    status = int(found[1]) if (found := _STATUS.search(text)) else 0
    if _METADATA_SERVICE.search(text):
        said = f"no credentials: none in the environment, and the instance's metadata service gave none: {text}"
        return PermissionError(f"{verb} {url}: {_cleaned(_BEFORE_DEBUG.sub('', said))}")
    what = f"{verb} {url}: {_words(text, status, code)}"
    if isinstance(error, AlreadyExistsError | PreconditionError):
        return FileExistsError(what)
    if code in ("NoSuchBucket", "ContainerNotFound") or "The specified bucket does not exist" in text:
        return OSError(f"{what}; there is no such bucket, or not in this region or at this endpoint")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(what)
    if isinstance(error, NotSupportedError) or status == 416 or "non-partial response" in text:
        return UnsupportedOperation(what)
    if isinstance(error, InvalidPathError | ValueError):
        return OSError(what)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
        return PermissionError(what)
    if status in _AGAIN_STATUS or code in _AGAIN_CODES:
        return ConnectionError(what)
    if not status and ("operation timed out" in text or "kind: Timeout" in text):
        return TimeoutError(what)
    if not status and ("HTTP error" in text or any(each in text for each in _LOST)):
        return ConnectionError(what)
    return OSError(what)


def _words(text: str, status: int, code: str) -> str:
    """Return what the store said, in one line."""
    message = found[1] if (found := _MESSAGE.search(text) or _JSON_MESSAGE.search(text)) else ""
    if status:
        phrase = found[2] if (found := _STATUS.search(text)) and found[2] else ""
        said = ": ".join(filter(None, (code, message.strip())))
        short = " ".join(filter(None, (str(status), phrase)))
        return _cleaned(f"{short} ({said})" if said else short)
    reasons = re.findall(r'message: "([^"]+)"', text) + re.findall(r'"((?:tcp|dns|tls)[^"]*error[^"]*)"', text)
    first = _REQUEST.sub("", _BEFORE_DEBUG.sub("", text)).strip()
    endpoint = f" at {found[1]}" if (found := _ENDPOINT.search(text)) else ""
    return _cleaned(": ".join([f"{first}{endpoint}", *dict.fromkeys(reasons)]))


def _cleaned(text: str) -> str:
    return _SECRET.sub("(removed)", _USER.sub("://", _QUERY.sub("", " ".join(text.split()))))[:2000]
