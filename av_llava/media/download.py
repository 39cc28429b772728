"""Fetching a medium over HTTP(S) to a local file.

Contract: standard library only; bounded in bytes and in time while the data flows; redirects
lead to http and https only. Errors are `MediaError` and name the address.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

from av_llava.errors import MediaError
from av_llava.media.limits import Limits

_BLOCK = 1 << 18
_SILENCE_S = 20.0  # longest wait for the next bytes


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects between web addresses; the standard handler would also follow ftp."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise MediaError(
                f"{req.full_url} redirects to {newurl!r}, which is neither http nor https."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, path: Path, limits: Limits) -> int:
    """Write what an HTTP(S) address serves to ``path`` and return the number of bytes.

    Raises:
        MediaError: the server cannot be reached, answers with an error, sends more than
            ``max_download_bytes``, takes longer than ``max_download_s``, or stops half way.
    """
    end = time.monotonic() + limits.max_download_s
    # Only these handlers: no file, ftp or data addresses however they are reached.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        _WebRedirects,
    ):
        opener.add_handler(handler())
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "av-llava"})
        silence_s = min(_SILENCE_S, limits.max_download_s)
        with opener.open(request, timeout=silence_s) as response:
            declared = response.headers.get("Content-Length")
            size = int(declared) if declared and declared.isdigit() else None
            if size is not None:
                limits.check("max_download_bytes", size, url, "the size that the server declares")
            got = _copy(response, path, url, limits, end)
    except urllib.error.HTTPError as error:
        raise MediaError(f"{url}: the server answers {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MediaError(f"{url} cannot be fetched: {reason}.") from error
    if size is not None and got < size:
        raise MediaError(f"{url}: the server stopped after {got:,} of {size:,} bytes.")
    return got


def _copy(
    response: http.client.HTTPResponse, path: Path, url: str, limits: Limits, end: float
) -> int:
    """Write the answer's body block by block, checking size and time after each."""
    got = 0
    with path.open("wb") as out:
        # read1 returns what has arrived, so that a slow server cannot hold the clock check off
        while block := response.read1(_BLOCK):
            got += len(block)
            limits.check("max_download_bytes", got, url, "the size sent so far")
            if time.monotonic() > end:
                raise MediaError(
                    f"{url}: fetching took longer than {limits.max_download_s:g} s "
                    f"(max_download_s); {got:,} bytes had come."
                )
            out.write(block)
    return got
