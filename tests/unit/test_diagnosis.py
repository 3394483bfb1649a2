"""What the doctor says of machines of every kind, and what it reads from the system."""

from __future__ import annotations

from pathlib import Path

import llama_moe
from llama_moe import Device, Driver, Finding, Plugin
from llama_moe.diagnosis import findings
from llama_moe.drivers import gpu_vendors, nvidia_driver, vulkan_drivers

WHEEL = {"version": "0.1.0", "linkage": "dynamic"}
BUILT_HERE = {"version": "0.1.0", "linkage": "static"}
CPU = Device("CPU", "a CPU", "cpu", "CPU", 1, 2)
CUDA = Device("CUDA0", "a GPU", "gpu", "CUDA", 1, 2)
NO_NVIDIA = Driver("NVIDIA", "libcuda.so.1", found=False)
NVIDIA = Driver("NVIDIA", "libcuda.so.1", found=True, version="580.65.06", supports=("CUDA 13.0",))
OLD_NVIDIA = Driver("NVIDIA", "libcuda.so.1", found=True, version="550.54.15", supports=("CUDA 12.4",))
NO_VULKAN = Driver("Vulkan", "libvulkan.so.1", found=False)
SOFTWARE_VULKAN = Driver("Vulkan", "libvulkan.so.1", found=True, version="1.3.239", supports=("lvp",))
VULKAN = Driver("Vulkan", "libvulkan.so.1", found=True, version="1.3.239", supports=("lvp", "radeon"))


def test_a_machine_without_a_gpu_lacks_nothing() -> None:
    assert findings(WHEEL, [CPU], [], [NO_NVIDIA, NO_VULKAN], []) == []
    assert findings(WHEEL, [CPU], [], [NO_NVIDIA, VULKAN], []) == []


def test_an_nvidia_gpu_that_nothing_uses() -> None:
    (advice,) = findings(WHEEL, [CPU], [], [NVIDIA, NO_VULKAN], ["NVIDIA"])
    assert advice == Finding("advice", "there is an NVIDIA GPU, and nothing that uses it", 'pip install "llama-moe[cuda13]"')
    # A container may show the driver and not the PCI bus.
    assert findings(WHEEL, [CPU], [], [NVIDIA, NO_VULKAN], []) == [advice]
    (advice,) = findings(BUILT_HERE, [CPU], [], [NVIDIA, NO_VULKAN], ["NVIDIA"])
    assert 'CMAKE_ARGS="-DGGML_CUDA=ON"' in advice.remedy
    assert findings(WHEEL, [CPU, CUDA], [], [NVIDIA, NO_VULKAN], ["NVIDIA"]) == []


def test_an_nvidia_gpu_whose_driver_is_missing_or_old() -> None:
    (advice,) = findings(WHEEL, [CPU], [], [NO_NVIDIA, NO_VULKAN], ["NVIDIA"])
    assert "no driver" in advice.problem
    assert "580" in advice.remedy
    (advice,) = findings(WHEEL, [CPU], [], [OLD_NVIDIA, NO_VULKAN], ["NVIDIA"])
    assert "550.54.15" in advice.problem
    assert "CUDA 12.4" in advice.problem


def test_a_gpu_for_vulkan() -> None:
    for driver in (NO_VULKAN, SOFTWARE_VULKAN):
        (advice,) = findings(WHEEL, [CPU], [], [NO_NVIDIA, driver], ["AMD"])
        assert advice.problem == "there is a GPU and no Vulkan driver for it"
        assert "mesa-vulkan-drivers" in advice.remedy
    (advice,) = findings(WHEEL, [CPU], [], [NO_NVIDIA, VULKAN], ["Intel"])
    assert advice.remedy == 'pip install "llama-moe[vulkan]"'


def test_a_plugin_that_is_skipped_is_said_once() -> None:
    skipped = Plugin("llama-moe-cuda13", "0.1.0", reason="it found no device; install NVIDIA's driver")
    assert findings(WHEEL, [CPU], [skipped], [NVIDIA, NO_VULKAN], ["NVIDIA"]) == [
        Finding("advice", "llama-moe-cuda13 0.1.0 is skipped", "it found no device; install NVIDIA's driver")
    ]
    broken = Plugin("llama-moe-cuda13", "0.1.0", reason="it is for llama.cpp 0123456", broken=True)
    assert [finding.severity for finding in findings(WHEEL, [CPU], [broken], [NVIDIA, NO_VULKAN], ["NVIDIA"])] == ["broken"]


def test_no_cpu_device_is_broken() -> None:
    assert [finding.severity for finding in findings(WHEEL, [], [], [NO_NVIDIA, NO_VULKAN], [])] == ["broken"]


def test_gpus_are_found_by_what_the_kernel_lists(tmp_path: Path) -> None:
    devices = {"0": ("0x8086", "0x020000"), "1": ("0x10de", "0x030200"), "2": ("0x1002", "0x030000"), "3": ("0x10de", "0x030000")}
    for name, (vendor, kind) in devices.items():
        folder = tmp_path / "sys/bus/pci/devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    assert gpu_vendors(tmp_path) == ("NVIDIA", "AMD")
    assert gpu_vendors(tmp_path / "nothing") == ()


def test_vulkan_drivers_are_those_of_the_environment_or_the_system(tmp_path: Path) -> None:
    system = tmp_path / "usr/share/vulkan/icd.d"
    system.mkdir(parents=True)
    for name in ("radeon_icd.x86_64.json", "lvp_icd.x86_64.json", "radeon_icd.i686.json"):
        (system / name).touch()
    assert vulkan_drivers(tmp_path, {}) == ("lvp", "radeon")
    chosen = f"{system / 'lvp_icd.x86_64.json'}:{system / 'gone.json'}"
    assert vulkan_drivers(tmp_path, {"VK_DRIVER_FILES": chosen}) == ("lvp",)


def test_this_machine_is_described_in_types_that_json_has() -> None:
    diagnosis = llama_moe.diagnose()
    assert diagnosis.build == llama_moe.build_info()
    assert "CPU" in {device.name for device in diagnosis.devices}
    assert [driver.name for driver in diagnosis.drivers] == ["NVIDIA", "Vulkan"]
    assert not diagnosis.broken
    text = str(diagnosis)
    assert diagnosis.build["llama_cpp_commit"] in text
    assert diagnosis.devices[0].description in text
    assert set(diagnosis.to_dict()) == {"build", "devices", "plugins", "drivers", "gpus", "findings", "broken"}


def test_a_driver_that_is_not_there_is_not_found() -> None:
    driver = nvidia_driver()
    assert driver.library == "libcuda.so.1"
    assert bool(driver.supports) <= driver.found
