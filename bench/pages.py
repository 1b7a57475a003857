"""Tables in documents: each stands between the mark that names its command and `CLOSE`."""

from __future__ import annotations

from pathlib import Path

CLOSE = "<!-- end of tables -->"


def replace_tables(document: str, tables: str, mark: str) -> str:
    """Put tables between `mark`, which names their command, and the next `CLOSE` of a document.

    Raises:
        ValueError: the document has not exactly one such mark with a `CLOSE` behind it.
    """
    before, *rest = document.split(mark)
    if len(rest) != 1 or CLOSE not in rest[0]:
        raise ValueError(f"the document must have one line {mark!r}, and a line {CLOSE!r} behind it")
    return f"{before}{mark}\n\n{tables}\n{CLOSE}{rest[0].split(CLOSE, 1)[1]}"


def replace_in(page: Path, tables: str, mark: str) -> None:
    """Put tables into a page on disk; end the program with the reason where the page has no place for them."""
    try:
        page.write_text(replace_tables(page.read_text(encoding="utf-8"), tables, mark), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{page}: {error}") from None
