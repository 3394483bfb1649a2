"""Plain-text tables: aligned columns, and bytes by device and role."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, TypeVar

from ._sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NameT = TypeVar("NameT", bound=str)


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> str:
    """Rows of cells as lines with aligned columns, two spaces apart; the columns in `right` are flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    flush_right = set(right)

    def pad(cell: str, column: int) -> str:
        return cell.rjust(widths[column]) if column in flush_right else cell.ljust(widths[column])

    return "\n".join("  ".join(pad(cell, column) for column, cell in enumerate(row)).rstrip() for row in rows)


def totals(pairs: Iterable[tuple[NameT, int]]) -> dict[NameT, int]:
    """The sum of the numbers of each name, in order of first appearance."""
    sums: defaultdict[NameT, int] = defaultdict(int)
    for name, number in pairs:
        sums[name] += number
    return dict(sums)


def size_table(cells: Iterable[tuple[str, str, int]], role_order: Sequence[str]) -> str:
    """A table of `(device, role, bytes)` with a row for each device, a column for each role, and totals."""
    entries = list(cells)
    sizes: defaultdict[tuple[str, str], int] = defaultdict(int)
    for device, role, size in entries:
        sizes[device, role] += size
    devices = list(dict.fromkeys(device for device, _, _ in entries))
    present = dict.fromkeys(role for _, role, _ in entries)
    roles = [role for role in role_order if role in present] + [role for role in present if role not in role_order]

    def line(label: str, numbers: list[int]) -> list[str]:
        return [label, *(format_size(number) if number else "-" for number in [*numbers, sum(numbers)])]

    rows = [["device", *roles, "total"]]
    rows += [line(device, [sizes.get((device, role), 0) for role in roles]) for device in devices]
    rows.append(line("total", [sum(sizes.get((device, role), 0) for device in devices) for role in roles]))
    return columns(rows, right=range(1, len(roles) + 2))
