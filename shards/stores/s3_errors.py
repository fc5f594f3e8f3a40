"""What went wrong with a request to S3: whether it may pass, and what to tell the user.

Of what a server or boto3 says, only the code enters an error: other text may quote a signed request.
"""

from __future__ import annotations

import re

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from shards.stores.blobs import ChangedObject
from shards.support.errors import EnvironmentFault

BUSY_CODES = frozenset(
    {
        *("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "429"),
        *("TooManyRequests", "TooManyRequestsException", "ServiceUnavailable", "InternalError"),
        *("RequestTimeout", "RequestTimeoutException", "OperationAborted", "ConditionalRequestConflict"),
        *("BadDigest", "XAmzContentChecksumMismatch", "IncompleteBody"),  # an upload that was damaged
    }
)
EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"})
IDENTITY_CODES = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed"})
REGION_CODES = frozenset({"PermanentRedirect", "301", "IllegalLocationConstraintException"})
_BREAKING = (ConnectionError, HTTPClientError, IncompleteReadError)
_CODE_PATTERN = re.compile(r"[A-Za-z0-9.]{1,64}")


class Refused(Exception):
    """The server's answer is one that the caller has to make sense of: 404, 412 or 416."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class DamagedObject(ChangedObject):
    """The bytes that come do not have the checksum that comes with them, however often they are read."""


class DamagedBody(Exception):
    """The body of one answer is not whole, or not what its checksum says."""


def error_code(error: Exception) -> str:
    """Take the server's error code, "" where there is none."""
    code = str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""
    return code if _CODE_PATTERN.fullmatch(code) else ""


def _status(error: Exception) -> int:
    if not isinstance(error, ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def may_pass(error: Exception) -> bool:
    """Whether the same request may do better a little later."""
    if isinstance(error, ClientError):
        return error_code(error) in BUSY_CODES or (_status(error) >= 500 and _status(error) != 501)
    passing = (*_BREAKING, FlexibleChecksumError, DamagedBody, ResponseParserError)
    return isinstance(error, passing) and not isinstance(error, SSLError)


def explain(error: Exception, uri: str, attempts: int) -> Exception:
    """Make the error to raise in the place of boto3's.

    Args:
        error: boto3's, or `DamagedBody`.
        uri: the object or bucket that the request was about.
        attempts: how often it was tried.
    """
    if isinstance(error, ClientError):
        return _explain_answer(error_code(error), _status(error), uri, attempts)
    if isinstance(error, FlexibleChecksumError | DamagedBody):
        return DamagedObject(
            f"came with wrong bytes {attempts} times",
            where=uri,
            fix="write the object again; if all fail, see what lies between this machine and the store",
        )
    return _explain_connection(error, uri, attempts)


def _explain_answer(code: str, status: int, uri: str, attempts: int) -> Exception:
    if code == "NoSuchBucket":
        what, fix = "there is no such bucket", "correct its name, or AWS_ENDPOINT_URL, or create it"
    elif status in (404, 412, 416):
        return Refused(status)
    elif code in EXPIRED_CODES:
        what, fix = (
            "the credentials have expired or are not valid",
            "renew them (aws sso login, or a new token), then run again",
        )
    elif code in IDENTITY_CODES:
        what = f"the credentials are refused ({code})"
        fix = "correct the access key, its secret or the region, where boto3 finds them"
    elif code in REGION_CODES:
        what, fix = "the bucket is in another region", "set AWS_DEFAULT_REGION to the bucket's region"
    elif code == "RequestTimeTooSkewed":
        what, fix = "the clock of this machine is wrong", "set it"
    elif status == 403:
        what = f"access is denied ({code})"
        fix = "allow s3:GetObject and s3:ListBucket, to write also s3:PutObject and s3:DeleteObject"
    elif status == 501:
        what = f"the server does not know this kind of request ({code})"
        fix = "use one that knows conditional writes: S3, or a recent MinIO, Ceph or SeaweedFS"
    elif status >= 500 or code in BUSY_CODES:
        what = f"the server is busy or failing ({status} {code}), {attempts} times"
        fix = "run the same command again later, or with fewer jobs"
    else:
        what, fix = f"the server refuses ({status} {code})", "see that its version and settings allow it"
    return EnvironmentFault(what, where=uri, fix=fix)


def _explain_connection(error: Exception, uri: str, attempts: int) -> EnvironmentFault:
    endpoint = "see that the network is up and AWS_ENDPOINT_URL is right, then run the same command again"
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        what = "there are no credentials for S3"
        fix = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role"
    elif isinstance(error, ProfileNotFound):
        what, fix = "the profile of AWS_PROFILE is not configured", "correct its name"
    elif isinstance(error, SSLError):
        what, fix = "the server's certificate is refused", "set AWS_CA_BUNDLE to your authority's certificate"
    elif isinstance(error, ConnectTimeoutError):
        what, fix = f"no connection in time, {attempts} times", endpoint
    elif isinstance(error, ReadTimeoutError):
        what, fix = f"no answer in time, {attempts} times", endpoint
    elif isinstance(error, _BREAKING):
        what = f"the connection fails or breaks ({type(error).__name__}), {attempts} times"
        fix = endpoint
    else:
        what, fix = f"boto3 cannot make the request ({type(error).__name__})", "see its configuration"
    return EnvironmentFault(what, where=uri, fix=fix)
