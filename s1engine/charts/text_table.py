"""Text tables for a terminal."""

from collections.abc import Iterator, Sequence

Column = tuple[str, int]  # heading and width


def fact_line(name: str, value: str) -> str:
    """One named value."""
    return f"  {name:<28}{value}"


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line of headings and a line for each row; cells are aligned at their right."""
    for cells in ([heading for heading, _ in columns], *rows):
        aligned = (cell.rjust(width) for cell, (_, width) in zip(cells, columns, strict=True))
        yield "  " + "  ".join(aligned)
