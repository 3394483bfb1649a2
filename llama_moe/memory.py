"""Where the bytes of a model and its contexts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from . import _table
from ._sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypedDict

    class MemoryRowDict(TypedDict):
        """One row of `MemoryReport.to_dict()`."""

        device: str
        role: str
        bytes: int

    class MemoryReportDict(TypedDict):
        """What `MemoryReport.to_dict()` returns."""

        rows: list[MemoryRowDict]
        total_bytes: int


ROLES = ("experts", "weights", "adapters", "kv_cache", "compute", "overhead")


class MemoryRow(NamedTuple):
    """Bytes of one role on one device."""

    device: str
    role: str
    bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class MemoryReport:
    """Bytes by device and role; `str()` of it is a table.

    Attributes:
        rows: one for each device and role. Roles are "experts", "weights" (every other weight, embedding and output included),
            "adapters" (LoRA), "kv_cache" (recurrent state too), "compute" (scratch buffers of a context) and "overhead" (what a device
            needs besides).
    """

    rows: tuple[MemoryRow, ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, str, int]]) -> MemoryReport:
        """A report of `(device, role, bytes)` rows."""
        return cls(tuple(MemoryRow(*row) for row in rows))

    @property
    def total_bytes(self) -> int:
        """The sum of all rows."""
        return sum(row.bytes for row in self.rows)

    def by_device(self) -> dict[str, int]:
        """Bytes of each device, all roles together."""
        return _table.totals((row.device, row.bytes) for row in self.rows)

    def by_role(self) -> dict[str, int]:
        """Bytes of each role, all devices together."""
        return _table.totals((row.role, row.bytes) for row in self.rows)

    def to_dict(self) -> MemoryReportDict:
        """The report as plain data, for JSON."""
        return {
            "rows": [{"device": row.device, "role": row.role, "bytes": row.bytes} for row in self.rows],
            "total_bytes": self.total_bytes,
        }

    def __str__(self) -> str:
        return _table.size_table(self.rows, ROLES)

    def __repr__(self) -> str:
        devices = ", ".join(f"{device} {format_size(size)}" for device, size in self.by_device().items())
        return f"<MemoryReport {format_size(self.total_bytes)}: {devices}>"
