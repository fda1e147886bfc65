"""CVAT task backups: what is drawn, as JSON, and the names of the images it is drawn on.

A shape of a track is stored at its keyframes only. In between, CVAT moves rectangles evenly and leaves the last one
standing to the end of the job, and so does this reader; where another kind of shape changes between two keyframes, the
images in between are said to hold a shape that is left behind.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from preprocess.cvat.document import CvatError, Drawing, Frame, decimal, images_of, mask_of, polygon_of, whole
from preprocess.cvat.shapes import Box, CvatImage, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_KINDS = frozenset({"rectangle", "polygon", "mask"})


def read_backup(read: Callable[[str], bytes]) -> Iterator[CvatImage]:
    """Yield the images of a task.

    Parameters
    ----------
    read
        Returns the content of ``task.json``, ``annotations.json`` or ``data/manifest.jsonl``.

    Raises
    ------
    CvatError
        If they do not fit together, or the task skips frames.
    """
    try:
        task, jobs = json.loads(read("task.json")), json.loads(read("annotations.json"))
        if task["data"].get("start_frame") or task["data"].get("frame_filter"):
            msg = "its task skips frames of its source; export 'CVAT for images 1.1' instead"
            raise CvatError(msg)
        frames = manifest_frames(read("data/manifest.jsonl"))
        drawn = _drawn(list(zip(task["jobs"], jobs, strict=True)), len(frames))
        deleted = frozenset(task["data"].get("deleted_frames") or ())
        images = list(images_of(drawn, frames))
    except CvatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        msg = f"it is no task backup as CVAT writes them ({type(error).__name__}); make it again"
        raise CvatError(msg) from None
    yield from (image for number, image in enumerate(images) if number not in deleted)


def manifest_frames(content: bytes) -> list[Frame]:
    """Read the names and sizes of the images in a ``manifest.jsonl``, in the order of their frames.

    Raises
    ------
    CvatError
        If it is none, or lists the frames of a video.
    """
    try:
        lines = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
        if {"type": "video"} in lines:
            msg = "its frames are those of a video file, which has no images by name; annotate single images"
            raise CvatError(msg)
        images = [line for line in lines if "name" in line]
        return [
            Frame(f"{line['name']}{line.get('extension', '')}", whole(line["width"]), whole(line["height"]))
            for line in images
        ]
    except CvatError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        msg = f"its manifest.jsonl lists no images ({type(error).__name__}); export it again"
        raise CvatError(msg) from None


def _drawn(jobs: list[tuple[dict[str, Any], dict[str, Any]]], num_frames: int) -> dict[int, Drawing]:
    """Collect by frame; jobs that overlap hold the same shape twice, and ground truth is a second opinion."""
    drawn: dict[int, Drawing] = defaultdict(Drawing)
    for job, content in jobs:
        if job.get("type") == "ground_truth":
            continue
        last = min(int(job.get("stop_frame", num_frames - 1)), num_frames - 1)
        for frame, drawing in _drawn_in_job(content, last).items():
            known = drawn[frame]
            known.shapes += [shape for shape in drawing.shapes if shape not in known.shapes]
            known.skipped |= drawing.skipped
            known.fault = known.fault or drawing.fault
    return drawn


def _drawn_in_job(content: Mapping[str, Any], last_frame: int) -> dict[int, Drawing]:
    drawn: dict[int, Drawing] = defaultdict(Drawing)
    for shape in content["shapes"]:
        _add(drawn[whole(shape["frame"])], shape, str(shape["label"]))
    for track in content["tracks"]:
        for frame, shape in _unrolled(track["shapes"], last_frame):
            _add(drawn[frame], shape, str(track["label"]))
    for tag in content.get("tags", ()):
        drawn[whole(tag["frame"])].skipped["tag"] = None
    return drawn


def _add(drawing: Drawing, shape: Mapping[str, Any] | None, label: str) -> None:
    if shape is None:
        drawing.skipped["interpolated"] = None
    elif shape["type"] not in _KINDS:
        drawing.skipped["other"] = None
    elif not shape.get("outside"):
        drawing.add(lambda: _shape_of(shape, label))


def _shape_of(shape: Mapping[str, Any], label: str) -> Shape:
    points = shape["points"]
    if shape["type"] == "rectangle":
        left, top, right, bottom = map(decimal, points)
        return Box(label, left, top, right, bottom, decimal(shape.get("rotation") or 0))
    if shape["type"] == "polygon":
        return polygon_of(label, points)
    *runs, left, top, right, bottom = map(whole, points)
    return mask_of(label, runs, (left, top, right - left + 1, bottom - top + 1))


def _unrolled(shapes: list[dict[str, Any]], last_frame: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (frame, shape) of a track, None where the shape there is not known."""
    keyframes = sorted(shapes, key=lambda shape: whole(shape["frame"]))
    for this, following in zip(keyframes, [*keyframes[1:], None], strict=True):
        if this.get("outside"):
            continue
        first = whole(this["frame"])
        end = last_frame + 1 if following is None else min(whole(following["frame"]), last_frame + 1)
        yield first, this
        for frame in range(first + 1, end):
            yield frame, this if following is None else _between(this, following, frame)


def _between(before: dict[str, Any], after: dict[str, Any], frame: int) -> dict[str, Any] | None:
    if before["points"] == after["points"] and before.get("rotation") == after.get("rotation"):
        return before
    if not before["type"] == after["type"] == "rectangle":
        return None
    share = (frame - before["frame"]) / (after["frame"] - before["frame"])
    points = [a + (b - a) * share for a, b in zip(before["points"], after["points"], strict=True)]
    start, turn = before.get("rotation") or 0.0, (after.get("rotation") or 0.0) - (before.get("rotation") or 0.0)
    return before | {"points": points, "rotation": (start + ((turn + 180) % 360 - 180) * share) % 360}
