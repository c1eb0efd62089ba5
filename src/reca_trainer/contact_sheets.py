"""Sheets of pictures: titled rows under each other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, TITLE, LINE = 6, 84, 17  # pixels: between cells, for titles, of a line of text
MARKS = {True: ("right", (20, 140, 60)), False: ("wrong", (200, 40, 40))}


def sheet_row(
    title: str,
    cells: Sequence[str | Image.Image | None],
    cell: int = 144,
    marks: Sequence[bool | None] | None = None,
) -> Image.Image:
    """One row of a sheet: its title, then texts, wrapped and whole, or pictures, fitted into squares of `cell` pixels.

    Args:
        marks: of each picture whether it is right, which its frame and a word say; `None` where nobody knows.
    """
    font = ImageFont.load_default(13)
    texts = {index: _wrapped(text, font, cell) for index, text in enumerate(cells) if isinstance(text, str)}
    heights = [LINE * (1 + text.count("\n")) for text in (title, *texts.values())]
    heights += [cell + (LINE if marks else 0) for content in cells if isinstance(content, Image.Image)]
    row = Image.new("RGB", (TITLE + len(cells) * (cell + MARGIN), max(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(row)
    pen.multiline_text((MARGIN, 0), title, fill="black", font=font)
    for index, content in enumerate(cells):
        left = TITLE + index * (cell + MARGIN)
        if index in texts:
            pen.multiline_text((left, 0), texts[index], fill="black", font=font)
        elif content is not None:
            row.paste(_fitted(content, cell), (left, 0))
            if marks and marks[index] is not None:
                word, colour = MARKS[marks[index]]
                pen.rectangle((left, 0, left + cell - 1, cell - 1), outline=colour, width=3)
                pen.text((left, cell), word, fill=colour, font=font)
    return row


def contact_sheet(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows, as `sheet_row` makes them, under each other."""
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` in lines of at most `width` pixels; only a longer word is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
