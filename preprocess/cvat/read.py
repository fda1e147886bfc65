"""Any layout that CVAT exports → images with their shapes.

- XML of "CVAT for images 1.1", alone or in an archive beside its images;
- XML of "CVAT for video 1.1" in an archive that says which image each frame is;
- backups of a task or of a project.

Archives are never unpacked: members are read in place, up to a size, and their names are never paths on this machine.
"""

from __future__ import annotations

import lzma
import re
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING

from PIL import Image

from preprocess.cvat.backup import manifest_frames, read_backup
from preprocess.cvat.document import CvatError, Frame, natural, read_document

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from preprocess.cvat.shapes import CvatImage

MAX_MEMBER_BYTES = 1 << 30
"""Members of an archive that are larger unpacked are refused; XML is streamed, JSON is held whole."""

_ARCHIVE = b"PK"
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"})


def read_cvat(path: Path) -> Iterator[CvatImage]:
    """Yield the images of a CVAT export, in its order.

    Parameters
    ----------
    path
        XML or archive; which one is seen from its content.

    Raises
    ------
    CvatError
        If it is none, or its images cannot be known by name.
    """
    try:
        with path.open("rb") as file:
            is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
            file.seek(0)
            yield from _read_archive(file) if is_archive else read_document(file)
    except CvatError as error:
        msg = f"{path}: {error}"
        raise CvatError(msg) from None
    except OSError as error:
        msg = f"{path} cannot be read ({type(error).__name__}); check the path"
        raise CvatError(msg) from None


def _read_archive(file: IO[bytes]) -> Iterator[CvatImage]:
    with _readable_errors(), zipfile.ZipFile(file) as archive:
        tasks = sorted(name for name in archive.namelist() if PurePosixPath(name).name == "task.json")
        documents = [name for name in archive.namelist() if name.lower().endswith(".xml")]
        if tasks:
            for name in tasks:
                yield from read_backup(partial(_read_beside, archive, name))
        elif len(documents) == 1:
            with _open(archive, documents[0]) as document:
                yield from read_document(document, partial(_frames, archive))
        else:
            msg = (
                f"the archive holds {len(documents)} XML files and no task.json; export 'CVAT for images 1.1' or back "
                "up the task"
            )
            raise CvatError(msg)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """Say of a damaged or locked archive that it is one."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError) as error:
        msg = f"the archive is damaged, encrypted or of an unknown kind ({type(error).__name__}); export it again"
        raise CvatError(msg) from None


def _open(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    size = archive.getinfo(name).file_size
    if size > MAX_MEMBER_BYTES:
        msg = f"a member of the archive has {size} bytes unpacked, at most {MAX_MEMBER_BYTES} are read; split the task"
        raise CvatError(msg)
    return archive.open(name)


def _read_beside(archive: zipfile.ZipFile, task: str, name: str) -> bytes:
    """Read a file of the task whose ``task.json`` is given."""
    try:
        with _open(archive, f"{task.removesuffix('task.json')}{name}") as file:
            return file.read()
    except KeyError:
        msg = f"it has no {name}: back up the task with its data, or export 'CVAT for images 1.1'"
        raise CvatError(msg) from None


# --- frames of a video -----------------------------------------------------------------------------------------------


def _frames(archive: zipfile.ZipFile, meta: Mapping[str, str]) -> list[Frame]:
    """Find the images of the frames: in a manifest, else by the order of the pictures, if there is only one order."""
    remedy = "export 'CVAT for images 1.1', which names them"
    if meta.get("start_frame", "0").strip() not in {"", "0"} or meta.get("frame_filter", "").strip():
        msg = f"its task skips frames of its source; {remedy}"
        raise CvatError(msg)
    manifests = [name for name in archive.namelist() if PurePosixPath(name).name == "manifest.jsonl"]
    if len(manifests) == 1:
        with _open(archive, manifests[0]) as file:
            return manifest_frames(file.read())
    pictures = sorted(name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in _PICTURES)
    num_frames = natural(meta.get("size", "").strip())
    if not pictures or len(pictures) != num_frames:
        msg = f"it has tracks of {num_frames} frames and {len(pictures)} images; {remedy}"
        raise CvatError(msg)
    if sorted(pictures, key=_natural_key) != pictures:
        msg = f"its images have another order by number than by letter, so that frames cannot be told apart; {remedy}"
        raise CvatError(msg)
    return [Frame(_below_images(name), *_picture_size(archive, name)) for name in pictures]


def _natural_key(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"[0-9]{1,18}|[^0-9]+", name)]


def _below_images(name: str) -> str:
    _, found, rest = f"/{name}".partition("/images/")
    return rest if found else name


def _picture_size(archive: zipfile.ZipFile, name: str) -> tuple[int, int]:
    """Width and height; zeros for what is no picture."""
    try:
        with _open(archive, name) as file, warnings.catch_warnings(action="ignore"), Image.open(file) as picture:
            return picture.size  # too large a one is refused with its numbers, not while it is looked at
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0
