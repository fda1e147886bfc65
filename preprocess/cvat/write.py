"""Images with their shapes to "CVAT for images 1.1": the form that CVAT imports and this project reads.

The same images give the same bytes: no date, no owner, no task id. Coordinates have two decimals, as CVAT writes them,
and more only where two would change them, so that what is read again is equal.

References
----------
https://docs.cvat.ai/docs/other/xml_format
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

from preprocess.commit import stream_atomic
from preprocess.cvat.shapes import LEVELS, REGION, Box, CvatImage, Polygon, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

_LABELS = "".join(
    f"        <label>\n          <name>{name}</name>\n          <type>any</type>\n"
    "          <attributes>\n          </attributes>\n        </label>\n"
    for name in (*LEVELS, REGION)
)
HEADER = (
    "<?xml version='1.0' encoding='utf-8'?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>\n"
    f"      <mode>annotation</mode>\n      <labels>\n{_LABELS}      </labels>\n    </task>\n  </meta>\n"
)
"""What stands before the images: the labels, by which CVAT knows the shapes."""

FOOTER = "</annotations>\n"
"""What stands after them."""


def write_cvat(path: Path, images: Iterable[CvatImage]) -> None:
    """Write images, numbered in the order given, as a file that has its name only when it is whole.

    Parameters
    ----------
    path
        The XML.
    images
        Names as in the CVAT task, which finds its images by them: ``<study>/<series>/<slice>.png`` where the exported
        pictures of a store are annotated.
    """
    with stream_atomic(path) as file:
        file.write(HEADER)
        file.writelines(image_xml(image, number) for number, image in enumerate(images))
        file.write(FOOTER)


def image_xml(image: CvatImage, number: int) -> str:
    """Render one image as the lines of its element."""
    attributes = {"id": number, "name": image.name, "width": image.width, "height": image.height}
    if not image.shapes:
        return f"  <image{_rendered(attributes)} />\n"
    shapes = "".join(f"    {_shape_xml(shape)}\n" for shape in image.shapes)
    return f"  <image{_rendered(attributes)}>\n{shapes}  </image>\n"


def _shape_xml(shape: Shape) -> str:
    common = {"label": shape.label, "source": "manual", "occluded": "0"}
    if isinstance(shape, Box):
        place = {"xtl": shape.left, "ytl": shape.top, "xbr": shape.right, "ybr": shape.bottom}
        turned = {"rotation": shape.rotation} if shape.rotation else {}
        kind, drawn = "box", {name: _decimal(value) for name, value in (place | turned).items()}
    elif isinstance(shape, Polygon):
        points = ";".join(f"{_decimal(x)},{_decimal(y)}" for x, y in shape.points)
        kind, drawn = "polygon", {"points": points}
    else:
        edges = {name: str(getattr(shape, name)) for name in ("left", "top", "width", "height")}
        kind, drawn = "mask", {"rle": ", ".join(map(str, shape.runs)), **edges}
    return f"<{kind}{_rendered(common | drawn | {'z_order': '0'})} />"


def _rendered(attributes: Mapping[str, object]) -> str:
    return "".join(f" {name}={quoteattr(str(value))}" for name, value in attributes.items())


def _decimal(value: float) -> str:
    text = f"{value:.2f}"
    return text if float(text) == value else repr(float(value))
