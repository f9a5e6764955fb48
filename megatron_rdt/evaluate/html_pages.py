"""Self-contained HTML pages: tables, figures as data URLs, one style; and folders of results that are replaced together."""

import base64
import html
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_rdt.files import TEMPORARY_SUFFIX

PAGE = "index.html"
TEXT_WIDTH = "60rem"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: WIDTH; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
.wide { overflow-x: auto; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
"""


@contextmanager
def replace_results(directory: Path) -> Iterator[Path]:
    """Yield an empty folder; after the block, its files replace those in `directory`, the page last.

    An earlier page stays whole until all of the new one is there, and for good if the block fails.
    """
    with tempfile.TemporaryDirectory(suffix=TEMPORARY_SUFFIX, prefix=".", dir=directory) as name:
        yield Path(name)
        for file in sorted(os.listdir(name), key=lambda file: (file == PAGE, file)):
            os.replace(os.path.join(name, file), directory / file)


def format_page(title: str, parts: Iterable[str], width: str = TEXT_WIDTH) -> str:
    """Return the page.

    Args:
        title: text.
        parts: HTML of the body.
        width: of the body, in CSS.
    """
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE.replace('WIDTH', width)}</style><body>{''.join(parts)}</body></html>\n"
    )


def format_paragraphs(texts: Iterable[str]) -> str:
    """Return a paragraph of HTML for each text."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def format_list(texts: Iterable[str]) -> str:
    """Return a list in HTML with an item for each text."""
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"


def format_html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in HTML; cells are texts, and an empty header has no line."""
    lines = ["".join(f"<th>{html.escape(text)}</th>" for text in header)] if header else []
    lines += ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    return f"<div class='wide'><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def format_figure(picture: Path, caption: str) -> str:
    """Return a figure in HTML that holds the PNG file itself."""
    encoded, text = base64.b64encode(picture.read_bytes()).decode(), html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'
