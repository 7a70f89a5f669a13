"""From a store's words to an `OSError`: the shapes in which obstore and the stores put them."""

from __future__ import annotations

from io import UnsupportedOperation

import pytest
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from aiodcp.storage.object_errors import object_errors
from aiodcp.storage.retry import is_transient

S3_403 = """The operation lacked valid permission for path k: Error performing PUT http://h:1/b/k in 1ms - \
Server returned non-2xx status code: 403 Forbidden: <?xml version="1.0"?><Error><Code>SignatureDoesNotMatch</Code><Message>The request \
signature we calculated does not match</Message><AWSAccessKeyId>AKIAIOSFODNN7EXAMPLE</AWSAccessKeyId><StringToSign>AWS4\
-HMAC-SHA256 AKIAIOSFODNN7EXAMPLE/2026</StringToSign></Error>

Debug source:
PermissionDenied {"AKIAIOSFODNN7EXAMPLE"}"""  # noqa: E501

AZURE_SAS = """Generic MicrosoftAzure error: Error performing PUT https://a.blob.core.windows.net/c/k?sv=2021&sig=\
SECRETsig%3D in 3ms - Server returned non-2xx status code: 503 Service Unavailable: <Error><Code>ServerBusy</Code><Message>Busy\
</Message></Error>"""  # noqa: E501

GCS_JSON = """Generic GCS error: Error performing PUT https://storage.googleapis.com/b/k in 3ms - Server \
returned non-2xx status code: 429 Too Many Requests: {"error": {"code": 429, "message": "The rate of change is too high"}}"""  # noqa: E501

CONNECT = """Generic S3 error: Error performing GET http://me:hunter2@127.0.0.1:9/b/k in 509us - HTTP error: error sending request

Debug source:
Generic { inner: Http( HttpError { kind: Connect, source: ConnectError( "tcp connect error", Os { code: 111, message: \
"Connection refused" } ) } ) }"""  # noqa: E501

REDACTED = "Generic MicrosoftAzure error: Error performing PUT REDACTED in 211us - HTTP error: error sending request"

TIMEOUT = """Generic S3 error: Error performing GET http://127.0.0.1:9/b/k in 30s - HTTP error: error sending request

Debug source:
Generic { inner: Http( HttpError { kind: Timeout, source: reqwest::Error { kind: Request, source: TimedOut } } ) }"""


@pytest.mark.parametrize(
    ("error", "kind", "transient", "words"),
    [
        (PermissionDeniedError(S3_403), PermissionError, False, "403 Forbidden (SignatureDoesNotMatch: The request"),
        (UnauthenticatedError("no token"), PermissionError, False, "no token"),
        (GenericError(AZURE_SAS), ConnectionError, True, "503 Service Unavailable (ServerBusy: Busy)"),
        (GenericError(GCS_JSON), ConnectionError, True, "429 Too Many Requests (The rate of change is too high)"),
        (GenericError(CONNECT), ConnectionError, True, "at http://127.0.0.1:9: Connection refused: tcp connect error"),
        (GenericError(TIMEOUT), TimeoutError, True, "error sending request at http://127.0.0.1:9"),
        (GenericError(REDACTED), ConnectionError, True, "s3://b/k: HTTP error: error sending request"),
        (AlreadyExistsError("there is one"), FileExistsError, False, "there is one"),
        (PreconditionError("changed"), FileExistsError, False, "changed"),
        (NotSupportedError("no suffix"), UnsupportedOperation, False, "no suffix"),
        (FileNotFoundError("Object at location k not found: x"), FileNotFoundError, False, "not found"),
        (ValueError("Could not parse path"), OSError, False, "Could not parse path"),
        (GenericError("Generic S3 error: something else"), OSError, False, "something else"),
    ],
)
def test_what_a_store_raises_is_an_oserror_that_names_the_request(
    error: Exception, kind: type[OSError], transient: bool, words: str
) -> None:
    with pytest.raises(kind) as caught, object_errors("PUT", "s3://b/k"):
        raise error
    text = str(caught.value)
    assert text.startswith("PUT s3://b/k: ")
    assert words in text
    assert is_transient(caught.value) is transient
    for secret in ("AKIA", "SECRET", "hunter2", "sig=", "Debug source", "\n"):
        assert secret not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_what_is_no_error_of_a_store_goes_through() -> None:
    with pytest.raises(KeyError), object_errors("PUT", "s3://b/k"):
        raise KeyError
    assert issubclass(GenericError, BaseError)
