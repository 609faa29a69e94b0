"""What huggingface_hub raises, as one sentence that says what to do."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from edgeattn.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

    from edgeattn.models.hub import HubId

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# huggingface_hub speaks HTTP with httpx up to its version 1 and with httpx2 since; hf_xet is its
# second way to fetch large files.
_NETWORK_MODULES = ("httpx", "httpx2", "hf_xet")


def refusal(raised: Exception, hub_id: HubId, endpoint: str) -> CheckpointError | None:
    """The sentence for an exception, None where none is known.

    Args:
        raised: by huggingface_hub, or by what it stands on.
        hub_id: what was asked for.
        endpoint: address of the hub.
    """
    from huggingface_hub import errors

    cause = raised.__cause__
    if isinstance(raised, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        # Wrapped around what kept a file from being fetched.
        return refusal(cause, hub_id, endpoint)
    if isinstance(raised, errors.HfHubHTTPError):
        return _answered(raised, hub_id, endpoint)
    if type(raised).__module__.partition(".")[0] in _NETWORK_MODULES:
        return _unreachable(raised, hub_id, endpoint)
    if isinstance(raised, OSError) and raised.errno in _DISK_ERRORS:
        return CheckpointError(
            expected=f"to write {hub_id} into the hub's cache",
            came=f"the disk refused ({raised.strerror or raised})",
            todo="free some space, or let HF_HOME name a folder on another disk",
        )
    if isinstance(raised, (OSError, RuntimeError)):
        return CheckpointError(
            expected=f"whole files of {hub_id} from {endpoint}",
            came=f"the download broke ({_first_line(raised)})",
            todo="run again, complete files are kept",
        )
    return None


def no_hub(endpoint: str) -> CheckpointError:
    """The error for an answer that no hub gives: a login page of the network, a wrong address."""
    return CheckpointError(
        expected=f"a Hugging Face hub at {endpoint}",
        came="something else answers there",
        todo="check HF_ENDPOINT, the proxy, and whether this network wants a login first",
    )


def _answered(raised: HfHubHTTPError, hub_id: HubId, endpoint: str) -> CheckpointError:
    """What the hub answered instead of a file."""
    from huggingface_hub import errors

    status = raised.response.status_code
    if isinstance(raised, errors.GatedRepoError):
        return CheckpointError(
            expected=f"access to {hub_id}",
            came="its owner wants the terms accepted first",
            todo=f"accept them at {endpoint}/{hub_id.repository}, then set HF_TOKEN or run "
            "`hf auth login`",
        )
    if isinstance(raised, errors.RepositoryNotFoundError):
        return CheckpointError(
            expected=f"a folder, a .gguf file or a hub repository named {hub_id}",
            came=f"nothing lies at that path and {endpoint} shows no such repository",
            todo="correct the name; for a private repository set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(raised, errors.RevisionNotFoundError):
        return CheckpointError(
            expected=f"a revision {hub_id.revision} of {hub_id.repository}",
            came="the repository has none of that name",
            todo="name a branch, a tag or a whole commit hash, or leave it out",
        )
    if status in (401, 403):
        return CheckpointError(
            expected=f"access to {hub_id}",
            came=f"{endpoint} refuses it with status {status}",
            todo="set HF_TOKEN to a valid token that may read it, or run `hf auth login`",
        )
    return CheckpointError(
        expected=f"{endpoint} to serve {hub_id}",
        came=f"it answers with status {status}",
        todo="try again later, or use --offline if it was downloaded before",
    )


def _unreachable(raised: Exception, hub_id: HubId, endpoint: str) -> CheckpointError:
    return CheckpointError(
        expected=f"to download {hub_id} from {endpoint}",
        came=f"no folder of that name is here and the connection failed ({_first_line(raised)})",
        todo="run again, complete files are kept; or use --offline if it was downloaded before",
    )


def _first_line(raised: Exception) -> str:
    return str(raised).partition("\n")[0].rstrip(".") or type(raised).__name__
