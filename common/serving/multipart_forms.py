"""Requests as multipart forms: their fields and their files, and what tells one from another."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from common.errors import BadSettingError, shorten

MOST_NAMED = 40  # characters of what is refused
MOST_FIELDS = 100
LONGEST_FIELD = 1_000_000  # bytes of what is no file


async def read_form(
    request: Request, files: Sequence[str]
) -> tuple[dict[str, str], dict[str, bytes]]:
    """A form's fields and its files.

    Args:
        files: the names of those that may be there, each once; `name[]` is `name` as well.

    Raises:
        BadSettingError: it is no such form.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadSettingError("send a multipart form (multipart/form-data), with pictures as files")
    fields: dict[str, str] = {}
    found: dict[str, bytes] = {}
    try:
        async with request.form(
            max_files=MOST_FIELDS, max_fields=MOST_FIELDS, max_part_size=LONGEST_FIELD
        ) as form:
            for given, value in form.multi_items():
                name = given.removesuffix("[]")
                said = shorten(name, MOST_NAMED)
                if name in fields or name in found:
                    raise BadSettingError(f"{said}: one is taken, and the form has several")
                if (name in files) != isinstance(value, UploadFile):
                    mend = (
                        "send it as a file, with a filename" if name in files else "it is no file"
                    )
                    raise BadSettingError(f"{said}: {mend}")
                if isinstance(value, UploadFile):
                    found[name] = await value.read()
                else:
                    fields[given] = value
    except HTTPException as error:
        raise BadSettingError(
            f"the form cannot be read ({error.detail.rstrip('.')}): send pictures as files, which "
            f"have a filename; other fields have at most {LONGEST_FIELD} bytes"
        ) from None
    return fields, found


def digest_of(fields: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """A number for a form's content; its bytes have another boundary each time."""
    content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
    return hashlib.sha256(json.dumps([sorted(fields.items()), content]).encode()).hexdigest()
