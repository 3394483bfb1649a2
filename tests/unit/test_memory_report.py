from __future__ import annotations

import json

from llama_moe import MemoryReport

ROWS = [
    ("CPU", "experts", 3 * 2**30),
    ("CPU", "weights", 2**20),
    ("CUDA0", "weights", 2 * 2**20),
    ("CUDA0", "kv_cache", 512),
    ("CUDA0", "compute", 2**20),
]
REPORT = MemoryReport.of(ROWS)


def test_bytes_add_up_by_device_and_role() -> None:
    assert REPORT.by_device() == {"CPU": 3 * 2**30 + 2**20, "CUDA0": 3 * 2**20 + 512}
    assert REPORT.by_role() == {"experts": 3 * 2**30, "weights": 3 * 2**20, "kv_cache": 512, "compute": 2**20}
    assert REPORT.total_bytes == sum(size for _, _, size in ROWS)


def test_to_dict_is_plain_data() -> None:
    data = REPORT.to_dict()
    assert data == {
        "rows": [{"device": device, "role": role, "bytes": size} for device, role, size in ROWS],
        "total_bytes": REPORT.total_bytes,
    }
    assert json.loads(json.dumps(data)) == data


def test_it_prints_as_a_table_of_devices_and_roles() -> None:
    assert str(REPORT) == (
        "device   experts  weights  kv_cache  compute     total\n"
        "CPU     3.00 GiB  1.0 MiB         -        -  3.00 GiB\n"
        "CUDA0          -  2.0 MiB     512 B  1.0 MiB   3.0 MiB\n"
        "total   3.00 GiB  3.0 MiB     512 B  1.0 MiB  3.00 GiB"
    )
    assert repr(REPORT) == "<MemoryReport 3.00 GiB: CPU 3.00 GiB, CUDA0 3.0 MiB>"


def test_columns_stand_in_a_fixed_order_whatever_comes_first() -> None:
    header = str(MemoryReport.of(reversed(ROWS))).splitlines()[0]
    assert header.split() == ["device", "experts", "weights", "kv_cache", "compute", "total"]


def test_an_empty_report_has_a_table_too() -> None:
    empty = MemoryReport.of([])
    assert str(empty) == "device  total\ntotal       -"
    assert empty.to_dict() == {"rows": [], "total_bytes": 0}


def test_equal_rows_make_equal_reports() -> None:
    assert MemoryReport.of(ROWS) == REPORT
    assert hash(MemoryReport.of(ROWS)) == hash(REPORT)
    assert MemoryReport.of(ROWS[:-1]) != REPORT
