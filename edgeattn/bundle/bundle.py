"""Opening a bundle: layout, manifest, hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeattn.bundle.manifest import Manifest, parse_manifest
from edgeattn.encoder_shape import KIND as ENCODER
from edgeattn.encoder_shape import AnyShape, EncoderShape
from edgeattn.errors import BundleError, EdgeattnError
from edgeattn.shape import ModelShape

MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
STRIPPED_MODEL = "model.stripped.onnx"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENAI_CONFIG = "genai_config.json"
GOLDEN = "golden/decoder.npz"
GOLDEN_ENCODER = "golden/encoder.npz"
GOLDEN_OPERATORS = "golden/operators.npz"
PLUGINS = "plugins"
DEVICE_SCRIPT = "build_on_device.sh"
ROTATIONS = "rotations.safetensors"
REPORT_JSON = "report.json"
REPORT_HTML = "report/index.html"

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest was read and whose files were checked.

    Attributes:
        path: its directory.
        manifest: see `Manifest`.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, *, check_hashes: bool = True) -> Bundle:
        """Opens a bundle.

        Args:
            path: its directory.
            check_hashes: read every file and compare with the manifest; sizes are always compared.

        Raises:
            BundleError: nothing is there, or a file is missing, changed, or leads outside.
        """
        path = Path(path)
        manifest_file = path / MANIFEST
        if not manifest_file.is_file():
            raise BundleError(
                expected=f"a bundle at {path}",
                came=f"there is no {MANIFEST}" if path.exists() else "nothing is there",
                todo="pass a directory that `edgeattn export` wrote",
            )
        try:
            manifest = parse_manifest(manifest_file.read_bytes(), str(manifest_file))
            for name, record in manifest.files.items():
                _check_file(path, name, record.bytes, record.sha256 if check_hashes else None)
        except OSError as error:
            raise BundleError(
                expected=f"files that can be read in {path}",
                came=f"the system says: {error.strerror or error}",
                todo="check the bundle's permissions or copy it again",
            ) from error
        if MODEL not in manifest.files:
            raise BundleError(
                expected=f"{MODEL} among the files that {manifest_file} lists",
                came="it is not, so nothing vouches for it",
                todo="export the bundle again",
            )
        return cls(path, manifest)

    @property
    def model_file(self) -> Path:
        """The ONNX file."""
        return self.path / MODEL

    @property
    def is_encoder(self) -> bool:
        """Whether it holds an encoder, not a decoder."""
        return self.manifest.shape.get("kind") == ENCODER

    @property
    def shape(self) -> ModelShape:
        """Architecture of the decoder.

        Raises:
            BundleError: it is none, or the manifest's shape does not add up.
        """
        self.require_decoder()
        with self._reading_shape():
            return ModelShape.from_dict(self.manifest.shape)

    @property
    def encoder_shape(self) -> EncoderShape:
        """Architecture of the encoder.

        Raises:
            BundleError: it is none, or the manifest's shape does not add up.
        """
        self.require_encoder()
        with self._reading_shape():
            return EncoderShape.from_dict(self.manifest.shape)

    @property
    def any_shape(self) -> AnyShape:
        """Architecture, of whichever it is.

        Raises:
            BundleError: the manifest's shape does not add up.
        """
        return self.encoder_shape if self.is_encoder else self.shape

    def require_decoder(self) -> None:
        """Refuses an encoder.

        Raises:
            BundleError: it is one.
        """
        if self.is_encoder:
            raise BundleError(
                expected=f"a decoder in {self.path}",
                came="it is an encoder, which generates no tokens",
                todo="use edgeattn.runtime.EncoderSession from Python",
            )

    def require_encoder(self) -> None:
        """Refuses a decoder.

        Raises:
            BundleError: it is one.
        """
        if not self.is_encoder:
            raise BundleError(
                expected=f"an encoder in {self.path}",
                came="it is a decoder",
                todo="use edgeattn run, or edgeattn.runtime.Session from Python",
            )

    @contextmanager
    def _reading_shape(self) -> Iterator[None]:
        try:
            yield
        except EdgeattnError:
            raise
        # Fields of a wrong type fail wherever they are first used.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise BundleError(
                expected="the model's shape in the manifest",
                came=f"it does not add up ({error})",
                todo="export the bundle again",
            ) from error

    def file(self, name: str) -> Path | None:
        """The path of a file the manifest lists, None when the bundle has no such file."""
        return self.path / name if name in self.manifest.files else None

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the bundle, empty when the bundle has no such file.

        Raises:
            BundleError: the file is no JSON object.
        """
        file = self.file(name)
        if file is None:
            return {}
        try:
            value = json.loads(file.read_bytes())
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise BundleError(
                expected=f"a JSON object in {file}",
                came="it holds none",
                todo="export the bundle again",
            )
        return value


def _check_file(root: Path, name: str, size: int, sha256: str | None) -> None:
    file = root / name
    parts = [file, *file.parents][: len(Path(name).parts)]
    if any(part.is_symlink() for part in parts):
        raise BundleError(
            expected=f"{name} to be a file of the bundle",
            came="it is a link that leads elsewhere",
            todo="copy the bundle with its files, or export it again",
        )
    if not file.is_file():
        raise BundleError(
            expected=f"{name}, which the manifest lists, in {root}",
            came="the file is missing",
            todo="copy the whole bundle again",
        )
    found = file.stat().st_size
    if found != size:
        raise BundleError(
            expected=f"{name} of {size} bytes, as the manifest says",
            came=f"it has {found}",
            todo="copy the bundle again or export it anew",
        )
    if sha256 is not None and hash_file(file) != sha256:
        raise BundleError(
            expected=f"{name} with the sha256 of the manifest",
            came="its content was changed",
            todo="copy the bundle again or export it anew",
        )


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, read in pieces.

    Args:
        path: the file.
        progress: called with the bytes read since the last call.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()
