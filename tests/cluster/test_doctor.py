"""The doctor recognises packages by their files, tells an impostor from Apex, and never raises."""

import importlib
import sys

import pytest

from ais_megatron.cluster import doctor
from ais_megatron.cluster.doctor import Finding, inspect_environment, print_doctor

NAMES = [
    "Python",
    "torch",
    "CUDA",
    "megatron-core",
    "Transformer Engine",
    "NVIDIA Apex",
    "FLA",
    "gradient accumulation fusion",
    "fused Adam",
    "NCCL",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "expandable segments",
    "SGLang",
    "Slurm",
    "nemo-run",
    "sentencepiece",
    "transformers",
    "wandb",
    "tensorboard",
    "lm_eval",
]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of pretended packages, first on the import path; metadata knows none of them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "_version", lambda distribution: None)
    # A test before this one may have loaded the CPU policy, which marks the packages that need CUDA as absent.
    for name in [name for name, module in sys.modules.items() if module is None]:
        monkeypatch.delitem(sys.modules, name)

    def add(*files):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise RuntimeError('the doctor must not import this')")
        importlib.invalidate_caches()

    return add


def test_every_part_once_and_every_absence_says_what_it_switches_off():
    findings = inspect_environment()
    assert [finding.name for finding in findings] == NAMES
    assert all("off: " in finding.note for finding in findings if not finding.present)
    assert findings[0] == Finding("Python", True, ".".join(map(str, sys.version_info[:3])), "")


def test_packages_are_not_imported(site):
    site("sglang/__init__.py", "nemo_run/__init__.py", "wandb/__init__.py", "fla/ops/__init__.py")
    findings = {finding.name: finding for finding in inspect_environment()}
    assert findings["SGLang"] == Finding("SGLang", True, None, "the SGLang rollout engine")
    assert findings["nemo-run"].present and findings["wandb"].present and findings["FLA"].present


def test_the_apex_of_pypi_is_told_from_nvidias(site):
    site("apex/__init__.py", "apex/interfaces.py")
    finding = doctor._apex()
    assert not finding.present and "an unrelated package from PyPI" in finding.note


def test_apex_without_and_with_its_cuda_extension(site):
    site("apex/__init__.py", "apex/optimizers/__init__.py")
    assert not doctor._apex().present and "amp_C" in doctor._apex().note
    site("amp_C.py")
    assert doctor._apex() == Finding("NVIDIA Apex", True, None, "fused Adam and norms")


def test_transformer_engine_needs_its_torch_extension(site):
    site("transformer_engine/__init__.py")
    finding = doctor._transformer_engine()
    assert not finding.present and "torch extension is missing" in finding.note
    site("transformer_engine/wheel_lib/transformer_engine_torch.cpython-311.so")
    assert doctor._transformer_engine().present


def test_slurm_version_and_a_broken_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._slurm() == Finding("Slurm", False, None, "off: submitting slurm/*.sbatch from this machine (no sbatch on PATH)")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho slurm 23.11.4\n")
    sbatch.chmod(0o755)
    assert doctor._slurm() == Finding("Slurm", True, "23.11.4", "sbatch is on PATH")
    sbatch.write_text("#!/bin/sh\necho no controller >&2\nexit 3\n")
    finding = doctor._slurm()
    assert not finding.present and "code 3: no controller" in finding.note


def test_a_probe_that_raises_becomes_a_finding(monkeypatch):
    def broken():
        raise OSError("half installed")

    monkeypatch.setattr(doctor, "_PROBES", (("torch", broken),))
    assert inspect_environment() == [Finding("torch", False, None, "cannot be inspected: OSError: half installed")]


def test_the_table_is_plain_text_off_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor, "inspect_environment", lambda: [Finding("x", True, "1.0", "[bold]kept[/bold]"), Finding("y", False, None, "off: z")]
    )
    print_doctor()
    out = capsys.readouterr().out
    assert "[bold]kept[/bold]" in out and "off: z" in out and "\x1b" not in out


def test_cuda_devices_are_counted_with_capability_and_fp8(monkeypatch):
    cuda = pytest.importorskip("torch").cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 3)
    monkeypatch.setattr(cuda, "get_device_name", lambda index: "H200" if index < 2 else "A100")
    monkeypatch.setattr(cuda, "get_device_capability", lambda index: (9, 0) if index < 2 else (8, 0))
    finding = doctor._cuda()
    assert finding.present
    assert finding.note == "2 x H200 (capability 9.0, FP8); 1 x A100 (capability 8.0, no FP8 tensor cores)"


def test_fused_kernels_say_whose_they_are(site):
    assert not doctor._fused_adam().present and not doctor._gradient_accumulation_fusion().present
    site("transformer_engine/__init__.py", "transformer_engine_torch.py")
    assert doctor._fused_adam().note == "from Transformer Engine"
    assert doctor._gradient_accumulation_fusion().note == "from Transformer Engine, for its own linear layers"
    site("fused_weight_gradient_mlp_cuda.py")
    assert doctor._gradient_accumulation_fusion().note == "from NVIDIA Apex, for all of Megatron's linear layers"


def test_environment_variables_of_cuda(monkeypatch):
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", *doctor.ALLOCATOR_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert doctor._max_connections().present and doctor._expandable_segments().present
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    connections, segments = doctor._max_connections(), doctor._expandable_segments()
    assert not connections.present and connections.version == "8" and "unset it" in connections.note
    assert not segments.present and "now: max_split_size_mb:64" in segments.note
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True")
    assert doctor._expandable_segments().present


def test_nccl_with_its_switches(monkeypatch):
    monkeypatch.setattr(doctor.nccl, "installed", lambda: {"torch": "2.14.1", "nccl": "2.30.7"})
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    note = "NCCL_CUMEM_ENABLE=0, NCCL_NVLS_ENABLE=unset; servers need the same version"
    assert doctor._nccl() == Finding("NCCL", True, "2.30.7", note)
