"""Files of the Hugging Face hub, from its cache where they are there, else from the network."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import UnfitEnvironmentError, in_one_line

OFFLINE = "HF_HUB_OFFLINE"  # read by the hub's own library when that is imported
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
FILE_IN_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)/([^:]+\.(?i:safetensors))")


def find_snapshot(
    repository: str,
    revision: str | None,
    said: str,
    tries: Sequence[Sequence[str]],
    is_complete: Callable[[Path], bool],
) -> Path:
    """The folder of a repository with the files that are needed.

    Args:
        said: the flag and its value, for the error message.
        tries: patterns of files to download; the next ones only where those before did not
            make the folder complete.

    Raises:
        UnfitEnvironmentError: the hub cannot be reached and the files are not in its cache.
    """
    with _reaching_the_hub(said):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        cached: Path | None = None
        try:
            cached = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except IncompleteSnapshotError as error:
            cached = Path(error.snapshot_path)  # by the hub's list; what we need may be there
        except LocalEntryNotFoundError:
            pass
        if cached is not None and is_complete(cached):
            return cached
        for patterns in tries:
            folder = Path(
                snapshot_download(repository, revision=revision, allow_patterns=[*patterns])
            )
            if is_complete(folder):
                break
        return folder


def find_file(repository: str, name: str, revision: str | None, said: str) -> Path:
    """One file of a repository. Raises as `find_snapshot`."""
    with _reaching_the_hub(said):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            path = hf_hub_download(repository, name, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            path = hf_hub_download(repository, name, revision=revision)
        return Path(path)


@contextmanager
def _reaching_the_hub(said: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if os.environ.get(OFFLINE) == "1":
            raise UnfitEnvironmentError(
                f"{said} is not on this machine, and --offline (or {OFFLINE}=1) forbids to fetch "
                "it: name a folder, or fetch it once without"
            ) from None
        raise UnfitEnvironmentError(
            f"{said} is not on this machine and cannot be had from the hub "
            f"({in_one_line(error)}): check the name and the network"
        ) from None
