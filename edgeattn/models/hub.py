"""MODEL by its name on the Hugging Face hub: `owner/name[@revision]`, fetched into the hub's cache.

Only what edgeattn reads is fetched, and never a pickle. Nothing falls back: a hub that cannot be
reached is an error, and the cache alone is used when `--offline` (or HF_HUB_OFFLINE) asks for it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgeattn import __version__
from edgeattn.errors import CheckpointError, EdgeattnError, MissingDependencyError
from edgeattn.models.checkpoint import (
    ENCODER_FILES,
    TEXT_FILES,
    Checkpoint,
    checkpoint_name,
    open_checkpoint,
    read_shape,
)
from edgeattn.models.hub_errors import no_hub, refusal
from edgeattn.models.hub_progress import Progress, byte_counter
from edgeattn.shape import ModelShape

# The hub's own rules: letters, digits, "_", "-" and "."; the last two never at an end of a name.
_NAME = r"\w(?:[\w.-]{0,94}\w)?"
_ID = re.compile(rf"(?P<repository>{_NAME}/{_NAME})(?:@(?P<revision>\w[\w./+-]*))?", re.ASCII)
_BRANCH = "main"  # what the hub shows where no revision is named
_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SMALL = (_CONFIG, "generation_config.json", *TEXT_FILES, *ENCODER_FILES)
_TIMEOUT_S = 20.0  # for the list of files; huggingface_hub has its own for files


@dataclass(frozen=True)
class HubId:
    """The name of a repository on the hub.

    Attributes:
        repository: owner/name.
        revision: a branch, a tag or a commit; None is the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def name(self) -> str:
        """What the model is called without its owner."""
        return self.repository.partition("/")[2]


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit, as far as the cache holds it.

    Attributes:
        hub_id: what was asked for.
        path: folder in the cache.
        sizes: bytes of the files in the repository's top folder and of `ENCODER_FILES`; offline of
            those in the cache's top folder.
    """

    hub_id: HubId
    path: Path
    sizes: Mapping[str, int] = field(compare=False, repr=False)

    @property
    def commit(self) -> str:
        """The commit the revision stood for; the cache names its folders so."""
        return self.path.name

    def identity(self) -> dict[str, str]:
        """What the manifest says of where the checkpoint came from."""
        return {"hub_id": self.hub_id.repository, "commit": self.commit}


def find_hub_id(model: str | Path) -> HubId | None:
    """The hub id that MODEL is, None where it is a path.

    What lies on this disk wins, and a `Path`, `./x`, `/x` or `x.gguf` is never a hub id.
    """
    if isinstance(model, Path) or model.endswith(".gguf") or os.path.lexists(model):
        return None
    match = _ID.fullmatch(model)
    if match is None or "--" in match["repository"] or ".." in model:
        return None
    return None if match["repository"].endswith(".git") else HubId(**match.groupdict())


def model_name(model: str | Path) -> str:
    """The short name of MODEL, whatever kind it is."""
    hub_id = find_hub_id(model)
    return hub_id.name if hub_id else checkpoint_name(Path(model))


@dataclass(frozen=True)
class Outline:
    """What is known of MODEL without its weights.

    Attributes:
        shape: the architecture.
        text_bytes: of the tokenizer's files.
    """

    shape: ModelShape
    text_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Outline:
        """That of an open checkpoint."""
        return cls(checkpoint.shape, sum(map(len, checkpoint.text.values())))


def read_outline(model: str | Path, *, offline: bool = False) -> Outline:
    """Looks at MODEL without torch; of a hub id only config.json is fetched."""
    hub_id = find_hub_id(model)
    if hub_id is None and not os.path.isdir(model):  # any text may be a name
        return Outline.of(open_checkpoint(Path(model)))
    if hub_id is None:
        path, sizes = Path(model), _sizes(Path(model))
    else:
        snapshot = fetch_config(hub_id, offline=offline)
        path, sizes = snapshot.path, dict(snapshot.sizes)
    return Outline(read_shape(path), sum(sizes.get(name, 0) for name in TEXT_FILES))


def open_model(
    model: str | Path, *, offline: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Opens MODEL: a Hugging Face directory, a `.gguf` file or a hub id, which is fetched first.

    Args:
        model: see `find_hub_id` for which is which.
        offline: a hub id is looked up in the cache alone.
        progress: called with (bytes fetched, bytes to fetch).

    Raises:
        CheckpointError: nothing is there, it cannot be fetched, or it does not add up.
        MissingDependencyError: it is a hub id, and huggingface_hub is not installed.
    """
    hub_id = find_hub_id(model)
    if hub_id is None:
        return open_checkpoint(Path(model))
    snapshot = fetch_checkpoint(hub_id, offline=offline, progress=progress)
    opened = open_checkpoint(snapshot.path)
    identity = {**opened.identity, **snapshot.identity()}
    return replace(opened, name=hub_id.name, identity=identity)


def fetch_config(hub_id: HubId, *, offline: bool = False) -> Snapshot:
    """Makes sure that the cache holds config.json, and what lies beside an encoder's."""
    with _refusals(hub_id):
        if _is_offline(offline):
            return _cached(hub_id)
        snapshot = _resolve(hub_id)
        _download(snapshot, [name for name in ENCODER_FILES if name in snapshot.sizes], None)
        return snapshot


def fetch_checkpoint(
    hub_id: HubId, *, offline: bool = False, progress: Progress | None = None
) -> Snapshot:
    """Makes sure that the cache holds everything edgeattn reads.

    Each file in the cache is whole, so that an interrupted download goes on with the next file.
    """
    with _refusals(hub_id):
        if _is_offline(offline):
            return _cached_whole(hub_id)
        snapshot = _resolve(hub_id)
        names = [name for name in _SMALL if name in snapshot.sizes]
        _download(snapshot, names + _weights(snapshot), progress)
        return snapshot


def _resolve(hub_id: HubId) -> Snapshot:
    """The commit a revision stands for, with its config.json.

    config.json is asked for by the revision: so the cache learns which commit that is.
    """
    commit, sizes = _list(hub_id.repository, hub_id.revision or _BRANCH)
    if _CONFIG not in sizes:
        raise CheckpointError(
            expected=f"a {_CONFIG} in {hub_id}",
            came="the repository holds none",
            todo="name a repository with a transformers checkpoint",
        )
    folder = _get(hub_id, _CONFIG, hub_id.revision or _BRANCH).parent
    if folder.name != commit:  # somebody pushed between the two questions
        _, sizes = _list(hub_id.repository, folder.name)
    return Snapshot(hub_id, folder, sizes)


def _list(repository: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit of a revision, and sizes of the files in its top folder and of an encoder's."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="edgeattn", library_version=__version__)
    try:
        info = api.model_info(
            repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    except (ValueError, TypeError, KeyError) as error:
        raise no_hub(api.endpoint) from error
    if info.sha is None or info.siblings is None:
        raise no_hub(api.endpoint)
    sizes = {s.rfilename: s.size or 0 for s in info.siblings}
    return info.sha, {n: size for n, size in sizes.items() if "/" not in n or n in ENCODER_FILES}


def _weights(snapshot: Snapshot) -> list[str]:
    """Names of the files with weights, the index among them.

    Others are never fetched: many repositories hold the same weights in several files.
    """
    if _SINGLE in snapshot.sizes:
        return [_SINGLE]
    if _INDEX not in snapshot.sizes:
        raise _no_safetensors(snapshot)
    index = _get(snapshot.hub_id, _INDEX, snapshot.commit)
    return [_INDEX, *(shard for shard in _shards(index) if shard in snapshot.sizes)]


def _download(snapshot: Snapshot, names: list[str], progress: Progress | None) -> None:
    """Fetches what is missing, the small files first: where weights are, all else is too."""
    missing = [name for name in names if not (snapshot.path / name).exists()]
    total = sum(snapshot.sizes[name] for name in missing)
    _check_space(snapshot, total)
    counter = byte_counter(total, progress)
    for name in missing:
        _get(snapshot.hub_id, name, snapshot.commit, counter)
    for name in names:
        _check_size(snapshot.path / name, snapshot.sizes[name])


def _get(hub_id: HubId, name: str, revision: str, counter: type[Any] | None = None) -> Path:
    """The place of a file in the cache, fetched where the cache does not hold it."""
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        hub_id.repository,
        name,
        revision=revision,
        library_name="edgeattn",
        library_version=__version__,
        tqdm_class=counter or byte_counter(0, None),
    )
    return Path(path)


def _is_offline(asked: bool) -> bool:
    from huggingface_hub import constants

    return asked or constants.HF_HUB_OFFLINE


def _cached(hub_id: HubId) -> Snapshot:
    """The snapshot in the cache, looked up without any request."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id.repository, _CONFIG, revision=hub_id.revision or _BRANCH)
    if not isinstance(config, str):
        raise _not_cached(hub_id, "the cache does not hold it")
    folder = Path(config).parent
    return Snapshot(hub_id, folder, _sizes(folder))


def _cached_whole(hub_id: HubId) -> Snapshot:
    """The snapshot in the cache, refused where weights are missing in it."""
    snapshot = _cached(hub_id)
    wanted = [_SINGLE]
    if _SINGLE not in snapshot.sizes and _INDEX in snapshot.sizes:
        wanted = _shards(snapshot.path / _INDEX)
    if not all(name in snapshot.sizes for name in wanted):
        raise _not_cached(hub_id, "the cache holds only a part of it")
    return snapshot


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files in a folder."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}


def _check_space(snapshot: Snapshot, size: int) -> None:
    free = shutil.disk_usage(snapshot.path).free
    if free < size:
        raise CheckpointError(
            expected=f"{size / 1e6:,.0f} MB of free disk to download {snapshot.hub_id}",
            came=f"{free / 1e6:,.0f} MB are free at {snapshot.path.parents[2]}",
            todo="free some space, or let HF_HOME name a folder on a larger disk",
        )


@contextmanager
def _refusals(hub_id: HubId) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence."""
    _require_library(hub_id)
    from huggingface_hub import constants

    try:
        yield
    except EdgeattnError:
        raise
    except Exception as error:
        refused = refusal(error, hub_id, constants.ENDPOINT)
        if refused is None:
            raise
        raise refused from error


def _require_library(hub_id: HubId) -> None:
    if find_spec("huggingface_hub") is None:
        raise MissingDependencyError(
            expected=f"a folder or a .gguf file at {hub_id}, or the package that fetches hub ids",
            came="neither is there",
            todo="correct the path, or pip install 'edgeattn[hub]'",
        )


def _shards(index: Path) -> list[str]:
    """The safetensors files an index names; `open_checkpoint` judges the index itself."""
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return sorted(s for s in shards if isinstance(s, str) and s.endswith(".safetensors"))


def _check_size(path: Path, size: int) -> None:
    """Refuses a file that was cut short after it had reached the cache."""
    found = path.stat().st_size
    if size and found != size:
        raise CheckpointError(
            expected=f"{path.name} of {size} bytes in the cache",
            came=f"it has {found}",
            todo=f"remove {path.resolve()} and run again",
        )


def _no_safetensors(snapshot: Snapshot) -> CheckpointError:
    pickled = sorted(n for n in snapshot.sizes if n.endswith((".bin", ".pt", ".pth")))
    gguf = sorted(n for n in snapshot.sizes if n.endswith(".gguf"))
    todo = "name a repository with safetensors; pickles are never loaded"
    if gguf:
        todo = f"download {gguf[0]} and pass the file"
    return CheckpointError(
        expected=f"{_SINGLE} or {_INDEX} in {snapshot.hub_id}",
        came=f"it holds {(pickled + gguf)[0]}" if pickled or gguf else "it holds neither",
        todo=todo,
    )


def _not_cached(hub_id: HubId, came: str) -> CheckpointError:
    return CheckpointError(
        expected=f"{hub_id} in the hub's cache, which is all that may be used offline",
        came=came,
        todo="run once without --offline and without HF_HUB_OFFLINE",
    )
